"""Tensor train: a chain of small cores, each mapping one digit of the input to one of the output."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from math import prod
from operator import mul
from typing import Self

from ..plan import Plan
from ..spec import Spec, register
from ..widths import balanced, digits
from .btt import ORDINALS, bonds


@register("tensor_train")
class TensorTrain(Spec):
    """Both widths are split into as many digits as ``cores``; neighbouring cores share an axis of size ``rank``.

    ``W[(o_0 ... o_c), (i_0 ... i_c)] = sum_r  G_0[o_0, r_1, i_0] G_1[o_1, r_2, i_1, r_1] ... G_c[o_c, i_c, r_c]``
    (Oseledets 2011; Qiu et al. 2024, "TT"; Potapczynski et al. 2024, section 2). Factors ``first``, ``second``, ...
    are these cores, the slowest digit first. Widths are split into their most even factors, smallest first, unless
    ``in_dims`` and ``out_dims`` give the digits. One ``rank`` for all, or one for each pair of neighbours (``4x8``).
    """

    cores: int = 2
    rank: int | tuple[int, ...] = 4
    in_dims: tuple[int, ...] | None = None
    out_dims: tuple[int, ...] | None = None

    def plan(self, out_features: int, in_features: int) -> Plan:
        n = self.cores
        ins = digits("in_dims", in_features, self.in_dims, balanced(in_features, n))
        outs = digits("out_dims", out_features, self.out_dims, balanced(out_features, n))
        cells = [a * b for a, b in zip(ins, outs, strict=True)]
        limits = [min(left, prod(cells) // left) for left in accumulate(cells[:-1], mul)]
        ranks = bonds(self.rank, limits, f"{out_features}x{in_features}")
        right, left = [f" r{k}" for k in range(1, n)] + [""], [""] + [f" r{k}" for k in range(1, n)]
        factors = [f"o{k}{right[k]} i{k}{left[k]}" for k in range(n)]
        x, y = (" ".join(f"{letter}{k}" for k in range(n)) for letter in "io")
        sizes = {f"{letter}{k}": size for letter, dims in (("i", ins), ("o", outs)) for k, size in enumerate(dims)}
        sizes |= {f"r{k}": size for k, size in enumerate(ranks, 1)}
        return Plan.einsum(f"{', '.join([x, *factors])} -> {y}", names=ORDINALS[:n], **sizes)

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        return prod(self.out_dims or (1,)), prod(self.in_dims or (1,))

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(cores=2, rank=3), (24, 16)
        yield cls(cores=3, rank=(2, 3), in_dims=(2, 4, 2)), (12, 16)
