"""Pixelated attention: its mask against butterfly factors written out, its costs, and the same numbers as a softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structlin.nn import PixelatedAttention, attention, pixelated_attention
from structlin.nn.attention import TILE, attend, block_mask, tiles
from structlin.testing import assert_close

SPECS = [
    PixelatedAttention(4, 2, 1),
    PixelatedAttention(4, 2, 1, causal=False),
    PixelatedAttention(8, 0, 0),
    PixelatedAttention(2, 3, 0, causal=False),
    PixelatedAttention(1, 2, 3),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def by_factors(spec: PixelatedAttention, length: int) -> Tensor:
    """The mask by the supports of butterfly factors of the next power of two, expanded to tokens and cut."""
    count = 1
    while count * spec.block_size < length:
        count *= 2
    blocks = torch.eye(count)
    for level in range(spec.nfactors):
        if 2**level < count:
            two = torch.kron(torch.ones(2, 2), torch.eye(2**level))
            blocks += torch.kron(torch.eye(count >> (level + 1)), two)
    blocks[: spec.nglobal] = 1
    blocks[:, : spec.nglobal] = 1
    mask = torch.kron(blocks, torch.ones(spec.block_size, spec.block_size))[:length, :length] > 0
    return mask.tril() if spec.causal else mask


def problem(heads: int = 4, kv_heads: int = 2, queries: int = 29, keys: int = 29) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, queries, 16), (2, kv_heads, keys, 16), (2, kv_heads, keys, 24))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)


def by_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The definition: scores, minus infinity where masked, softmax; zeros where nothing is seen."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = (q @ k.mT * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).nan_to_num() @ v


# the mask


@every_spec
@pytest.mark.parametrize("length", [1, 4, 16, 29, 64])
def test_the_mask_is_that_of_the_butterfly_factors(spec, length):
    mask = spec.mask(length)
    assert torch.equal(mask, by_factors(spec, length))
    assert mask.diagonal().all()


@every_spec
def test_rows_do_not_depend_on_the_length(spec):
    mask = spec.mask(45)
    if spec.causal:
        assert all(torch.equal(spec.mask(1, keys)[0], mask[keys - 1, :keys]) for keys in range(1, 46))
    assert torch.equal(spec.mask(7, 30), mask[23:30, :30])


@every_spec
@pytest.mark.parametrize("length", [1, 3, 31, 64])
def test_costs_are_counts_of_the_mask(spec, length):
    cost, mask = spec.cost(length), spec.mask(length)
    dense = torch.ones_like(mask).tril() if spec.causal else torch.ones_like(mask)
    assert (cost.pairs, cost.dense_pairs) == (mask.sum(), dense.sum())
    assert cost.density == mask.sum().item() / dense.sum().item()

    def blocks(table):
        size = spec.block_size
        padded = torch.nn.functional.pad(table, (0, -length % size, 0, -length % size))
        return padded.unflatten(0, (-1, size)).unflatten(2, (-1, size)).any(3).any(1).sum()

    assert (cost.blocks, cost.dense_blocks) == (blocks(mask), blocks(dense))
    assert cost.flops(64, heads=2, batch=3) == 2 * 2 * 64 * 6 * cost.pairs


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("compute", [0.125, 0.25, 1])
@pytest.mark.parametrize("length", [4096, 9000])
def test_a_budget_is_kept_and_used(causal, compute, length):
    spec = PixelatedAttention.for_budget(compute, length, causal=causal)
    assert 0.8 * compute < spec.cost(length).compute <= compute
    assert spec.causal == causal
    assert compute == 1 or spec.nfactors > 0


def test_a_budget_below_the_diagonal_says_what_fits():
    with pytest.raises(ValueError, match=r"compute=0.1 .* allowed: 0.2222, .* blocks of 128 take, to 1"):
        PixelatedAttention.for_budget(0.1, 1024)
    assert PixelatedAttention.for_budget(0.2223, 1024) == PixelatedAttention(128, 0, 0)


@every_spec
def test_beyond_the_butterfly_weights_have_low_rank(spec):
    length, size = 64, spec.block_size
    weights = torch.rand(length, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * spec.mask(
        length
    )
    beyond = weights * ~PixelatedAttention(size, spec.nfactors, 0, spec.causal).mask(length)
    assert torch.linalg.matrix_rank(beyond) <= (1 if spec.causal else 2) * spec.nglobal * size


@every_spec
def test_text_and_back(spec):
    assert PixelatedAttention.parse(str(spec)) == spec
    assert PixelatedAttention.parse("pixelated:nfactors=2") == PixelatedAttention(nfactors=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dense", "'dense' is no attention; allowed: pixelated"),
        ("pixelated:nfactor=2", "'nfactor=2' .* did you mean 'nfactors'"),
        ("pixelated:nfactors=2:nfactors=3", "'nfactors=3' .* each once"),
        ("pixelated:nfactors", "'nfactors' in .* not allowed"),
        ("pixelated:block_size=96", "block_size=96 is no power of two; the nearest are 64 and 128"),
        ("pixelated:block_size=0:nglobal=-1", "block_size=0 must be .* 1 or more; nglobal='-1' must be .* 0 or more"),
        ("pixelated:causal=perhaps", "causal='perhaps' must be true or false"),
    ],
)
def test_bad_specs_are_one_message(text, message):
    with pytest.raises(ValueError, match=message):
        PixelatedAttention.parse(text)


# the numbers


@every_spec
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_it_is_a_softmax_under_the_mask_with_its_gradients(spec, kv_heads):
    q, k, v = problem(kv_heads=kv_heads)
    wanted = by_softmax(q, k, v, by_factors(spec, 29), 16**-0.5)
    found = pixelated_attention(q, k, v, spec)
    assert_close(found, wanted, 1e-14)
    dy = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad(found, (q, k, v), dy), torch.autograd.grad(wanted, (q, k, v), dy), strict=True
    ):
        assert_close(one, other, 1e-13)
    assert_close(pixelated_attention(q, k, v, spec, scale=0.5), by_softmax(q, k, v, by_factors(spec, 29), 0.5), 1e-14)


@pytest.mark.parametrize("queries", [1, 5])
def test_the_last_queries_are_rows_of_the_whole(queries):
    q, k, v = problem()
    whole = pixelated_attention(q, k, v, SPECS[0])
    assert_close(pixelated_attention(q[:, :, -queries:], k, v, SPECS[0]), whole[:, :, -queries:], 1e-14)


@every_spec
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_padding_is_seen_by_no_query_and_a_query_without_keys_gives_zeros(spec, dtype):
    q, k, v = (tensor.to(dtype) for tensor in problem())
    padding = torch.ones(2, 29, dtype=torch.bool)
    padding[0, 20:], padding[1, :9] = False, False
    mask = by_factors(spec, 29) & padding[:, None, None]
    found = pixelated_attention(q, k, v, spec, padding=padding)
    assert_close(found, by_softmax(q, k, v, mask, 0.25), 1e-14 if dtype == torch.float64 else 1e-6)
    changed = torch.where(padding[:, None, :, None], v, float("nan")).nan_to_num(7.0)
    assert torch.equal(pixelated_attention(q, k, changed, spec, padding=padding), found)
    assert found[1, :, 0].eq(0).all() or not spec.causal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "q .* are given; allowed: .batch, heads, tokens, dim"),
        (lambda q, k, v: (q, k[:, :, 1:], v), "k and v alike up to dim"),
        (lambda q, k, v: (q[:, :3], k, v), "heads of q a multiple of those of k"),
        (lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]), "as many queries as keys, or the last of them"),
        (lambda q, k, v: (q, k, v.float()), "dtypes .*float64.*float32"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pixelated_attention(*change(*problem()), SPECS[0])


def test_padding_of_another_shape_or_dtype_is_refused():
    q, k, v = problem()
    for padding in (torch.ones(2, 28, dtype=torch.bool), torch.ones(2, 29)):
        with pytest.raises(ValueError, match=r"padding is torch.* allowed: torch.bool \[2, 29\]"):
            pixelated_attention(q, k, v, SPECS[0], padding=padding)
    with pytest.raises(ValueError, match="30 queries for 29 keys"):
        SPECS[0].mask(30, 29)


# what FlexAttention is given; its kernels run in tests/gpu

TILED = [
    PixelatedAttention(128, 2, 1),
    PixelatedAttention(128, 1, 0, causal=False),
    PixelatedAttention(32, 4, 1),
    PixelatedAttention(256, 1, 1),
    PixelatedAttention(16, 3, 2, causal=False),
]
every_tiled = pytest.mark.parametrize("spec", TILED, ids=str)


@every_tiled
@pytest.mark.parametrize("length", [640, 1000, 100])
def test_tiles_are_those_of_the_mask(spec, length):
    count = -(-length // TILE)
    mask = torch.zeros(count * TILE, count * TILE, dtype=torch.bool)
    mask[:length, :length] = spec.mask(length)
    cut = mask.unflatten(0, (count, TILE)).unflatten(2, (count, TILE))
    some, every = tiles(spec, length)
    assert torch.equal(some, cut.any(3).any(1))
    assert torch.equal(every, cut.all(3).all(1))


@every_tiled
def test_the_kernel_reads_the_mask_from_the_lists_of_tiles(spec):
    """Tiles of the full lists are taken whole and those of the others by mask_mod, as the kernels do."""
    length = 900
    mask = block_mask(spec, length, "cpu")
    position = torch.arange(length)
    zero = torch.tensor(0)
    seen = torch.zeros(1024, 1024, dtype=torch.bool)
    by_pair = torch.zeros_like(seen)
    by_pair[:length, :length] = mask.mask_mod(zero, zero, position[:, None], position)
    lists = ((mask.full_kv_num_blocks, mask.full_kv_indices, True), (mask.kv_num_blocks, mask.kv_indices, False))
    for counts, columns, whole in lists:
        for row, count in enumerate(counts[0, 0]):
            for column in columns[0, 0, row, :count]:
                tile = (slice(row * TILE, (row + 1) * TILE), slice(column * TILE, (column + 1) * TILE))
                assert not seen[tile].any()
                seen[tile] = True if whole else by_pair[tile]
    assert torch.equal(seen[:length, :length], spec.mask(length))
    assert not seen[length:].any()
    assert not seen[:, length:].any()
    assert mask.seq_lengths == (length, length)


def test_the_mask_of_pairs_is_never_evaluated(monkeypatch):
    monkeypatch.setattr(attention, "_sees", None)
    assert block_mask(PixelatedAttention(64, 7, 2), 20_000, "cpu").kv_indices.shape[-1] == 157


def test_masks_are_kept_and_those_made_in_inference_train():
    spec = PixelatedAttention(128, 3, 1)
    with torch.inference_mode():
        mask = block_mask(spec, 777, "cpu")
    assert block_mask(PixelatedAttention(128, 3, 1), 777, torch.device("cpu")) is mask
    assert block_mask(spec, 778, "cpu") is not mask
    assert not mask.kv_indices.is_inference()


def test_whole_sequences_run_flex_attention_on_a_gpu_and_the_last_queries_do_not(monkeypatch):
    given = []
    monkeypatch.setattr(attention, "runs_flex", lambda device: True)
    monkeypatch.setattr(attention, "attend", lambda q, k, v, mask, scale: given.append(mask))
    q, k, v = problem()
    padding = torch.ones(2, 29, dtype=torch.bool)
    pixelated_attention(q, k, v, SPECS[0])
    pixelated_attention(q, k, v, SPECS[0], padding=padding)
    pixelated_attention(q[:, :, -3:], k, v, SPECS[0])
    assert [isinstance(mask, Tensor) for mask in given] == [False, False, True]


def test_flex_attention_is_always_compiled_and_its_limits_are_errors(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(SPECS[0], 29, "cpu")
    assert attention._flex(mask.mask_mod) is not flex_attention
    assert attention._flex(mask.mask_mod) is attention._flex(block_mask(SPECS[0], 30, "cpu").mask_mod)
    assert attention._flex(mask.mask_mod) is not attention._flex(block_mask(SPECS[1], 29, "cpu").mask_mod)
    q, k, v = problem()
    with pytest.raises(ValueError, match=r"torch.float64 with head_dim=16 .* allowed on a GPU: float32"):
        attend(q, k, v, mask, None)
    small = [tensor.float()[..., :8] for tensor in (q, k, v)]
    with pytest.raises(ValueError, match="head_dim=8 and value_dim=8"):
        attend(*small, mask, None)


def test_every_spec_and_length_of_a_process_has_its_own_mask(monkeypatch):
    compiled = torch.compile
    attention._compiled.cache_clear()
    monkeypatch.setattr(attention, "runs_flex", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda run, fullgraph: compiled(run, backend="eager", fullgraph=fullgraph))
    for length in (130, 200, 70):
        q, k, v = (tensor.detach().float() for tensor in problem(queries=length, keys=length))
        padding = torch.arange(length) < torch.tensor([[length], [length - 9]])
        for spec in (PixelatedAttention(16, 1, 1), PixelatedAttention(16, 2, 0, causal=False)):
            mask = by_factors(spec, length)
            assert_close(pixelated_attention(q, k, v, spec), by_softmax(q, k, v, mask, 0.25), 1e-6)
            padded = pixelated_attention(q, k, v, spec, padding=padding)
            assert_close(padded, by_softmax(q, k, v, mask & padding[:, None, None], 0.25), 1e-6)
    attention._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_code_has_it_in_one_graph(monkeypatch):
    """Traced only; the mask is built in the graph, and another spec is another graph."""
    monkeypatch.setattr(attention, "runs_flex", lambda device: True)
    run = torch.compile(pixelated_attention, backend="eager", fullgraph=True)
    q, k, v = (tensor.detach().float() for tensor in problem(queries=200, keys=200))
    padding = torch.arange(200) < torch.tensor([[200], [150]])
    for spec in (PixelatedAttention(32, 1, 1), PixelatedAttention(16, 2, 0, causal=False)):
        assert_close(run(q, k, v, spec), by_softmax(q, k, v, by_factors(spec, 200), 0.25), 1e-6)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "runs_flex", lambda device: False)
        wanted = pixelated_attention(q, k, v, spec, padding=padding)
    assert_close(run(q, k, v, spec, padding=padding), wanted, 1e-6)
    torch._dynamo.reset()
