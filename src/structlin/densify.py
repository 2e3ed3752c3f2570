"""Reverse sparsification (Dao et al. 2022): train structured for most of the run, and go on dense.

The matrices stay what they are, so the loss does not jump; what needs a rule is the optimizer, whose groups and moments
belong to the factors.
"""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.optim import Optimizer

from . import moments as rule
from . import regroup
from .nn import StructuredLinear
from .surgery import dense_twins, replace


def densify_(
    model: nn.Module, optimizer: Optimizer, moments: Literal["reset", "carry"] = "reset", lr: float | None = None
) -> list[str]:
    """Replace every `StructuredLinear` of ``model`` by the ``nn.Linear`` of the same function, in ``optimizer`` too.

    >>> model = nn.Sequential(StructuredLinear(64, 64, Monarch(nblocks=4)), nn.ReLU(), nn.Linear(64, 8))
    >>> optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))
    >>> densify_(model, optimizer, lr=1e-3)
    ['0']
    >>> [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    [0, 4680]

    Call it after ``optimizer.step()`` and before the next forward pass; gradients of the factors are lost. Biases, and
    all other parameters, stay the same objects with the same state.

    Args:
        model: any module, as for `to_dense_`.
        optimizer: the one that holds the factors.
        moments: "reset" gives the dense weights no state, as in a new optimizer; "carry" works it out from that of the
            factors (see `structlin.moments`), for SGD, and Adam and AdamW without ``amsgrad``.
        lr: learning rate of the dense weights from now on; that of their factors unless given. Models trained with
            `param_groups` need it, as their factors have rates of their own. A weight goes into the group of its
            first factor of two or more dimensions; where ``lr`` differs, into a group of that ``lr`` and the same other
            options, which is added if there is none. A learning-rate scheduler must be made anew after an addition. No
            group is removed, even if empty.

    Returns:
        The names of the replaced layers, as `to_dense_`.

    Raises:
        ValueError: where `to_dense_` raises; for an unknown ``moments``, an ``lr`` that is not positive, an optimizer
            that "carry" has no rule for or that lacks a trainable factor, or factors of several rates without ``lr``.
            Nothing is changed then.
    """
    if moments not in ("reset", "carry"):
        raise ValueError(f"moments={moments!r} is unknown; allowed: 'reset', 'carry'")
    if lr is not None and not 0 < lr < float("inf"):
        raise ValueError(f"lr={lr} must be finite and positive")
    if moments == "carry":
        rule.check(optimizer)
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, StructuredLinear)}
    groups = {layer: _group(optimizer, layer, name, lr) for layer, name in layers.items()}
    twins = dense_twins(model)
    carried = {
        layer: rule.carried(optimizer, layer, group, float(group["lr"]) if lr is None else lr)
        for layer, group in groups.items()
        if moments == "carry" and group is not None
    }
    for layer, dense in twins.items():
        dense.register_parameter("bias", layer.bias)
        if (group := groups[layer]) is not None:
            regroup.forget(optimizer, rule.stored(layer).values())
            regroup.join(optimizer, dense.get_parameter("weight"), group, lr)
            if carried.get(layer):
                shape = layer.out_features, layer.in_features
                optimizer.state[dense.get_parameter("weight")] = {
                    key: layer.as_weight(value) if getattr(value, "shape", None) == shape else value
                    for key, value in carried[layer].items()
                }
    return replace(model, twins)


def _group(optimizer: Optimizer, layer: StructuredLinear, name: str, lr: float | None) -> regroup.Group | None:
    """The group whose options the dense weight of ``layer`` takes; None where all factors are frozen."""
    trained = {path: parameter for path, parameter in rule.stored(layer).items() if parameter.requires_grad}
    groups = {path: regroup.find(optimizer, parameter) for path, parameter in trained.items()}
    if missing := [path for path, group in groups.items() if group is None]:
        raise ValueError(f"{name}: the optimizer lacks {', '.join(missing)}; give the one that trains the layer")
    found = [(trained[path], group) for path, group in groups.items() if group is not None]
    rates = sorted({float(group["lr"]) for _, group in found})
    if lr is None and len(rates) > 1:
        raise ValueError(
            f"{name}: its factors have the learning rates {', '.join(f'{rate:g}' for rate in rates)}; "
            f"give that of the dense weights, as lr={rates[-1]:g}"
        )
    shaped = [group for parameter, group in found if parameter.ndim > 1]
    return next(iter([*shaped, *(group for _, group in found)]), None)
