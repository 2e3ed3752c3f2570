"""Matrix products over tokens that are sorted by expert: every expert's rows by that expert's weight.

Where an expert's rows end is data on the device, and nothing here reads it back, but on the CPU, where reading costs
nothing. Two products are each other's gradients, so that forward, both gradients and double backward are one piece of
code: `ragged_mm` keeps the rows, `ragged_outer` sums over those of each expert. Both are deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import implement, is_exporting

BLOCK = 128  # rows of a block, where no grouped GEMM of PyTorch serves
MOST_GROUPS = 1024  # that one grouped GEMM of PyTorch takes

_library = torch.library.Library("structlin", "FRAGMENT")
for _schema in (
    "ragged_mm(Tensor x, Tensor w, Tensor ends) -> Tensor",
    "ragged_outer(Tensor x, Tensor y, Tensor ends) -> Tensor",
):
    _library.define(_schema, tags=[torch.Tag.pt2_compliant_tag])


def ragged_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Rows of ``x`` by the weight of their expert, differentiably.

    Args:
        x: (groups, rows, k), any float dtype; expert e has the rows from ``ends[e - 1]`` to ``ends[e]``.
        w: (groups, experts, k, n), of the dtype and device of ``x``.
        ends: (experts,), int32, not decreasing, the last one the number of rows. Not checked: it is on the device.

    Returns:
        (groups, rows, n), contiguous. An expert without rows has a gradient of exact zeros.
    """
    return _call("ragged_mm", x, w, ends)


def ragged_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """Sum over the rows of each expert of the outer products of ``x`` and ``y``: the gradient of a weight.

    (groups, rows, k) and (groups, rows, n) -> (groups, experts, k, n); ``ends`` as in `ragged_mm`.
    """
    return _call("ragged_outer", x, y, ends)


def _call(name: str, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if is_exporting():
        return BLOCKED[name](a, b, ends)
    result: Tensor
    if not torch.compiler.is_compiling() and _is_watched(a):
        result = FUNCTIONS[name].apply(a, b, ends, False)
    else:
        result = getattr(torch.ops.structlin, name).default(a, b, ends)
    return result


def _is_watched(a: Tensor) -> bool:
    # a mode that watches operations, such as a counter of FLOPs, knows PyTorch's own; tensors without values do not
    return torch._C._len_torch_dispatch_stack() > 0 and type(a) in (Tensor, torch.nn.Parameter)


def _compute(name: str, a: Tensor, b: Tensor, ends: Tensor, opaque: bool) -> Tensor:
    if not opaque:
        return COMPUTED[name](a, b, ends)
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = getattr(torch.ops.structlin, name).default(a, b, ends)
    return result


class _Mm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, ends: Tensor, opaque: bool) -> Tensor:
        ctx.save_for_backward(x, w, ends)
        return _compute("ragged_mm", x, w, ends, opaque)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, w, ends = ctx.saved_tensors
        dx = ragged_mm(dy, w.mT, ends) if ctx.needs_input_grad[0] else None
        dw = ragged_outer(x, dy, ends) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, ends: Tensor, opaque: bool) -> Tensor:
        ctx.save_for_backward(x, y, ends)
        return _compute("ragged_outer", x, y, ends, opaque)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, y, ends = ctx.saved_tensors
        dx = ragged_mm(y, dw.mT, ends) if ctx.needs_input_grad[0] else None
        dy = ragged_mm(x, dw, ends) if ctx.needs_input_grad[1] else None
        return dx, dy, None, None


def _autograd(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
            result: Tensor = FUNCTIONS[name].apply(a, b, ends, True)
            return result
        return _compute(name, a, b, ends, True)

    return run


def _mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    groups, experts = w.shape[:2]
    if x.is_cpu:
        found = x.new_empty(groups, x.shape[1], w.shape[-1])
        for e, rows in enumerate(_segments(ends)):
            found[:, rows] = x[:, rows] @ w[:, e]
        return found
    if _grouped(x, w.shape[-1], groups * experts) and x.shape[1] > 0:
        offs, w = _group_ends(ends, groups, x.shape[1]), w if 1 in w.stride()[-2:] else w.contiguous()
        y: Tensor = F.grouped_mm(_rows(x), w.flatten(0, 1), offs=offs)
        return y.view(*x.shape[:2], -1)
    return blocked_mm(x, w, ends)


def _outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    groups, experts = x.shape[0], ends.shape[0]
    if x.is_cpu:
        w = x.new_empty(groups, experts, x.shape[-1], y.shape[-1])
        for e, rows in enumerate(_segments(ends)):
            w[:, e] = x[:, rows].mT @ y[:, rows]
        return w
    if _grouped(x, y.shape[-1], groups * experts) and x.shape[1] > 0:
        offs = _group_ends(ends, groups, x.shape[1])
        found = F.grouped_mm(_rows(x).T, _rows(y), offs=offs).unflatten(0, (groups, experts))
        # what a group without rows holds is not said
        some = ends.diff(prepend=ends.new_zeros(1)) > 0
        return torch.where(some[:, None, None], found, 0)
    return blocked_outer(x, y, ends)


def _segments(ends: Tensor) -> list[slice]:
    stops = ends.tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _grouped(x: Tensor, n: int, count: int) -> bool:
    """Whether PyTorch's grouped GEMM takes it: half precision on Hopper, rows of whole 16 bytes."""
    if not (x.is_cuda and x.dtype == torch.bfloat16 and count < MOST_GROUPS):
        return False
    return x.shape[-1] % 8 == 0 and n % 8 == 0 and torch.cuda.get_device_capability(x.device)[0] >= 9


def _rows(x: Tensor) -> Tensor:
    """(groups, rows, k) -> (groups * rows, k), contiguous."""
    return x.contiguous().flatten(0, 1)


def _group_ends(ends: Tensor, groups: int, rows: int) -> Tensor:
    """Where the rows of each (group, expert) end, all groups one after the other."""
    first = torch.arange(groups, device=ends.device, dtype=torch.int32) * rows
    return (first[:, None] + ends).flatten()


def _blocks(ends: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows in blocks of one expert each, of which there are at most rows / BLOCK + experts.

    Returns:
        The expert of every block; the row of every place in the blocks; whether the place holds one; the place of
        every row.
    """
    experts, device = ends.shape[0], ends.device
    starts = F.pad(ends[:-1], (1, 0)).long()
    stops = ((ends - starts + BLOCK - 1) // BLOCK).cumsum(0)
    firsts = F.pad(stops[:-1], (1, 0))
    block = torch.arange(rows // BLOCK + experts, device=device)
    expert = torch.searchsorted(stops, block, right=True).clamp(max=experts - 1)
    row = starts[expert, None] + (block - firsts[expert])[:, None] * BLOCK + torch.arange(BLOCK, device=device)
    holds = row < ends[expert, None]
    every = torch.arange(rows, device=device)
    owner = torch.searchsorted(ends, every.int(), right=True)
    place = firsts[owner] * BLOCK + every - starts[owner]
    return expert, row.clamp(max=rows - 1), holds, place


def _in_blocks(x: Tensor, row: Tensor, holds: Tensor) -> Tensor:
    """(groups, rows, k) -> (groups, blocks, BLOCK, k), zero where no row is."""
    return torch.where(holds[..., None], x[:, row], 0)


def blocked_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """`ragged_mm` by plain PyTorch of fixed shapes: rows padded to blocks of one expert each."""
    if x.shape[1] == 0:
        return x.new_empty(*x.shape[:2], w.shape[-1])
    expert, row, holds, place = _blocks(ends, x.shape[1])
    y = _in_blocks(x, row, holds) @ w[:, expert]
    found: Tensor = y.flatten(1, 2)[:, place]
    return found


def blocked_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """`ragged_outer` by plain PyTorch of fixed shapes, summed without atomic operations."""
    experts = ends.shape[0]
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], experts, x.shape[-1], y.shape[-1])
    expert, row, holds, _ = _blocks(ends, x.shape[1])
    parts = _in_blocks(x, row, holds).mT @ _in_blocks(y, row, holds)
    owns = expert == torch.arange(experts, device=expert.device)[:, None]
    return (owns.to(parts.dtype) @ parts.flatten(2)).view(*parts.shape[:1], experts, *parts.shape[2:])


def _fake_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    _register_flops()
    return x.new_empty(*x.shape[:2], w.shape[-1])


def _fake_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    _register_flops()
    return x.new_empty(x.shape[0], ends.shape[0], x.shape[-1], y.shape[-1])


FUNCTIONS: dict[str, type[torch.autograd.Function]] = {"ragged_mm": _Mm, "ragged_outer": _Outer}
COMPUTED = {"ragged_mm": _mm, "ragged_outer": _outer}
BLOCKED = {"ragged_mm": blocked_mm, "ragged_outer": blocked_outer}
for _name, _fake in (("ragged_mm", _fake_mm), ("ragged_outer", _fake_outer)):
    implement(_library, _name, COMPUTED[_name], _autograd(_name), _fake)


@cache
def _register_flops() -> None:
    # on first tracing, as the counter takes long to import
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.structlin.ragged_mm)(lambda x, w, *_, **__: 2 * x[0] * x[1] * x[2] * w[3])
    register_flop_formula(torch.ops.structlin.ragged_outer)(lambda x, y, *_, **__: 2 * x[0] * x[1] * x[2] * y[2])
