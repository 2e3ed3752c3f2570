"""Structure-aware learning rates: every factor at the rate that its fan-in asks for, every layer at that of its width.

The rule of a factor is data of its layer's plan (`analysis.lr_scale`), so groups follow from the modules alone; the
growth of a layer needs the same model at the width that was tuned. docs/learning-rates.md derives both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from math import prod
from operator import attrgetter
from typing import Any

from torch import nn

from . import analysis
from .nn import RoutedLinear, Router, StructuredLinear
from .nn.boxcar import masks_of

Shape = tuple[int, ...]

# modules whose weights are stored as (out, in, ...), besides structured ones
STRUCTURED = (StructuredLinear, RoutedLinear)
MATRICES = (nn.Linear, Router, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    optimizer: str = "adam",
    base: nn.Module | None = None,
    depth: Mapping[str, float] | None = None,
    multipliers: Mapping[str, float] | None = None,
    structure_lr: float | None = None,
    independent_decay: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups in which ``lr`` means the same for dense and structured layers, and for every width.

    A factor gets ``lr`` times `analysis.lr_scale`, and so does what a parametrization stores of it. With a ``base``, a
    weight moreover gets the muP multiplier of its layer's growth against the layer of the same name there:
    ``base fan-in / fan-in`` under Adam, ``(out / base out) / (in / base in)`` under SGD, where biases, norms and
    embeddings get the growth of their size (Yang et al. 2021, table 3; Yang et al. 2023, the spectral condition). A
    readout needs no mark: its input grows and its output does not. Everything else, as the gain of a normalised factor,
    gets ``lr``. Frozen parameters are left out; shared ones occur once, at the rate of the first module with them.

    Args:
        model: any module.
        lr: learning rate of a dense layer, of the base model where one is given.
        weight_decay: of parameters with two or more dimensions; zero for the others.
        optimizer: "adam" for Adam, AdamW and others that divide by the size of the gradient, or "sgd".
        base: the same model, dense or structured, at the width for which ``lr`` was tuned; only shapes are read, so it
            may be on the meta device.
        depth: glob over module names -> how many times as many residual branches as the tuned model has; Adam's rates
            there are divided by its square root (Yang et al. 2024). For models that multiply each branch by
            ``1 / sqrt(number of branches)``; under SGD that multiplier is all that is needed.
        multipliers: glob over module names -> factor on the rates there, as ``{"embedding": 8}``; the first glob that
            matches counts. Embeddings often want a larger rate than matrices do.
        structure_lr: learning rate of the widths and locations of trained masks; ``lr`` unless given.
        independent_decay: divide each group's decay by its scale, so that every matrix shrinks by
            ``lr * weight_decay`` in a step of AdamW or SGD, whatever its own rate.

    Returns:
        A list of dictionaries with the keys "params", "lr" and "weight_decay", as every torch optimizer takes it.

    Raises:
        ValueError: for a rate or decay that is negative or not finite, a model without trainable parameters, an unknown
            optimizer, a ``base`` that is not the same model, a parameter whose fan-in is not known, and a glob of
            ``depth`` or ``multipliers`` that matches nothing or whose number is not positive.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("structure_lr", structure_lr or 0.0)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value} must be finite and not negative")
    if optimizer not in analysis.OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is unknown; allowed: {', '.join(analysis.OPTIMIZERS)}")
    scales = _scales(model, optimizer, base, depth or {}, multipliers or {})
    places = {parameter for mask in masks_of(model) for parameter in mask.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for parameter, scale in scales.items():
        rate = structure_lr if structure_lr is not None and parameter in places else lr * scale
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups[rate, decay / scale if independent_decay else decay].append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameters")
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _scales(
    model: nn.Module,
    optimizer: str,
    base: nn.Module | None,
    depth: Mapping[str, float],
    multipliers: Mapping[str, float],
) -> dict[nn.Parameter, float]:
    """What multiplies the rate of every trainable parameter, in the order of the model."""
    scales = _structure(model, optimizer)
    branches = _by_glob(model, "depth", depth)
    factors = [
        _width(model, base, optimizer) if base else {},
        {parameter: ratio**-0.5 if optimizer == "adam" else 1.0 for parameter, ratio in branches.items()},
        _by_glob(model, "multipliers", multipliers),
    ]
    for factor in factors:
        scales = {parameter: scale * factor.get(parameter, 1.0) for parameter, scale in scales.items()}
    return scales


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a module itself; what a parametrization stores of a factor has the name of the factor."""
    yield from module.named_parameters(recurse=False)
    for name, parametrization in getattr(module, "parametrizations", {}).items():
        for path, parameter in parametrization.named_parameters():
            yield name if path.startswith("original") else f"parametrizations.{name}.{path}", parameter


def _structure(model: nn.Module, optimizer: str) -> dict[nn.Parameter, float]:
    """The scale of every trainable parameter within its layer, in the order of the model."""
    scales = {parameter: 1.0 for parameter in model.parameters() if parameter.requires_grad}
    for parameter, (_, module, name) in _owners(model).items():
        if isinstance(module, STRUCTURED) and name in module.plan.factors:
            scales[parameter] = analysis.lr_scale(module.plan, name, optimizer)
    return scales


def _owners(model: nn.Module) -> dict[nn.Parameter, tuple[str, nn.Module, str]]:
    """Trainable parameter -> path of the first module that has it, that module, and its name there."""
    owners: dict[nn.Parameter, tuple[str, nn.Module, str]] = {}
    for path, module in model.named_modules():
        for name, parameter in _parameters(module):
            if parameter.requires_grad:
                owners.setdefault(parameter, (path, module, name))
    return owners


def _width(model: nn.Module, base: nn.Module, optimizer: str) -> dict[nn.Parameter, float]:
    """The muP multiplier of every trainable parameter."""
    modules = dict(base.named_modules())
    scales = {}
    for parameter, (path, module, name) in _owners(model).items():
        shape, old = (_shape(of, name, module) for of in (module, modules.get(path)))
        full = f"{path}.{name}".removeprefix(".")
        if old is None or shape is None or len(old) != len(shape):
            raise ValueError(
                f"base must be the same model at another width, but {full} has shape {shape} in the model and "
                f"{old or 'no counterpart'} in base"
            )
        ratios = [size / size_of_base for size, size_of_base in zip(shape, old, strict=True)]
        into, out = 1.0, prod(ratios)
        if len(shape) > 1 and isinstance(module, (*MATRICES, *STRUCTURED)) and not name.startswith("bias"):
            into, out = prod(ratios[1:]), ratios[0]
        elif sum(ratio != 1 for ratio in ratios) > 1:
            known = ", ".join(kind.__name__ for kind in (*MATRICES, *STRUCTURED))
            raise ValueError(
                f"{full} grows from {old} to {shape}, and which of these is the fan-in of a {type(module).__name__} "
                f"is not known; with base, matrices may belong to {known}"
            )
        scales[parameter] = 1 / into if optimizer == "adam" else out / into
    return scales


def _shape(module: nn.Module | None, name: str, model: nn.Module) -> Shape | None:
    """Shape of what the ``model``'s module calls ``name``: of a factor or dense weight that of the matrix (out, in)."""
    weight = name in model.plan.factors if isinstance(model, STRUCTURED) else name == "weight"
    if weight and isinstance(module, nn.Linear | StructuredLinear | RoutedLinear):
        return module.out_features, module.in_features
    if module is None:
        return None
    try:
        return tuple(attrgetter(name)(module).shape)
    except AttributeError:
        return None


def _by_glob(model: nn.Module, name: str, values: Mapping[str, float]) -> dict[nn.Parameter, float]:
    """The value of every trainable parameter whose module a glob matches, the first one that does."""
    owners = _owners(model)
    for pattern, value in values.items():
        if not (0 < value < float("inf") and any(fnmatchcase(path, pattern) for path, _, _ in owners.values())):
            allowed = "allowed: globs that match modules with trainable parameters, positive numbers"
            raise ValueError(f"{name}={{{pattern!r}: {value}}}; {allowed}")
    found: dict[nn.Parameter, float] = {}
    for parameter, (path, _, _) in owners.items():
        matching = [value for pattern, value in values.items() if fnmatchcase(path, pattern)]
        if matching:
            found[parameter] = matching[0]
    return found
