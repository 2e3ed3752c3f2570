"""Pixelated attention on a GPU: accurate in every dtype with all gradients, compiled, as a graph, and in models."""

import dataclasses

import pytest
import torch
from torch import nn

from structlin.bench.timing import capture
from structlin.nn import PixelatedAttention, pixelated_attention
from structlin.recipes import find
from structlin.testing import assert_as_accurate
from structlin.train import model as models

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    pytest.mark.filterwarnings("ignore:\\s*Online softmax is disabled"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # Dynamo looks at it
]

SPECS = [
    PixelatedAttention(128, 2, 1),
    PixelatedAttention(128, 3, 0, causal=False),
    PixelatedAttention(32, 2, 1),
    PixelatedAttention(256, 1, 1, causal=False),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


@pytest.fixture(autouse=True)
def compiled_anew():
    yield
    torch._dynamo.reset()


def problem(dtype, length=1000, heads=4, kv_heads=2, dim=64):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, h, length, dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes]


def by_softmax(q, k, v, mask):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).nan_to_num() @ v


def results(run, q, k, v, dy):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = run(*leaves)
    return [x.detach() for x in (y, *torch.autograd.grad(y, leaves, dy))]


def check(run, mask, inputs):
    exact = results(lambda *qkv: by_softmax(*qkv, mask), *(x.double() for x in inputs))
    plain = results(lambda *qkv: by_softmax(*qkv, mask), *inputs)
    for ours, theirs, right in zip(results(run, *inputs), plain, exact, strict=True):
        assert_as_accurate(ours, theirs, right)


@every_spec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_it_is_as_accurate_as_pytorch(spec, dtype):
    check(lambda q, k, v: pixelated_attention(q, k, v, spec), spec.mask(1000, device="cuda"), problem(dtype))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [100, 1024, 2500])
def test_lengths_and_heads(length, dim):
    spec = SPECS[0]
    mask = spec.mask(length, device="cuda")
    check(lambda q, k, v: pixelated_attention(q, k, v, spec), mask, problem(torch.bfloat16, length, 4, 4, dim))


@every_spec
def test_padding_is_not_seen(spec):
    inputs = problem(torch.bfloat16)
    padding = torch.arange(1000, device="cuda") < torch.tensor([[1000], [700]], device="cuda")
    mask = spec.mask(1000, device="cuda") & padding[:, None, None]
    check(lambda q, k, v: pixelated_attention(q, k, v, spec, padding=padding), mask, inputs)


def test_the_last_queries_are_rows_of_the_whole():
    q, k, v, _ = problem(torch.float32)
    whole = pixelated_attention(q, k, v, SPECS[0])
    last = pixelated_attention(q[:, :, -3:], k, v, SPECS[0])
    exact = by_softmax(q.double(), k.double(), v.double(), SPECS[0].mask(1000, device="cuda"))[:, :, -3:]
    assert_as_accurate(last, whole[:, :, -3:], exact)


def test_several_lengths_and_specs_in_one_process():
    for length in (512, 700, 1024, 1300, 300, 900):
        for spec in SPECS[:2]:
            q, k, v, dy = problem(torch.bfloat16, length)
            check(
                lambda q, k, v, spec=spec: pixelated_attention(q, k, v, spec),
                spec.mask(length, device="cuda"),
                [q, k, v, dy],
            )


def test_it_runs_as_a_cuda_graph():
    inputs = problem(torch.bfloat16)
    run = capture(lambda: results(lambda q, k, v: pixelated_attention(q, k, v, SPECS[0]), *inputs)[1])
    run.replay()
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_llama"])
def test_compiled_training_is_as_eager_training(name):
    recipe = dataclasses.replace(find(name), context=512, attention="pixelated:block_size=128:nfactors=1:nglobal=1")
    losses, gradients = [], []
    windows = torch.randint(500, (2, 513), generator=torch.Generator().manual_seed(1)).cuda()
    for mode in ("none", "default"):
        model, _ = models.build(recipe, 500, "cuda")
        whole = models.LanguageModel(model, mode)
        loss = whole(windows)
        loss.backward()
        losses.append(loss.item())
        gradients.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-3)
    dense, _ = models.build(dataclasses.replace(recipe, attention="dense"), 500, "cuda")
    assert models.loss(dense, windows).item() != losses[0]


def test_a_model_generates_with_a_cache_what_it_does_without():
    import structlin.hf

    recipe = dataclasses.replace(find("tiny_llama"), context=512)
    model = models.dense(recipe, 500, "sdpa").cuda().eval()
    structlin.hf.pixelate_attention_(model, PixelatedAttention(32, 1, 1))
    ids = torch.randint(500, (2, 130), generator=torch.Generator().manual_seed(1)).cuda()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))
