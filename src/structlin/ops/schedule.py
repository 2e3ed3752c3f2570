"""The GEMMs and copies of a program for a number of tokens, worked out once and then replayed.

Everything that depends on shapes alone (sizes and strides of every operand, forward and in both gradients) is
computed here, so that running a layer costs little more host time than the calls it makes.

Where the order that one step writes is not the one that the next step reads, the first of these that is possible
happens: the GEMM itself writes the other order, with the tokens innermost, since each feature is a row of its own then;
a kernel of ours does so where the GEMM cannot; or the result is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod

from torch import Tensor

from ..plan import Axes
from .blocks import blocks
from .equation import parse
from .gemm import plan_contiguous
from .lowering import Chain, Stage, program
from .moves import Kernels, Move, Relayout, both_ways, has_triton, looked_up, relayout
from .products import Gemm, Multiply, Plain


@dataclass(frozen=True)
class Both:
    """Both gradients of a step in one kernel: tokens innermost in its input and its result, and groups small."""

    sizes: tuple[int, int, int, int]  # groups, tokens, n and k
    # of d, z, the gradient of z, and w, but for those of their tokens
    strides: tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int, int]]

    def run(self, d: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of ``z`` and ``w`` for that of the result."""
        from ..kernels.gradients import gradients

        return gradients(d, z, w, self.sizes, self.strides)


@dataclass(frozen=True)
class Step:
    """One factor: the product with it, its two gradients, and what reorders the result (``undo`` its gradient).

    ``both`` does what both gradients do, where that is faster.
    """

    forward: Multiply
    dgrad: Multiply
    wgrad: Multiply
    after: Move | None
    undo: Move | None
    both: Both | None = None


@dataclass(frozen=True)
class Steps:
    """One term: what reorders the input (``undo`` its gradient), then the steps."""

    before: Move | None
    undo: Move | None
    steps: tuple[Step, ...]


@lru_cache(maxsize=1024)
def schedule(text: str, tokens: int, kernels: Kernels) -> tuple[Steps, ...]:
    """Everything that the program ``text`` runs for ``tokens`` tokens, with these ``kernels``."""
    what = program(text)
    sizes = {"t": tokens, **what.sizes}
    return tuple(_chain(chain, sizes, kernels) for chain in what.chains)


@cache
def saved_widths(text: str, kernels: Kernels) -> list[list[int]]:
    """Of each term the elements per token of every tensor besides the input that the backward pass needs."""
    what = program(text)
    widths: list[list[int]] = []
    for chain in what.chains:
        moved = chain.stages[0].relayout is not None or (
            chain.gather and not (kernels.tensor_memory and blocks(chain, what.sizes))
        )
        saved = chain.stages if moved else chain.stages[1:]
        widths.append([prod(what.sizes[axis] for axis in parse(stage.equation)[0][1:]) for stage in saved])
    return widths


@cache
def gradient_widths(text: str) -> list[int]:
    """Elements per token of the gradient of each term's first product; 0 where it is that of the result itself."""
    what = program(text)
    same = [len(chain.stages) == 1 and chain.relayout is None and chain.collect is None for chain in what.chains]
    ends = [parse(chain.stages[0].equation)[2][1:] for chain in what.chains]
    return [0 if own else prod(what.sizes[axis] for axis in end) for own, end in zip(same, ends, strict=True)]


def _chain(chain: Chain, sizes: dict[str, int], kernels: Kernels) -> Steps:
    sparse = blocks(chain, sizes) if kernels.tensor_memory and sizes["t"] else None
    if sparse is not None:
        return Steps(None, None, (Step(*sparse, None, None),))
    first, end = parse(chain.stages[0].equation)[0], parse(chain.stages[-1].equation)[2]
    before, undo = both_ways(_shape(first, sizes), chain.stages[0].relayout, kernels.exchange)
    written = _shape(end, sizes)
    ordered = tuple(written[i] for i in chain.relayout or range(len(end)))
    after, undo_after = both_ways(ordered, chain.relayout, kernels.exchange)
    ends: list[Move | None] = [before, undo, after, undo_after]
    if chain.gather is not None:
        ends[:2] = looked_up(sizes["t"], chain.in_features, chain.gather, before, undo)
    if chain.collect is not None:
        ends[2:] = looked_up(sizes["t"], chain.out_features, chain.collect, undo_after, after)[::-1]
    steps = _steps(chain.stages, (ends[2], ends[3]), sizes, kernels)
    return Steps(ends[0], ends[1], steps)


def _steps(
    stages: tuple[Stage, ...], ends: tuple[Move | None, Move | None], sizes: dict[str, int], kernels: Kernels
) -> tuple[Step, ...]:
    """The steps of a chain, with as many intermediates stored tokens last as that saves a copy for."""
    equations = [parse(stage.equation) for stage in stages]
    last = [False] * (len(stages) - 1)
    steps = _planned(equations, last, ends, sizes, kernels)
    assert steps is not None
    for i, stage in enumerate(stages[1:]):
        if stage.relayout is not None and sizes["t"]:
            last[i] = True
            better = _planned(equations, last, ends, sizes, kernels)
            last[i] = better is not None
            steps = better or steps
    return steps


def _planned(
    equations: list[tuple[Axes, Axes, Axes]],
    last: list[bool],
    ends: tuple[Move | None, Move | None],
    sizes: dict[str, int],
    kernels: Kernels,
) -> tuple[Step, ...] | None:
    """The steps when these intermediates are stored tokens last; None if a step could not do so without a copy."""
    orders = [_last(equation[0]) if late else equation[0] for equation, late in zip(equations[1:], last, strict=True)]
    reads = [equations[0][0], *orders]
    orders = [_last(equation[2]) if late else equation[2] for equation, late in zip(equations, last, strict=False)]
    gradients = [*orders, equations[-1][2]]
    found = []
    for i, (x, w, y) in enumerate(equations):
        forward = _to(reads[i], w, y, reads[i + 1] if i + 1 < len(reads) else y, sizes, kernels)
        dgrad = _to(gradients[i], w, x, gradients[i - 1] if i else x, sizes, kernels)
        wgrad = _gemm(reads[i], gradients[i], w, sizes)
        if forward is None or dgrad is None or wgrad is None:
            return None
        found.append((forward, dgrad, wgrad))
    steps = []
    for i, (forward, dgrad, wgrad) in enumerate(found):
        after, undo = (forward[1], found[i + 1][1][1]) if i + 1 < len(found) else ends
        both = _both(dgrad[0], wgrad) if i and dgrad[1] is None and kernels.tensor_memory else None
        steps.append(Step(forward[0], dgrad[0], wgrad, after, undo, both))
    return tuple(steps)


def _both(dgrad: Gemm, wgrad: Gemm) -> Both | None:
    """One kernel for these, if there is one."""
    if len(dgrad.a[0]) != 3 or not has_triton():
        return None
    from ..kernels.gradients import fits

    (groups, tokens, n), (d_group, d_token, d_n) = dgrad.a
    (_, _, k), (dz_group, dz_token, dz_k) = dgrad.c
    z_shape, (z_group, z_k, z_token) = wgrad.a
    if (d_token, z_token, dz_token) != (1, 1, 1) or not fits(tokens, n, k):
        return None
    if z_shape != (groups, k, tokens) or wgrad.b != dgrad.a:
        return None
    group, by_n, by_k = dgrad.b[1]
    strides = (d_group, d_n), (z_group, z_k), (dz_group, dz_k), (group, by_n, by_k)
    return Both((groups, tokens, n, k), strides)


def _to(
    a: Axes, b: Axes, native: Axes, target: Axes, sizes: dict[str, int], kernels: Kernels
) -> tuple[Gemm, Relayout | None] | None:
    """``a, b -> target``: in place, or in the native order and moved; None if that would need another copy."""
    gemm = _gemm(a, b, target, sizes)
    if gemm is not None:
        return gemm, None
    gemm = _gemm(a, b, native, sizes)
    if gemm is None:
        return None
    move = relayout(_shape(native, sizes), tuple(map(native.index, target)), kernels.exchange)
    if move.tokens_last and not (kernels.tensor_memory and store_fits(gemm, move)):
        return None
    return gemm, move


def store_fits(gemm: Gemm, move: Relayout) -> bool:
    """Whether the kernel that stores across can write what ``move`` would make of the result."""
    if gemm.plain is None or move.swap is None or not has_triton():
        return False
    from ..kernels.across import fits

    groups, second, run = move.swap
    return (
        groups == gemm.plain.groups and second * run == gemm.plain.n and fits(move.shape[0], gemm.plain.k, second * run)
    )


def _last(axes: Axes) -> Axes:
    return (*axes[1:], axes[0])


def _shape(axes: Axes, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[axis] for axis in axes)


def _gemm(a: Axes, b: Axes, c: Axes, sizes: dict[str, int]) -> Gemm | None:
    """``a, b -> c`` over contiguous tensors; None if one of them would have to be copied."""
    plan = plan_contiguous(a, b, c, sizes)
    if plan.a is None or plan.b is None or plan.c is None:
        return None
    g, m, n, k = plan.sizes
    first = 1 if g == 1 else 0  # a single group is a plain matrix product
    plain = None
    if m == sizes["t"] and plan.b in ((n * k, 1, k), (n * k, n, 1)):
        if plan.a == (k, g * k, 1):
            plain = Plain(g, k, n, False, plan.b[1] == 1)
        elif plan.a == (k * m, 1, m):
            plain = Plain(g, k, n, True, plan.b[1] == 1)
    return Gemm(
        ((g, m, k)[first:], plan.a[first:]),
        ((g, k, n)[first:], plan.b[first:]),
        ((g, m, n)[first:], plan.c[first:]),
        _shape(c, sizes),
        plain,
    )
