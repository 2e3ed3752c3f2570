"""Blocks of features by a static table: looked up before a block-sparse product, or added up after one.

Both are each other's adjoint, so the gradient of a lookup is a sum that again reads by a table: every block is used
equally often, and nothing is added by atomic operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import Table, num_blocks

_kept: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}


def gather(x: Tensor, table: Table) -> Tensor:
    """(*, blocks * width) -> (*, rows * slots * width): block ``table[row][slot]`` for every row and slot."""
    index = index_on(x.device, positions(table))
    found: Tensor = x.unflatten(-1, (num_blocks(table), -1)).index_select(-2, index).flatten(-2)
    return found


def collect(x: Tensor, table: Table) -> Tensor:
    """(*, rows * slots * width) -> (*, blocks * width): the adjoint, each block the sum of its uses."""
    index = index_on(x.device, uses(table))
    blocks: Tensor = x.unflatten(-1, (len(positions(table)), -1)).index_select(-2, index)
    # with its dtype, or autocast on a GPU would make it float32
    summed: Tensor = blocks.unflatten(-2, (num_blocks(table), -1)).sum(-2, dtype=x.dtype).flatten(-2)
    return summed


def positions(table: Table) -> tuple[int, ...]:
    """The block of every row and slot."""
    return tuple(block for row in table for block in row)


def uses(table: Table) -> tuple[int, ...]:
    """Where in `positions` each block stands: all places of the first block, then those of the next."""
    blocks = positions(table)
    return tuple(sorted(range(len(blocks)), key=blocks.__getitem__))


def scatter(x: Tensor, table: Table, row: int, slot: int) -> Tensor:
    """Slots put at their blocks: ``x`` has the rows of ``table`` along its dimension ``row`` and their slots along
    ``slot``, which becomes that of the blocks; a block that a row does not use is zero there."""
    shape = [1] * x.dim()
    shape[row], shape[slot] = len(table), len(table[0])
    index = index_on(x.device, positions(table)).view(len(table), len(table[0]))
    index = (index if row < slot else index.T).reshape(shape).expand(x.shape)
    blocks = x.new_zeros([num_blocks(table) if i == slot else n for i, n in enumerate(x.shape)])
    return blocks.scatter(slot, index, x)


def index_on(device: torch.device, index: tuple[int, ...]) -> Tensor:
    """``index`` as a tensor, kept for each device unless a tracer or a transform made it, which it must not outlive."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if traced or torch._C._functorch.peek_interpreter_stack() is not None:
        return torch.tensor(index, device=device)
    found = _kept.get((device, index))
    if found is None:
        with torch.inference_mode(False):
            found = _kept[device, index] = torch.tensor(index, device=device)
    return found
