"""A mixture of experts as a spec: no one matrix, but some of several for each token, each of the same structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, Self

from ..analysis import flops, num_params
from ..plan import Plan
from ..spec import MIXTURES, Spec, register
from .btt import BTT
from .dense import Dense
from .low_rank import LowRank
from .monarch import Monarch


@register("moe", MIXTURES)
class MoE(Spec):
    """``y = sum_e g_e(x) W_e x`` over the ``top_k`` of ``experts`` matrices that a router picks for each token.

    Every ``W_e`` is a matrix of the structure ``of`` with factors of its own; `structlin.nn.RoutedLinear` is the layer.
    With ``of=BTT(rank=1)`` this is BTT-MoE (Potapczynski et al. 2024, section 5): the rank axis of a BTT matrix is the
    axis of experts, and the gate multiplies the intermediate between both factors.

    ``balance`` is how the load of the experts is evened out: by a loss, or by a bias on what the router picks from
    (Wang et al. 2024, "auxiliary-loss-free"), both in `structlin.nn`.

    As text the parameters of the structure follow: ``btt_moe:experts=8:top_k=2:rank=1``,
    ``(monarch:nblocks=4+low_rank:rank=8)_moe:experts=8``. It is no term of a sum or a product, and holds no MoE.
    """

    of: Spec
    experts: int = 8
    top_k: int = 2
    balance: Literal["loss", "bias"] = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k > self.experts:
            raise ValueError(f"moe: top_k={self.top_k} exceeds experts={self.experts}; it may be 1 to {self.experts}")
        if isinstance(self.of, MoE):
            raise ValueError(f"moe: the experts of {self.of} cannot be mixtures again; give a structure of matrices")

    @property
    def expert(self) -> Spec:
        """The structure of one expert, padded if the mixture is."""
        return replace(self.of, pad=self.pad)

    def plan(self, out_features: int, in_features: int) -> Plan:
        """A mixture has no plan.

        Raises:
            ValueError: always, as it is no matrix; `expert_plan` is that of one expert.
        """
        raise ValueError(
            f"{self} is a mixture of experts and no matrix; its layer is structlin.nn.RoutedLinear, "
            "and to_structured_ takes it as a rule"
        )

    def expert_plan(self, out_features: int, in_features: int) -> Plan:
        """The matrix of one expert.

        Raises:
            ValueError: when the shape does not fit its structure, or for trained masks.
        """
        plan = self.expert.plan(out_features, in_features)
        if self.of.masks(plan):
            raise ValueError(f"{self.of} has trained masks, which experts cannot share; use another structure")
        return plan

    def costs(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Parameters of all experts and of the router, and forward FLOPs of one token: of what it visits, only."""
        plan, router = self.expert_plan(out_features, in_features), self.experts * in_features
        return self.experts * num_params(plan) + router, self.top_k * flops(plan) + 2 * router

    def __str__(self) -> str:
        name, _, rest = str(self.of).partition(":")
        if parenthesised(str(self.of)):
            name, rest = f"({self.of})", ""
        parts = [
            f"{name}_moe",
            f"experts={self.experts}",
            f"top_k={self.top_k}",
            "balance=bias" * (self.balance == "bias"),
        ]
        parts += [rest, "pad=true" * self.pad]
        return ":".join(filter(None, parts))

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        yield cls(BTT(rank=1), 4, 2), (24, 16)
        yield cls(BTT(rank=2), 3, 1), (16, 24)
        yield cls(LowRank(rank=4), 4, 2), (24, 16)
        yield cls(Monarch(nblocks=2), 4, 3), (16, 24)
        yield cls(Dense(), 3, 2, balance="bias"), (24, 16)
        yield cls(Monarch(nblocks=4) + LowRank(rank=2), 3, 2), (16, 16)
        yield cls(Monarch(nblocks=4), 3, 2, pad=True), (18, 15)


def parenthesised(text: str) -> bool:
    """Whether the text of a spec needs parentheses before more may follow."""
    return any(letter in text for letter in "+@(") or text.endswith(".T")


def btt_moe(experts: int = 8, top_k: int = 2, **fields: Any) -> MoE:
    """BTT-MoE; ``fields`` are those of `BTT`, of rank 1 unless given: the experts are the paper's rank axis."""
    return MoE(BTT(**fields), experts, top_k)


def low_rank_moe(experts: int = 8, top_k: int = 2, **fields: Any) -> MoE:
    """Low-rank experts; ``fields`` are those of `LowRank`, whose rank is the fraction 1 / experts unless given."""
    return MoE(LowRank(**({"rank": 1 / experts} | fields)), experts, top_k)


def monarch_moe(experts: int = 8, top_k: int = 2, **fields: Any) -> MoE:
    """Monarch experts; ``fields`` are those of `Monarch`."""
    return MoE(Monarch(**fields), experts, top_k)


def dense_moe(experts: int = 8, top_k: int = 2) -> MoE:
    """Whole matrices as experts: the plain mixture in place of one linear layer."""
    return MoE(Dense(), experts, top_k)
