"""How the width of a layer divides: into equal parts, into even digits, into a rank; and what to say when it does not.

Nothing is ever rounded or padded in silence: a width that does not fit is an error that names the values that do.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import accumulate, pairwise
from math import gcd, prod
from operator import mul


def divide(what: str, parts: int, **sizes: int) -> tuple[int, ...]:
    """Each of ``sizes`` divided by ``parts``, exactly.

    >>> divide("nblocks", 4, in_features=64, out_features=32)
    (16, 8)

    Raises:
        ValueError: naming the parameter ``what``, the size that it does not divide, and the values that would do.
    """
    for name, size in sizes.items():
        if size % parts:
            raise ValueError(f"{what}={parts} does not divide {name}={size}; {_fitting(what, gcd(*sizes.values()))}")
    return tuple(size // parts for size in sizes.values())


def butterfly(size: int, nfactors: int | None, **widths: int) -> list[tuple[int, int]]:
    """(stride, radix) of each of the first ``nfactors`` factors of a butterfly matrix over ``size`` cells, or of all.

    The number of a cell is read in digits, the prime factors of ``size``, the smallest fastest; factor l links cells
    that differ in digit l, which are multiples of its stride apart. Of a power of two all radices are 2.

    >>> butterfly(12, None, in_features=768)
    [(1, 2), (2, 2), (4, 3)]

    Raises:
        ValueError: for a size below 2 or one that does not divide all ``widths``, naming those that do, and for more
            factors than it has.
    """
    common = gcd(*widths.values())
    if size < 2 or common % size:
        fitting = [str(n) for n in range(2, common + 1) if common % n == 0]
        shown = " and ".join(f"{name}={width}" for name, width in widths.items())
        fits = ", ".join(fitting if len(fitting) <= 12 else [*fitting[:11], "...", fitting[-1]])
        does = f"butterfly_size may be {fits}" if fits else "none does, as they have no common divisor"
        raise ValueError(f"butterfly_size={size} is not from 2 on and a divisor of {shown}; {does}")
    levels, stride = list[tuple[int, int]](), 1
    while stride < size:
        radix = next(n for n in range(2, size + 1) if size // stride % n == 0)
        levels.append((stride, radix))
        stride *= radix
    if nfactors is not None and nfactors > len(levels):
        raise ValueError(
            f"nfactors={nfactors} exceeds the factors of butterfly_size={size}; nfactors may be 1 to {len(levels)}"
        )
    return levels[:nfactors]


@cache
def balanced(size: int, parts: int = 2) -> tuple[int, ...]:
    """The factors of ``size`` that are nearest to each other, ascending: ``balanced(768) == (24, 32)``.

    Raises:
        ValueError: for a size below 1.
    """
    if size < 1:
        raise ValueError(f"a width of {size} has no factors; widths start at 1")
    return min(_ascending(size, parts, 1), key=sum)


def greedy(size: int, parts: int = 2) -> tuple[int, ...]:
    """The factors that the published code takes, each prime into the smallest so far: ``greedy(768) == (16, 48)``."""
    factors, prime = [1] * parts, 2
    while size > 1:
        if size % prime:
            prime += 1 if prime * prime <= size else size - prime
        else:
            factors[factors.index(min(factors))] *= prime
            size //= prime
    return tuple(sorted(factors))


def digits(what: str, size: int, dims: tuple[int, ...] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """How a feature index is read, slowest digit first: ``dims`` if given, else ``default``.

    Raises:
        ValueError: when ``dims`` do not multiply to ``size`` or are not as many as ``default``.
    """
    if dims is None:
        return default
    if prod(dims) != size or len(dims) != len(default):
        wanted = f"must be {len(default)} numbers whose product is {size}"
        raise ValueError(f"{what}={_joined(dims)} {wanted}; one choice is {_joined(default)}")
    return dims


def common_digits(one: tuple[int, ...], other: tuple[int, ...]) -> list[int]:
    """Sizes of the digits that refine both ways of reading an index, slowest first.

    >>> common_digits((4, 6), (2, 12))
    [2, 2, 6]

    Raises:
        ValueError: for different widths, and where no digits refine both.
    """
    if prod(one) != prod(other):
        raise ValueError(f"a matrix of {prod(one)} columns cannot follow one of {prod(other)} rows")
    bounds = sorted({1, *accumulate(one, mul), *accumulate(other, mul)})
    if any(high % low for low, high in pairwise(bounds)):
        raise ValueError(
            f"the product has no common digits between its factors: one side reads {prod(one)} features as "
            f"{'x'.join(map(str, other))}, the other as {'x'.join(map(str, one))}"
        )
    return [high // low for low, high in pairwise(bounds)]


def share(rank: int | float, size: int) -> int:
    """A rank that may be given as a fraction of ``size``: the nearest whole number, at least 1.

    Raises:
        ValueError: for a fraction that is not positive.
    """
    if isinstance(rank, float) and not rank > 0:
        raise ValueError(f"rank={rank} is given; allowed: a whole number from 1 on, or a fraction above 0")
    return rank if isinstance(rank, int) else max(1, round(rank * size))


def _ascending(size: int, parts: int, least: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (size,)
    for d in range(least, round(size ** (1 / parts)) + 1) if parts > 1 else ():
        if size % d == 0 and d**parts <= size:
            yield from ((d, *rest) for rest in _ascending(size // d, parts - 1, d))


def _fitting(what: str, size: int) -> str:
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    shown = divisors if len(divisors) <= 12 else [*divisors[:11], "...", divisors[-1]]
    return f"{what} may be {', '.join(map(str, shown))}"


def _joined(dims: tuple[int, ...]) -> str:
    return "x".join(map(str, dims))
