"""The one operator: a binary einsum whose gradients are the same operator with the operands in other places.

So forward, input gradient, weight gradient and double backward are one piece of code for every structure. It is
registered with PyTorch as an opaque op with a shape function, so that torch.compile does not look inside; where a
transform has to look inside (torch.func, forward-mode AD, export) the same equation runs as plain PyTorch instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad
from torch import Tensor

from . import gemm, reference
from .equation import constant_when_traced, parse
from .moves import kernels_on

_library = torch.library.Library("structlin", "DEF")
_library.define(
    "contract(Tensor a, Tensor b, str equation, str backend='bmm') -> Tensor", tags=[torch.Tag.pt2_compliant_tag]
)
_op = torch.ops.structlin.contract.default

STEP_BACKENDS = ("reference", "bmm", "copy", "triton")
"""What can run one contraction: einsum; a batched GEMM in place; the same after copying every operand; and where a GEMM
would have to copy, a kernel of ours that reads and writes any order, in half precision on a GPU like the H100."""


def contract(a: Tensor, b: Tensor, equation: str, backend: str = "bmm") -> Tensor:
    """Contract two tensors over named axes, differentiably.

    >>> contract(torch.ones(5, 2, 3), torch.ones(2, 4, 3), "t g k, g n k -> t g n").shape
    torch.Size([5, 2, 4])

    Args:
        a: any float or complex tensor; its axes are named by the first operand of ``equation``.
        b: of the dtype and device of ``a``; its axes are named by the second operand.
        equation: ``"a axes, b axes -> result axes"``, names separated by spaces. Every axis occurs in two or three
            of the operands. Under autocast both operands are cast as ``nn.Linear`` casts its own.
        backend: what runs it, one of `STEP_BACKENDS`; its gradients run there too.

    Returns:
        A contiguous tensor with the axes of the result in the order of the equation. Differentiable twice and more;
        complex gradients are conjugated as PyTorch does.

    Raises:
        ValueError: for operands that do not match the equation or each other, or an unknown backend.
    """
    a, b = autocast(a), autocast(b)
    _check(a, b, equation, backend)
    if seen_through():
        return reference.contract(a, b, equation)
    result: Tensor = _op(a, b, equation, backend)
    return result


def result_shape(a: Tensor, b: Tensor, equation: str) -> list[int]:
    """Shape of the result, from those of the operands."""
    axes_a, axes_b, axes_c = parse(equation)
    size = dict(zip(axes_a, a.shape, strict=True)) | dict(zip(axes_b, b.shape, strict=True))
    return [size[axis] for axis in axes_c]


def _check(a: Tensor, b: Tensor, equation: str, backend: str) -> None:
    if backend not in STEP_BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; allowed for one contraction: {', '.join(STEP_BACKENDS)}")
    axes_a, axes_b, _ = parse(equation)
    if a.dim() != len(axes_a) or b.dim() != len(axes_b):
        raise ValueError(f"{equation!r} takes {len(axes_a)} and {len(axes_b)} axes, not {a.dim()} and {b.dim()}")
    size = dict(zip(axes_a, a.shape, strict=True))
    for axis, n in zip(axes_b, b.shape, strict=True):
        if axis in size and size[axis] != n:
            raise ValueError(f"axis {axis!r} of {equation!r} has size {size[axis]} in one operand and {n} in the other")
    if a.dtype != b.dtype:
        raise ValueError(f"operands have dtypes {a.dtype} and {b.dtype}; cast one, or run under torch.autocast")


def autocast(x: Tensor) -> Tensor:
    """``x`` as autocast would hand it to ``nn.Linear``."""
    dtype = autocast_dtype(x)
    return x if dtype == x.dtype else x.to(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would hand ``x`` to ``nn.Linear``."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return x.dtype
    # float64 is exempt, as in autocast's own rule for nn.Linear
    kind = x.device.type
    if kind == "meta" or not x.is_floating_point() or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


@constant_when_traced  # asked while tracing, where dynamo has entered the transform as well
def transforming() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


@constant_when_traced  # dynamo of PyTorch 2.11 takes every compilation for an export
def is_exporting() -> bool:
    """Whether torch.export is tracing."""
    return torch.compiler.is_exporting()


def implement(
    library: torch.library.Library,
    name: str,
    compute: Callable[..., Any],
    record: Callable[..., Any] | None,
    fake: Callable[..., Any],
) -> None:
    """Say how the operator ``name`` of ``library`` is computed, what autograd records, None for what PyTorch would, and
    what tensors come out of tensors without values."""
    library.impl(name, compute, "CompositeExplicitAutograd")
    if record is not None:
        library.impl(name, record, "Autograd")
    torch.library.register_fake(f"structlin::{name}", fake, lib=library)


def seen_through() -> bool:
    """Whether a transform or an export has to look inside, so that plain PyTorch must run."""
    if is_exporting() or transforming():
        return True
    # a mode that watches operations, such as a counter of FLOPs or a tracer, knows PyTorch's own
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def refuse_transforms(name: str) -> None:
    """Raise where an op of ours would otherwise return a zero tangent, or none."""
    if transforming():
        raise NotImplementedError(
            f"the op structlin::{name} has no forward-mode or functional derivative of its own; "
            f"call structlin.ops.{name.partition('_')[0]}, which runs as plain PyTorch there"
        )


def _compute(a: Tensor, b: Tensor, equation: str, backend: str = "bmm") -> Tensor:
    _check(a, b, equation, backend)
    if backend == "reference":
        return reference.contract(a, b, equation).contiguous()
    a, b = a.resolve_conj(), b.resolve_conj()
    if backend == "triton" and kernels_on(a.device, a.dtype).tensor_memory:
        found = gemm.contract_anywhere(a, b, equation)
        if found is not None:
            return found
    return gemm.contract(a, b, equation, in_place=backend != "copy")


def _fake(a: Tensor, b: Tensor, equation: str, backend: str = "bmm") -> Tensor:
    return a.new_empty(result_shape(a, b, equation))


def _below_autograd(a: Tensor, b: Tensor, equation: str, backend: str) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = _op(a, b, equation, backend)
    return result


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, equation: str, backend: str) -> Tensor:
        return _below_autograd(a, b, equation, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str, str], output: Tensor) -> None:
        a, b, ctx.equation, ctx.backend = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        a, b = ctx.saved_tensors
        axes_a, axes_b, axes_c = (" ".join(axes) for axes in parse(ctx.equation))
        dc = dc.contiguous()  # both gradients read it
        da = db = None
        if ctx.needs_input_grad[0]:
            da = _op(dc, b.conj(), f"{axes_c}, {axes_b} -> {axes_a}", ctx.backend)
        if ctx.needs_input_grad[1]:
            db = _op(a.conj(), dc, f"{axes_a}, {axes_c} -> {axes_b}", ctx.backend)
        return da, db, None, None


def _autograd(a: Tensor, b: Tensor, equation: str, backend: str = "bmm") -> Tensor:
    refuse_transforms("contract")
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        result: Tensor = _Contract.apply(a, b, equation, backend)  # type: ignore[no-untyped-call]
        return result
    return _below_autograd(a, b, equation, backend)


implement(_library, "contract", _compute, _autograd, _fake)
