"""Trained masks: what they are, what the layer makes of them, the search for blocks, and the shrinking of widths."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import structlin as sl
from structlin import analysis, shrinkage
from structlin.describe import describe
from structlin.nn.boxcar import BoxcarMask, masks_of
from structlin.spec import Boxcar
from structlin.testing import assert_close, error, inputs, make

SHAPE = (24, 16)
SPEC = sl.Gblr(components=4, rank=2)


def mask_of(n, widths, locations, sigma=None, rounding=False):
    return BoxcarMask(Boxcar(0, 1, tuple(widths), tuple(locations), sigma, rounding), n, None, torch.float64)


def boxcar(n, start, length):
    return np.roll(np.r_[np.ones(length), np.zeros(n - length)], start)


@pytest.mark.parametrize("n", [1, 2, 15, 16])
def test_an_interval_of_whole_features_is_a_cyclic_boxcar(n):
    places = [(start, length) for start in range(n) for length in range(n + 1)]
    mask = mask_of(n, [length / n for _, length in places], [start / n for start, _ in places]).mask()
    np.testing.assert_allclose(mask.detach().numpy(), [boxcar(n, *place) for place in places], atol=1e-12)


@pytest.mark.parametrize("n", [15, 16])
@pytest.mark.parametrize("sigma", [0.5, 3.0, math.inf])
def test_a_smooth_mask_is_the_papers(n, sigma):
    widths, locations = np.random.default_rng(0).uniform(size=(2, 9))
    f, w, start = np.arange(n // 2 + 1), widths[:, None], locations[:, None]
    box = w * np.sinc(f * w) / np.sinc(f / n) * np.exp(-(f**2) / (2 * sigma**2))
    phase = -2 * np.pi * f * start + np.pi * f * (1 / n - w)
    wanted = np.fft.irfft(box * np.exp(1j * phase), n, norm="forward")
    found = mask_of(n, widths, locations, sigma).mask().detach().numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_rounding_moves_the_mask_to_whole_features_and_lets_gradients_through():
    rounded, exact = mask_of(16, [0.3], [0.7], 2.0, True), mask_of(16, [5 / 16], [11 / 16], 2.0)
    with torch.no_grad():
        rounded.widths.fill_(0.3)
        rounded.locations.fill_(0.7)
    assert_close(rounded.mask(), exact.mask())
    cotangent = torch.linspace(-1, 1, 16, dtype=torch.float64)
    for mask in (rounded, exact):
        (mask.mask() @ cotangent).sum().backward()
        assert mask.widths.grad.abs() > 0
    assert_close(rounded.widths.grad, exact.widths.grad)
    assert_close(rounded.locations.grad, exact.locations.grad)


def test_evaluation_drops_narrow_intervals_and_faint_entries():
    mask = mask_of(64, [0.9 / 64, 1 / 64, 0.25], [0, 0, 0], sigma=8)
    before = mask.mask()
    mask.eval()
    after = mask.mask()
    assert before[0].abs().max() > 0.1
    assert after[0].abs().max() == 0
    assert after[1].abs().max() > 0.1
    faint = before[2].abs() < 1e-3
    assert 0 < faint.sum() < 64
    assert torch.equal(after[2] == 0, faint)
    assert torch.equal(after[2][~faint], before[2][~faint])


def test_masks_of_wide_layers_are_exact_in_single_precision():
    n = 4096
    mask = BoxcarMask(Boxcar(0, 1, (1000 / n, 1.0), (3999 / n, 0.0), rounding=True), n, None, torch.bfloat16)
    assert mask.widths.dtype == torch.float32
    wanted = np.stack([boxcar(n, 3999, 1000), np.ones(n)])
    np.testing.assert_allclose(mask.mask().detach().numpy(), wanted, atol=1e-5)


def test_first_widths_have_the_mean_asked_for_and_locations_are_spread_evenly():
    plan = sl.Gblr(components=8, width=0.5).plan(*SHAPE)
    masks = sl.Gblr(components=8, width=0.5).masks(plan)
    assert masks.keys() == {"down", "up"}
    for boxcar_ in masks.values():
        assert boxcar_.widths == (1.0, 1.0, *[0.25 / 0.75] * 6)
        assert sum(boxcar_.widths) / 8 == pytest.approx(0.5)
        assert boxcar_.locations == tuple(k / 8 for k in range(8))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (sl.Gblr(components=9, rank=2), r"components=9 of rank=2 .*components may be 1 to 8"),
        (sl.Gblr(rank=17), r"rank=17 .*rank may be 1 to 16"),
    ],
    ids=str,
)
def test_more_components_than_the_shape_has_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        sl.StructuredLinear(16, 24, spec)


def test_a_width_of_zero_is_refused():
    with pytest.raises(ValueError, match="above 0, up to 1"):
        sl.Gblr(width=0.0)


def moved(spec, **how):
    """A layer whose intervals are elsewhere than at first, with smooth edges."""
    layer = make(spec, SHAPE, "cpu", **how)
    for mask in masks_of(layer):
        nn.init.uniform_(mask.widths, 0.2, 0.9)
        nn.init.uniform_(mask.locations)
        mask.sigma.fill_(5.0)
    return layer


def test_copies_and_checkpoints_keep_places_and_sigma(tmp_path):
    model = nn.Sequential(moved(SPEC))
    x = inputs(model[0], 5)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    masks_of(twin)[0].widths.data.zero_()
    assert not torch.equal(twin(x), model(x))
    sl.save(model, tmp_path / "model")
    for device in ("cpu", "meta"):
        dense = nn.Sequential(nn.Linear(16, 24, device=device, dtype=torch.float64))
        loaded = sl.load(dense, tmp_path / "model")
        assert torch.equal(loaded(x), model(x))
        assert [float(mask.sigma) for mask in masks_of(loaded)] == [5.0, 5.0]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_dense_form_is_that_of_the_mode(dtype, mode):
    layer = moved(SPEC, dtype=dtype).train(mode)
    x = inputs(layer, 5)
    dense = layer.to_dense()
    assert dense.weight.dtype == dtype
    assert dense.weight.requires_grad
    assert_close(dense(x), layer(x), 0.03 if dtype == torch.bfloat16 else 1e-5)
    layer.requires_grad_(False)
    assert not layer.to_dense().weight.requires_grad


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_moving_to_another_dtype_leaves_places_precise():
    layer = moved(SPEC, dtype=torch.float32)
    places = [mask.locations.clone() for mask in masks_of(layer)]
    for dtype in (torch.bfloat16, torch.float16, torch.complex64):
        assert copy.deepcopy(layer).to(dtype).stored("down").dtype == dtype
        for mask, place in zip(masks_of(copy.deepcopy(layer).to(dtype)), places, strict=True):
            assert torch.equal(mask.locations, place)
    assert {mask.widths.dtype for mask in masks_of(layer.double())} == {torch.float64}


def test_dense_backend_follows_the_masks():
    layer = moved(SPEC).eval()
    x = inputs(layer, 5)
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: masks_of(layer)[0].widths.mul_(0.5),
            lambda: masks_of(layer)[1].sigma.fill_(2.0),
            lambda: layer.stored("up").mul_(2),
        ):
            change()
            layer.backend = "auto"
            wanted = layer(x)
            layer.backend = "dense"
            assert_close(layer(x), wanted)
            kept = layer._weight[1]
            layer(x)
            assert layer._weight[1] is kept


def test_sums_and_transposes_keep_the_masks():
    summed, transposed = moved(sl.LowRank(2) + SPEC), moved(SPEC.T)
    low = summed.up @ summed.down
    with torch.no_grad():
        assert len(masks_of(summed)) == len(masks_of(transposed)) == 2
        assert error(summed.to_dense().weight, low + torch.einsum("oaq,aqi->oi", summed.up1, summed.down1)) < 1e-12
        assert_close(transposed.to_dense().weight.T, torch.einsum("oaq,aqi->oi", transposed.up, transposed.down))
    assert [mask.size for mask in masks_of(transposed)] == [SHAPE[0], SHAPE[1]]
    twice = sl.StructuredLinear(16, 24, SPEC + sl.Gblr(components=3))
    assert [len(mask.widths) for mask in masks_of(twice)] == [4, 4, 3, 3]


def test_a_product_cannot_keep_them():
    with pytest.raises(ValueError, match="trained masks, which a product cannot keep"):
        (SPEC @ sl.LowRank(4)).plan(*SHAPE)


def test_learning_rates():
    layer = make(SPEC, SHAPE, "cpu")
    names = {parameter: name for name, parameter in layer.named_parameters()}

    def rates(**how):
        groups = sl.param_groups(layer, lr=0.5, weight_decay=0.1, **how)
        return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}

    factors = {"parametrizations.down.original": (0.25, 0.1), "parametrizations.up.original": (0.5, 0.1)}
    places = [f"parametrizations.{factor}.0.{what}" for factor in ("down", "up") for what in ("widths", "locations")]
    assert rates() == {**factors, **dict.fromkeys(places, (0.5, 0.0)), "bias": (0.5, 0.0)}
    assert rates(structure_lr=0.125) == {**factors, **dict.fromkeys(places, (0.125, 0.0)), "bias": (0.5, 0.0)}
    with pytest.raises(ValueError, match="structure_lr=-1 must be finite and not negative"):
        rates(structure_lr=-1)


BLOCKS = [(4, 12, 40, 10), (12, 10, 3, 14), (30, 16, 17, 12), (60, 14, 58, 9)]  # row, height, column, width; one wraps


def planted(rows, columns, blocks, rank, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    weight = torch.zeros(rows, columns, dtype=dtype)
    for row, height, column, width in blocks:
        left = torch.randn(height, rank, generator=generator, dtype=dtype)
        right = torch.randn(rank, width, generator=generator, dtype=dtype)
        weight[(torch.arange(height) + row)[:, None] % rows, (torch.arange(width) + column) % columns] += left @ right
    return weight


def places(layer):
    down, up = masks_of(layer)
    found = torch.stack(
        [up.locations * up.size, up.widths * up.size, down.locations * down.size, down.widths * down.size]
    )
    return sorted(map(tuple, found.detach().round().int().T.tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("rank", [1, 2])
def test_planted_blocks_are_found(rank, dtype):
    weight = planted(72, 64, BLOCKS, rank, dtype)
    spec = sl.Gblr(components=4, rank=rank, width=1.0, sigma=3)
    layer = sl.StructuredLinear(64, 72, spec, bias=False, dtype=dtype).project_(weight)
    assert places(layer) == BLOCKS
    assert error(layer.to_dense().weight, weight) < 1e3 * torch.finfo(dtype).eps
    norms = [float(getattr(layer, name).detach().norm()) for name in ("down", "up")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_planted_blocks_are_found_in_a_transposed_structure_and_by_conversion():
    weight = planted(72, 64, BLOCKS, 1).float()
    model = nn.Sequential(nn.Linear(64, 72))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    bias = model[0].bias.clone()
    sl.to_structured_(model, {"*": sl.Gblr(components=4, width=1.0).T}, weights="project")
    assert error(model[0].to_dense().weight, weight) < 1e-4
    assert torch.equal(model[0].bias, bias)
    sl.to_dense_(model)
    assert error(model[0].weight, weight) < 1e-4


def test_components_that_find_nothing_can_still_learn():
    weight = planted(72, 64, BLOCKS[:1], 1)
    layer = sl.StructuredLinear(64, 72, sl.Gblr(components=3, width=1.0), bias=False, dtype=torch.float64)
    layer.project_(weight)
    assert error(layer.to_dense().weight, weight) < 1e-12
    layer(torch.randn(5, 64, dtype=torch.float64)).sum().backward()
    assert (layer.stored("up").grad.abs().sum((0, 2)) > 0).all()


def test_no_interval_gets_wider_than_it_starts_and_the_fit_uses_what_there_is():
    torch.manual_seed(0)
    weight = torch.randn(48, 32)
    errors = []
    for width in (0.25, 0.5, 1.0):
        spec = sl.Gblr(components=8, width=width)
        layer = sl.StructuredLinear(32, 48, spec, bias=False).project_(weight)
        for mask, first in zip(masks_of(layer), spec.masks(layer.plan).values(), strict=True):
            assert (mask.size * mask.widths).round().int().tolist() <= [round(w * mask.size) for w in first.widths]
        errors.append(error(layer.to_dense().weight, weight))
    nearest = float(torch.linalg.svdvals(weight)[8:].norm() / weight.norm())
    assert errors[0] > errors[1] > errors[2] >= nearest - 1e-5
    assert errors[2] < 1.02 * nearest


def test_the_fit_leaves_no_gradient_in_the_factor_that_it_solved_last():
    torch.manual_seed(0)
    weight, eye = torch.randn(48, 32, dtype=torch.float64), torch.eye(32, dtype=torch.float64)
    spec = sl.Gblr(components=8, width=0.5)
    layer = sl.StructuredLinear(32, 48, spec, bias=False, dtype=torch.float64).project_(weight)
    left = (layer(eye).T - weight).square().sum()
    left.backward()
    slopes = [
        float(layer.stored(name).grad.norm() * layer.stored(name).detach().norm() / left.detach())
        for name in ("down", "up")
    ]
    assert slopes[0] < 1e-8
    assert slopes[1] < 0.02


def test_a_layer_without_masks_takes_the_nearest_factors():
    weight = torch.randn(SHAPE)
    layer = sl.StructuredLinear(16, 24, sl.LowRank(4)).project_(weight)
    for name, factor in sl.project(layer.plan, weight).items():
        assert torch.equal(getattr(layer, name), factor)


def test_what_cannot_be_projected_is_refused():
    weight = torch.randn(SHAPE)
    layer = sl.StructuredLinear(16, 24, SPEC)
    with pytest.raises(ValueError, match="cannot be fitted to inputs"):
        layer.project_(weight, torch.randn(5, 16))
    with pytest.raises(ValueError, match=r"one weight \(out_features, in_features\), not \(2, 24, 16\)"):
        layer.project_(torch.stack([weight, weight]))
    with pytest.raises(ValueError, match="one chain of two factors only"):
        sl.StructuredLinear(16, 24, SPEC + sl.LowRank(2)).project_(weight)
    model = nn.Sequential(nn.Linear(16, 24))
    with pytest.raises(ValueError, match="one chain of two factors only"):
        sl.to_structured_(model, {"*": SPEC + sl.LowRank(2)}, weights="project")


def test_a_frozen_weight_stays_frozen_with_its_places():
    model = nn.Sequential(nn.Linear(16, 24).requires_grad_(False))
    sl.to_structured_(model, {"*": SPEC})
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_masks_can_be_removed_for_good():
    layer = moved(SPEC).eval()
    x = inputs(layer, 5)
    wanted = layer(x)
    for name in ("down", "up"):
        parametrize.remove_parametrizations(layer, name)
    assert_close(layer(x), wanted)
    assert [name for name, _ in layer.named_parameters()] == ["bias", "down", "up"]


def shrinking(lr=0.5, **how):
    layer = make(SPEC, SHAPE, "cpu")
    optimizer = torch.optim.SGD(sl.param_groups(layer, lr=0.0, structure_lr=lr))
    return layer, shrinkage.Shrinkage(layer, optimizer, **how)


def test_one_step_shrinks_widths_and_keeps_places_in_range():
    layer, shrink = shrinking(threshold=0.2, target=0.1)
    mask, other = masks_of(layer)
    with torch.no_grad():
        mask.widths.copy_(torch.tensor([0.05, 0.5, 1.0, 1.3]))
        mask.locations.copy_(torch.tensor([-0.25, 0.0, 1.0, 1.75]))
    before = other.widths.clone()
    shrink.step()
    assert mask.widths.tolist() == pytest.approx([0.0, 0.4, 0.9, 1.0])
    assert mask.locations.tolist() == pytest.approx([0.75, 0.0, 0.0, 0.75])
    assert_close(other.widths, before - 0.1)
    shrink.optimizer.param_groups[0]["lr"] = shrink.optimizer.param_groups[-1]["lr"] = 0.0
    before = mask.widths.clone()
    shrink.step()
    assert torch.equal(mask.widths, before)


def test_nothing_shrinks_at_the_target():
    layer, shrink = shrinking(target=1.0)
    before = [mask.widths.clone() for mask in masks_of(layer)]
    shrink.step()
    assert all(torch.equal(mask.widths, b) for mask, b in zip(masks_of(layer), before, strict=True))


def test_shrinkage_without_masks_or_their_optimizer_is_refused():
    layer = make(SPEC, SHAPE, "cpu")
    with pytest.raises(ValueError, match="no trained masks"):
        shrinkage.Shrinkage(nn.Linear(2, 2), torch.optim.SGD(layer.parameters()))
    with pytest.raises(ValueError, match="does not train all widths"):
        shrinkage.Shrinkage(layer, torch.optim.SGD([layer.bias]))
    for how in ({"threshold": -1.0}, {"threshold": math.nan}, {"target": 1.1}):
        with pytest.raises(ValueError, match="a fraction from 0 to 1"):
            shrinkage.Shrinkage(layer, torch.optim.SGD(layer.parameters()), **how)


def test_sigma_is_annealed_linearly():
    assert [shrinkage.annealed_sigma(step, 10, 30) for step in (0, 10, 20, 30, 99)] == [1, 1, 50.5, 100, 100]
    with pytest.raises(ValueError, match="first=3 must be less than last=3"):
        shrinkage.annealed_sigma(0, 3, 3)
    layer = make(SPEC, SHAPE, "cpu")
    shrinkage.set_sigma_(layer, 7.0)
    assert [float(mask.sigma) for mask in masks_of(layer)] == [7.0, 7.0]
    with pytest.raises(ValueError, match="sigma=0 must be above 0"):
        shrinkage.set_sigma_(layer, 0)


def test_training_recovers_planted_blocks():
    torch.manual_seed(0)
    n, steps, blocks = 32, 400, [(2, 10, 18, 8), (18, 12, 4, 10)]
    weight, eye = planted(n, n, blocks, 1, torch.float32), torch.eye(n)
    for row, height, column, width in blocks:
        inside = weight[row : row + height, column : column + width]
        inside.copy_(inside.sign() * (1 + inside.abs().clamp(max=0.5)))
    layer = sl.StructuredLinear(n, n, sl.Gblr(components=2, width=1.0, sigma=1), bias=False)
    optimizer = torch.optim.AdamW(sl.param_groups(layer, lr=2e-2, structure_lr=5e-3))
    shrink = shrinkage.Shrinkage(layer, optimizer, threshold=1.0, target=0.31)
    for step in range(steps):
        shrinkage.set_sigma_(layer, shrinkage.annealed_sigma(step, steps // 10, 7 * steps // 10))
        optimizer.zero_grad()
        ((layer(eye) - weight.T).square().sum() / weight.square().sum()).backward()
        optimizer.step()
        shrink.step()
    shrinkage.set_sigma_(layer, math.inf)
    assert places(layer) == blocks
    assert shrinkage.effective_flops(layer) < analysis.flops(layer.plan) / 2


def test_effective_flops_are_those_of_the_intervals():
    layer = make(sl.Gblr(components=2, rank=2), (32, 16), "cpu")
    down, up = masks_of(layer)
    with torch.no_grad():
        down.widths.copy_(torch.tensor([4 / 16, 1 / 16]))
        up.widths.copy_(torch.tensor([8 / 32, 0.5]))
    assert shrinkage.effective_flops(layer) == 2 * (2 * (4 + 8) + 1 * 16)
    model = nn.Sequential(layer, sl.StructuredLinear(32, 8, sl.LowRank(2)), nn.Linear(8, 8))
    assert shrinkage.effective_flops(model) == 2 * (24 + 16) + 2 * 2 * (32 + 8)


def test_describe_names_the_masks():
    text = describe(sl.Gblr(components=4, width=0.5), 24, 16)
    assert "down: 4 trained intervals of 16 features, 50% wide at first in the mean" in text
    assert "up: 4 trained intervals of 24 features" in text
    assert "masks" not in describe(sl.LowRank(4), 24, 16)
