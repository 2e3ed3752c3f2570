"""Pixelfly for whole models: budgets are kept, blocks are those that were asked for, what stays dense says why."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from scripts import script
from torch import nn

import structlin as sl
from structlin import analysis, sparsity
from structlin.sparsity import HOPPER_BLOCKS, OTHER_BLOCKS, pixelfly_within
from structlin.structures.block_sparse import random_table, read_mask, write_mask
from structlin.widths import butterfly

ROOT = Path(__file__).parents[1]


class MixerBlock(nn.Module):
    """Tolstikhin et al. 2021: an MLP over patches, then one over channels."""

    def __init__(self, patches, width):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(patches, width // 2), nn.GELU(), nn.Linear(width // 2, patches))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.tokens(self.norms[0](x).mT).mT
        return x + self.channels(self.norms[1](x))


def gpt2(**sizes):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("structlin.hf")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def vit():
    transformers = pytest.importorskip("transformers")
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=2))


MODELS = {
    "gpt2-small": lambda: gpt2(n_layer=2),
    "gpt2-medium": lambda: gpt2(n_embd=1024, n_layer=2, n_head=16),
    "vit": vit,
    "mixer": lambda: nn.Sequential(*(MixerBlock(196, 768) for _ in range(2))),
}


@pytest.mark.parametrize("blocks", [HOPPER_BLOCKS, OTHER_BLOCKS], ids=["hopper", "other"])
@pytest.mark.parametrize("name", MODELS)
def test_published_models_on_the_meta_device(name, blocks):
    """Most layers are sparse, near the density, in blocks that divide their widths: 768 is 12 blocks of 64."""
    with torch.device("meta"):
        model = MODELS[name]()
    found = sl.sparsify(model, 0.25, blocks)
    assert 0.9 * 0.25 <= found.density <= 0.25
    large = {n: spec for n, spec in found.specs.items() if ".tokens." not in n}
    assert {spec.block_size for spec in large.values()} == {64 if blocks is HOPPER_BLOCKS else 32}
    # a Mixer with 196 patches: they are no blocks of any size that pays
    assert {n for n in found.shapes if ".tokens." not in n} - set(large) <= {"lm_head", "classifier"}
    assert all("no grid of blocks" in why for n, why in found.kept.items() if n != "lm_head")
    for spec, shape in {(spec, found.shapes[n]) for n, spec in large.items()}:
        low = analysis.num_params(sl.LowRank(spec.rank).plan(*shape)) / (0.25 * shape[0] * shape[1])
        assert 0.2 < low <= 1 / 3
        assert not any(width // spec.butterfly_size % spec.block_size for width in shape)
    swaps = sl.to_structured_(model, found.rules)
    assert [swap.name for swap in swaps] == list(found.specs)
    assert sum(s.params for s in swaps) / sum(s.dense_params for s in swaps) == pytest.approx(found.density)


def test_the_published_configuration_of_gpt2_medium():
    """butterfly_size 16 and two factors are those of the released configurations, at the density that they have."""
    assert pixelfly_within((1024, 1024), 0.25, (64,)) == sl.Pixelfly(64, 16, 2, rank=32)
    assert pixelfly_within((4096, 4096), 0.25, HOPPER_BLOCKS) == sl.Pixelfly(128, 32, 5, rank=128)
    assert pixelfly_within((768, 768), 0.25, HOPPER_BLOCKS) == sl.Pixelfly(64, 12, 1, rank=32)


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1600, 6400)])
def test_the_kernels_of_hopper_take_what_is_chosen_for_them(shape):
    """Sparse and low-rank term in one kernel, widths of 768 and 1600 included."""
    pytest.importorskip("triton")
    from structlin.ops.lowering import lower
    from structlin.ops.moves import Kernels
    from structlin.ops.products import pairs
    from structlin.ops.schedule import schedule

    plan = pixelfly_within(shape, 0.25, HOPPER_BLOCKS).plan(*shape)
    terms = schedule(lower(plan).text, 128, Kernels(True, True))
    assert pairs([(term.steps[-1].forward, term.steps[-1].after) for term in terms]) == {0: 1}


def test_no_pixelfly_of_the_block_size_spends_more(monkeypatch):
    monkeypatch.setattr(sparsity, "FULL", 1.0)
    for shape, density in ((64, 64), 0.35), ((96, 192), 0.5), ((256, 64), 0.4):
        budget, every = density * shape[0] * shape[1], []
        for size, nfactors, rank in itertools.product((2, 3, 4, 6, 8, 12, 16, 24), (1, 2, 3, 4), range(8, 64, 8)):
            try:
                params = analysis.num_params(sl.Pixelfly(8, size, nfactors, rank=rank).plan(*shape))
            except ValueError:
                continue
            low = rank * sum(shape) / budget
            if params <= budget and low <= 1 / 3 and abs(low - 0.25) <= max(4 * sum(shape) / budget, 1 / 12):
                every.append(params)
        if every:
            assert analysis.num_params(pixelfly_within(shape, density, (8,)).plan(*shape)) == max(every)


def test_smaller_blocks_only_where_larger_ones_spend_too_little():
    assert pixelfly_within((1024, 1024), 0.1, HOPPER_BLOCKS).block_size == 32
    assert pixelfly_within((4096, 4096), 0.1, HOPPER_BLOCKS).block_size == 128
    with pytest.raises(ValueError, match=r"sparsest butterfly has 25.0%: allow 33% or more"):
        pixelfly_within((64, 64), 0.1, (8,))


def test_a_sparse_model_runs_and_learns():
    torch.manual_seed(0)
    model = nn.Sequential(MixerBlock(32, 64), MixerBlock(32, 64))
    found = sl.sparsify(model, 0.5, 4)
    assert not found.kept
    sl.to_structured_(model, found.rules)
    x = torch.randn(3, 32, 64)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_stays_dense_says_why_and_is_counted():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10), nn.Linear(10, 64))
    found = sl.sparsify(model, 0.4, (16, 8), layers=["[01]"])
    assert list(found.rules.items())[1] == ("1", None)
    assert found.overall == pytest.approx((found.density * 4096 + 640) / 4736)
    text = str(found)
    assert "1 stays dense: 10x64 has no grid of blocks of 16, 8; give a size that divides both widths" in text
    assert f"{found.density:.1%} of their dense weights; 40.0% was asked for" in text
    assert [swap.name for swap in sl.to_structured_(model, found.rules)] == ["0"]


def test_names_with_brackets_are_taken_as_they_are():
    model = nn.ModuleDict({"a[0]": nn.Linear(64, 64)})
    assert len(sl.to_structured_(model, sl.sparsify(model, 0.5, 8).rules)) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"density": 0.0}, "allowed: above 0 and below 1"),
        ({"density": 1.0}, "allowed: above 0 and below 1"),
        ({"block_size": 0}, "allowed: whole numbers from 1"),
        ({"block_size": ()}, "allowed: whole numbers from 1"),
        ({"layers": ["h.*"]}, "'h.[*]' matches no linear layer; there are 0"),
        (
            {"density": 0.05, "block_size": 32},
            "no layer becomes sparse: 0: no pixelfly .* 100.0%: give smaller",
        ),
    ],
    ids=str,
)
def test_sparsify_says_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        sl.sparsify(nn.Sequential(nn.Linear(64, 64)), **{"density": 0.5, "block_size": 8, **wrong})


def test_blocks_are_those_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert sparsity.block_sizes() == HOPPER_BLOCKS
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert sparsity.block_sizes() == OTHER_BLOCKS


def test_the_magnitude_mask_is_the_best_of_all():
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    weight = torch.randn(12, 8)
    tables = [
        rows
        for rows in itertools.product(list(itertools.combinations(range(4), 2)), repeat=4)
        if all(sum(column in row for row in rows) == 2 for column in range(4))
    ]
    cells = weight.unflatten(1, (4, 2)).unflatten(0, (4, 3)).square().sum((1, 3))
    best = max(tables, key=lambda rows: sum(float(cells[i, j]) for i, row in enumerate(rows) for j in row))
    spec = sl.magnitude_mask(weight, 4, 2)
    assert read_mask(spec.mask, 4, 2) == best
    layer = nn.Linear(8, 12, bias=False)
    layer.weight.data = weight
    model = nn.Sequential(layer)
    (swap,) = sl.to_structured_(model, {"0": spec}, "project")
    kept = model[0].to_dense().weight
    assert torch.equal(kept[kept != 0], weight[kept != 0])  # a masked copy
    assert swap.error**2 == pytest.approx(1 - float((kept.square().sum() / weight.square().sum()).detach()), rel=1e-4)


def test_the_magnitude_mask_says_what_is_wrong():
    for weight in (torch.zeros(3), torch.full((4, 4), torch.nan), torch.empty(4, 4, device="meta")):
        with pytest.raises(ValueError, match="must be a finite matrix"):
            sl.magnitude_mask(weight, 2, 1)
    with pytest.raises(ValueError, match="nblocks=3 does not divide"):
        sl.magnitude_mask(torch.ones(4, 6), 3, 1)
    with pytest.raises(ValueError, match="slots may be 1 to 2"):
        sl.magnitude_mask(torch.ones(4, 4), 2, 3)


def test_masks_are_text_and_back():
    generator = random.Random(0)
    for n in (2, 3, 8, 24):
        slots = generator.randint(1, n)
        table = random_table(n, slots, generator.randint(1, 99))
        assert read_mask(write_mask(table), n, slots) == table
        spec = sl.BlockSparse(n, slots, write_mask(table))
        assert sl.spec.parse(str(spec)) == spec == sl.Spec.from_dict(spec.to_dict())


def test_random_masks_are_random_and_even():
    tables = [random_table(16, 4, seed) for seed in range(1, 65)]
    assert len(set(tables)) == 64
    for table in tables:
        assert all(sum(column in row for row in table) == 4 for column in range(16))
    uses = torch.zeros(16, 16)
    for table in tables:
        uses[torch.arange(16)[:, None], torch.tensor(table)] += 1
    # 256 cells, each kept in 16 of 64 masks on average: a chi-square of about as many as there are cells
    assert ((uses - 16).square() / 12).sum() < 330


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slots": 5}, "slots=5 exceeds nblocks=4; slots may be 1 to 4"),
        ({"mask": "0x96c"}, "0x and 4 hexadecimal digits"),
        ({"mask": "0x96C3"}, "no mask of 4x4 cells"),
        ({"mask": "0x96c1"}, "has 1, 2 cells in its rows and columns; every row and every column must have slots=2"),
        ({"mask": 0}, "must be a positive whole number or text"),
        ({"nblocks": 3, "mask": "0x771"}, "every row and every column must have slots=2"),
    ],
    ids=str,
)
def test_a_mask_that_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        sl.BlockSparse(**{"nblocks": 4, "slots": 2, **fields}).plan(12, 12)


def test_factors_of_a_butterfly():
    assert butterfly(16, 2, n=16) == [(1, 2), (2, 2)]
    assert butterfly(60, None, n=120) == [(1, 2), (2, 2), (4, 3), (12, 5)]


def test_all_factors_of_a_butterfly_reach_every_cell():
    for size in (4, 6, 12):
        plan = sl.BlockButterfly(size).plan(2 * size, size)
        assert analysis.density(plan) == 1
        assert analysis.rank_bound(plan) == size
        flat = sl.Pixelfly(1, size, len(butterfly(size, None, n=size))).plan(size, size)
        assert analysis.density(flat) == (1 + sum(r - 1 for _, r in butterfly(size, None, n=size))) / size


@pytest.fixture(scope="module")
def benchmarks():
    """benchmarks/sparsify.py and its claims."""
    return script("sparsify"), script("claims_sparsify")


def test_rivals_have_the_weights_of_pixelfly(benchmarks):
    script, _ = benchmarks
    for shape in script.SHAPES:
        fly = pixelfly_within(shape, 0.25, HOPPER_BLOCKS)
        params = analysis.num_params(fly.plan(*shape))
        for name in ("random", "butterfly"):
            rival = script.rival(name, fly, shape)
            assert 0.7 < analysis.num_params(rival.plan(*shape)) / params < 1.2


def test_claims_follow_from_records(benchmarks, monkeypatch):
    script, claims = benchmarks
    monkeypatch.setattr(claims, "found", dict)
    assert all(measure() is None for *_, measure in claims.ROWS)
    names = [job.name for job in script.jobs(["layers", "models"], False, {})]
    assert len(set(names)) == len(names)
    metrics = {"pixelfly_ms": 1.0, "butterfly_ms": 3.5, "step_ms": 2.0, "valid_loss": 1.5}
    specs = {"butterfly": "block_butterfly:butterfly_size=8:nfactors=3"}
    runs = {name: {"name": name, "metrics": metrics, "config": {"rate": 1e-3, "specs": specs}} for name in names}
    alone = {"butterfly": "block_butterfly:butterfly_size=8:nfactors=1"}  # no product
    runs["layer 4096x1024 d0.25"] = {**runs[names[0]], "name": "layer 4096x1024 d0.25", "config": {"specs": alone}}
    quality = [f"quality {name} lr0.001 s{seed}" for name in script.CONTENDERS for seed in (0, 1)]
    monkeypatch.setattr(claims, "found", lambda: runs | dict.fromkeys(quality, runs[names[0]]))
    found = {claim: measure() for claim, _, _, measure in claims.ROWS}
    assert [verdict for _, verdict in found.values()] == [True, False, False, False, False, True, True]
    assert "4096x4096 at 0.25 3.50" in found["faster than the product of butterfly factors"][0]
    assert "4096x1024 at 0.25" not in found["faster than the product of butterfly factors"][0]
    assert found["GPT-2 medium trains faster"][0] == "GPT-2 medium 1.00 times dense's speed, whole step"


def test_quality_runs_wait_for_what_they_need(benchmarks):
    script, _ = benchmarks

    def names(found):
        return [job.name for job in script.jobs(["quality"], False, found)]

    assert not any("magnitude" in name or "s1" in name for name in names({}))
    dense = {"status": "ok", "config": {"masks": {"0": "block_sparse"}}}
    done = {f"quality dense lr{rate} s0": {**dense, "metrics": {"valid_loss": rate}} for rate in script.RATES}
    later = names(done)
    assert f"quality dense lr{script.RATES[0]} s1" in later
    assert f"quality magnitude lr{script.RATES[0]} s0" in later
    assert not any("pixelfly" in name and "s1" in name for name in later)
