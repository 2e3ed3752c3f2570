"""The router of a mixture of experts: which experts each token visits, how much of each, and how even their load is.

Forward keeps its logits and routes; the losses and the figures for a log are computed from them when they are asked
for. Nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.tiles import Sets
from ..ops.routed import alike, arrange, is_led, multiply_led, multiply_routed
from ..ops.rows import Program, Routes, sort

BIAS_STEP = 0.001  # of the bias of an expert at each update (Wang et al. 2024)


class Routing(NamedTuple):
    """Where the tokens of one forward pass went.

    Attributes:
        logits: (tokens, experts), float32 or wider.
        gate: (tokens, top_k), of the same dtype; the shares of the chosen experts, which add up to 1.
        chosen: (tokens, top_k), int64, the experts.
        routes: the rows that the tokens become.
    """

    logits: Tensor
    gate: Tensor
    chosen: Tensor
    routes: Routes | Sets


class Load(NamedTuple):
    """How a router spread its last tokens, on the device: nothing waits for it until it is read.

    Attributes:
        load: (experts,) the share of all choices that fell on each expert, float32.
        entropy: scalar, in nats, the mean over the tokens of the entropy of the softmax over all experts.
    """

    load: Tensor
    entropy: Tensor


class Router(nn.Module):
    """A linear map from a token to a logit for each expert, zero at first; the largest ``top_k`` are chosen.

    The gate is the softmax over the chosen logits, in float32 or wider (Potapczynski et al. 2024). There is no
    capacity: no token is dropped. While logits are tied, as at the start, which of them is chosen is arbitrary.

    Args:
        in_features: width of a token.
        experts: their number.
        top_k: how many of them a token visits.
        balance: "loss" for `routing_loss`, or "bias": to what is chosen from a bias is added, which is no part of the
            gate and which `update_balance_` moves.
        device: of the weight (experts, in_features).
        dtype: of the weight.
    """

    def __init__(
        self,
        in_features: int,
        experts: int,
        top_k: int,
        balance: str = "loss",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.experts, self.top_k, self.balance = in_features, experts, top_k, balance
        self.weight = nn.Parameter(torch.empty(experts, in_features, device=device, dtype=dtype))
        # counted in steps: whole numbers, which no cast of the model rounds
        steps = torch.empty(experts, device=device, dtype=torch.int32) if balance == "bias" else None
        self.register_buffer("bias_steps", steps)
        self.last: Routing | None = None
        self.reset_parameters()

    bias_steps: Tensor | None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero: every expert is as likely as any other."""
        for tensor in (self.weight, self.bias_steps):
            if tensor is not None:
                tensor.zero_()

    def forward(self, x: Tensor, program: Program | None = None) -> Routing:
        """Tokens (tokens, in_features) -> where they go, sorted as the ``program`` of a layer takes them, or by expert.

        Raises:
            ValueError: when input and weight differ in dtype, and under ``torch.autograd.detect_anomaly()`` for logits
                that are not finite; without it the output of such a token is not finite either.
        """
        x, weight = alike(x, [self.weight])
        logits = F.linear(x, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        _refuse_what_is_not_finite(logits)
        scores = logits.detach()
        if (bias := self._bias()) is not None:
            scores = scores + bias
        chosen = scores.topk(self.top_k, dim=1).indices
        gate = logits.gather(1, chosen).softmax(1)
        routes = sort(chosen, self.experts) if program is None else arrange(x, chosen, self.experts, program)
        self.last = Routing(logits, gate, chosen, routes)
        return self.last

    def multiply(self, x: Tensor, factors: Sequence[Tensor], program: Program) -> Tensor:
        """`forward`, then the mixture of ``program``: (tokens, in_features) -> (tokens, out_features).

        One operator where there are kernels of ours for it. Raises what both raise.
        """
        if not is_led(x, self.experts, self.top_k, program):
            _, gate, chosen, routes = self(x, program)
            return multiply_routed(x, factors, gate, chosen, routes, program)
        x, weight = alike(x, [self.weight])
        led = multiply_led(x, weight, self._bias(), factors, self.top_k, program)
        _refuse_what_is_not_finite(led.logits)
        self.last = Routing(led.logits, led.gate, led.chosen, led.sets)
        return led.y

    def _bias(self) -> Tensor | None:
        return None if self.bias_steps is None else BIAS_STEP * self.bias_steps

    def __getstate__(self) -> dict[str, Any]:
        # tensors of a graph can be neither copied nor pickled
        return {**self.__dict__, "last": None}

    def extra_repr(self) -> str:
        by = f", balance={self.balance!r}" * (self.balance != "loss")
        return f"in_features={self.in_features}, experts={self.experts}, top_k={self.top_k}{by}"


def _refuse_what_is_not_finite(logits: Tensor) -> None:
    if torch.compiler.is_compiling() or not torch.is_anomaly_enabled():
        return
    wrong = int((~logits.isfinite()).any(1).sum())
    if wrong:
        raise ValueError(
            f"the router got logits that are not finite for {wrong} of {logits.shape[0]} tokens; "
            "look for what is not finite in its input or its weight"
        )


def _routers(model: nn.Module) -> dict[str, Router]:
    """The routers that have run, by their first names."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    if not found:
        raise ValueError("the model has no router; RoutedLinear and MoEFFN bring one")
    missing = [name for name, router in found.items() if router.last is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} did not run yet; call this after a forward pass")
    return found


def routing_loss(model: nn.Module, balance: float = 0.01, z: float = 0.001) -> Tensor:
    """What to add to the loss of ``model`` after its forward pass: the mean over its routers, a scalar.

    For each ``balance * experts * sum_e p_e f_e + z * mean(logsumexp(logits)**2)``, with ``p_e`` the mean over the
    tokens of the softmax over all experts and ``f_e`` the share of the choices that fell on e (Potapczynski et al.
    2024; Zoph et al. 2022 for the second). Where the load is even, experts times the sum is 1. A router that is
    balanced by a bias has the second part only. Every process has the losses of its own tokens.

    Args:
        model: any module with routers.
        balance: coefficient of the first part.
        z: coefficient of the second.

    Taking the losses lets go of the graph behind them: the routers keep values only, and what the backward pass of one
    step leaves is not held until the next, in which a CUDA graph may be captured on another stream.

    Raises:
        ValueError: for a model without routers or with one that did not run; with gradients enabled also where a router
            in training ran without them, as under ``checkpoint(..., use_reentrant=True)``: use_reentrant=False keeps
            them; and for the second call with gradients after one forward pass.
    """
    losses = []
    for name, router in _routers(model).items():
        assert router.last is not None
        logits, gate, chosen, routes = router.last
        lost = router.training and router.weight.requires_grad and not logits.requires_grad
        if lost and torch.is_grad_enabled():
            raise ValueError(
                f"{name} ran without gradients, or its losses were taken already; call this once after each forward "
                "pass, and where that was a checkpoint, pass use_reentrant=False"
            )
        tokens = max(logits.shape[0], 1)
        loss = z * logits.logsumexp(1).square().sum() / tokens
        if router.balance == "loss":
            share = _counts(router).to(logits.dtype) / (tokens * router.top_k)
            loss = loss + balance * router.experts * (logits.softmax(1).sum(0) / tokens * share).sum()
        losses.append(loss)
        if torch.is_grad_enabled():
            router.last = Routing(logits.detach(), gate.detach(), chosen, routes)
    return torch.stack(losses).mean()


def _counts(router: Router) -> Tensor:
    """(experts,) int32, the choices that fell on each expert."""
    assert router.last is not None
    every = torch.arange(router.experts, device=router.last.chosen.device)
    return (router.last.chosen.flatten()[:, None] == every).sum(0, dtype=torch.int32)


@torch.no_grad()
def routing_load(model: nn.Module) -> dict[str, Load]:
    """The load of every router in its last forward pass, by name; of no tokens it is zero.

    Raises:
        ValueError: for a model without routers, or with one that did not run.
    """
    found = {}
    for name, router in _routers(model).items():
        assert router.last is not None
        logits, choices = router.last.logits, max(router.last.gate.numel(), 1)
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum() / max(logits.shape[0], 1)
        found[name] = Load(_counts(router).float() / choices, entropy)
    return found


@torch.no_grad()
def update_balance_(model: nn.Module) -> None:
    """After a step: raise the bias of every expert with less than the mean load, lower that of one with more.

    For routers with ``balance="bias"``; moves by 0.001 (Wang et al. 2024). Where torch.distributed is initialised the
    loads of all processes are added.

    Raises:
        ValueError: for a model without routers, with one that did not run, or without one balanced by a bias.
    """
    balanced = [router for router in _routers(model).values() if router.bias_steps is not None]
    if not balanced:
        raise ValueError('no router of the model is balanced by a bias; give balance="bias"')
    for router in balanced:
        assert router.last is not None
        assert router.bias_steps is not None
        counts = _counts(router)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        router.bias_steps += (counts.sum() - counts * router.experts).sign()
