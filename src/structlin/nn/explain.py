"""What a layer runs for a number of tokens, and why."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..ops.equation import parse
from ..ops.gemm import plan_gemm
from .linear import StructuredLinear


@dataclass(frozen=True)
class Ran:
    """One thing that runs in the forward pass: ``what`` (an equation or a copy), by which ``backend``, and ``why``."""

    what: str
    backend: str
    why: str


class Explanation(list[Ran]):
    """The forward pass of a layer in order; prints as a table."""

    def __str__(self) -> str:
        rows = [("step", "runs as", "why"), *((r.what, r.backend, r.why) for r in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def explain(layer: StructuredLinear, tokens: int) -> Explanation:
    """What the forward pass of ``layer`` runs for ``tokens`` tokens, in order, with the reason for each choice.

    Raises:
        ValueError: for fewer than one token.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be a positive whole number")
    shape = f"{layer.out_features}x{layer.in_features}"
    forced = f"backend={layer.backend!r} was asked for"
    if layer.plan.is_dense:
        return Explanation([Ran(f"dense {shape}", "linear", "the structure is one dense weight")])
    if layer.backend == "dense":
        return Explanation([Ran(f"dense {shape}", "linear", forced + "; the weight is kept in inference")])
    rows = Explanation()
    names = iter(layer.plan.factors)
    for chain in layer._program.chains:
        for stage in chain.stages:
            if stage.relayout is not None:
                rows.append(Ran(_order(stage.equation), "copy", "the next step cannot read it in place otherwise"))
            rows.append(_step(layer, tokens, next(names), stage.equation, forced))
        if chain.relayout is not None:
            rows.append(Ran("order of the output features", "copy", "the last step cannot write it in place"))
    rows += [Ran("sum of terms", "add", "")] * (len(layer._program.chains) - 1)
    return rows


def _order(equation: str) -> str:
    return "reorder to " + " ".join(parse(equation)[0])


def _step(layer: StructuredLinear, tokens: int, name: str, equation: str, forced: str) -> Ran:
    if layer._step_backend == "reference":
        return Ran(equation, "einsum", forced)
    axes, _, _ = parse(equation)
    x_shape = (tokens, *(layer.plan.sizes[axis] for axis in axes[1:]))
    x_stride = tuple(prod(x_shape[i + 1 :]) for i in range(len(x_shape)))
    factor = layer.get_parameter(name)
    gemm = plan_gemm(equation, x_shape, x_stride, tuple(factor.shape), factor.stride())
    g, m, n, k = gemm.sizes
    runs = f"{'mm' if g == 1 else f'bmm of {g}'} {m}x{n}x{k}"
    if layer._step_backend == "copy":
        return Ran(equation, f"copies, {runs}", forced)
    if gemm.copies:
        operands = {"a": "its input", "b": "its factor", "c": "its output"}
        return Ran(
            equation, f"copies, {runs}", f"{', '.join(operands[c] for c in gemm.copies)}: no single stride per role"
        )
    return Ran(equation, runs, "every role is one stride: read and written in place")
