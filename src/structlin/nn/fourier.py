"""The Fourier transform as a learnable Monarch matrix: two block factors that start as the exact transform.

Cooley and Tukey's first step splits a transform of length ``N = I K`` into K transforms of length I, a phase for each
entry, and I transforms of length K. With the phases taken into the first blocks that is a Monarch matrix of complex
numbers (Dao et al. 2022, section 3: Monarch matrices contain the transform).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..structures import Chain
from ..widths import balanced
from .linear import StructuredLinear

EQUATION = "i k, k j i, j o k -> o j"


class MonarchFourier(nn.Module):
    """``torch.fft.fft`` over the last dimension, or ``ifft``, with weights that can learn.

    >>> x = torch.randn(3, 64, dtype=torch.complex64)
    >>> torch.allclose(MonarchFourier(64)(x), torch.fft.fft(x), atol=1e-4)
    True

    Args:
        length: N, of the transform; a product of two numbers above 1, taken as near to each other as can be.
        inverse: whether it starts as the inverse transform, with its factor of 1/N.
        device: of the parameters.
        dtype: of the parameters and the input, a complex type.

    Shape: input and output (*, length), complex. It has N (I + K) weights, of N^2 that a matrix has.

    Attributes:
        linear: the `StructuredLinear` without bias that does it; its factors are the parameters.

    Raises:
        ValueError: for a length that is prime or below 4, or a type that is not complex.
    """

    def __init__(
        self,
        length: int,
        inverse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.complex64,
    ) -> None:
        super().__init__()
        if not dtype.is_complex:
            raise ValueError(f"a transform of dtype={dtype} is given; allowed: torch.complex64, torch.complex128")
        if _prime(length):
            near = min((n for n in range(4, 2 * max(length, 4)) if not _prime(n)), key=lambda n: abs(n - length))
            raise ValueError(f"length={length} is no product of two numbers above 1; the nearest that is: {near}")
        self.length, self.inverse = length, inverse
        first, second = balanced(length)
        spec = Chain(EQUATION, f"i={first} j={first} k={second} o={second}")
        self.linear = StructuredLinear(length, length, spec, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make it the exact transform again."""
        w1, w2 = self.linear.w1, self.linear.w2  # [k, j, i] and [j, o, k]
        assert isinstance(w1, Tensor)
        assert isinstance(w2, Tensor)
        (second, first, _), device = w1.shape, w1.device
        sign = 1 if self.inverse else -1
        scale = (1 / first, 1 / second) if self.inverse else (1.0, 1.0)
        k, j, i = (torch.arange(n, device=device) for n in (second, first, first))
        # the input at i K + k, the output at o I + j; whole turns are taken off before they are rounded
        turns = (i * j[:, None] * second + k[:, None, None] * j[:, None]) % self.length
        w1.copy_(scale[0] * torch.exp(sign * 2j * torch.pi * turns.double() / self.length))
        turns = torch.arange(second, device=device)[:, None] * k % second
        w2.copy_((scale[1] * torch.exp(sign * 2j * torch.pi * turns.double() / second)).expand_as(w2))

    def forward(self, x: Tensor) -> Tensor:
        """The transform of ``x`` (*, length), complex."""
        y: Tensor = self.linear(x)
        return y

    def matrix(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """What rows are multiplied by, complex ``[length, length]``, or the part of it at these rows or columns.

        An entry is a product of two weights, so a part costs no more than its entries.

        Args:
            rows: their places, int64 ``[n]``; all by default.
            columns: the same, not given together with rows.

        Raises:
            ValueError: when both are given.
        """
        w1, w2 = self.linear.w1, self.linear.w2  # [k, j, i] and [j, o, k]; the input at i K + k, the output at o I + j
        assert isinstance(w1, Tensor)
        assert isinstance(w2, Tensor)
        second, first, _ = w1.shape
        if rows is not None:
            if columns is not None:
                raise ValueError("rows and columns are given; allowed: one of them")
            i, k = rows // second, rows % second
            part = w1[k, :, i].unsqueeze(1) * w2[:, :, k].permute(2, 1, 0)  # [n, o, j]
            return part.flatten(1)
        if columns is not None:
            o, j = columns // first, columns % first
            part = w1[:, j].permute(2, 0, 1) * w2[j, o].T  # [i, k, n]
            return part.flatten(0, 1)
        whole = w1.permute(2, 0, 1).unsqueeze(2) * w2.permute(2, 1, 0)  # [i, k, o, j]
        return whole.flatten(2).flatten(0, 1)

    def extra_repr(self) -> str:
        """Length and direction."""
        return f"length={self.length}, inverse={self.inverse}"


def _prime(length: int) -> bool:
    return length < 4 or balanced(length)[0] == 1
