"""What a layer costs on a device, predicted: the one model that `auto`'s rule, `structlin predict` and `advise` share.

A layer is the products and copies that it runs (`Work`), and a device is what it reaches (`Ceilings`): FLOP/s by size
of product, bytes/s, and the time of a launch. Every product takes the longer of its FLOPs and its bytes, one after
another. Five numbers, which `structlin.advise.ceilings.fit` reads off times that `structlin bench` measured.
docs/advise.md holds the model against what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .analysis import factor_products
from .plan import Plan


class Product(NamedTuple):
    """One matrix product: its FLOPs, the numbers that it reads and writes, and the smaller of its n and k."""

    flops: float
    numbers: float
    inner: int


class Work(NamedTuple):
    """What runs for a layer.

    Attributes:
        products: the matrix products.
        copied: numbers read and written by copies at the speed of memory.
        reordered: the same by copies that PyTorch makes of strided views.
        copies: how many copies there are.
    """

    products: tuple[Product, ...] = ()
    copied: float = 0.0
    reordered: float = 0.0
    copies: int = 0

    def __add__(self, other: object) -> Work:
        """Both, one after the other."""
        assert isinstance(other, Work)
        moved = self.copied + other.copied, self.reordered + other.reordered
        return Work(self.products + other.products, *moved, self.copies + other.copies)


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches with numbers of ``itemsize`` bytes.

    Attributes:
        flops: FLOP/s of a product that is large in every dimension.
        half: the n or k at which a product reaches half of that.
        bandwidth: bytes/s of what memory bounds.
        reorder: bytes/s of PyTorch's copies of strided views.
        launch: seconds that one kernel takes at least, in a CUDA graph; on a CPU one call.
        itemsize: bytes of a number.
    """

    flops: float
    half: float
    bandwidth: float
    reorder: float
    launch: float
    itemsize: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < float("inf") or (value == 0 and name not in ("half", "launch")):
                raise ValueError(f"{name}={value} of a device is given; allowed: positive numbers")


HOPPER = {
    2: Ceilings(flops=7.93e14, half=117.0, bandwidth=3.62e12, reorder=1.52e12, launch=4.97e-6),
    4: Ceilings(flops=6.0e13, half=0.0, bandwidth=3.62e12, reorder=1.52e12, launch=4.97e-6, itemsize=4),
}
"""Ceilings of an H200 by bytes of a number. Half precision is fitted to results/bench-h200.json; single is the rate of
a large product alone, and stands for wider numbers too."""


def seconds(work: Work, ceilings: Ceilings) -> float:
    """Seconds that ``work`` takes, launched as a CUDA graph."""

    def one(product: Product) -> float:
        rate = ceilings.flops / (1 + ceilings.half / product.inner)
        return max(product.flops / rate, ceilings.itemsize * product.numbers / ceilings.bandwidth)

    moved = work.copied / ceilings.bandwidth + work.reordered / ceilings.reorder
    launches = ceilings.launch * (len(work.products) + work.copies)
    return sum(map(one, work.products)) + ceilings.itemsize * moved + launches


def dense_work(out_features: int, in_features: int, tokens: int, training: bool = False) -> Work:
    """What ``nn.Linear`` of that shape runs: one product, or in training three."""
    numbers = tokens * (in_features + out_features) + in_features * out_features
    product = Product(2.0 * tokens * in_features * out_features, numbers, min(in_features, out_features))
    return Work((product,) * (3 if training else 1))


def composed_work(plan: Plan, tokens: int, training: bool = False, keep: bool = False) -> Work:
    """What a layer runs that multiplies its factors into one weight first, or finds it kept (``keep``)."""
    entries = plan.in_features * plan.out_features
    work = dense_work(plan.out_features, plan.in_features, tokens, training)
    if keep:
        return work
    passes = 3 if training else 1
    products = [
        Product(
            2.0 * plan.size({*a, *b}),
            plan.size(a) + plan.size(b) + plan.size(c),
            min(plan.size({*a} & {*b} - {*c}), plan.size({*b} - {*a})) or 1,
        )
        for term in plan.terms
        for a, b, c in factor_products(term)
    ]
    return work + Work(tuple(products) * passes, passes * entries * len(plan.terms), 0.0, passes * len(plan.terms))
