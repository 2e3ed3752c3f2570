"""Advice: the knapsack is exact, scores measure what they say, and rules are what conversions take."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import structlin as sl
from structlin import analysis, cli
from structlin.advise import allocate, scores
from structlin.advise.advice import Advice, Scored, choose, pixelfly_candidates, score
from structlin.advise.options import CANDIDATES, Option, measuring, options, predicting
from structlin.costs import HOPPER
from structlin.ops.lowering import lower
from structlin.report import records

LADDER = tuple(f"low_rank:rank={rank}" for rank in (2, 4, 6, 8, 10, 12))


def model(seed: int = 0) -> nn.Module:
    """Four layers, the second nearly of rank 4, the others of full rank."""
    torch.manual_seed(seed)
    found = nn.Sequential(
        nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16), nn.Linear(16, 8)
    )
    low = torch.randn(32, 4) @ torch.randn(4, 32) / 8 + 0.001 * torch.randn(32, 32)
    found[2].weight.data = low
    return found


def test_the_knapsack_is_the_optimum_of_all_combinations():
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        values, costs = (torch.rand(5, 4, generator=generator).tolist() for _ in range(2))
        every = list(itertools.product(range(4), repeat=5))
        for budget in (1.0, 2.0, 3.0):
            totals = {
                pick: sum(values[i][j] for i, j in enumerate(pick))
                for pick in every
                if sum(costs[i][j] for i, j in enumerate(pick)) <= budget
            }
            if not totals:
                with pytest.raises(ValueError, match="cheapest options"):
                    allocate.knapsack(values, costs, budget)
                continue
            found = tuple(allocate.knapsack(values, costs, budget))
            assert totals[found] == pytest.approx(min(totals.values()))


def test_the_knapsack_does_not_care_for_units():
    values, costs = [[0.0, 3e-9, 9e-9], [0.0, 1e-9, 8e-9]], [[4e12, 2e12, 1e12], [4e12, 2e12, 1e12]]
    assert allocate.knapsack(values, costs, 6e12) == [0, 1]
    assert allocate.knapsack([[0.0, 0.0]], [[2.0, 1.0]], 1.0) == [1]


def test_advice_puts_the_rank_where_it_is_needed():
    layers, kept = score(model(), candidates=LADDER)
    advice = choose(layers, "params", 0.6, kept=kept)
    assert advice.spent("params") <= 0.6
    assert str(advice.rules["2"]) == "low_rank:rank=4"
    plain = choose(layers, "params", 0.6, "uniform")
    assert len({str(spec) for spec in plain.rules.values()}) == 1
    assert advice.loss < 0.7 * plain.loss
    for change, layer in zip(sl.to_structured_(model(), advice.rules, "project"), layers, strict=False):
        index = [str(option.spec) for option in layer.options].index(str(change.spec))
        assert change.error**2 == pytest.approx(layer.losses[index], abs=1e-9)


def test_scoring_leaves_the_model_as_it_was():
    before, x = model().train(), torch.randn(6, 24)
    state = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    for by in scores.SCORES:
        score(before, candidates=LADDER[:2], by=by, batches=[x])
    assert before.training
    assert all(type(module) is not sl.StructuredLinear for module in before.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.state_dict().items())
    assert all(p.grad is None for p in before.parameters())


def test_fisher_is_the_change_of_the_outputs():
    """For a linear model the second order is all there is: the score is the mean squared change of its outputs."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(12, 10, bias=False), nn.Linear(10, 6, bias=False)).double()
    x = torch.randn(400, 12, dtype=torch.float64)
    scores_before, probes = scores.watch(linear, ["1"], [x]), scores.PROBES
    layer, _ = scores.projected(linear[1], sl.LowRank(2), None)
    found = scores.fisher(linear[1], layer, scores_before["1"])
    change = (linear(x) - layer(linear[0](x))).square().sum(1).mean().detach()
    assert found == pytest.approx(float(change), rel=4 / (400 * 6 * probes) ** 0.5)
    assert scores_before["1"].inputs.shape == (400, 10)
    with pytest.raises(ValueError, match="no batch reaches"):
        scores.watch(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), ["a"], [])


def test_the_probe_of_logits_is_their_log_likelihood():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    logits = torch.tensor([[0.3, -1.0, 2.0]], requires_grad=True)
    generator, total, draws = torch.Generator().manual_seed(0), torch.zeros(3), 4000
    for _ in range(draws):
        (grad,) = torch.autograd.grad(scores.probe(Output(logits), generator), logits)
        total += grad[0].square()
    p = logits[0].softmax(0).detach()
    assert torch.allclose(total / draws, p * (1 - p), atol=0.02)  # the diagonal of the Fisher matrix of a softmax


def test_the_tangent_kernel_is_that_of_its_definition():
    net, x = model().double(), torch.randn(5, 24, dtype=torch.float64)
    found = scores.tangent_kernel(net, ["0", "2"], x)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 8, generator=generator).double()
    rows = []
    for example in x:
        wanted = [*net[0].parameters(), *net[2].parameters()]
        grads = torch.autograd.grad((net(example[None]) * noise).sum() / 8**0.5, wanted)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    exact = torch.stack(rows)
    assert torch.allclose(found, exact @ exact.T, rtol=1e-10)
    assert scores.kernel_distance(found, found) == 0
    assert scores.kernel_distance(2 * found, found) == pytest.approx(1)


def test_ntk_ranks_a_nearer_matrix_first():
    layers, _ = score(model(), layers=["2"], candidates=LADDER, by="ntk", batches=[torch.randn(8, 24)])
    by_rank = dict(zip((str(option.spec) for option in layers[0].options), layers[0].losses, strict=True))
    assert by_rank["None"] == 0 < by_rank["low_rank:rank=12"]
    assert by_rank["low_rank:rank=4"] < by_rank["low_rank:rank=2"]


def times(plan):
    return 1.0 if plan.is_dense else (0.5 if analysis.num_params(plan) < 150 else 2.0)


@pytest.mark.parametrize("budget", ["flops", "time"])
def test_nothing_slower_than_dense_is_chosen_unless_weights_alone_count(budget):
    layers, _ = score(model(), candidates=LADDER, clock=times)
    found = choose(layers, budget, 0.7)
    for layer, i in zip(found.layers, found.chosen, strict=True):
        assert layer.options[i].seconds <= layer.options[0].seconds
    assert found.spent(budget) <= 0.7
    slow = choose(layers, "params", 0.6)
    assert any(layer.options[i].seconds > 1 for layer, i in zip(slow.layers, slow.chosen, strict=True))


def test_options_have_their_costs():
    found = options((64, 32), ("low_rank:rank=4", "low_rank:rank=64", "monarch:nblocks=7", *CANDIDATES), None)
    assert found[0] == Option(None, 2048, 4096, None)
    assert found[1] == Option(sl.LowRank(4), 384, 768, None)
    assert all(option.params < 2048 or option.flops < 4096 for option in found[1:])
    assert len({str(option.spec) for option in found}) == len(found) > 10
    with pytest.raises(ValueError, match="unknown structure"):
        options((64, 32), ("lowrank:rank=4",), None)


def test_clocks_measure_and_predict():
    dense, low = sl.Dense().plan(64, 64), sl.LowRank(4).plan(64, 64)
    here = measuring(torch.device("cpu"), torch.float32, 8, training=False)
    assert here(dense) > 0 < here(low)
    on_paper = predicting(HOPPER[2], 16384, training=True)
    wide = sl.Dense().plan(4096, 4096), sl.LowRank(512).plan(4096, 4096)
    assert on_paper(wide[1]) < on_paper(wide[0])


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_busy_cpu_slows_a_layer_and_the_dense_one_beside_it(training, monkeypatch):
    """After the first measurement all take twice as long; the ratio to dense is that of one moment."""
    calls, plain = [], lower(sl.Dense().plan(64, 32))

    def times(subject):
        calls.append(subject)
        busy = 1.0 if len(calls) == 1 else 2.0
        own, dense = 10.0 if subject.what == plain else 4.0, 99.0 if training else 10.0
        return {"eager": {"bmm": busy * own, "dense": busy * dense}, "graph": {}}

    monkeypatch.setattr("structlin.advise.options.measure.times", times)
    clock = measuring(torch.device("cpu"), torch.float32, 8, training)
    assert clock(sl.Dense().plan(64, 32)) == pytest.approx(10e-3)
    assert clock(sl.LowRank(4).plan(64, 32)) == pytest.approx(4e-3)
    assert clock(sl.LowRank(4).plan(64, 32)) == pytest.approx(4e-3)
    assert len(calls) == (3 if training else 2)


def test_pixelfly_splits_a_budget():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 128))
    layers, _ = score(net, candidates=pixelfly_candidates(net, 0.5))
    advice = choose(layers, "params", 0.5, "pixelfly")
    assert advice.rules == sl.sparsify(net, 0.5).rules
    assert 0.8 * 0.5 <= advice.spent("params") <= 0.5
    with pytest.raises(ValueError, match="was not scored"):
        choose(score(net, candidates=LADDER)[0], "params", 0.5, "pixelfly")
    with pytest.raises(ValueError, match="no pixelfly with blocks of"):
        pixelfly_candidates(net, 0.01)


def test_layers_that_cannot_change_stay_dense_and_say_why():
    tied = nn.ModuleDict({"a": nn.Linear(16, 16, bias=False), "b": nn.Embedding(16, 16), "c[0]": nn.Linear(16, 16)})
    tied["b"].weight = tied["a"].weight
    layers, kept = score(tied, candidates=["low_rank:rank=2"])
    assert [layer.name for layer in layers] == ["c[0]"]
    assert "shares its weight with b" in kept["a"]
    advice = choose(layers, "params", 0.5, kept=kept)
    assert "a stays dense: shares" in str(advice)
    (swap,) = sl.to_structured_(tied, advice.rules)
    assert swap.name == "c[0]"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": "memory"}, "allowed: params, flops, time"),
        ({"share": 0.0}, "allowed: above 0"),
        ({"policy": "greedy"}, "allowed: knapsack, uniform, pixelfly"),
        ({"budget": "time"}, "give a clock"),
        ({"share": 0.01}, "cheapest options"),
        ({"share": 0.01, "policy": "uniform"}, "no structure that fits all"),
    ],
    ids=str,
)
def test_choose_says_what_is_wrong(wrong, message):
    layers = [Scored("0", (8, 8), (Option(None, 64, 128, None), Option(sl.LowRank(2), 32, 64, None)), (0.0, 1.0))]
    with pytest.raises(ValueError, match=message):
        choose(layers, **{"budget": "params", "share": 0.5, **wrong})
    assert isinstance(choose(layers, "params", 0.5), Advice)


def test_score_says_what_is_wrong():
    for wrong, message in (
        ({"by": "loss"}, "allowed: projection, fisher, ntk"),
        ({"by": "fisher"}, "needs batches"),
        ({"layers": ["encoder.*"]}, "matches no linear layer"),
    ):
        with pytest.raises(ValueError, match=message):
            score(model(), **wrong)


# the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    from tiny_models import VOCABULARY, dense
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("advise") / "dense"
    dense("llama").save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


def test_the_command_writes_rules_that_convert_takes(folder, tmp_path, capsys):
    pytest.importorskip("scipy")
    rules, text = tmp_path / "rules.json", tmp_path / "text.txt"
    text.write_text(" ".join(f"w{7 * i % 64}" for i in range(300)))
    common = [str(folder), "--out", str(rules), "--candidates", *LADDER, "monarch:nblocks=4"]
    assert cli.main(["advise", *common, "--budget", "params=0.6"]) == 0
    out = capsys.readouterr().out
    assert "total" in out
    assert f"structlin convert {folder} DST --rules {rules}" in out
    first = json.loads(rules.read_text())
    assert cli.main(["convert", str(folder), str(tmp_path / "new"), "--rules", str(rules)]) == 0
    calibrated = ["--calibrate", str(text), "--calibrate-tokens", "128"]
    assert cli.main(["advise", *common, "--budget", "params=0.6", *calibrated]) == 0
    assert json.loads(rules.read_text()) != first


def test_the_command_takes_costs_of_another_device(folder, tmp_path, capsys):
    from test_costs import RESULTS

    few = [r for r in records.read(RESULTS / "bench-h200.json") if r["config"]["backend"] in ("linear", "triton")][:12]
    records.write(tmp_path / "bench.json", few)
    rules = tmp_path / "rules.json"
    arguments = [str(folder), "--out", str(rules), "--costs", str(tmp_path / "bench.json"), "--budget", "flops=1"]
    assert cli.main(["advise", *arguments, "--candidates", *LADDER]) == 0
    assert set(json.loads(rules.read_text()).values()) == {None}  # layers of 32 are bound by launches there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "memory=0.5"], "allowed: params|flops|time=SHARE"),
        (["--budget", "params=2"], "allowed: params|flops|time=SHARE"),
        (["--budget", "params=0.5", "--score", "fisher"], "--calibrate: is needed"),
        (["--budget", "params=0.5", "--score", "loss"], "--score: 'loss' is unknown"),
        (["--budget", "flops=0.5", "--policy", "pixelfly"], "--policy: pixelfly keeps"),
        (["--budget", "params=0.5", "--out", "rules.txt"], "--out: rules.txt is given"),
        (["--budget", "params=0.5", "--layers", "h.*"], "'h.*' matches no linear layer"),
        (["--budget", "params=0.001"], "cheapest options"),
        (
            ["--budget", "params=0.5", "--candidates", "dyad:nblocks=7"],
            "--candidates: dyad:nblocks=7 is given; allowed",
        ),
        (["--budget", "time=0.5", "--costs", "../empty.json"], "no record holds times of a layer"),
        (["--budget", "params=0.5", "--out", "gone/rules.json"], "--out: gone/rules.json is given; allowed: a file in"),
    ],
    ids=lambda value: "_".join(value).replace("--", "") if isinstance(value, list) else "says",
)
def test_the_command_says_what_is_wrong(arguments, message, folder, capsys, tmp_path, monkeypatch):
    records.write(tmp_path / "empty.json", [])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["advise", str(folder), "--candidates", "low_rank:rank=8", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().iterdir())
