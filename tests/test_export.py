"""ONNX: the exported layer is plain operators, and another runtime computes the same with it."""

import pytest
import torch
from torch import nn

import structlin as sl
from structlin.testing import assert_close, inputs, make

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")


def run(module, example, others, **how):
    """The module's outputs in onnxruntime for each of `others`, exported once with `example`."""
    program = torch.onnx.export(module.eval(), (example,), dynamo=True, verbose=False, **how)
    domains = {node.domain for node in program.model.graph}
    assert domains <= {""}, f"operators of {domains} in the graph"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    name = session.get_inputs()[0].name
    return [torch.from_numpy(session.run(None, {name: x.numpy()})[0]) for x in others]


@pytest.mark.parametrize(
    ("spec", "backend"),
    [(sl.Monarch(2), "auto"), (sl.Kronecker(), "auto"), (sl.Dyad(4, "dt"), "auto"), (sl.Dyad(4), "dense")],
    ids=str,
)
def test_onnxruntime_computes_the_layer(spec, backend):
    layer = make(spec, (24, 16), "cpu", torch.float32)
    layer.backend = backend
    x = inputs(layer, 5)
    (y,) = run(layer, x, [x])
    assert_close(y, layer(x), 1e-5)


def test_any_number_of_tokens_and_a_whole_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16))
    sl.to_structured_(model, {"0": sl.Monarch(2), "2": sl.Dyad(4)})
    batches = [torch.randn(tokens, 3, 16) for tokens in (2, 1, 7)]
    shapes = ({0: torch.export.Dim("tokens", min=1, max=64)},)
    for x, y in zip(batches, run(model, batches[0], batches, dynamic_shapes=shapes), strict=True):
        assert_close(y, model(x), 1e-5)
