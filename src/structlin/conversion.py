"""What a conversion of a model did or would do to each layer, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import analysis
from .plan import Plan
from .spec import Spec


@dataclass(frozen=True)
class Swap:
    """One layer of a `Conversion`: FLOPs are forward ones per token, parameters without the bias.

    ``padded`` is the (out_features, in_features) of the matrix where it is padded. Padding is in all costs. ``error``
    is ``|W - S| / |W|`` in the Frobenius norm after a projection of ``W``, or ``|(W - S) x| / |W x|`` over the inputs
    that it was fitted to; None where nothing was projected. ``speedup`` is the time of the dense layer over that of the
    structured one on the device of the model, "measured" or by the cost "rule", as ``known_by`` says (see
    `structlin.nn.worth.speedup`); None for a mixture of experts, which is not judged.
    """

    name: str
    in_features: int
    out_features: int
    spec: Spec
    params: int
    dense_params: int
    flops: int
    dense_flops: int
    padded: tuple[int, int] | None = None
    error: float | None = None
    speedup: float | None = field(default=None, compare=False)
    known_by: str | None = field(default=None, compare=False)


class Conversion(list[Swap]):
    """The layers that `to_structured_` swapped, or would swap; prints as a table with totals."""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "shape", "spec", "params", "of dense", "FLOPs/token", "of dense")]
        rows += [_row(s.name, _shape(s), str(s.spec), [s]) for s in self]
        rows += [_row("total", "", "", self)]
        if any(s.speedup is not None for s in self):
            rows = [(*row, pays) for row, pays in zip(rows, ["pays", *map(_pays, self), ""], strict=True)]
        if any(s.error is not None for s in self):
            errors = ["error", *("" if s.error is None else f"{s.error:.4f}" for s in self), ""]
            rows = [(*row, error) for row, error in zip(rows, errors, strict=True)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _pays(swap: Swap) -> str:
    if swap.speedup is None:
        return "-"
    how = "by the rule" if swap.known_by == "rule" else swap.known_by
    return f"{'yes' if swap.speedup > 1 else 'no'}: {swap.speedup:.2f}x {how}"


def _shape(swap: Swap) -> str:
    padded = f" padded to {swap.padded[0]}x{swap.padded[1]}" if swap.padded else ""
    return f"{swap.out_features}x{swap.in_features}{padded}"


def _row(name: str, shape: str, spec: str, swaps: list[Swap]) -> tuple[str, ...]:
    params, flops = sum(s.params for s in swaps), sum(s.flops for s in swaps)
    dense_params, dense_flops = sum(s.dense_params for s in swaps), sum(s.dense_flops for s in swaps)
    return (
        name, shape, spec,
        f"{params:,}", f"{params / max(1, dense_params):.1%}",
        f"{flops:,}", f"{flops / max(1, dense_flops):.1%}",
    )  # fmt: skip


def swap(name: str, spec: Spec, plan: Plan, speedup: float | None = None, known_by: str | None = None) -> Swap:
    """The entry of a layer that gets the matrix of ``plan``; for what follows see `Swap`."""
    size = plan.in_features * plan.out_features
    return Swap(
        name, plan.in_features, plan.out_features, spec,
        analysis.num_params(plan), size, analysis.flops(plan), 2 * size, plan.padded if plan.kept else None,
        speedup=speedup, known_by=known_by,
    )  # fmt: skip
