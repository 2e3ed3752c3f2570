"""A sum of products as one product: the operands that differ are written side by side, those that are shared read once.

DYAD is the example: ``y = W1 x + W2 (P x)`` has two block-diagonal products of one output. Beside each other in every
row, ``x`` and ``P x`` make one contraction of twice the length with ``[W1 W2]``, which writes ``y`` once, where the
second product of a sum would read the first one's result to add to it. Its two gradients read ``dy`` once each, and the
gradient of both inputs is brought to one order and added (`unjoin`). Where the terms share the input and differ in the
order of their output, the same happens on the other side.

What may be joined is read off the program: terms of one step each, with the same groups and sizes, that are equal on
one side in place and all different on the other. The joined product is an ordinary program of `structlin.ops.chain`.
Joining is an operator of its own, opaque to torch.compile, since a copy between orders is slow as Inductor writes it;
adding up is traced there as plain PyTorch, since it is fast when fused into what comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import chain, replay
from .contract import implement, seen_through
from .equation import parse
from .lowering import REVISION, Chain, Permutation, Program, program
from .moves import has_triton, relayout

_library = torch.library.Library("structlin", "FRAGMENT")
for _schema in (
    "join(Tensor x, str program) -> Tensor",
    "unjoin(Tensor z, str program) -> Tensor",
    "rejoined(Tensor x, Tensor weight, str program) -> Tensor",
    "rejoined_backward(Tensor dy, Tensor x, Tensor weight, str program, bool[] needed) -> Tensor[]",
):
    _library.define(_schema, tags=[torch.Tag.pt2_compliant_tag])
_join_op = torch.ops.structlin.join.default
_unjoin_op = torch.ops.structlin.unjoin.default
_rejoined_op = torch.ops.structlin.rejoined.default
_rejoined_backward_op = torch.ops.structlin.rejoined_backward.default


@dataclass(frozen=True)
class Part:
    """The order of one term's operand: features split into ``view``, their axes permuted (tokens first); None if both
    orders are the same."""

    view: tuple[int, ...]
    permutation: Permutation | None

    def forth(self, x: Tensor, rows: int) -> Tensor:
        """[tokens, features] -> [tokens, rows, features / rows] in the order of the term."""
        if self.permutation is not None:
            x = x.reshape(-1, *self.view).permute(self.permutation)
        return x.reshape(x.shape[0], rows, -1) if x.numel() else x.reshape(x.shape[0], rows, prod(self.view) // rows)

    def back(self, z: Tensor) -> Tensor:
        """The adjoint of `forth`."""
        if self.permutation is not None:
            shape = [self.view[i - 1] for i in self.permutation[1:]]
            inverse = sorted(range(len(self.permutation)), key=self.permutation.__getitem__)
            z = z.reshape(z.shape[0], *shape).permute(inverse)
        return z.reshape(z.shape[0], prod(self.view))


@dataclass(frozen=True)
class Joined:
    """How the sum ``whole`` runs as the one product ``inner``, with its inputs joined (``of_input``) or its outputs.

    ``parts`` are the orders of the terms, each in ``rows`` rows of ``width`` features. Every factor is a stack of
    matrices of the shape ``factor``, (groups, outputs, inputs). ``swap`` is what the kernel takes (a, b, r) and which
    of two parts it exchanges, None where there is no kernel for these orders.
    """

    whole: Program
    inner: Program
    of_input: bool
    parts: tuple[Part, ...]
    rows: int
    width: int
    factor: tuple[int, int, int]
    swap: tuple[tuple[int, int, int], int] | None

    def __hash__(self) -> int:
        return hash(self.whole)


def joined(what: Program) -> Joined | None:
    """How ``what`` runs as one product, or None if it is no sum that can be joined."""
    return _joined(what.text)


@cache
def _joined(text: str) -> Joined | None:
    what = program(text)
    chains = what.chains
    plain = what.in_place and all(len(c.stages) == 1 and c.gather is None and c.collect is None for c in chains)
    roles = [_roles(chain, what.sizes) for chain in chains] if plain else []
    if len(roles) < 2 or roles[0] is None or len(set(roles)) > 1:
        return None
    free, group, out, contract = roles[0]
    inputs = [Part(chain.view, chain.stages[0].relayout) for chain in chains]
    outputs = [_output(chain, what.sizes) for chain in chains]
    of_input = all(part.permutation is None for part in outputs)
    own, other = (inputs, outputs) if of_input else (outputs, inputs)
    orders = {part if part.permutation else None for part in own}
    if any(part.permutation for part in other) or len(orders) < len(own):
        return None
    rows, width = free * group, contract if of_input else out
    sizes = {"f": free, "g": group, "n": out, "k": contract}
    sizes["k" if of_input else "n"] *= len(own)
    inner = " ".join(f"{axis}={size}" for axis, size in sizes.items()) + ": t f g k, g n k -> t f g n"
    swap = _swap(own)
    return Joined(what, program(inner), of_input, tuple(own), rows, width, (group, out, contract), swap)


def _roles(chain: Chain, sizes: dict[str, int]) -> tuple[int, int, int, int] | None:
    """Sizes of the free, group, output and contracted features of a step of the form t f g k, g n k -> t f g n."""
    x, w, y = parse(chain.stages[0].equation)
    free = tuple(axis for axis in x[1:] if axis in y and axis not in w)
    group = tuple(axis for axis in x if axis in y and axis in w)
    out, contract = tuple(axis for axis in y if axis not in x), tuple(axis for axis in x if axis not in y)
    t = x[:1]
    if (x, w, y) != ((*t, *free, *group, *contract), (*group, *out, *contract), (*t, *free, *group, *out)):
        return None
    free_, group_, out_, contract_ = (prod(sizes[axis] for axis in axes) for axes in (free, group, out, contract))
    return free_, group_, out_, contract_


def _output(chain: Chain, sizes: dict[str, int]) -> Part:
    """From the order of the output to the order in which the step writes."""
    view = tuple(sizes[axis] for axis in chain.y)
    order = chain.relayout
    return Part(view, None if order is None else tuple(sorted(range(len(order)), key=order.__getitem__)))


def _swap(parts: Sequence[Part]) -> tuple[tuple[int, int, int], int] | None:
    moved = [i for i, part in enumerate(parts) if part.permutation is not None]
    if len(parts) != 2 or len(moved) != 1:
        return None
    part = parts[moved[0]]
    assert part.permutation is not None
    swap = relayout((1, *part.view), part.permutation, False).swap
    return None if swap is None else (swap, moved[0])


def multiply(
    x: Tensor, factors: Sequence[Tensor], how: Joined, keep: bool = True, bias: Tensor | None = None
) -> Tensor:
    """As `structlin.ops.multiply` of ``how.whole``: (*, in_features) -> (*, out_features), as one product.

    Between forward and backward it keeps the joined factors and the joined input, or with ``keep=False`` the input, to
    join it again. Where the outputs are joined, it keeps the input either way.

    Raises:
        ValueError: when the input and a factor differ in dtype.
    """
    x, factors = chain.cast_alike(x, factors)
    if x.is_complex() or seen_through():
        return chain.compose(x, factors, how.whole, bias=bias)
    stacks = [factor if factor.shape == how.factor else factor.reshape(how.factor) for factor in factors]
    weight = torch.cat(stacks, 2 if how.of_input else 1)
    ops = (_join_op, _unjoin_op, _rejoined_op) if torch.compiler.is_compiling() else _EAGER
    join, unjoin, rejoined = ops
    text = how.whole.text + (REVISION if torch.compiler.is_compiling() else "")
    tokens = chain.rows(x)
    if how.of_input and keep:
        return chain.as_given(chain.multiply(join(tokens, text), [weight], how.inner, bias=bias), None, x)
    y = rejoined(tokens, weight, text) if how.of_input else unjoin(chain.multiply(tokens, [weight], how.inner), text)
    return chain.as_given(y, bias, x)


def _of(text: str) -> Joined:
    how = _joined(text)
    assert how is not None
    return how


def _fast(x: Tensor, how: Joined) -> bool:
    return how.swap is not None and x.device.type == "cuda" and has_triton()


def _run_join(x: Tensor, text: str) -> Tensor:
    how = _of(text)
    if _fast(x, how):
        from ..kernels import join

        assert how.swap is not None
        return join.join(x.contiguous(), how.swap[0], how.width, how.swap[1])
    return torch.cat([part.forth(x, how.rows) for part in how.parts], 2).flatten(1)


def _plain_unjoin(z: Tensor, text: str) -> Tensor:
    how = _of(text)
    halves = z.reshape(z.shape[0], how.rows, len(how.parts), how.width).unbind(2)
    total, *others = (part.back(half) for part, half in zip(how.parts, halves, strict=True))
    for other in others:
        total = total + other
    return total


def _run_unjoin(z: Tensor, text: str) -> Tensor:
    how = _of(text)
    if _fast(z, how):
        from ..kernels import join

        assert how.swap is not None
        return join.unjoin(z.contiguous(), how.swap[0], how.width, how.swap[1])
    return _plain_unjoin(z, text)


class _Join(torch.autograd.Function):
    """`_run_join`; ``traced`` where PyTorch traces for torch.compile. `_Unjoin` is its gradient and the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, text: str, traced: bool) -> Tensor:
        ctx.text, ctx.traced = text, traced
        if not traced:
            return _run_join(x, text)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = _join_op(x, text)
        return result

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None, None]:
        if not (ctx.traced or torch.is_grad_enabled()):
            return _run_unjoin(dz, ctx.text), None, None
        dx: Tensor = _Unjoin.apply(dz, ctx.text, ctx.traced)  # type: ignore[no-untyped-call]
        return dx, None, None


class _Unjoin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, text: str, traced: bool) -> Tensor:
        ctx.text, ctx.traced = text, traced
        return _plain_unjoin(z, text) if traced else _run_unjoin(z, text)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        if not (ctx.traced or torch.is_grad_enabled()):
            return _run_join(dx, ctx.text), None, None
        dz: Tensor = _Join.apply(dx, ctx.text, ctx.traced)  # type: ignore[no-untyped-call]
        return dz, None, None


class _Rejoined(torch.autograd.Function):
    """The product with the joined input, which is joined again for the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, text: str, traced: bool) -> Tensor:
        ctx.text, ctx.traced = text, traced
        ctx.save_for_backward(x, weight)
        if not traced:
            with torch._C._AutoDispatchBelowADInplaceOrView():  # what is returned may be changed in place
                return _run_rejoined(x, weight, text)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = _rejoined_op(x, weight, text)
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            y = chain.multiply(_eager_join(x, ctx.text), [weight], _of(ctx.text).inner)
            wanted = [tensor for tensor, need in zip((x, weight), needed, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return next(found) if needed[0] else None, next(found) if needed[1] else None, None, None
        run = _rejoined_backward_op if ctx.traced else _run_rejoined_backward
        dz, dw = run(dy, x, weight, ctx.text, needed)
        unjoin = _plain_unjoin if ctx.traced else _run_unjoin
        return unjoin(dz, ctx.text) if needed[0] else None, dw if needed[1] else None, None, None


def _run_rejoined(x: Tensor, weight: Tensor, text: str) -> Tensor:
    return replay.forward(_run_join(x, text), [weight], _of(text).inner, False, True)[0]


def _run_rejoined_backward(dy: Tensor, x: Tensor, weight: Tensor, text: str, needed: Sequence[bool]) -> list[Tensor]:
    found = replay.backward(dy, _run_join(x, text), [weight], (), _of(text).inner, needed, True)
    return [dy.new_empty(0) if gradient is None else gradient for gradient in found]


def _applied(function: type[torch.autograd.Function], traced: bool) -> Callable[..., Tensor]:
    def apply(*given: Tensor | str) -> Tensor:
        result: Tensor = function.apply(*given, traced)
        return result

    return apply


_EAGER = _eager_join, _, _ = tuple(_applied(function, False) for function in (_Join, _Unjoin, _Rejoined))


def _fake_join(x: Tensor, text: str) -> Tensor:
    return x.new_empty(x.shape[0], len(_of(text).parts) * x.shape[1])


def _fake_unjoin(z: Tensor, text: str) -> Tensor:
    return z.new_empty(z.shape[0], z.shape[1] // len(_of(text).parts))


def _fake_rejoined(x: Tensor, weight: Tensor, text: str) -> Tensor:
    return x.new_empty(x.shape[0], _of(text).inner.chains[0].out_features)


def _fake_rejoined_backward(dy: Tensor, x: Tensor, weight: Tensor, text: str, needed: Sequence[bool]) -> list[Tensor]:
    shapes = (x.shape[0], len(_of(text).parts) * x.shape[1]), weight.shape
    return [x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed, strict=True)]


for _name, _run, _function, _fake in (
    ("join", _run_join, _Join, _fake_join),
    ("unjoin", _run_unjoin, _Unjoin, _fake_unjoin),
    ("rejoined", _run_rejoined, _Rejoined, _fake_rejoined),
    ("rejoined_backward", _run_rejoined_backward, None, _fake_rejoined_backward),
):
    implement(_library, _name, _run, None if _function is None else _applied(_function, True), _fake)
