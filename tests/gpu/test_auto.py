"""What `auto` measures on a GPU, and what runs then, launched from Python and in a graph."""

import pytest
import torch

import structlin as sl
from structlin.nn.explain import layer_key
from structlin.ops import choice, measure
from structlin.testing import assert_close, inputs, make, plain

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture
def layer(monkeypatch, tmp_path):
    monkeypatch.setenv("STRUCTLIN_CACHE_DIR", str(tmp_path))
    made = make(sl.Monarch(8, order="blocked"), (2048, 1024), "cuda", torch.bfloat16)
    made.backend = "auto"
    return made


def test_the_first_call_measures_every_candidate(layer):
    x = inputs(layer, 300).requires_grad_()
    state = torch.cuda.get_rng_state()
    y = layer(x)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert_close(y, plain(layer, x), 0.02)
    found = choice.look(layer_key(layer, 300, True))
    assert found.why == "measured"
    candidates = {*measure.structured(layer._program, torch.bfloat16, 512, x.device), "dense"}
    assert {*found.numbers["eager"]} == {*found.numbers["graph"]} == candidates
    assert all(0 < ms < 1000 for times in found.numbers.values() for ms in times.values())


@pytest.mark.parametrize("eager", ["bmm", "dense"])
@pytest.mark.parametrize("graph", ["bmm", "dense", "triton"])
@pytest.mark.parametrize("training", [True, False])
def test_a_capture_runs_its_own_choice(layer, eager, graph, training):
    """Choices from another process: what the graph needs is warm after one call from Python."""
    layer.train(training)
    key = layer_key(layer, 512, training)
    sl.restore_choices({choice._portable(key): {"eager": eager, "graph": graph, "why": "measured", "numbers": {}}})
    x = inputs(layer, 512).requires_grad_(training)
    dy = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16)

    def run():
        with torch.set_grad_enabled(training):
            y = layer(x)
            return [y.detach(), *(torch.autograd.grad(y, (x, *layer.parameters()), dy) if training else ())]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wanted = run()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = run()
    for tensor in found:
        tensor.fill_(float("nan"))
    captured.replay()
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, 0.02)
    with torch.no_grad():
        layer.first.mul_(2)  # a graph follows the factors, also where it multiplies the dense weight out
    wanted = run()
    captured.replay()
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, 0.02)
