"""Linear layers that are not ``nn.Linear``: 1x1 convolutions convert, compute, save, and come back as convolutions."""

import pytest
import torch
from torch import nn

import structlin as sl
from structlin.calibration import record_inputs
from structlin.nn import StructuredConv1d, StructuredConv2d
from structlin.testing import assert_close

SPEC = sl.Monarch(nblocks=2)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, 8, 1, bias=False)
    )


@pytest.mark.parametrize(
    ("conv", "structured", "x"),
    [
        (nn.Conv1d(8, 12, 1), StructuredConv1d, torch.randn(3, 8, 5)),
        (nn.Conv1d(8, 12, 1, bias=False), StructuredConv1d, torch.randn(8, 5)),
        (nn.Conv2d(8, 12, 1), StructuredConv2d, torch.randn(3, 8, 5, 4)),
        (nn.Conv2d(8, 12, 1, padding="valid"), StructuredConv2d, torch.randn(8, 5, 4)),
    ],
    ids=["1d", "1d without bias", "2d", "2d unbatched"],
)
def test_a_convolution_of_full_rank_computes_the_same(conv, structured, x):
    model = nn.Sequential(conv)
    wanted = model(x)
    (swap,) = sl.to_structured_(model, {"0": sl.LowRank(rank=8)}, weights="project")
    assert type(model[0]) is structured
    assert (swap.out_features, swap.in_features) == (12, 8)
    assert swap.error < 1e-5
    assert_close(model(x), wanted, 1e-5)
    assert model(x).is_contiguous()
    sl.to_dense_(model)
    assert type(model[0]) is type(conv)
    assert_close(model(x), wanted, 1e-5)


def test_only_convolutions_that_are_a_matrix_are_layers():
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, stride=2), nn.Conv2d(8, 8, 1, groups=2),
        nn.Conv2d(8, 8, 1, padding=1),
    )  # fmt: skip
    assert [swap.name for swap in sl.to_structured_(model, {"*": SPEC}, dry_run=True)] == ["0"]
    with pytest.raises(ValueError, match="rule '1' matches no linear layer"):
        sl.to_structured_(model, {"1": SPEC})


def test_a_structured_convolution_names_the_shape_it_wants():
    model = nn.Sequential(nn.Conv2d(8, 8, 1))
    sl.to_structured_(model, {"0": SPEC})
    with pytest.raises(ValueError, match=r"\(batch, 8, 2 dimensions of positions\), not \(2, 4, 8, 8\)"):
        model(torch.randn(2, 4, 8, 8))


def test_a_convolutional_network_saves_loads_and_is_densified_in_training(tmp_path):
    model, x = network(), torch.randn(2, 8, 6, 6)
    sl.to_structured_(model, {"*": SPEC})
    sl.save(model, tmp_path / "saved")
    twin = sl.load(network(), tmp_path / "saved")
    assert torch.equal(twin(x), model(x))
    optimizer = torch.optim.AdamW(sl.param_groups(model, lr=1e-3))
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = model(x)
    assert sl.densify_(model, optimizer, moments="carry", lr=1e-3) == ["0", "3"]
    assert_close(model(x), before, 1e-5)
    assert optimizer.state[model[0].weight]["exp_avg"].shape == model[0].weight.shape
    model(x).square().mean().backward()
    optimizer.step()


def test_a_projection_reports_its_error_and_a_dry_run_the_same():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    planned = sl.to_structured_(model, {"*": SPEC}, weights="project", dry_run=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    done = sl.to_structured_(model, {"*": SPEC}, weights="project")
    assert planned == done
    for swap in done:
        weight = before[f"{swap.name}.weight"].flatten(1)
        away = (weight - model.get_submodule(swap.name).matrix()).norm() / weight.norm()
        assert swap.error == pytest.approx(float(away), rel=1e-5)
    header, first, *_ = str(done).splitlines()
    assert header.split()[-1] == "error"
    assert first.split()[-1] == f"{done[0].error:.4f}"
    assert "error" not in str(sl.to_structured_(network(), {"*": SPEC})).splitlines()[0]


@pytest.mark.parametrize("spec", [sl.LowRank(rank=2), sl.Monarch(nblocks=2)], ids=str)
@torch.no_grad()
def test_fitting_to_inputs_lowers_the_error_on_them(spec):
    x = torch.randn(4, 8, 6, 6) * torch.logspace(0, -2, 8).reshape(8, 1, 1)
    inputs = record_inputs(network(), ["0"], [x])
    assert inputs["0"].shape == (4 * 36, 8)
    plain, fitted = network(), network()
    sl.to_structured_(plain, {"0": spec}, weights="project")
    (swap,) = sl.to_structured_(fitted, {"0": spec}, weights="project", inputs=inputs)
    wanted = network()[0](x)
    errors = [float((m[0](x) - wanted).norm() / (wanted - wanted.mean()).norm()) for m in (plain, fitted)]
    assert errors[1] < 0.9 * errors[0]
    assert swap.error < 1


def test_inputs_that_belong_to_no_layer_or_no_projection_are_refused():
    inputs = {"2": torch.randn(3, 16)}
    with pytest.raises(ValueError, match="inputs are given for '2', which no rule converts"):
        sl.to_structured_(network(), {"0": SPEC}, weights="project", inputs=inputs)
    with pytest.raises(ValueError, match="inputs are for weights='project'"):
        sl.to_structured_(network(), {"0": SPEC}, inputs=inputs)
    for x, message in (
        (torch.randn(3, 7), r"0: its inputs are of shape \(3, 7\); allowed: finite ones of shape \(\*, 8\)"),
        (torch.full((3, 8), torch.inf), "0: its inputs are not all finite"),
    ):
        with pytest.raises(ValueError, match=message):
            sl.to_structured_(network(), {"0": SPEC}, weights="project", inputs={"0": x})


def test_inputs_given_by_keyword_are_recorded():
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(input=x)

    x = torch.randn(3, 4)
    assert torch.equal(record_inputs(Caller(), ["layer"], [x])["layer"], x)


@pytest.mark.parametrize("register", ["_register_state_dict_hook", "register_load_state_dict_pre_hook"])
def test_hooks_on_a_state_are_not_lost(register):
    model = network()
    getattr(model[0], register)(lambda *_: None)
    with pytest.raises(ValueError, match=r"0 .*has hooks or tensors of its own"):
        sl.to_structured_(model, {"0": SPEC})


def test_a_dry_run_refuses_what_the_run_would():
    for dtype, spec, message in (
        (torch.float8_e4m3fn, SPEC, "has a weight of dtype torch.float8_e4m3fn"),
        (torch.complex64, sl.btt_moe(4, 2), "is complex, and has no order to choose experts by"),
    ):
        model = nn.Sequential(nn.Linear(16, 16))
        model[0].weight = nn.Parameter(model[0].weight.detach().to(dtype))
        for dry in (True, False):
            with pytest.raises(ValueError, match=message):
                sl.to_structured_(model, {"0": spec}, dry_run=dry)


def test_recording_inputs_leaves_the_model_alone_and_names_what_is_not_reached():
    model = network().train()
    model[1].eval()
    record_inputs(model, ["0", "3"], [torch.randn(1, 8, 2, 2)])
    assert [module.training for module in model] == [True, False, True, True]
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="1, 2: no linear layer of the model"):
        record_inputs(model, ["1", "2"], [])
    with pytest.raises(ValueError, match="0: no batch reaches it"):
        record_inputs(model, ["0"], [])
