"""The Fourier neural operator (Li et al. 2021), and Monarch-NO (Dao et al. 2022), whose transforms are learned.

A layer transforms along each axis, keeps the lowest modes, multiplies the channels of each by a complex matrix, and
transforms back; a pointwise layer is added. As so few modes are kept, a transform is a product with a short matrix, its
rows for those modes alone. That is less work than a whole transform, has no complex numbers in it, and serves both
models: in the first the rows are those of the exact transform, in the second they are read off two learned Monarch
factors, which start as the exact transform. Channels are last, so pointwise layers are plain `nn.Linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...nn import MonarchFourier
from .rollout import Stepper

HIDDEN = 128
"""Features before the last layer, as published."""


class ExactFourier(nn.Module):
    """``torch.fft.fft`` over the last dimension, or ``ifft``, without weights; `MonarchFourier` without learning."""

    def __init__(self, length: int, inverse: bool = False) -> None:
        super().__init__()
        self.length, self.inverse = length, inverse

    def forward(self, x: Tensor) -> Tensor:
        """The transform of ``x`` (*, length), complex."""
        y: Tensor = torch.fft.ifft(x) if self.inverse else torch.fft.fft(x)
        return y

    def matrix(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """See `MonarchFourier.matrix`; complex64."""
        every = torch.arange(self.length, device=next((x.device for x in (rows, columns) if x is not None), None))
        turns = (every if rows is None else rows)[:, None] * (every if columns is None else columns) % self.length
        sign, scale = (1, 1 / self.length) if self.inverse else (-1, 1.0)
        found: Tensor = scale * torch.exp(sign * 2j * torch.pi * turns.double() / self.length)
        return found.to(torch.complex64)


class SpectralConv(nn.Module):
    """A layer on the lowest modes of functions on a grid of one or two axes.

    Args:
        width: channels of input and output.
        shape: points along each axis.
        modes: modes that are kept of each axis, positive and negative ones counted apart along the first of two.
        learned: whether the transforms are Monarch factors that learn.

    Shape: input and output (batch, *shape, width), real.

    Raises:
        ValueError: for more modes than an axis has, or a length that has no Monarch factors.
    """

    def __init__(self, width: int, shape: tuple[int, ...], modes: int, learned: bool = False) -> None:
        super().__init__()
        if 2 * modes > min(shape):
            raise ValueError(f"modes={modes} for {min(shape)} points; allowed: 1 to {min(shape) // 2}")
        self.width, self.shape, self.modes = width, shape, modes
        rows = 2 * modes if len(shape) == 2 else 1
        self.weight = nn.Parameter(torch.rand(rows, modes, 2, width, width) / width**2)
        make = MonarchFourier if learned else ExactFourier
        with torch.random.fork_rng([]):  # so that a seed gives both models the same weights
            self.forth = nn.ModuleList(make(length) for length in shape)
            self.back = nn.ModuleList(make(length, inverse=True) for length in shape)

    def matrices(self) -> list[Tensor]:
        """Real matrices of the transforms, cut to the modes: along the last axis forth and back, then the first."""
        device, m, n = self.weight.device, self.modes, self.shape[0]
        first = torch.arange(m, device=device)
        lowest = _part(self.forth[-1], columns=first)
        # a real function has its negative modes too, so all but the mean count twice
        inverse = torch.where(first > 0, 2.0, 1.0)[:, None] * _part(self.back[-1], rows=first)
        found = [torch.cat([lowest.real, lowest.imag], 1).T, torch.cat([inverse.real, -inverse.imag]).T]
        if len(self.shape) == 2:
            kept = torch.cat([first, torch.arange(n - m, n, device=device)])
            found += [_real_form(_part(self.forth[0], columns=kept)), _real_form(_part(self.back[0], rows=kept))]
        return [matrix.contiguous() for matrix in found]

    def forward(self, x: Tensor, last: Tensor, from_last: Tensor, *first: Tensor) -> Tensor:
        """The layer at ``x``, with the transforms of `matrices`."""
        batch, lines, m, c = x.shape[0], x.shape[1] if first else 1, self.modes, self.width
        z = _along(last, x.reshape(batch * lines, -1, c))  # [batch lines, (re im) modes, c]
        if first:
            z = _along(first[0], z.view(batch, lines * 2, m * c))
        z = z.view(batch, -1, 2, m, c).permute(1, 3, 0, 2, 4).reshape(-1, batch, 2 * c)
        real, imaginary = self.weight.flatten(0, 1).unbind(1)
        mix = torch.cat([torch.cat([real, imaginary], 2), torch.cat([-imaginary, real], 2)], 1)
        z = torch.bmm(z, mix).view(-1, m, batch, 2, c).permute(2, 0, 3, 1, 4)
        if first:
            z = _along(first[1], z.reshape(batch, -1, m * c))
        return _along(from_last, z.reshape(batch * lines, 2 * m, c)).view(x.shape)


class FNO(Stepper):
    """Fourier neural operator on functions of one or two coordinates, or Monarch-NO.

    Args:
        shape: points along each axis.
        times: length of the window that it is given.
        width: channels of its layers.
        modes: of each axis, that its layers keep.
        depth: number of layers.
        learned: whether the transforms are Monarch factors that learn.
        pad: points that are added at the end of each axis, for functions that are not periodic.

    Shape: see `Stepper`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        times: int,
        width: int,
        modes: int,
        depth: int,
        learned: bool = False,
        pad: int = 0,
    ) -> None:
        super().__init__()
        self.shape, self.pad = shape, pad
        padded = tuple(length + pad for length in shape)
        self.lift = nn.Linear(times + len(shape), width)
        self.spectral = nn.ModuleList(SpectralConv(width, padded, modes, learned) for _ in range(depth))
        self.pointwise = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.hidden = nn.Linear(width, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)
        places = [torch.arange(length) / length for length in shape]
        grid = torch.stack(torch.meshgrid(*places, indexing="ij"), -1)
        self.register_buffer("grid", grid, persistent=False)

    def prepare(self) -> list[Tensor]:
        """The matrices of all layers."""
        found: list[Tensor] = []
        for layer in self.spectral:
            assert isinstance(layer, SpectralConv)
            found += layer.matrices()
        return found

    def step(self, window: Tensor, *prepared: Tensor) -> Tensor:
        """See `Stepper`."""
        assert isinstance(self.grid, Tensor)
        x = self.lift(torch.cat([window, self.grid.expand(len(window), *self.grid.shape)], -1))
        if self.pad:
            x = F.pad(x, (0, 0, *[0, self.pad] * len(self.shape)))
        each = len(prepared) // len(self.spectral)
        for index, (spectral, pointwise) in enumerate(zip(self.spectral, self.pointwise, strict=True)):
            x = spectral(x, *prepared[index * each : (index + 1) * each]) + pointwise(x)
            if index + 1 < len(self.spectral):
                x = F.gelu(x)
        for axis, length in enumerate(self.shape, 1):
            x = x.narrow(axis, 0, length)
        found: Tensor = self.head(F.gelu(self.hidden(x)))
        return found


def _part(transform: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    assert isinstance(transform, ExactFourier | MonarchFourier)
    return transform.matrix(rows, columns)


def _along(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix`` [out, in] times the middle dimension of ``x`` [p, in, s]; nothing is copied for it."""
    return torch.bmm(matrix.to(x.dtype).expand(len(x), -1, -1), x)


def _real_form(matrix: Tensor) -> Tensor:
    """Complex [in, out] as real [(out, 2), (in, 2)] that multiplies columns of real and imaginary parts in turn."""
    real, imaginary = matrix.T.real, matrix.T.imag
    rows = [torch.stack([real, -imaginary], -1), torch.stack([imaginary, real], -1)]  # each [out, in, 2]
    return torch.stack(rows, 1).flatten(2).flatten(0, 1)
