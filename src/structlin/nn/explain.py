"""What a layer runs for a number of tokens, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.blocks import Blocks
from ..ops.moves import Gather, Move, Relayout, has_triton, tensor_memory
from ..ops.schedule import Multiply, schedule
from ..plan import Plan
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
    guide = [Ran(f"dense {layer.out_features}x{layer.in_features}", "linear", "the guide, mixed in")]
    return Explanation(_own(layer, tokens) + guide * ("guide" in layer._modules))


def _own(layer: StructuredLinear, tokens: int) -> Explanation:
    forced = f"backend={layer.backend!r} was asked for"
    dense = Ran(f"dense {layer.out_features}x{layer.in_features}", "linear", "the structure is one dense weight")
    if layer.plan.is_dense:
        return Explanation([dense])
    if layer.backend == "dense":
        return Explanation([Ran(dense.what, "linear", forced + "; the weight is kept in inference")])
    (before, after), why = padding_copies(layer.plan), "the width does not fit the structure"
    copies = [[Ran(what, "copy", why) for what in ends] for ends in (before, after)]
    return Explanation([*copies[0], *_multiplied(layer, tokens), *copies[1]])


def padding_copies(plan: Plan) -> tuple[list[str], list[str]]:
    """The copies before and after what runs that a padded plan needs, in words; none where an end is not padded."""
    (rows, columns), (out_features, in_features) = plan.padded, (plan.out_features, plan.in_features)
    before = [f"pad the input from {in_features} to {columns}"] if columns > in_features else []
    after = [f"cut the output from {rows} to {out_features}"] if rows > out_features else []
    return before, after


def _multiplied(layer: StructuredLinear, tokens: int) -> Explanation:
    forced = f"backend={layer.backend!r} was asked for"
    if layer.backend in ("reference", "copy"):
        runs = {"reference": "einsum", "copy": "copies and bmm"}[layer.backend]
        equations = [stage.equation for chain in layer._program.chains for stage in chain.stages]
        return Explanation([Ran(equation, runs, forced) for equation in equations])
    if not layer._program.in_place:
        equations = [stage.equation for chain in layer._program.chains for stage in chain.stages]
        why = "a factor is stored in an order that no GEMM reads in place"
        return Explanation([Ran(equation, "copies where needed, and bmm", why) for equation in equations])
    return _lowered(layer, tokens)


def _lowered(layer: StructuredLinear, tokens: int) -> Explanation:
    factor = next(layer.parameters())
    sequences = schedule(layer._program.text, tokens, tensor_memory(factor.device, factor.dtype))
    rows = Explanation()
    for chain, sequence in zip(layer._program.chains, sequences, strict=True):
        if sequence.before is not None:
            rows.append(_copy(sequence.before, factor.device, "the first step cannot read the input in place"))
        for stage, step in zip(chain.stages, sequence.steps, strict=True):
            if isinstance(step.forward, Blocks):
                rows.append(Ran(stage.equation, "block-sparse kernel", "reads its blocks by the table"))
            elif isinstance(step.after, Relayout) and step.after.tokens_last:
                why = "stores its result tokens last, in the order of what comes next"
                rows.append(Ran(stage.equation, f"across kernel, {_size(step.forward)}", why))
            else:
                rows.append(Ran(stage.equation, _size(step.forward), "every role is one stride: in place"))
                if step.after is not None:
                    rows.append(_copy(step.after, factor.device, "no order serves both sides"))
    return rows


def _size(gemm: Multiply) -> str:
    assert not isinstance(gemm, Blocks)
    (*group, m, k), n = gemm.a[0], gemm.b[0][-1]
    return f"{f'bmm of {group[0]}' if group else 'mm'} {m}x{n}x{k}"


def _copy(relayout: Move, device: torch.device, why: str) -> Ran:
    if not isinstance(relayout, Relayout):
        what = "look up blocks of the input" if isinstance(relayout, Gather) else "add up blocks of the output"
        return Ran(what, "copy", "the structure is block-sparse")
    kernel = relayout.swap is not None and device.type == "cuda" and has_triton()
    return Ran("reorder the axes", "exchange kernel" if kernel else "copy", why)
