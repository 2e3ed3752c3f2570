"""Block tensor train (Qiu et al., 2024): Monarch with freely chosen factors of the widths, a rank, any number of cores.

Each core maps one digit of the input to one of the output, as in a tensor train, but has weights of its own for every
value of the digits that are not its business: no weight is shared, and a layer is one batched product per core.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Literal, Self

from ..plan import Plan
from ..spec import Spec, register
from ..widths import balanced, digits, greedy

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def bonds(rank: int | tuple[int, ...], limits: Sequence[int], shape: str) -> tuple[int, ...]:
    """The rank between each pair of neighbouring factors: one number for all, or one each, up to ``limits``.

    Raises:
        ValueError: for a rank over its limit, or not as many as there are limits.
    """
    ranks = rank if isinstance(rank, tuple) else (rank,) * len(limits)
    if len(ranks) != len(limits):
        raise ValueError(f"{len(limits) + 1} factors have {len(limits)} ranks between them, not {len(ranks)}: {ranks}")
    if any(r > limit for r, limit in zip(ranks, limits, strict=True)):
        allowed = "1 to " + (str(min(limits)) if isinstance(rank, int) else "x".join(map(str, limits)))
        raise ValueError(
            f"rank={rank} exceeds what two neighbouring factors of {shape} can have; rank may be {allowed}"
        )
    return ranks


def count(what: str, factors: int) -> int:
    """``factors``, a number of factors that `ORDINALS` has names for.

    Raises:
        ValueError: for a number below 2 or too large.
    """
    if not 2 <= factors <= len(ORDINALS):
        raise ValueError(f"{what}={factors} is out of range; {what} may be 2 to {len(ORDINALS)}")
    return factors


def block_chain(
    ins: Sequence[int], outs: Sequence[int], rank: int | tuple[int, ...], order: str = "blocked"
) -> Plan:  # fmt: skip
    """A chain in which factor s maps the s-th digit of the input, from the fastest, to the s-th of the output.

    Factor s is stored as (input digits that wait, output digits that are done, output digit s, rank to the right,
    input digit s, rank to the left). Sizes are given slowest digit first. The output is written with the digit of
    the first factor slowest (``order="blocked"``) or fastest (``"paper"``).
    """
    n = len(ins)
    limits = [min(prod(ins[n - s :]), prod(outs[s:])) for s in range(1, n)]
    ranks = bonds(rank, limits, f"{prod(outs)}x{prod(ins)}")
    factors = []
    for s in range(n):
        waiting, done = [f"i{d}" for d in range(n - 1, s, -1)], [f"o{d}" for d in range(s)]
        if order == "paper" and s == n - 1:
            done.reverse()  # as the output has them: the last product then writes in place
        right, left = [f"r{s + 1}"] * (s + 1 < n), [f"r{s}"] * (s > 0)
        factors.append(" ".join([*waiting, *done, f"o{s}", *right, f"i{s}", *left]))
    x = " ".join(f"i{d}" for d in range(n - 1, -1, -1))
    y = " ".join(f"o{d}" for d in (range(n) if order == "blocked" else range(n - 1, -1, -1)))
    sizes = {f"i{n - 1 - d}": size for d, size in enumerate(ins)} | {f"o{d}": size for d, size in enumerate(outs)}
    sizes |= {f"r{s}": size for s, size in enumerate(ranks, 1)}
    return Plan.einsum(f"{', '.join([x, *factors])} -> {y}", names=ORDINALS[:n], **sizes)


@register("btt")
class BTT(Spec):
    """Both widths are split into as many digits as ``cores``; every pair of blocks has rank ``rank``.

    Factors for two cores: ``first`` (c, f, rank, a), ``second`` (f, e, c, rank) with in_features = c a and
    out_features = f e (Qiu et al. 2024, section 3; Potapczynski et al. 2024, theta with beta = delta = 0). For more
    cores see `block_chain`; their general code reads and writes the digits in the opposite order.

    ``split`` chooses the digits: the most even ones, or those of the published code ("greedy"); a, the smallest, is
    the fastest digit of the input, f the slowest of the output. ``in_dims`` and ``out_dims`` give them instead, slowest
    first: ``btt:in_dims=32x24``. One ``rank`` for all, or one for each pair of neighbours (``4x8``).
    """

    rank: int | tuple[int, ...] = 1
    cores: int = 2
    split: Literal["balanced", "greedy"] = "balanced"
    in_dims: tuple[int, ...] | None = None
    out_dims: tuple[int, ...] | None = None

    def plan(self, out_features: int, in_features: int) -> Plan:
        split, n = balanced if self.split == "balanced" else greedy, count("cores", self.cores)
        ins = digits("in_dims", in_features, self.in_dims, split(in_features, n)[::-1])
        outs = digits("out_dims", out_features, self.out_dims, split(out_features, n))
        return block_chain(ins, outs, self.rank)

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        return prod(self.out_dims or (1,)), prod(self.in_dims or (1,))

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(rank=1), (16, 16)
        yield cls(rank=2), (24, 16)
        yield cls(rank=2, cores=3, in_dims=(2, 4, 3)), (16, 24)
