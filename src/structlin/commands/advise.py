"""``structlin advise``: structures and sizes for the layers of a model folder, under a budget."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import check_file, fail, lacks, reason, whole_from
from ..report.records import write_bytes

if TYPE_CHECKING:
    from torch import nn

    from ..advise.options import Clock

DESCRIPTION = (
    "Choose a structure and a size for every linear layer of the model in the folder MODEL so that the layers together "
    "keep within a budget and lose as little as possible. Prints a table and writes rules for structlin convert. "
    "Nothing slower than dense is chosen, unless the budget is of parameters alone."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``structlin advise``."""
    add = parser.add_argument
    add("source", metavar="MODEL", help="folder that save_pretrained wrote, with safetensors")
    add("--budget", required=True, metavar="params=0.5|flops=0.4|time=0.7", help="share of the dense layers' cost")
    add("--out", default="rules.json", metavar="FILE.json", help="the rules; default: rules.json")
    add("--layers", nargs="+", default=["*"], metavar="GLOB", help="layers to consider; default: all linear layers")
    add("--candidates", nargs="+", metavar="SPEC", help="structures to try; default: a ladder of sizes of several")
    add("--calibrate", nargs="+", metavar="FILE", help="texts to run the model on")
    add("--calibrate-tokens", type=whole_from(1), default=2048, metavar="N", help="of these texts; default: 2048")
    add("--score", metavar="projection|fisher|ntk", help="what is minimised: the share of each weight that is lost, "
        "the change of the model's outputs, or that of its tangent kernel; the last two need --calibrate; default: "
        "fisher with --calibrate, else projection")  # fmt: skip
    add("--fit", default="weights", metavar="weights|inputs", help="what projections are nearest to, as structlin "
        "convert without and with --calibrate; default: weights")  # fmt: skip
    add("--policy", default="knapsack", metavar="knapsack|uniform|pixelfly", help="the best allocation, one structure "
        "for all layers, or pixelfly at one density for a budget of parameters; default: knapsack")  # fmt: skip
    add("--costs", metavar="FILE.json", help="records of structlin bench of the device that the model is for; default: "
        "time layers on this machine, where a budget needs times")  # fmt: skip
    add("--device", metavar="cpu|cuda[:N]", help="where to time layers; default: cuda if there is a GPU, else cpu")
    add(
        "--tokens",
        type=whole_from(1),
        metavar="N",
        help="rows to time layers at; default: 16384 on a GPU, 256 on a CPU",
    )
    add("--training", action="store_true", help="time forward and backward; default: inference")


def main(options: argparse.Namespace, command: str) -> int:
    """Run ``structlin advise``; returns 0, 1 where a package or the machine fails, 2 for bad input."""
    if missing := lacks(("transformers", "accelerate"), "hf") or lacks(("scipy",), "scaling"):
        return fail(missing, 1, "advise")
    try:
        work(options)
    except ValueError as error:
        return fail(str(error), 2, "advise")
    except OSError as error:
        return fail(reason(error), 1, "advise")
    except RuntimeError as error:
        return fail(f"{type(error).__name__}: {error}", 1, "advise")
    except KeyboardInterrupt:
        return fail("interrupted; nothing is written", 130, "advise")
    return 0


def read_budget(text: str) -> tuple[str, float]:
    """``"params=0.5"`` as its two parts.

    Raises:
        ValueError: for another form, an unknown cost or a share that is not above 0 and at most 1.
    """
    from ..advise.advice import BUDGETS

    name, _, share = text.partition("=")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if name not in BUDGETS or not 0 < value <= 1:
        raise ValueError(f"--budget: {text!r} is given; allowed: {'|'.join(BUDGETS)}=SHARE, above 0 and at most 1")
    return name, value


def work(options: argparse.Namespace) -> None:
    """Score the layers, choose, print and write.

    Raises:
        ValueError: for bad options, a folder that is no dense model, or a budget that nothing meets.
    """
    from ..advise.advice import POLICIES, choose, pixelfly_candidates, score
    from ..advise.options import CANDIDATES
    from ..advise.scores import SCORES

    budget, share = read_budget(options.budget)
    options.score = options.score or ("fisher" if options.calibrate else "projection")
    for name, allowed in (("score", SCORES), ("policy", POLICIES), ("fit", ("weights", "inputs"))):
        if getattr(options, name) not in allowed:
            raise ValueError(f"--{name}: {getattr(options, name)!r} is unknown; allowed: {', '.join(allowed)}")
    if not options.calibrate and (options.score != "projection" or options.fit == "inputs"):
        raise ValueError("--calibrate: is needed for --score fisher and ntk, and for --fit inputs")
    if options.policy == "pixelfly" and budget != "params":
        raise ValueError("--policy: pixelfly keeps to a budget of parameters; give --budget params=SHARE")
    check_file("--out", options.out, ".json")
    model, batches = load(Path(options.source), options.calibrate, options.calibrate_tokens)
    candidates: Any = options.candidates or CANDIDATES
    check_candidates(model, options.layers, options.candidates or ())
    if options.policy == "pixelfly":
        candidates = pixelfly_candidates(model, share, options.layers)
    layers, kept = score(
        model, layers=options.layers, candidates=candidates, by=options.score, batches=batches,
        fitted=options.fit == "inputs", clock=None if budget == "params" else clock(options), progress=True,
    )  # fmt: skip
    advice = choose(layers, budget, share, options.policy, kept)
    write_bytes(options.out, advice.to_json().encode())
    print(advice)
    print(f"{options.out}: structlin convert {options.source} DST --rules {options.out}")


def check_candidates(model: nn.Module, layers: list[str], candidates: Sequence[str]) -> None:
    """See that each candidate is one for some layer.

    Raises:
        ValueError: for one that fits no layer, or has more weights and FLOPs than any that it fits.
    """
    from ..advise.options import options
    from ..surgery import convertible

    shapes = sorted(set(convertible(model, layers)[0].values())) if candidates else []
    for text in candidates:
        if all(len(options(shape, [text], None)) == 1 for shape in shapes):
            sizes = ", ".join(f"{rows}x{columns}" for rows, columns in shapes)
            raise ValueError(
                f"--candidates: {text} is given; allowed: structures that fit one of {sizes}, and save there"
            )


def load(source: Path, files: list[str] | None, tokens: int) -> tuple[Any, list[dict[str, Any]]]:
    """The dense model in a folder, in float32, and batches of the texts for it.

    Raises:
        ValueError: as `structlin.hf.convert` for its source, and for texts that cannot be read or are too short.
    """
    import torch
    import transformers

    from ..hf.calibrate import text_batches
    from ..hf.convert import open_dense

    empty, _ = open_dense(source)
    model = getattr(transformers, type(empty).__name__).from_pretrained(source, dtype=torch.float32)
    return model, text_batches(source, model.config, files, tokens) if files else []


def clock(options: argparse.Namespace) -> Clock:
    """What gives the seconds of a layer: predictions from records, or this machine."""
    import torch

    from ..advise.ceilings import fit, measured
    from ..advise.options import measuring, predicting
    from ..bench.settings import DEFAULT_DTYPE, DTYPES, configure
    from ..report import records

    if options.costs:
        found = records.read(options.costs)
        ceilings = fit(measured(found))
        tokens = options.tokens or next(r["config"]["tokens"] for r in found if "tokens" in r["config"])
        return predicting(ceilings, tokens, options.training, found[0]["device"]["type"])
    settings = configure(tokens=options.tokens, device=options.device)
    device = torch.device(settings.device)
    return measuring(device, DTYPES[DEFAULT_DTYPE[device.type]], settings.tokens, options.training)
