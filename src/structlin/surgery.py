"""Swap the linear layers of a model, in place: all that the rules name, or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace as with_changes
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .conversion import Conversion, Swap, swap
from .nn import RoutedLinear, StructuredLinear, layer_of
from .nn.init import check as check_init
from .nn.kinds import StructuredConv, is_hooked, kind_of
from .nn.projection import check
from .nn.worth import speedup
from .progress import shown
from .spec import Spec
from .structures import Dense, MoE


@torch.no_grad()
def to_structured_(
    model: nn.Module,
    rules: Mapping[str, Spec | None],
    weights: Literal["init", "project"] = "init",
    dry_run: bool = False,
    init: str = "spectral",
    progress: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
) -> Conversion:
    """Replace the linear layers of ``model`` whose names match, in place.

    These are ``nn.Linear``, ``nn.Conv1d`` and ``nn.Conv2d`` of kernel size 1, and, once `structlin.hf` is imported,
    the ``Conv1D`` of GPT-2.

    >>> from structlin.structures import Monarch
    >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 10))
    >>> [swap.name for swap in to_structured_(model, {"3": None, "*": Monarch(nblocks=4)})]
    ['0', '2']

    Args:
        model: any module; its own root is not replaced. A layer that occurs under several names is replaced under all.
        rules: glob over module names -> spec; the first matching glob wins, ``None`` keeps the layer dense.
        weights: "init" draws factors and bias afresh; "project" takes those nearest to the dense weight and
            keeps the bias.
        dry_run: check and report only; with "project", fit every layer, for the errors, and drop it.
        init: how factors are drawn, as in `StructuredLinear`.
        progress: whether a line on stderr, where that is a terminal, says what is done and the time left.
        inputs: name of a layer -> typical inputs (*, in_features), to which "project" then fits that layer, as
            `project`; layers without any are fitted to their weight. `structlin.calibration` records them.

    Returns:
        The swapped layers, with their costs beside dense ones, whether they pay on the device of their weight, and the
        error of the projection.

    Raises:
        ValueError: one message with every problem: a shape that does not fit, a rule that matches nothing, a weight
            that another module shares, a layer that is more than a plain ``nn.Linear`` (a subclass, a parametrization,
            hooks), a weight that cannot be projected, inputs that belong to no layer. The model is unchanged then.
    """
    if weights not in ("init", "project"):
        raise ValueError(f"weights={weights!r} is unknown; allowed: 'init', 'project'")
    check_init(init)
    names, (conversion, problems) = _linears(model), planned(model, rules, weights)
    problems += _stray(inputs or {}, conversion, weights)
    if problems:
        raise ValueError("cannot convert the model:\n  " + "\n  ".join(problems))
    if dry_run and weights == "init":
        return conversion
    # all are built before one is put in place: running out of memory, too, leaves the model as it was
    layers, done = {}, Conversion()
    for change in shown((s.name, _effort(s), s) for s in conversion) if progress else conversion:
        dense = model.get_submodule(change.name)
        layer, distance = _build(dense, change.spec, weights, init, (inputs or {}).get(change.name))
        done.append(with_changes(change, error=distance))
        if not dry_run:
            layers[change.name] = layer
    for alias, layer in ((alias, layer) for name, layer in layers.items() for alias in names[name]):
        model.set_submodule(alias, layer)
    return done


def planned(model: nn.Module, rules: Mapping[str, Spec | None], weights: str) -> tuple[Conversion, list[str]]:
    """What `to_structured_` would do to ``model``, and every problem with it."""
    names = _linears(model)
    chosen, problems = _resolve(names, rules)
    owners = _owners(model)
    conversion = Conversion()
    for name, spec in chosen.items():
        dense = model.get_submodule(name)
        shape = _kind(dense).shape_of(dense)
        try:
            _refuse(model, names[name], dense, owners)
            if isinstance(spec, MoE):
                conversion.append(_mixture(name, dense, spec, weights))
                continue
            plan = spec.plan(*shape)
            if weights == "project":
                check(plan, _kind(dense).as_matrix(dense.get_parameter("weight")), spec.masks(plan))
            weight = dense.get_parameter("weight")
            conversion.append(swap(name, spec, plan, *speedup(plan, weight.device, weight.dtype)))
        except ValueError as error:
            problems.append(f"{name} ({shape[0]}x{shape[1]}): {error}")
    return conversion, problems


def convertible(
    model: nn.Module, layers: Sequence[str], weights: str = "project"
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """The linear layers whose names match: (out_features, in_features) of those that `to_structured_` takes with
    ``weights``, and why it refuses the others.

    Raises:
        ValueError: for a glob that matches no linear layer, or a model in which none can be converted.
    """
    linears = _linears(model)
    for glob in layers:
        if not any(fnmatchcase(name, glob) for name in linears):
            near = f"there are {', '.join(list(linears)[:4])} and so on" if linears else "the model has none"
            raise ValueError(f"{glob!r} matches no linear layer; {near}")
    shapes: dict[str, tuple[int, int]] = {}
    kept: dict[str, str] = {}
    for name in linears:
        if any(fnmatchcase(name, glob) for glob in layers):
            _, problems = planned(model, {literal(name): Dense()}, weights)
            if problems:
                kept[name] = problems[0].partition(": ")[2]
            else:
                dense = model.get_submodule(name)
                shapes[name] = _kind(dense).shape_of(dense)
    if not shapes:
        raise ValueError(f"no layer can be converted: {kept}")
    return shapes, kept


def literal(name: str) -> str:
    """A glob that matches ``name`` alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def to_dense_(model: nn.Module) -> list[str]:
    """Replace every `StructuredLinear` of ``model`` by the dense layer of the same function.

    Returns:
        The names of the replaced layers, all of them where one layer has several.

    Raises:
        ValueError: one message with every problem: a factor that another module shares, hooks that would be lost, a
            model that is itself a `StructuredLinear`, a guide, a mixture of experts. The model is unchanged then.
    """
    return replace(model, dense_twins(model))


def dense_twins(model: nn.Module) -> dict[StructuredLinear, nn.Module]:
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
        if is_hooked(layer):
            problems.append(f"{name}: has hooks, which would be lost; remove them first")
    if problems:
        raise ValueError("cannot make the model dense:\n  " + "\n  ".join(problems))
    return {layer: layer.to_dense_layer() for layer in dict.fromkeys(layer for _, layer in found)}


def replace(model: nn.Module, twins: Mapping[StructuredLinear, nn.Module]) -> list[str]:
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
        if name and kind_of(module) is not None:
            names.setdefault(module, []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def _resolve(names: dict[str, list[str]], rules: Mapping[str, Spec | None]) -> tuple[dict[str, Spec], list[str]]:
    chosen: dict[str, Spec] = {}
    used: set[str | None] = set()
    problems: list[str] = []
    if not isinstance(rules, Mapping) or not all(isinstance(glob, str) for glob in rules):
        allowed = "a mapping from globs over names to specs, as {'*': Monarch(nblocks=4)}"
        return chosen, [f"rules are {rules!r}; allowed: {allowed}"]
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
        why = "is never used: earlier rules match all its layers" if shadowed else "matches no linear layer"
        problems.append(f"rule {glob!r} {why}")
    return chosen, problems


def _owners(model: nn.Module) -> Counter[int]:
    """Id of a parameter -> number of modules that hold it."""
    return Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))


def _stray(inputs: Mapping[str, Tensor], conversion: Conversion, weights: str) -> list[str]:
    """What is wrong with ``inputs``."""
    if inputs and weights != "project":
        return ["inputs are for weights='project'; leave them out"]
    widths, problems = {change.name: change.in_features for change in conversion}, []
    for name, x in inputs.items():
        if name not in widths:
            problems.append(f"inputs are given for {name!r}, which no rule converts")
        elif x.dim() == 0 or x.shape[-1] != widths[name] or not x.isfinite().all():
            given = f"are of shape {tuple(x.shape)}" if x.isfinite().all() else "are not all finite"
            problems.append(f"{name}: its inputs {given}; allowed: finite ones of shape (*, {widths[name]})")
    return problems


def _kind(dense: nn.Module) -> type[StructuredLinear]:
    kind = kind_of(dense)
    assert kind is not None
    return kind


def _refuse(model: nn.Module, names: list[str], dense: nn.Module, owners: Counter[int]) -> None:
    if parametrize.is_parametrized(dense):
        raise ValueError("is parametrized; remove the parametrization first, or keep it by a None rule")
    if type(dense) is not _kind(dense).stands_for:
        raise ValueError(
            f"is a {type(dense).__name__}, whose owner may use its weight directly; keep it by a None rule"
        )
    if any(owners[id(parameter)] > 1 for parameter in dense.parameters()):
        others = _sharers(model, dense, names)
        raise ValueError(f"shares its weight with {others}; untie it first, or keep it by a None rule")
    if is_hooked(dense) or not dense.state_dict().keys() <= {"weight", "bias"}:
        raise ValueError("has hooks or tensors of its own, which would be lost; remove them, or keep it by a None rule")
    weight = dense.get_parameter("weight")
    if not (weight.is_floating_point() or weight.is_complex()):
        raise ValueError(f"has a weight of dtype {weight.dtype}, which cannot be trained; keep it by a None rule")
    if weight.dtype.itemsize < 2:
        raise ValueError(
            f"has a weight of dtype {weight.dtype}; convert before it is quantized, or keep it by a None rule"
        )
    if hasattr(weight, "device_mesh"):
        raise ValueError("has a weight cut over several devices; convert before the model is sharded")
    parents = (model.get_submodule(name.rpartition(".")[0]) for name in names)
    if torch.backends.mha.get_fastpath_enabled() and any(isinstance(p, nn.TransformerEncoderLayer) for p in parents):
        raise ValueError(
            "belongs to an nn.TransformerEncoderLayer, which reads the weight directly in evaluation; "
            "call torch.backends.mha.set_fastpath_enabled(False) first, or keep it by a None rule"
        )


def _mixture(name: str, dense: nn.Module, spec: MoE, weights: str) -> Swap:
    if weights == "project":
        raise ValueError(f"{spec} is no matrix to project to; use weights='init', or keep the layer by a None rule")
    kind = _kind(dense)
    if issubclass(kind, StructuredConv):
        raise ValueError(f"a {type(dense).__name__} has no tokens to route; allowed for {spec}: linear layers")
    if dense.get_parameter("weight").is_complex():
        raise ValueError("is complex, and has no order to choose experts by; keep it by a None rule")
    rows, columns = kind.shape_of(dense)
    spec.expert_plan(rows, columns)
    params, flops = spec.costs(rows, columns)
    return Swap(name, columns, rows, spec, params, rows * columns, flops, 2 * rows * columns)


def _sharers(model: nn.Module, dense: nn.Module, names: list[str]) -> str:
    """The names of the other modules that hold a parameter of ``dense``."""
    own = {id(parameter) for parameter in dense.parameters()}
    found = [n for n, m in model.named_modules() if own & {id(p) for p in m.parameters(recurse=False)}]
    return ", ".join(name for name in found if name not in names)


def _effort(swap: Swap) -> int:
    """What the time to fit a matrix grows with: the cost of its SVD."""
    return swap.dense_params * min(swap.in_features, swap.out_features)


def _build(
    dense: nn.Module, spec: Spec, weights: str, init: str, inputs: Tensor | None
) -> tuple[StructuredLinear | RoutedLinear, float | None]:
    """The layer for ``dense``, and how far its matrix is from that of ``dense`` if it was projected."""
    kind = _kind(dense)
    (rows, columns), weight = kind.shape_of(dense), dense.get_parameter("weight")
    bias = dense._parameters.get("bias")
    layer: StructuredLinear | RoutedLinear
    if isinstance(spec, MoE):
        layer = layer_of(spec, columns, rows, bias is not None, weight.device, weight.dtype, init)
    else:
        layer = kind(columns, rows, spec, bias is not None, weight.device, weight.dtype, init=init)
    distance = None
    if weights == "project" and isinstance(layer, StructuredLinear):
        distance = fit_(layer, kind.as_matrix(weight), inputs)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
    for name, parameter in layer.named_parameters():
        source = bias if name == "bias" and bias is not None else weight
        parameter.requires_grad_(source.requires_grad)
    return layer.train(dense.training), distance


def fit_(layer: StructuredLinear, matrix: Tensor, inputs: Tensor | None = None) -> float:
    """Project ``matrix`` (out_features, in_features) into ``layer``; the relative error, as in `Swap`."""
    layer.project_(matrix, inputs)
    wide = layer.matrix()
    target = matrix.to(wide.dtype)
    if inputs is not None:
        x = inputs.reshape(-1, matrix.shape[1]).to(wide.device, wide.dtype)
        return float((x @ (target - wide).T).norm() / (x @ target.T).norm().clamp(min=torch.finfo(x.dtype).tiny))
    return float((target - wide).norm() / target.norm().clamp(min=torch.finfo(target.real.dtype).tiny))
