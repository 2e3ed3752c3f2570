"""Advice for a model: a structure and a size for each of its linear layers, under a budget for all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..progress import shown
from ..sparsity import block_sizes, pixelfly_within
from ..spec import Spec
from ..surgery import convertible, literal
from . import allocate, scores
from .options import CANDIDATES, Clock, Option, Shape, options

BUDGETS = ("params", "flops", "time")
"""What can be bounded: weights, FLOPs, or seconds, as a share of those of the dense layers."""

POLICIES = ("knapsack", "uniform", "pixelfly")
"""How options are chosen: the exact optimum, one structure for all layers, or pixelfly as `structlin.sparsify` does."""


@dataclass(frozen=True)
class Scored:
    """A layer, its shape, its options, dense first, and what each loses."""

    name: str
    shape: Shape
    options: tuple[Option, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Advice:
    """What was chosen for every layer, as an index into its options; prints as a table with totals.

    Attributes:
        layers: all layers that were considered.
        chosen: the index of the option of each.
        budget: what was bounded, of `BUDGETS`.
        share: the bound, as a share of the dense layers' cost.
        kept: layers that stay dense because they cannot be converted, and why.
    """

    layers: tuple[Scored, ...]
    chosen: tuple[int, ...]
    budget: str
    share: float
    kept: Mapping[str, str]

    @property
    def rules(self) -> dict[str, Spec | None]:
        """Name of every layer -> spec, or None for dense: rules for `to_structured_`."""
        found = {layer.name: layer.options[i].spec for layer, i in zip(self.layers, self.chosen, strict=True)}
        return {literal(name): spec for name, spec in (dict.fromkeys(self.kept) | found).items()}

    @property
    def loss(self) -> float:
        """The sum that was minimised."""
        return sum(layer.losses[i] for layer, i in zip(self.layers, self.chosen, strict=True))

    def spent(self, budget: str) -> float:
        """The cost of what was chosen as a share of that of the dense layers."""
        pairs = list(zip(self.layers, self.chosen, strict=True))
        chosen = sum(_cost(layer.options[i], budget) for layer, i in pairs)
        return chosen / sum(_cost(layer.options[0], budget) for layer, _ in pairs)

    def to_json(self) -> str:
        """The rules as a JSON object from globs to specs as text, or null: what ``structlin convert --rules`` reads."""
        return json.dumps({glob: spec and str(spec) for glob, spec in self.rules.items()}, indent=1) + "\n"

    def __str__(self) -> str:
        timed = self.layers[0].options[0].seconds is not None
        rows = [("layer", "shape", "structure", "params", "FLOPs", *(["time"] if timed else []), "loss")]
        for layer, i in zip(self.layers, self.chosen, strict=True):
            one, dense = layer.options[i], layer.options[0]
            time = [f"{one.seconds / dense.seconds:.1%}"] if one.seconds and dense.seconds else []
            shares = [f"{one.params / dense.params:.1%}", f"{one.flops / dense.flops:.1%}", *time]
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            rows.append((layer.name, shape, str(one.spec or "dense"), *shares, f"{layer.losses[i]:.4g}"))
        totals = [f"{self.spent(budget):.1%}" for budget in (BUDGETS if timed else BUDGETS[:2])]
        rows.append(("total", "", "", *totals, f"{self.loss:.4g}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"{name} stays dense: {why}" for name, why in self.kept.items())])


def score(
    model: nn.Module,
    *,
    layers: Sequence[str] = ("*",),
    candidates: Sequence[str | Spec] = CANDIDATES,
    by: str = "projection",
    batches: Iterable[Any] | None = None,
    fitted: bool = True,
    clock: Clock | None = None,
    progress: bool = False,
) -> tuple[list[Scored], dict[str, str]]:
    """Every layer's options and what each loses, which any number of calls of `choose` may share.

    Args:
        model: any module with linear layers; unchanged afterwards.
        layers: globs over names; the others are left out altogether.
        candidates: structures to try.
        by: what a layer loses, of `structlin.advise.scores.SCORES`.
        batches: what ``model`` is called with, as for `structlin.calibration.record_inputs`; "fisher" and "ntk" need
            them, and "ntk" takes the first.
        fitted: whether projections are fitted to what layers are given on the batches, where there are any, or to
            their weights alone, which is much faster. Convert the same way.
        clock: seconds of a layer, for a budget in time and to leave out what is slower than dense.
        progress: whether a line on stderr, where that is a terminal, says what is done and the time left.

    Returns:
        The layers, and the names of those that cannot be converted with the reason.

    Raises:
        ValueError: for an unknown score or one without the batches it needs, and globs that match nothing.
    """
    if by not in scores.SCORES:
        raise ValueError(f"by={by!r} is unknown; allowed: {', '.join(scores.SCORES)}")
    data = list(batches or ())
    if by != "projection" and not data:
        raise ValueError(f"by={by!r} needs batches of data to run the model on")
    shapes, kept = convertible(model, layers)
    seen = scores.watch(model, list(shapes), data) if data else {}
    reference = scores.tangent_kernel(model, list(shapes), data[0]) if by == "ntk" else None
    fitting = {shape: options(shape, candidates, clock) for shape in dict.fromkeys(shapes.values())}

    def loss(name: str, spec: Spec) -> float:
        dense = model.get_submodule(name)
        layer, error = scores.projected(dense, spec, seen[name].inputs if seen and fitted else None)
        if by == "projection":
            return error**2
        if by == "fisher":
            return scores.fisher(dense, layer, seen[name])
        assert reference is not None
        with scores.in_place_of(model, name, layer):
            kernel = scores.tangent_kernel(model, list(shapes), data[0])
        return scores.kernel_distance(kernel, reference)

    found = []
    work = ((name, len(fitting[shape]) * shape[0] * shape[1] * min(shape), shape) for name, shape in shapes.items())
    for name, shape in zip(shapes, shown(work) if progress else shapes.values(), strict=True):
        losses = [0.0 if option.spec is None else loss(name, option.spec) for option in fitting[shape]]
        found.append(Scored(name, shape, tuple(fitting[shape]), tuple(losses)))
    return found, kept


def choose(
    layers: Sequence[Scored], budget: str, share: float, policy: str = "knapsack", kept: Mapping[str, str] | None = None
) -> Advice:
    """The options that lose least within a budget.

    Under a budget of FLOPs or time nothing is chosen that is slower than dense, as far as times are known; weights
    alone may be saved at a loss of speed.

    Args:
        layers: from `score`.
        budget: what is bounded, of `BUDGETS`.
        share: of the dense layers' cost, above 0 and at most 1.
        policy: of `POLICIES`. "pixelfly" is for layers scored with `pixelfly_candidates` and a budget of params.
        kept: layers that stay dense, and why.

    Raises:
        ValueError: for an unknown budget or policy, a share out of bounds, a time that is not known, or a budget
            that nothing meets.
    """
    for name, given, allowed in (("budget", budget, BUDGETS), ("policy", policy, POLICIES)):
        if given not in allowed:
            raise ValueError(f"{name}={given!r} is unknown; allowed: {', '.join(allowed)}")
    if not 0 < share <= 1:
        raise ValueError(f"a share of {share} is given; allowed: above 0, at most 1")
    if budget == "time" and any(layer.options[0].seconds is None for layer in layers):
        raise ValueError("a budget in time needs the times of layers; give a clock")
    allowed_options = [_allowed(layer, budget) for layer in layers]
    rows = [
        [(layer.options[i], layer.losses[i]) for i in own] for layer, own in zip(layers, allowed_options, strict=True)
    ]
    costs = [[_cost(option, budget) for option, _ in row] for row in rows]
    values = [[loss for _, loss in row] for row in rows]
    bound = share * sum(_cost(layer.options[0], budget) for layer in layers)
    if policy == "knapsack":
        picked = allocate.knapsack(values, costs, bound)
    elif policy == "uniform":
        picked = allocate.uniform([[str(option.spec) for option, _ in row] for row in rows], values, costs, bound)
    else:
        wanted = [pixelfly_within(layer.shape, share, block_sizes()) for layer in layers]
        names = [[option.spec for option, _ in row] for row in rows]
        if absent := [str(spec) for spec, row in zip(wanted, names, strict=True) if spec not in row]:
            raise ValueError(f"{absent[0]} was not scored; score with the candidates of pixelfly_candidates")
        picked = [row.index(spec) for spec, row in zip(wanted, names, strict=True)]
    chosen = tuple(own[i] for own, i in zip(allowed_options, picked, strict=True))
    return Advice(tuple(layers), chosen, budget, share, kept or {})


def pixelfly_candidates(model: nn.Module, share: float, layers: Sequence[str] = ("*",)) -> list[Spec]:
    """The structures that the policy "pixelfly" gives the layers of ``model`` for a share of their weights.

    Raises:
        ValueError: as `structlin.sparsity.pixelfly_within` for a layer that none fits.
    """
    shapes, _ = convertible(model, layers)
    return list(dict.fromkeys(pixelfly_within(shape, share, block_sizes()) for shape in shapes.values()))


def _cost(option: Option, budget: str) -> float:
    value = {"params": option.params, "flops": option.flops, "time": option.seconds}[budget]
    assert value is not None
    return float(value)


def _allowed(layer: Scored, budget: str) -> list[int]:
    """Indices of the options that may be chosen: dense, and what is no slower unless weights alone are asked for."""
    dense = layer.options[0].seconds
    return [
        i
        for i, option in enumerate(layer.options)
        if i == 0 or budget == "params" or dense is None or (option.seconds is not None and option.seconds <= dense)
    ]
