"""Training the places of low-rank blocks: intervals that do not pay are narrowed, and masks sharpen on the way.

What a structure with trained masks (`structlin.Gblr`) needs beside an optimizer, after Lee et al. 2024, and what its
blocks cost when only their intervals are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import analysis
from .nn import StructuredLinear
from .nn.boxcar import BoxcarMask, masks_of


class Shrinkage:
    """The proximal step on the widths of all trained masks of a model (Lee et al. 2024): call it after the optimizer.

    >>> from structlin import Gblr, param_groups
    >>> layer = StructuredLinear(64, 64, Gblr(components=8))
    >>> optimizer = torch.optim.AdamW(param_groups(layer, lr=1e-3, structure_lr=5e-4))
    >>> shrinkage = Shrinkage(layer, optimizer, threshold=0.04, target=0.12)
    >>> loss = layer(torch.randn(8, 64)).square().mean()
    >>> loss.backward(); optimizer.step(); shrinkage.step()

    Args:
        model: any module with trained masks.
        optimizer: the one that trains them; the learning rates of its groups, as they are at each step, scale the
            threshold.
        threshold: widths shrink by threshold times learning rate in each step, as a lasso penalty of that weight.
        target: mean width of all masks, a fraction; at or below it nothing shrinks.

    Raises:
        ValueError: for a model without trained masks, widths that the optimizer does not train, a threshold that is
            negative or not finite, or a target that is not from 0 to 1.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, threshold: float = 0.04, target: float = 0.12
    ) -> None:
        if not (0 <= threshold < float("inf") and 0 <= target <= 1):
            raise ValueError(
                f"threshold={threshold} and target={target} are given; the threshold must be finite and not negative, "
                "the target a fraction from 0 to 1"
            )
        self.masks = _masks(model)
        self.threshold, self.target, self.optimizer = threshold, target, optimizer
        groups = {id(parameter): i for i, group in enumerate(optimizer.param_groups) for parameter in group["params"]}
        if any(id(mask.widths) not in groups for mask in self.masks):
            raise ValueError("the optimizer does not train all widths of the model; give it param_groups(model, lr)")
        self.groups = [groups[id(mask.widths)] for mask in self.masks]

    @torch.no_grad()
    def step(self) -> None:
        """Soft-threshold all widths while their mean is above the target; keep widths in [0, 1], locations in [0, 1).

        Nothing is read back from the device.
        """
        active = mean_width(self.masks) > self.target
        for mask, group in zip(self.masks, self.groups, strict=True):
            amount = self.threshold * self.optimizer.param_groups[group]["lr"] * active.to(mask.widths)
            mask.widths.sub_(amount).clamp_(0, 1)
            mask.locations.remainder_(1)


def mean_width(masks: list[BoxcarMask]) -> Tensor:
    """The mean over all intervals of all masks, a fraction; a tensor () on the device of the first mask."""
    device = masks[0].widths.device
    return torch.cat([mask.widths.detach().to(device) for mask in masks]).mean()


@torch.no_grad()
def set_sigma_(model: nn.Module, sigma: float) -> None:
    """Smooth all trained masks of ``model`` by a Gaussian of standard deviation ``sigma`` over the frequencies.

    1 spreads an interval over much of the features, 100 leaves little of that, infinity makes edges hard.

    Raises:
        ValueError: for a model without trained masks, or a sigma that is not above 0.
    """
    if not sigma > 0:
        raise ValueError(f"sigma={sigma} must be above 0; infinity is a hard mask")
    for mask in _masks(model):
        mask.sigma.fill_(sigma)


def annealed_sigma(step: int, first: int, last: int, start: float = 1.0, end: float = 100.0) -> float:
    """The sigma of one training step: ``start`` up to step ``first``, ``end`` from ``last`` on, linear in between.

    Lee et al. 2024 go from 1 to 100.

    Raises:
        ValueError: unless ``first`` comes before ``last``.
    """
    if first >= last:
        raise ValueError(f"first={first} must be less than last={last}")
    return start + (end - start) * min(1.0, max(0.0, (step - first) / (last - first)))


def effective_flops(model: nn.Module) -> int:
    """Forward FLOPs per token of all structured layers of ``model``, were only what the masks leave computed.

    A component of rank r whose intervals hold u outputs and v inputs costs ``2 min(u v, r (u + v))`` (Lee et al.
    2024): as two thin products, or as the block that they multiply to, whichever is less. A term of a plan without
    masks costs what the plan says. Our kernels compute all features of a masked factor, so that the layer itself runs
    `structlin.analysis.flops`.
    """
    return sum(_layer_flops(layer) for layer in model.modules() if isinstance(layer, StructuredLinear))


def _layer_flops(layer: StructuredLinear) -> int:
    flops = 0
    for term in layer.plan.terms:
        found = [layer.get_submodule(f"parametrizations.{n}.0") for n in term.names if _is_masked(layer, n)]
        masks = [mask for mask in found if isinstance(mask, BoxcarMask)]
        if len(masks) != 2:
            flops += sum(analysis.step_flops(layer.plan, step) for step in term.steps)
            continue
        v, u = ((mask.size * mask.widths.detach().double()).round().long() for mask in masks)
        rank = layer.plan.size(term.weights[0]) // (masks[0].size * len(v))
        flops += int(2 * torch.minimum(u * v, rank * (u + v)).sum())
    return flops


def _is_masked(layer: StructuredLinear, name: str) -> bool:
    return parametrize.is_parametrized(layer, name) and name in layer.spec.masks(layer.plan)


def _masks(model: nn.Module) -> list[BoxcarMask]:
    masks = masks_of(model)
    if not masks:
        raise ValueError("the model has no trained masks; only structures such as gblr do")
    return masks
