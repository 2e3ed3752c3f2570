"""What a layer runs for a number of tokens, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ..ops import choice, joined
from ..ops.blocks import Blocks
from ..ops.lowering import Program
from ..ops.moves import Gather, Move, Relayout, kernels_on
from ..ops.products import Multiply, pairs
from ..ops.schedule import schedule
from ..plan import Plan
from .linear import StructuredLinear


@dataclass(frozen=True)
class Ran:
    """One thing that runs in the forward pass: ``what`` (an equation or a copy), by which ``backend``, and ``why``."""

    what: str
    backend: str
    why: str


class Explanation(list[Ran]):
    """The forward pass of a layer in order, and what backend "auto" chose and why, if asked; prints as a table."""

    def __init__(self, rows: Iterable[Ran] = (), choice: str | None = None) -> None:
        super().__init__(rows)
        self.choice = choice

    def __str__(self) -> str:
        rows = [("step", "runs as", "why"), *((r.what, r.backend, r.why) for r in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*([] if self.choice is None else [f"auto runs {self.choice}"]), *lines])


def explain(layer: StructuredLinear, tokens: int, training: bool | None = None) -> Explanation:
    """What the forward pass of ``layer`` runs for ``tokens`` tokens, in order, with the reason for each choice.

    Measures nothing: backend "auto" is explained as it would choose with what is known by now, in training or
    inference (by default as the layer stands), launched from Python.

    Raises:
        ValueError: for fewer than one token.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be a positive whole number")
    guide = [Ran(f"dense {layer.out_features}x{layer.in_features}", "linear", "the guide, mixed in")]
    found, backend, why = None, layer.backend, f"backend={layer.backend!r} was asked for"
    if backend == "auto" and not layer.plan.is_dense:
        found = choice.look(layer_key(layer, tokens, layer.training if training is None else training))
        backend, why = found.eager, "auto chose it"
    rows = _own(layer, tokens, backend, why) + guide * ("guide" in layer._modules)
    return Explanation(rows, None if found is None else str(found))


def layer_key(layer: StructuredLinear, tokens: int, training: bool) -> choice.Key:
    """What the choice of backend for this layer, on its device and in its dtype, goes by."""
    factor: Tensor = getattr(layer, next(iter(layer.plan.factors)))
    return choice.Key(layer._runs, factor.dtype, choice.bucket(tokens), factor.device, training)


def _own(layer: StructuredLinear, tokens: int, backend: str, forced: str) -> list[Ran]:
    dense = Ran(f"dense {layer.out_features}x{layer.in_features}", "linear", "the structure is one dense weight")
    if layer.plan.is_dense:
        return [dense]
    if backend == "dense":
        size = layer.in_features * layer.out_features * next(layer.parameters()).element_size() / 1e6
        return [Ran(dense.what, "linear", f"{forced}; the weight, {size:.3g} MB, is kept in inference")]
    (before, after), why = padding_copies(layer.plan), "the width does not fit the structure"
    copies = [[Ran(what, "copy", why) for what in ends] for ends in (before, after)]
    return [*copies[0], *_multiplied(layer, tokens, backend, forced), *copies[1]]


def padding_copies(plan: Plan) -> tuple[list[str], list[str]]:
    """The copies before and after what runs that a padded plan needs, in words; none where an end is not padded."""
    (rows, columns), (out_features, in_features) = plan.padded, (plan.out_features, plan.in_features)
    before = [f"pad the input from {in_features} to {columns}"] if columns > in_features else []
    after = [f"cut the output from {rows} to {out_features}"] if rows > out_features else []
    return before, after


def _multiplied(layer: StructuredLinear, tokens: int, backend: str, forced: str) -> list[Ran]:
    if backend in ("reference", "copy"):
        runs = {"reference": "einsum", "copy": "copies and bmm"}[backend]
        equations = [stage.equation for chain in layer._program.chains for stage in chain.stages]
        return [Ran(equation, runs, forced) for equation in equations]
    if not layer._program.in_place:
        equations = [stage.equation for chain in layer._program.chains for stage in chain.stages]
        why = "a factor is stored in an order that no GEMM reads in place"
        return [Ran(equation, "copies where needed, and bmm", why) for equation in equations]
    if backend == "joined" and layer._joined is not None:
        return _joined(layer, layer._joined, tokens)
    return _lowered(layer, layer._program, tokens, backend in ("triton", "joined"))


def _joined(layer: StructuredLinear, how: joined.Joined, tokens: int) -> list[Ran]:
    factor = next(layer.parameters())
    runs = "joining kernel" if how.swap is not None and kernels_on(factor.device, factor.dtype).exchange else "copy"
    rows = [Ran("join the factors", "copy", f"{len(how.parts)} terms are one product")]
    if how.of_input:
        rows.append(Ran("join the input in all its orders", runs, "the terms share their output"))
    rows += _lowered(layer, how.inner, tokens, True)
    if not how.of_input:
        rows.append(Ran("bring the outputs to one order and add them", runs, "the terms share their input"))
    return rows


def _lowered(layer: StructuredLinear, program: Program, tokens: int, kernels: bool) -> list[Ran]:
    factor = next(layer.parameters())
    sequences = schedule(program.text, tokens, kernels_on(factor.device, factor.dtype, kernels))
    rows: list[Ran] = []
    paired = pairs([(sequence.steps[-1].forward, sequence.steps[-1].after) for sequence in sequences]).values()
    for place, (chain, sequence) in enumerate(zip(program.chains, sequences, strict=True)):
        if sequence.before is not None:
            rows.append(_copy(sequence.before, "the first step cannot read the input in place"))
        for stage, step in zip(chain.stages, sequence.steps, strict=True):
            if isinstance(step.forward, Blocks):
                rows.append(Ran(stage.equation, "block-sparse kernel", "reads its blocks by the table"))
            elif place in paired and step is sequence.steps[-1]:
                why = "its inner dimension continues that of the blocks, and the sum is written once"
                rows.append(Ran(stage.equation, "in the block-sparse kernel", why))
            elif isinstance(step.after, Relayout) and step.after.tokens_last:
                why = "stores its result tokens last, in the order of what comes next"
                rows.append(Ran(stage.equation, f"across kernel, {_size(step.forward)}", why))
            else:
                rows.append(Ran(stage.equation, _size(step.forward), "every role is one stride: in place"))
                if step.after is not None:
                    rows.append(_copy(step.after, "no order serves both sides"))
    return rows


def _size(gemm: Multiply) -> str:
    assert not isinstance(gemm, Blocks)
    (*group, m, k), n = gemm.a[0], gemm.b[0][-1]
    return f"{f'bmm of {group[0]}' if group else 'mm'} {m}x{n}x{k}"


def _copy(relayout: Move, why: str) -> Ran:
    if not isinstance(relayout, Relayout):
        what = "look up blocks of the input" if isinstance(relayout, Gather) else "add up blocks of the output"
        return Ran(what, "copy", "the structure is block-sparse")
    return Ran("reorder the axes", "exchange kernel" if relayout.kernel else "copy", why)
