"""Trained boxcar masks on the factors of a layer (Lee et al. 2024, Gaussian-Dirichlet masks), as parametrizations.

A mask of ones on an interval has no gradient in the place of its edges. Written by its Fourier coefficients it has
one, for any real width and location, and a Gaussian over the frequencies smooths it while training looks for both.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi
from typing import Self

import torch
from torch import Tensor, nn

from ..masks import Boxcar

NEGLIGIBLE = 1e-3  # below this part of itself a mask is zero in evaluation


class BoxcarMask(nn.Module):
    """Multiplies a factor by one interval for each component; a parametrization of `torch.nn.utils.parametrize`.

    Parameters ``widths`` and ``locations`` (components,), as fractions of the features, and the buffer ``sigma`` (),
    infinite for hard edges. They are real and keep single precision or better in a layer of half precision, which
    could not tell the places of a wide layer apart. In evaluation intervals narrower than one feature are dropped, and
    entries of the mask below 0.001.

    Args:
        boxcar: the description, with the first widths and locations.
        size: number of features.
        device: of the parameters.
        dtype: of the factor.
    """

    widths: nn.Parameter
    locations: nn.Parameter
    sigma: Tensor

    def __init__(
        self, boxcar: Boxcar, size: int, device: torch.device | str | int | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.boxcar, self.size, self.rounding = boxcar, size, boxcar.rounding
        real = torch.promote_types((dtype or torch.get_default_dtype()).to_real(), torch.float32)
        components = len(boxcar.widths)
        self.widths = nn.Parameter(torch.empty(components, device=device, dtype=real))
        self.locations = nn.Parameter(torch.empty(components, device=device, dtype=real))
        self.register_buffer("sigma", torch.empty((), device=device, dtype=real))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Widths, locations and sigma as described; whole features where they are rounded, and one at least."""
        self.sigma.fill_(self.boxcar.sigma or torch.inf)
        for parameter, values, least in (
            (self.widths, self.boxcar.widths, 1),
            (self.locations, self.boxcar.locations, 0),
        ):
            features = self.size * torch.tensor(values, dtype=torch.float64)
            features = features.round().clamp(min=least) if self.rounding else features
            parameter.copy_(features / self.size)

    def mask(self) -> Tensor:
        """The mask (components, size) as it is now.

        ``irfft(w sinc(f w) / sinc(f / n) exp(-f^2 / (2 sigma^2)) exp(i pi f (1 / n - w - 2 location)))`` with
        normalised sinc: a Gaussian times the Dirichlet kernel of an interval. Without a Gaussian, and with whole
        features, it is one on the interval and zero elsewhere, to rounding error.
        """
        n = self.size
        length, start = n * self.widths[:, None], n * self.locations[:, None]
        if not self.training:
            length = torch.where(length < 1 - NEGLIGIBLE, 0, length)
        if self.rounding:
            length, start = _rounded(length), _rounded(start)
        f = torch.arange(n // 2 + 1, device=length.device, dtype=length.dtype)
        # angles are taken modulo a turn while they are whole numbers: exact in single precision up to 4,096 features
        half_turns = torch.remainder(f[1:] * length, 2 * n)
        shift = torch.remainder(2 * start + length - 1 + n, 2 * n) - n
        amplitude = torch.cat([length / n, (pi / n * half_turns).sin() / (n * (pi / n * f[1:]).sin())], -1)
        angle = -pi / n * torch.remainder(f * shift, 2 * n)
        amplitude = amplitude * (-0.5 * (f / self.sigma).square()).exp()
        mask = torch.fft.irfft(torch.polar(torch.ones_like(angle), angle) * amplitude, n, norm="forward")
        return mask if self.training else torch.where(mask.abs() < NEGLIGIBLE, 0, mask)

    def forward(self, factor: Tensor) -> Tensor:
        """The factor with each component cut to its interval, in its shape and dtype."""
        mask = self.mask() if self.boxcar.component < self.boxcar.feature else self.mask().T
        shape = [
            size if dim in (self.boxcar.component, self.boxcar.feature) else 1 for dim, size in enumerate(factor.shape)
        ]
        return factor * mask.to(factor.real.dtype).reshape(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            fits = moved.is_floating_point() and moved.dtype.itemsize >= torch.float32.itemsize
            return moved if fits else tensor.to(moved.device)

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"components={len(self.boxcar.widths)}, size={self.size}, rounding={self.rounding}"


def masks_of(module: nn.Module) -> list[BoxcarMask]:
    """All trained masks in ``module``."""
    return [mask for mask in module.modules() if isinstance(mask, BoxcarMask)]


def _rounded(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()
