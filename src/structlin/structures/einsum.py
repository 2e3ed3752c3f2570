"""The continuous space of two-factor einsums (Potapczynski et al., 2024), in which most structures here are points.

A point is seven exponents theta: how the width of the input divides among three digits (alpha, beta, gamma), that of
the output among three others (delta, epsilon, phi), and how the rank rho grows. The published code rounds each digit
alone and then drops inputs or writes constant zeros where the product misses the width; here the digits always
multiply to the width exactly, or with ``pad=True`` to the next wider one that has such digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import islice, product
from math import isqrt, log, prod
from typing import Self

from ..plan import Plan
from ..spec import Spec, register

BTT_POINT = (0.5, 0.0, 0.5, 0.0, 0.5, 0.5, 0.0)
TOLERANCE = 1e-2  # exponents are often written with two decimals, as in (0.33, 0.67)
STRETCH = 2.0  # a digit may be this factor away from its power of the width


@register("einsum")
class Einsum(Spec):
    """``Z = sum_alpha A x``, ``Y = sum_{beta, gamma, rho} B Z`` at a point of the space (Potapczynski et al. 2024,
    section 2: ``x[gamma, beta, alpha]``, ``A[phi, delta, rho, gamma, alpha]``, ``B[phi, epsilon, rho, gamma, beta]``,
    ``Y[phi, epsilon, delta]``).

    Factors ``first`` (gamma, phi, delta, rho, alpha) and ``second`` (phi, epsilon, gamma, rho, beta), without the axes
    of size 1; a factor left with none is left out. ``theta = (alpha, beta, gamma, delta, epsilon, phi, rho)``: the
    digits of the input are the exact factors of in_features nearest ``in_features**alpha`` and so on, and ``rho`` is a
    power of the smaller width. ``dims`` gives the seven sizes themselves instead. The default is the square BTT point.
    """

    dims: tuple[int, ...] | None = None
    theta: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims and self.theta:
            raise ValueError("einsum: give the sizes (dims) or their exponents (theta), not both")
        for what, values in (("dims", self.dims), ("theta", self.theta)):
            if values and len(values) != 7:
                raise ValueError(f"einsum: {what} has {len(values)} numbers; there are seven: a, b, g, d, e, f, r")
        for end in (self.theta[:3], self.theta[3:6]) if self.theta else ():
            if abs(sum(end) - 1) > TOLERANCE:
                raise ValueError(f"einsum: theta divides a width as {end}, which must add up to 1")

    def plan(self, out_features: int, in_features: int) -> Plan:
        if self.dims:
            sizes = self.dims
            if (prod(sizes[:3]), prod(sizes[3:6])) != (in_features, out_features):
                raise ValueError(
                    f"dims={'x'.join(map(str, sizes))} is a matrix of {prod(sizes[3:6])}x{prod(sizes[:3])}, "
                    f"not of {out_features}x{in_features}"
                )
        else:
            theta = self.theta or BTT_POINT
            # ties go to the digits of btt and kronecker: gamma >= alpha >= beta, delta >= epsilon >= phi
            gamma, alpha, beta = nearest(in_features, (theta[2], theta[0], theta[1]))
            delta, epsilon, phi = nearest(out_features, theta[3:6])
            rho = round(min(in_features, out_features) ** theta[6])
            sizes = (alpha, beta, gamma, delta, epsilon, phi, rho)
        # one axis stays at each end of a matrix of one row or column
        size = {a: n for a, n in zip("abgdefr", sizes, strict=True) if n > 1}
        size |= {a: 1 for a, width in (("a", in_features), ("e", out_features)) if width == 1}
        operands = [" ".join(a for a in axes if a in size) for axes in ("gba", "gfdra", "fegrb", "fed")]
        kept = [(name, axes) for name, axes in zip(("first", "second"), operands[1:3], strict=True) if axes]
        used = "".join(operands)
        equation = f"{', '.join([operands[0], *(axes for _, axes in kept)])} -> {operands[3]}"
        return Plan.einsum(equation, names=[name for name, _ in kept], **{a: n for a, n in size.items() if a in used})

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        return (prod(self.dims[3:6]), prod(self.dims[:3])) if self.dims else (1, 1)

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(dims=(2, 4, 2, 3, 2, 4, 2)), (24, 16)
        yield cls(theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25)), (16, 16)


@cache
def nearest(width: int, exponents: tuple[float, ...]) -> tuple[int, ...]:
    """The factors of ``width`` nearest its powers ``exponents``, by the squared distance of the logarithms.

    An exponent of 0 is a factor of 1. Where several are as near, the first of them is the largest possible.

    Raises:
        ValueError: when one would be more than a factor of 2 away, naming the nearest widths that fit.
    """
    found = _nearest(width, exponents)
    if found is None:
        near = (other for step in range(1, width) for other in (width - step, width + step))
        fitting = [str(other) for other in islice((n for n in near if _nearest(n, exponents)), 2)]
        raise ValueError(
            f"a width of {width} has no factors near its powers {exponents}; widths that do: {', '.join(fitting)}"
        )
    return found


@cache
def _nearest(width: int, exponents: tuple[float, ...]) -> tuple[int, ...] | None:
    scale = sum(exponents)
    wanted = [exponent / scale * log(width) for exponent in exponents]
    small = [d for d in range(1, isqrt(width) + 1) if width % d == 0]
    divisors = sorted({*small, *(width // d for d in small)}, reverse=True)
    choices = [
        [d for d in divisors if (d == 1 if exponent == 0 else abs(log(d) - goal) <= log(STRETCH) + 1e-9)]
        for exponent, goal in zip(exponents, wanted, strict=True)
    ]
    fits = [dims for dims in product(*choices) if prod(dims) == width]
    distance = {
        dims: round(sum((log(d) - goal) ** 2 for d, goal in zip(dims, wanted, strict=True)), 9) for dims in fits
    }
    return min(fits, key=distance.__getitem__, default=None)
