"""Predicted costs: the arithmetic of the model, and how near it comes to what an H200 measured."""

from pathlib import Path
from statistics import median

import pytest

import structlin as sl
from structlin import cli, costs
from structlin.advise import paper
from structlin.advise.ceilings import MODES, Measured, fit, held_out, measured, predicted, unseen
from structlin.costs import HOPPER, Ceilings, Product, Work
from structlin.ops.lowering import lower
from structlin.ops.moves import Kernels
from structlin.ops.work import peak_numbers, work
from structlin.report import records

RESULTS = Path(__file__).parents[1] / "results"
UNIT = Ceilings(flops=100.0, half=0.0, bandwidth=10.0, reorder=5.0, launch=0.0, itemsize=2)
NONE, ALL = Kernels(False, False), Kernels(True, True)


def run(plan, tokens, training=False, kernels=NONE):
    return work(lower(plan), plan.kept, tokens, kernels, training)


def test_a_product_takes_the_longer_of_flops_and_bytes_and_every_kernel_a_launch():
    by_flops, by_bytes = Product(1000.0, 10.0, 8), Product(10.0, 1000.0, 8)
    assert costs.seconds(Work((by_flops,)), UNIT) == 10.0
    assert costs.seconds(Work((by_bytes,)), UNIT) == 200.0
    half = Ceilings(100.0, 8.0, 10.0, 5.0, 1.0, 2)
    assert costs.seconds(Work((by_flops,)), half) == 2 * 10.0 + 1.0
    copies = Work((), copied=10.0, reordered=10.0, copies=2)
    assert costs.seconds(Work((by_flops,)) + copies, half) == 21.0 + 2 * (1.0 + 2.0) + 2.0


@pytest.mark.parametrize("wrong", [{"flops": 0.0}, {"bandwidth": float("nan")}, {"launch": -1.0}], ids=str)
def test_ceilings_are_positive(wrong):
    with pytest.raises(ValueError, match=r"allowed: positive"):
        Ceilings(**{**vars(UNIT), **wrong})


def test_work_counts_what_runs():
    plan = sl.LowRank(8).plan(64, 32)
    down, up = run(plan, 16).products
    assert down == (2.0 * 16 * 8 * 32, 16 * (32 + 8) + 8 * 32, 8)
    assert up == (2.0 * 16 * 8 * 64, 16 * (8 + 64) + 8 * 64, 8)
    assert len(run(plan, 16, training=True).products) == 6
    dense = sl.Dense().plan(64, 32)
    assert run(dense, 16) == costs.dense_work(64, 32, 16)
    composed = costs.composed_work(plan, 16)
    assert composed.products == (*costs.dense_work(64, 32, 16).products, Product(2.0 * 64 * 8 * 32, 8 * 96 + 2048, 8))
    assert costs.composed_work(plan, 16, keep=True) == costs.dense_work(64, 32, 16)


def test_work_counts_copies_padding_and_sums():
    twice = run(sl.Monarch(4).plan(64, 64), 16)
    assert twice.reordered == 2 * 2 * 16 * 64  # between the steps, and into the paper's order of the output
    assert run(sl.Monarch(4, order="blocked").plan(64, 64), 16).reordered == twice.reordered / 2
    assert run(sl.Monarch(4).plan(64, 64), 16, kernels=Kernels(True, False)).copied == twice.reordered
    padded = run(sl.Monarch(4, pad=True).plan(61, 64), 16)
    assert padded.copied == 16 * (61 + 64)
    sums = run((sl.BlockDiagonal(4) + sl.LowRank(4)).plan(64, 64), 16).products
    assert sums[-1].numbers == 16 * (4 + 2 * 64) + 4 * 64  # reads what it adds to
    assert run(sl.Pixelfly(block_size=4, butterfly_size=4).plan(64, 64), 16).copied > 0  # looks blocks up


def test_memory_is_counted():
    dense, low = sl.Dense().plan(64, 32), sl.LowRank(8).plan(64, 32)
    assert peak_numbers(lower(dense), 16, NONE) == 16 * 64
    assert peak_numbers(lower(dense), 16, NONE, training=True) == 16 * (64 + 32) + 64 * 32
    assert peak_numbers(lower(low), 16, NONE) == 16 * (64 + 8)
    assert peak_numbers(lower(low), 16, NONE, training=True) == 16 * (64 + 8 + 8 + 32) + 8 * 96


@pytest.fixture(scope="module")
def layers() -> list[Measured]:
    return measured(records.read(RESULTS / "bench-h200.json"))


def test_the_constants_are_the_fit_to_the_record(layers):
    found = fit(layers)
    assert found.itemsize == 2
    for name, value in vars(HOPPER[2]).items():
        assert vars(found)[name] == pytest.approx(value, rel=0.01), name


@pytest.mark.parametrize("by", ["structure", "shape"])
def test_predictions_hold_for_what_the_fit_did_not_see(layers, by):
    few = [layer for layer in layers if layer.backend != "bmm"]  # to save time
    assert median(check.error for check in held_out(few, by)) <= 0.15


def test_predictions_hold_for_a_record_that_nothing_was_fitted_to():
    found = unseen(records.read(RESULTS / "rows-h200.json"), HOPPER[2])
    assert {check.layer.backend for check in found} == {"linear", "auto"}
    assert median(check.error for check in found if check.layer.backend == "auto") <= 0.06
    assert all(check.error <= 0.15 for check in found if check.layer.structure.startswith("dyad"))
    with pytest.raises(ValueError, match="bfloat16 is measured; the device is calibrated for 4 bytes"):
        unseen(records.read(RESULTS / "rows-h200.json"), HOPPER[4])
    with pytest.raises(ValueError, match="no record holds times"):
        unseen(records.read(RESULTS / "blocks-h200.json"), HOPPER[2])


def test_memory_is_that_of_the_record(layers):
    off = [abs(layer.predicted_bytes / layer.bytes - 1) for layer in layers if layer.bytes]
    assert sum(error < 0.001 for error in off) >= 0.95 * len(off)


def test_a_fit_finds_the_ceilings_that_made_the_times(layers):
    truth = Ceilings(3e14, 60.0, 2e12, 5e11, 3e-6, 2)
    made = [layer._replace(seconds=costs.seconds(layer.work, truth)) for layer in layers[::4]]
    found = fit(made)
    for name, value in vars(truth).items():
        assert vars(found)[name] == pytest.approx(value, rel=0.02), name
    with pytest.raises(ValueError, match="ten or more"):
        fit(made[:4])
    with pytest.raises(ValueError, match="no record holds times"):
        measured([])


def test_auto_is_the_faster_of_steps_and_one_weight():
    train = sl.TensorTrain(cores=2, rank=8).plan(4096, 4096)
    steps = costs.seconds(run(train, 16384, True, ALL), HOPPER[2])
    assert predicted(train, 16384, HOPPER[2]) < steps
    joined = sl.Dyad(nblocks=4).plan(4096, 1024)  # writes its output once
    assert predicted(joined, 16384, HOPPER[2]) < 0.9 * costs.seconds(run(joined, 16384, True, ALL), HOPPER[2])
    dense = sl.Dense().plan(4096, 1024)
    assert predicted(dense, 64, HOPPER[2]) == costs.seconds(costs.dense_work(4096, 1024, 64, True), HOPPER[2])


def test_decoders_have_the_sizes_of_their_names():
    for name, billions in (("7b", 6.74), ("13b", 13.02), ("70b", 68.98)):
        found = paper.step(paper.DECODERS[name], None, HOPPER[2])
        assert found.params / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_cluster_shares_work_and_pays_for_talking():
    size = paper.DECODERS["7b"]
    alone, shared = (paper.step(size, None, HOPPER[2], gpus=gpus, tensor=gpus) for gpus in (1, 8))
    assert alone.communication == 0 < shared.communication
    assert shared.linears == pytest.approx(alone.linears / 8)
    assert shared.weights < alone.weights / 7
    many = paper.step(size, None, HOPPER[2], gpus=64, tensor=8)
    assert many.optimizer == pytest.approx(shared.optimizer / 8)
    with pytest.raises(ValueError, match="both must divide"):
        paper.step(size, None, HOPPER[2], gpus=6, tensor=4)


def test_blocks_are_predicted_as_measured():
    for record in records.read(RESULTS / "blocks-h200.json"):
        config = record["config"]
        if config["backend"] == "recompute":
            continue
        width, context = config["out_features"], int(config["problem"].rpartition("x")[2])
        spec = None if config["backend"] == "linear" else sl.spec.parse(config["structure"].removeprefix("block "))
        block = paper.Decoder(1, width, 4 * width, width // 64, width // 64, 0, gated=False)
        ms = 1e3 * sum(paper.block_seconds(block, spec, config["tokens"], context, HOPPER[2]))
        assert ms == pytest.approx(record["metrics"]["graph_forward_backward_ms"], rel=0.15)


def test_predict_prints_layers_and_decoders(capsys):
    assert cli.main(["predict", "monarch:nblocks=16@4096x4096", "low_rank:rank=0.25@7b", "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "monarch:nblocks=16@4096x4096: 0.636 ms, dense 2.154 ms, 3.38 times as fast" in out
    assert "dense: " in out
    assert "8 GPUs in groups of 1" in out


def test_predict_checks_and_draws(capsys, tmp_path):
    few = [r for r in records.read(RESULTS / "bench-h200.json") if r["config"]["backend"] in ("linear", "triton")][:24]
    records.write(tmp_path / "few.json", few)
    given = ["--from", str(tmp_path / "few.json"), "--against", str(RESULTS / "rows-h200.json")]
    assert cli.main(["predict", "--check", *given, "--plot", str(tmp_path / "a.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == [
        "held out by structure", "held out by shape", "other records"
    ]  # fmt: skip
    assert "52 times" in lines[2]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give layers as SPEC@OUTxIN"),
        (["monarch@12b"], "not of the form SPEC@OUTxIN"),
        (["--check"], "--check: needs --from"),
        (["dyad@64x64", "--plot", "a.png"], "--plot: is for --check"),
        (["dyad@64x64", "--against", "a.json"], "--against: is for --check"),
        (["dyad@64x64", "--tokens", "0"], "--tokens: 0 is given"),
        (["dyad@64x64", "--tokens", "9" * 400], "allowed: whole numbers"),
        (["dyad@64x64", "--gpus", "8"], "--gpus: is for decoders"),
        (["dyad@7b", "--inference"], "--inference: is for layers"),
        (["dyad@64x64", "--from", "empty.json"], "no record holds times of a layer"),
        (["--check", "--from", "empty.json", "--plot", "a.txt"], "--plot: a.txt is given"),
        (["dyad@64x64", "--from", "absent.json"], "absent.json: No such file"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "says",
)
def test_predict_says_what_is_wrong(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records.write("empty.json", [])
    try:
        status = cli.main(["predict", *arguments])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_modes_are_those_of_bench():
    from structlin.bench.contenders import MODES as BENCH

    assert tuple(MODES) == BENCH
