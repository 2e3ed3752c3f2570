"""A linear layer of experts: a drop-in ``nn.Linear`` that multiplies every token by the few matrices it chose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.tiles import Sets
from ..ops.contract import transforming
from ..ops.routed import arrange, multiply_routed, size_of_sets
from ..ops.rows import program
from ..padding import described
from ..plan import Plan
from ..spec import Spec
from ..structures import MoE
from . import init as initialisation
from .linear import StructuredLinear
from .nested import by_values
from .router import Router, Routing


class RoutedLinear(nn.Module):
    """``y = sum_e g_e(x) W_e x + bias`` over the experts that a router picks for each token; as ``torch.nn.Linear``.

    >>> layer = RoutedLinear(64, 128, btt_moe(experts=8, top_k=2))
    >>> layer(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 128])

    With `btt_moe` this is BTT-MoE (Potapczynski et al. 2024, section 5). A token costs what it visits: no expert runs
    for a token that did not choose it. Training adds `structlin.nn.routing_loss` to the loss of the model.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        spec: the mixture, of any structure.
        bias: whether to add a learnable bias of shape (out_features,), zero at first (but for init="reference").
        device: of the parameters; "meta" allocates nothing.
        dtype: of the parameters, any real float type.
        init: how the factors of each expert are drawn, as in `StructuredLinear`.
        zero_last: whether the last factor of each term and the bias start at zero, for the output of a residual branch.

    Shape: input (*, in_features), output (*, out_features), with any number of leading dimensions of any size.

    The factors are parameters named as those of the structure, with the experts as an additional first axis.

    Attributes:
        plan: the matrix of one expert.
        router: the `Router`.
        leads: whether the layer asks the router; one that `share_router_` made a follower goes where the leader went.

    Raises:
        ValueError: when the shape does not fit the structure, for a spec that is no mixture, a complex dtype, or an
            input that does not fit the layer.
    """

    spec: MoE
    plan: Plan
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: MoE,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        init: str = "spectral",
        zero_last: bool = False,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"a layer of {out_features}x{in_features} features has no weight; widths start at 1")
        if not isinstance(spec, MoE):
            raise ValueError(f"{spec!r} is no mixture of experts; give one, as btt_moe(experts=8, top_k=2)")
        if dtype is not None and dtype.is_complex:
            raise ValueError(f"dtype={dtype} has no order to choose experts by; give a real one")
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.init, self.zero_last, self.leads = initialisation.check(init), zero_last, True
        self.plan = spec.expert_plan(out_features, in_features)
        self._program = program(self.plan)
        for name, shape in self.plan.shapes.items():
            factor = torch.empty(spec.experts, *shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(factor))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.router = Router(in_features, spec.experts, spec.top_k, spec.balance, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the factors of every expert anew, as ``init`` and ``zero_last`` say; the router becomes zero."""
        draws = initialisation.draws(self.spec.expert, self.plan, self.init)
        if self.zero_last:
            draws |= dict.fromkeys(("bias", *(term.names[-1] for term in self.plan.terms)), initialisation.ZERO)
        for name in self.plan.factors:
            for factor in self.get_parameter(name):
                initialisation.fill_(factor, draws[name], self.plan, name)
        if self.bias is not None:
            initialisation.fill_(self.bias, draws.get("bias", initialisation.ZERO), self.plan, "bias")
        self.router.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features); a nested tensor (batch, lengths, in_features) to one."""
        x = input
        if x.is_nested:
            return by_values(self, x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"the last dimension of the input must be in_features={self.in_features}, not that of {tuple(x.shape)}"
            )
        if transforming():
            raise NotImplementedError(
                "tokens are sorted by where they go, which transforms of torch.func cannot follow; call a mixture of "
                "experts outside of them"
            )
        tokens = x.reshape(-1, self.in_features)
        factors = [getattr(self, name) for name in self.plan.factors]
        if self.leads:
            y = self.router.multiply(tokens, factors, self._program)
        else:
            _, gate, chosen, routes = self._followed(tokens)
            y = multiply_routed(tokens, factors, gate, chosen, routes, self._program)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _followed(self, tokens: Tensor) -> Routing:
        last = self.router.last
        if last is None or last.gate.shape[0] != tokens.shape[0]:
            went = "none" if last is None else last.gate.shape[0]
            raise ValueError(
                f"{tokens.shape[0]} tokens follow a shared router that last saw {went}; the layer that leads must run "
                "first, on the same tokens"
            )
        if torch.is_grad_enabled() and self.router.weight.requires_grad and not last.gate.requires_grad:
            raise ValueError(
                "the layer that leads a shared router ran without gradients, so the router would not learn from this "
                "one; checkpoint all layers of the router together, or with use_reentrant=False"
            )
        size = last.routes.unit.shape[1] if isinstance(last.routes, Sets) else 0
        if size == size_of_sets(tokens, self.spec.experts, self.spec.top_k, self._program):
            return last
        return last._replace(routes=arrange(tokens, last.chosen, self.spec.experts, self._program))

    @torch.no_grad()
    def expert(self, index: int) -> StructuredLinear:
        """A copy of one expert, without the bias: the layer of its structure."""
        first = self.get_parameter(next(iter(self.plan.factors)))
        layer = StructuredLinear(
            self.in_features, self.out_features, self.spec.expert, False, first.device, first.dtype
        )
        for name in self.plan.factors:
            layer.get_parameter(name).copy_(self.get_parameter(name)[index])
        return layer.train(self.training)

    def to_dense(self) -> nn.Linear:
        """A mixture is no matrix.

        Raises:
            ValueError: always; ``layer.expert(i).to_dense()`` is one expert as ``nn.Linear``.
        """
        raise ValueError(
            f"{self.spec} multiplies every token by matrices of its own and has no dense form; "
            "expert(i).to_dense() is that of one expert"
        )

    def extra_repr(self) -> str:
        params, flops = self.spec.costs(self.out_features, self.in_features)
        drawn = f", init={self.init!r}" * (self.init != "spectral") + ", zero_last=True" * self.zero_last
        drawn += ", leads=False" * (not self.leads)
        padding = f", padded {padded}" if (padded := described(self.plan)) else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, spec={self.spec!r}, "
            f"bias={self.bias is not None}{drawn}, params={params:,}, "
            f"compute={flops / (2 * self.in_features * self.out_features):.1%}{padding}"
        )


def layer_of(
    spec: Spec,
    in_features: int,
    out_features: int,
    bias: bool = True,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    init: str = "spectral",
) -> StructuredLinear | RoutedLinear:
    """The layer of any spec: `RoutedLinear` for a mixture of experts, else `StructuredLinear`; raises as they do."""
    if isinstance(spec, MoE):
        return RoutedLinear(in_features, out_features, spec, bias, device, dtype, init)
    return StructuredLinear(in_features, out_features, spec, bias, device, dtype, init=init)


def share_router_(block: nn.Module) -> list[str]:
    """Let all `RoutedLinear` of ``block`` go where its first one goes, in place: one router for each block.

    The first is the first by registration; it must also run first, and all on the same tokens. Its router is that of
    the others too, and a checkpoint says which they are.

    Returns:
        The names of the layers that follow.

    Raises:
        ValueError: for fewer than two layers, or mixtures that differ in experts, top_k or balance. The block is
            unchanged then.
    """
    layers = {name: module for name, module in block.named_modules() if isinstance(module, RoutedLinear)}
    if len(layers) < 2:
        raise ValueError(f"the block has {len(layers)} RoutedLinear; a router is shared by two or more")
    kinds = {name: (m.spec.experts, m.spec.top_k, m.spec.balance) for name, m in layers.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"layers that share a router have the same experts, top_k and balance, not {kinds}")
    leader, *followers = layers.values()
    for layer in followers:
        layer.router, layer.leads = leader.router, False
    return list(layers)[1:]
