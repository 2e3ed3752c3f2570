"""Blocks of features by a static table: looked up before a block-sparse product, or added up after one.

Both are each other's adjoint, so the gradient of a lookup is a sum that again reads by a table: every block is used
equally often, and nothing is added by atomic operations.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..plan import Table, num_blocks


def gather(x: Tensor, table: Table) -> Tensor:
    """(*, blocks * width) -> (*, rows * slots * width): block ``table[row][slot]`` for every row and slot."""
    index = torch.tensor(positions(table), device=x.device)
    found: Tensor = x.unflatten(-1, (num_blocks(table), -1)).index_select(-2, index).flatten(-2)
    return found


def collect(x: Tensor, table: Table) -> Tensor:
    """(*, rows * slots * width) -> (*, blocks * width): the adjoint, each block the sum of its uses."""
    index = torch.tensor(uses(table), device=x.device)
    blocks: Tensor = x.unflatten(-1, (len(positions(table)), -1)).index_select(-2, index)
    summed: Tensor = blocks.unflatten(-2, (num_blocks(table), -1)).sum(-2).flatten(-2)
    return summed


def positions(table: Table) -> tuple[int, ...]:
    """The block of every row and slot."""
    return tuple(block for row in table for block in row)


def uses(table: Table) -> tuple[int, ...]:
    """Where in `positions` each block stands: all places of the first block, then those of the next."""
    blocks = positions(table)
    return tuple(sorted(range(len(blocks)), key=blocks.__getitem__))


@cache
def index_on(device: torch.device, index: tuple[int, ...]) -> Tensor:
    """``index`` as a tensor, made once for each device."""
    with torch.inference_mode(False):
        return torch.tensor(index, device=device)
