"""``structlin tune``: choose backends ahead of time."""

from __future__ import annotations

import argparse

from ..options import fail, whole

DESCRIPTION = (
    "Measure the backends that auto chooses from, for structures at shapes, and keep the fastest in "
    "STRUCTLIN_CACHE_DIR (default: ~/.cache/structlin). Prints milliseconds from Python / in a graph."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``structlin tune``."""
    add = parser.add_argument
    add("problems", nargs="+", metavar="SPEC@OUTxIN", help="a structure at a shape, as in monarch:nblocks=4@3072x768")
    add("--tokens", type=whole, metavar="N", help="rows of the input; default: 16384 on a GPU, 256 on a CPU")
    add("--inference", action="store_true", help="choose for the forward pass alone; default: forward and backward")
    add("--dtype", metavar="NAME", help="of inputs and weights; default: bfloat16 on a GPU, float32 on a CPU")
    add("--device", metavar="cpu|cuda[:N]", help="default: cuda if there is a GPU, else cpu")


def main(options: argparse.Namespace, command: str) -> int:
    """Run ``structlin tune``; returns 0, or 2 for a bad option."""
    import torch

    from ..bench.problems import Problem
    from ..bench.settings import DTYPES, configure
    from ..nn import StructuredLinear
    from ..nn import tune as run

    try:
        # the same options with the same defaults as structlin bench
        settings = configure(
            problem=options.problems, tokens=options.tokens, dtype=options.dtype, device=options.device
        )
        layers: list[StructuredLinear] = []
        for problem in settings.problems:
            if not isinstance(problem, Problem):
                raise ValueError(f"{problem}: a block is given; allowed: SPEC@OUTxIN, as in monarch:nblocks=4@3072x768")
            if problem.plan.is_dense:
                raise ValueError(f"{problem} is given; allowed: structures, as a dense layer runs in one way")
            shape = problem.in_features, problem.out_features
            where = {"device": torch.device(settings.device), "dtype": DTYPES[settings.dtype]}
            layers.append(StructuredLinear(*shape, problem.spec, bias=False, **where))
    except ValueError as error:
        return fail(str(error), 2, "tune")
    print(run(layers, settings.tokens, not options.inference))
    return 0
