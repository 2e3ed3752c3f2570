"""Normalised factors: a factor whose scale may grow only through a gain of its own (Qiu et al. 2024, "BTT norm";
Potapczynski et al. 2024).

The entries of a factor are held at or below the root mean square that they start with, so that a learning rate that is
too large for a product of factors does not blow it up. The bound is worked out from the plan and is a plain number, and
nothing is read back from the device: a layer with normalised factors compiles to one graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import analysis
from .linear import StructuredLinear
from .routed import RoutedLinear


class Normalised(nn.Module):
    """``W -> gain * W / max(1, RMS(W) / sigma)``, a parametrization for one factor.

    Attributes:
        gain: learnable, real, of shape (1,). It starts at ``max(1, RMS(W) / sigma)``, so that normalising a factor, or
            assigning to a normalised one, changes nothing at first: at 1 for a factor no larger than a fresh one.
        sigma: the root mean square above which the factor is scaled down.
    """

    def __init__(self, sigma: float, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.sigma = sigma
        self.gain = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    def forward(self, factor: Tensor) -> Tensor:
        """The normalised factor, of the same shape and dtype; computed in float32 or wider."""
        wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
        return (wide * (self.gain / self._excess(wide))).to(factor.dtype)

    @torch.no_grad()
    def right_inverse(self, factor: Tensor) -> Tensor:
        """``factor`` itself; the gain becomes what makes `forward` give it back."""
        self.gain.copy_(self._excess(factor.to(torch.promote_types(factor.dtype, torch.float32))))
        return factor

    def _excess(self, factor: Tensor) -> Tensor:
        # the root is taken after the clamp: at zero it would have no gradient
        return (factor.abs().square().mean() / self.sigma**2).clamp(min=1).sqrt()

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:.3g}"


def is_normalised(layer: StructuredLinear) -> bool:
    """Whether `normalise_` has been here."""
    return any(isinstance(module, Normalised) for module in layer.modules())


def unsaveable(layer: StructuredLinear) -> str | None:
    """Why a saved layer could not be loaded again: factors that are neither plain, masked by the structure nor all
    normalised; None where it could."""
    masked, kinds = layer.spec.masks(layer.plan), {}
    for name in layer.plan.factors:
        found = layer.get_submodule(f"parametrizations.{name}") if parametrize.is_parametrized(layer, name) else None
        forms = [] if found is None else list(found.children())
        odd = [type(form).__name__ for form in forms[name in masked :] if not isinstance(form, Normalised)]
        if odd:
            return f"{name} is parametrized by {', '.join(odd)}, which a checkpoint does not keep; remove it first"
        kinds[name] = any(isinstance(form, Normalised) for form in forms)
    if len(set(kinds.values())) > 1:
        plain = ", ".join(name for name, normalised in kinds.items() if not normalised)
        return f"is normalised, but for {plain}; a checkpoint keeps all factors normalised, or none"
    return None


def normalise_(model: nn.Module) -> list[str]:
    """Normalise every factor of every `StructuredLinear` of ``model``, in place.

    >>> layer = StructuredLinear(64, 64, Monarch(nblocks=4))
    >>> normalise_(nn.Sequential(layer))
    ['0']
    >>> [name for name, _ in layer.named_parameters()][-2:]
    ['parametrizations.second.original', 'parametrizations.second.0.gain']

    A factor becomes ``gain * W / max(1, RMS(W) / sigma)``, with ``sigma`` its `analysis.init_std` and a learnable gain
    (Qiu et al. 2024). The function of the model does not change. The parameters of the factors stay the same objects;
    the gains are new, so make the optimizer afterwards: `param_groups` gives them the plain learning rate and no decay.
    `torch.nn.utils.parametrize.remove_parametrizations` undoes it for a factor, `to_dense_` for a model.

    Returns:
        The names of the layers, the first of each where it has several.

    Raises:
        ValueError: for a model without structured layers, with a factor that is parametrized already, or with a mixture
            of experts. The model is unchanged then.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
    if not layers:
        raise ValueError("the model has no StructuredLinear to normalise; convert it with to_structured_ first")
    problems = [
        f"{name or 'the model'}: is a mixture of experts, whose factors have no such form"
        for name, module in model.named_modules()
        if isinstance(module, RoutedLinear)
    ]
    problems += [
        f"{name or 'the model'}: {factor} is parametrized already"
        for name, layer in layers.items()
        for factor in layer.plan.factors
        if parametrize.is_parametrized(layer, factor)
    ]
    if problems:
        raise ValueError("cannot normalise the model:\n  " + "\n  ".join(problems))
    for layer in layers.values():
        for name in layer.plan.factors:
            factor = layer.get_parameter(name)
            dtype = factor.real.dtype if factor.is_complex() else factor.dtype
            clamp = Normalised(analysis.init_std(layer.plan, name), factor.device, dtype)
            clamp.gain.requires_grad_(factor.requires_grad)
            # unsafe only skips a check of the result's shape and dtype
            parametrize.register_parametrization(layer, name, clamp, unsafe=True)
    return list(layers)
