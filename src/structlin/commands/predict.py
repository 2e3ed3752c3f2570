"""``structlin predict``: time and memory of layers and whole decoders on a device, from its measured ceilings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ..options import check_file, fail, lacks, reason, whole_from

if TYPE_CHECKING:
    from ..costs import Ceilings
    from ..report.records import Record

DESCRIPTION = (
    "Predict what layers cost on a device, dense and structured, from what the device reaches: an H200, or the device "
    "whose records of structlin bench are given. A decoder's name in place of a shape (7b, 13b, 34b, 70b) predicts a "
    "training step of all of it on paper, on any number of GPUs. With --check: how far predictions are off for "
    "structures and shapes that the calibration did not see."
)


CONTEXT = 4096  # of a decoder's sequences, unless given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``structlin predict``."""
    add = parser.add_argument
    add("what", nargs="*", metavar="SPEC@OUTxIN|SPEC@7b", help="as in monarch:nblocks=16@4096x4096 or btt:rank=2@70b")
    add("--from", dest="source", metavar="FILE.json", help="records of structlin bench on the device, as of "
        "structlin bench --preset ceilings --backends bmm,triton; default: an H200 in half precision")  # fmt: skip
    add("--tokens", type=whole_from(1), default=16384, metavar="N", help="rows of the input; default: 16384")
    add("--inference", action="store_true", help="the forward pass of layers alone; default: forward and backward")
    add("--context", type=whole_from(1), metavar="N", help=f"of a decoder's sequences; default: {CONTEXT}")
    add("--gpus", type=whole_from(1), metavar="N", help="that train a decoder; default: 1")
    add("--tensor", type=whole_from(1), metavar="N", help="of these, how many share each layer; default: 1")
    add("--check", action="store_true", help="print errors of predictions for what the calibration did not see")
    add("--against", metavar="FILE.json", help="with --check: other records of the device, to be predicted too")
    add("--plot", metavar="FILE.png", help="with --check: the picture of it")


def main(options: argparse.Namespace, command: str) -> int:
    """Run ``structlin predict``; returns 0, 1 where a package is missing, 2 for bad input."""
    from ..costs import HOPPER
    from ..report import records

    needed = ["scipy"] * bool(options.source) + ["matplotlib"] * bool(options.plot)
    if missing := lacks(needed, "scaling"):
        return fail(missing, 1, "predict")
    try:
        _checked(options)
        if options.check:
            others = records.read(options.against) if options.against else None
            check(records.read(options.source), others, options.plot)
            return 0
        ceilings, device = HOPPER[2], "cuda"
        if options.source:
            from ..advise.ceilings import fit, measured

            found = records.read(options.source)
            ceilings, device = fit(measured(found)), found[0]["device"]["type"]
        print(table(options, ceilings, device))
    except ValueError as error:
        return fail(str(error), 2, "predict")
    except OSError as error:
        return fail(reason(error), 2, "predict")
    return 0


def _checked(options: argparse.Namespace) -> None:
    from ..advise.paper import DECODERS

    decoders = [text.rpartition("@")[2] in DECODERS for text in options.what]
    for name in ("context", "gpus", "tensor"):
        if getattr(options, name) is not None and not any(decoders):
            raise ValueError(f"--{name}: is for decoders, as in monarch:nblocks=16@7b")
    if options.inference and any(decoders):
        raise ValueError("--inference: is for layers; decoders are predicted in training")
    check_file("--plot", options.plot, ".png")
    if options.check and not options.source:
        raise ValueError("--check: needs --from FILE.json, records to check against")
    for name in ("plot", "against"):
        if getattr(options, name) and not options.check:
            raise ValueError(f"--{name}: is for --check")
    if bool(options.what) == options.check:
        raise ValueError("give layers as SPEC@OUTxIN or SPEC@7b, or --check")


def table(options: argparse.Namespace, ceilings: Ceilings, device: str) -> str:
    """What ``structlin predict`` prints for layers and decoders."""
    from ..advise.paper import DECODERS

    products = f"{ceilings.flops / 1e12:.4g} TFLOP/s (half of it at {ceilings.half:.0f})"
    lines = [f"ceilings: {products}, {ceilings.bandwidth / 1e9:.0f} GB/s, {1e6 * ceilings.launch:.1f} us for a launch"]
    for text in options.what:
        spec, _, size = text.rpartition("@")
        lines += (_decoder if size in DECODERS else _layer)(text, spec, size, options, ceilings, device)
    return "\n".join(lines)


def _layer(
    text: str, _spec: str, _size: str, options: argparse.Namespace, ceilings: Ceilings, device: str
) -> list[str]:
    from .. import costs
    from ..advise.ceilings import memory, predicted
    from ..bench.problems import read
    from ..structures import Dense

    problem, training = read(text), not options.inference
    shape = problem.out_features, problem.in_features
    dense = costs.seconds(costs.dense_work(*shape, options.tokens, training), ceilings)
    ours = predicted(problem.plan, options.tokens, ceilings, training, device)
    held = [
        memory(plan, options.tokens, ceilings.itemsize, training, device)
        for plan in (Dense().plan(*shape), problem.plan)
    ]
    return [
        f"{text}: {1e3 * ours:.3f} ms, dense {1e3 * dense:.3f} ms, {dense / ours:.2f} times as fast; "
        f"memory {held[1] / 1e6:.0f} MB, dense {held[0] / 1e6:.0f} MB"
    ]


def _decoder(
    text: str, spec: str, size: str, options: argparse.Namespace, ceilings: Ceilings, _device: str
) -> list[str]:
    from ..advise.paper import DECODERS, step
    from ..spec import parse

    cluster = {
        "tokens": options.tokens,
        "context": options.context or CONTEXT,
        "gpus": options.gpus or 1,
        "tensor": options.tensor or 1,
    }
    lines = ["{}, {gpus} GPUs in groups of {tensor}, {tokens} tokens a group, on paper:".format(text, **cluster)]
    for name, chosen in (("dense", None), (spec, parse(spec))):
        found = step(DECODERS[size], chosen, ceilings, **cluster)
        parts = ("linears", "rest", "communication", "optimizer")
        times = ", ".join(f"{part} {getattr(found, part):.3f}" for part in parts)
        lines.append(
            f"  {name}: {found.seconds:.3f} s ({times}); {found.params / 1e9:.2f}G weights; on each GPU "
            f"{found.weights / 1e9:.1f} GB of weights and state, {found.activations / 1e9:.1f} GB kept for backward"
        )
    return lines


def check(found: Sequence[Record], others: Sequence[Record] | None, plot: str | None) -> None:
    """Print the errors of predictions for layers that were held out of a fit to ``found``, and for all of ``others``;
    draw them into the file ``plot``."""
    from ..advise.ceilings import fit, held_out, measured, unseen
    from ..report.records import write_bytes

    layers = measured(found)
    checks = {f"held out by {by}": held_out(layers, by) for by in ("structure", "shape")}
    if others is not None:
        checks["other records"] = unseen(others, fit(layers))
    for how, held in checks.items():
        errors = sorted(one.error for one in held)
        worst = max(held, key=lambda one: one.error)
        print(
            f"{how}: {len(errors)} times, median error {median(errors):.1%}, nine of ten within "
            f"{errors[int(0.9 * len(errors))]:.1%}, worst {worst.error:.1%} ({worst.layer.structure} by "
            f"{worst.layer.backend})"
        )
    memory = sorted(
        abs(layer.predicted_bytes / layer.bytes - 1) for layer in layers if layer.bytes is not None and layer.bytes > 0
    )
    if memory:
        print(f"memory: median error {median(memory):.1%}, nine of ten within {memory[int(0.9 * len(memory))]:.1%}")
    if plot:
        from ..advise.plot import draw

        config = found[0]["config"]
        device = found[0]["device"]["name"]
        title = f"Predicted times of layers, {device}, {config['tokens']} tokens, {config['dtype']}"
        write_bytes(Path(plot), draw(checks, title))
