"""Swap the linear layers of a model, in place: all that the rules name, or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import analysis
from .nn import RoutedLinear, StructuredLinear, layer_of
from .nn.init import check as check_init
from .nn.projection import check
from .progress import shown
from .spec import Spec
from .structures import MoE


@dataclass(frozen=True)
class Swap:
    """One layer of a `Conversion`: FLOPs are forward ones per token, parameters without the bias.

    ``padded`` is the (out_features, in_features) of the matrix where it is padded. Padding is in all costs.
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


class Conversion(list[Swap]):
    """The layers that `to_structured_` swapped, or would swap; prints as a table with totals."""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "shape", "spec", "params", "of dense", "FLOPs/token", "of dense")]
        rows += [_row(s.name, _shape(s), str(s.spec), [s]) for s in self]
        rows += [_row("total", "", "", self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


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


@torch.no_grad()
def to_structured_(
    model: nn.Module,
    rules: Mapping[str, Spec | None],
    weights: Literal["init", "project"] = "init",
    dry_run: bool = False,
    init: str = "spectral",
    progress: bool = False,
) -> Conversion:
    """Replace the ``nn.Linear`` layers of ``model`` whose names match, in place.

    >>> from structlin.structures import Monarch
    >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 10))
    >>> [swap.name for swap in to_structured_(model, {"3": None, "*": Monarch(nblocks=4)})]
    ['0', '2']

    Args:
        model: any module; its own root is not replaced. A layer that occurs under several names is replaced under all.
        rules: glob over module names -> spec; the first matching glob wins, ``None`` keeps the layer dense.
        weights: "init" draws factors and bias afresh; "project" takes those nearest to the dense weight and
            keeps the bias.
        dry_run: check and report only.
        init: how factors are drawn, as in `StructuredLinear`.
        progress: whether a line on stderr, where that is a terminal, says what is done and the time left.

    Returns:
        The swapped layers, with their costs beside dense ones.

    Raises:
        ValueError: one message with every problem: a shape that does not fit, a rule that matches nothing, a weight
            that another module shares, a layer that is more than a plain ``nn.Linear`` (a subclass, a parametrization,
            hooks), a weight that cannot be projected. The model is unchanged then.
    """
    if weights not in ("init", "project"):
        raise ValueError(f"weights={weights!r} is unknown; allowed: 'init', 'project'")
    check_init(init)
    names = _linears(model)
    chosen, problems = _resolve(names, rules)
    owners = _owners(model)
    conversion = Conversion()
    for name, spec in chosen.items():
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        try:
            _refuse(model, names[name], dense, owners)
            if weights == "project":
                _check_projection(dense, spec)
            conversion.append(_swap(name, dense, spec))
        except ValueError as error:
            problems.append(f"{name} ({dense.out_features}x{dense.in_features}): {error}")
    if problems:
        raise ValueError("cannot convert the model:\n  " + "\n  ".join(problems))
    if not dry_run:
        # all are built before one is put in place: running out of memory, too, leaves the model as it was
        swaps = shown((s.name, _effort(s), s) for s in conversion) if progress else conversion
        layers = {s.name: _build(model.get_submodule(s.name), s.spec, weights, init) for s in swaps}
        for alias, layer in ((alias, layer) for name, layer in layers.items() for alias in names[name]):
            model.set_submodule(alias, layer)
    return conversion


def to_dense_(model: nn.Module) -> list[str]:
    """Replace every `StructuredLinear` of ``model`` by the ``nn.Linear`` of the same function.

    Returns:
        The names of the replaced layers, all of them where one layer has several.

    Raises:
        ValueError: one message with every problem: a factor that another module shares, hooks that would be lost, a
            model that is itself a `StructuredLinear`, a guide, a mixture of experts. The model is unchanged then.
    """
    return replace(model, dense_twins(model))


def dense_twins(model: nn.Module) -> dict[StructuredLinear, nn.Linear]:
    """What `to_dense_` replaces, and by what; raises as it does."""
    if isinstance(model, StructuredLinear):
        raise ValueError("the model is itself a StructuredLinear and cannot be replaced in place; use its to_dense()")
    found = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, StructuredLinear)]
    mixtures = [name for name, module in model.named_modules() if isinstance(module, RoutedLinear)]
    owners, problems = _owners(model), [f"{name}: is a mixture of experts, which is no matrix" for name in mixtures]
    for name, layer in found:
        if any(owners[id(parameter)] > 1 for parameter in layer.parameters()):
            problems.append(f"{name}: shares a factor with another module; untie it first")
        if "guide" in layer._modules:
            problems.append(f"{name}: has a guide; drop it first, with the drop() of what guide_ returned")
        if _is_hooked(layer):
            problems.append(f"{name}: has hooks, which would be lost; remove them first")
    if problems:
        raise ValueError("cannot make the model dense:\n  " + "\n  ".join(problems))
    return {layer: layer.to_dense() for layer in dict.fromkeys(layer for _, layer in found)}


def replace(model: nn.Module, twins: Mapping[StructuredLinear, nn.Linear]) -> list[str]:
    """Put the dense layers of ``twins`` in the places of the structured ones; all names that were replaced."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {name: twins[module] for name, module in modules.items() if isinstance(module, StructuredLinear)}
    for name, dense in found.items():
        model.set_submodule(name, dense)
    return list(found)


def _linears(model: nn.Module) -> dict[str, list[str]]:
    """First name -> all names of every linear layer."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and name:
            names.setdefault(module, []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def _resolve(names: dict[str, list[str]], rules: Mapping[str, Spec | None]) -> tuple[dict[str, Spec], list[str]]:
    chosen: dict[str, Spec] = {}
    used: set[str | None] = set()
    problems: list[str] = []
    for glob, spec in rules.items():
        if not (spec is None or isinstance(spec, Spec)):
            problems.append(f"rule {glob!r} gives {spec!r}; a rule gives a spec, as Monarch(nblocks=4), or None")
    if problems:
        return chosen, problems
    for name, aliases in names.items():
        globs = {next((glob for glob in rules if fnmatchcase(alias, glob)), None) for alias in aliases}
        used |= globs
        specs = {rules[glob] if glob is not None else None for glob in globs}
        if len(specs) > 1:
            problems.append(f"{', '.join(aliases)} are one layer, but the rules treat them differently")
        elif (spec := specs.pop()) is not None:
            chosen[name] = spec
    for glob in (glob for glob in rules if glob not in used):
        shadowed = any(fnmatchcase(alias, glob) for aliases in names.values() for alias in aliases)
        why = "is never used: earlier rules match all its layers" if shadowed else "matches no nn.Linear"
        problems.append(f"rule {glob!r} {why}")
    return chosen, problems


def _owners(model: nn.Module) -> Counter[int]:
    """Id of a parameter -> number of modules that hold it."""
    return Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))


def _refuse(model: nn.Module, names: list[str], dense: nn.Linear, owners: Counter[int]) -> None:
    if parametrize.is_parametrized(dense):
        raise ValueError("is parametrized; remove the parametrization first, or keep it by a None rule")
    if type(dense) is not nn.Linear:
        raise ValueError(
            f"is a {type(dense).__name__}, whose owner may use its weight directly; keep it by a None rule"
        )
    if any(owners[id(parameter)] > 1 for parameter in dense.parameters()):
        raise ValueError("shares its weight with another module; untie it first, or keep it by a None rule")
    if _is_hooked(dense) or not dense.state_dict().keys() <= {"weight", "bias"}:
        raise ValueError("has hooks or tensors of its own, which would be lost; remove them, or keep it by a None rule")
    if not (dense.weight.is_floating_point() or dense.weight.is_complex()):
        raise ValueError(f"has a weight of dtype {dense.weight.dtype}, which cannot be trained; keep it by a None rule")
    parents = (model.get_submodule(name.rpartition(".")[0]) for name in names)
    if torch.backends.mha.get_fastpath_enabled() and any(isinstance(p, nn.TransformerEncoderLayer) for p in parents):
        raise ValueError(
            "belongs to an nn.TransformerEncoderLayer, which reads the weight directly in evaluation; "
            "call torch.backends.mha.set_fastpath_enabled(False) first, or keep it by a None rule"
        )


def _is_hooked(module: nn.Module) -> bool:
    forward, backward = (
        (module._forward_pre_hooks, module._forward_hooks),
        (module._backward_pre_hooks, module._backward_hooks),
    )
    return any(forward + backward) or "forward" in vars(module)


def _check_projection(dense: nn.Linear, spec: Spec) -> None:
    if isinstance(spec, MoE):
        raise ValueError(f"{spec} is no matrix to project to; use weights='init', or keep the layer by a None rule")
    plan = spec.plan(dense.out_features, dense.in_features)
    check(plan, dense.weight, spec.masks(plan))


def _swap(name: str, dense: nn.Linear, spec: Spec) -> Swap:
    rows, columns = dense.out_features, dense.in_features
    plan = spec.expert_plan(rows, columns) if isinstance(spec, MoE) else spec.plan(rows, columns)
    own = spec.costs(rows, columns) if isinstance(spec, MoE) else (analysis.num_params(plan), analysis.flops(plan))
    params, flops = own
    padded = plan.padded if plan.kept else None
    return Swap(name, columns, rows, spec, params, rows * columns, flops, 2 * rows * columns, padded)


def _effort(swap: Swap) -> int:
    """What the time to fit a matrix grows with: the cost of its SVD."""
    return swap.dense_params * min(swap.in_features, swap.out_features)


def _build(dense: nn.Module, spec: Spec, weights: str, init: str) -> StructuredLinear | RoutedLinear:
    assert isinstance(dense, nn.Linear)
    bias, weight = dense.bias, dense.weight
    layer = layer_of(spec, dense.in_features, dense.out_features, bias is not None, weight.device, weight.dtype, init)
    if weights == "project" and isinstance(layer, StructuredLinear):
        layer.project_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_((bias if name == "bias" else weight).requires_grad)
    return layer.train(dense.training)
