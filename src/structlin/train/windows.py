"""Fixed windows of a long row of tokens, in an order that is a function of seed and step alone.

Documents are packed end to end, so no token is padding. Every epoch shifts the cuts and shuffles the windows anew; a
run that goes on at any step, on any number of devices, reads what an uninterrupted one reads. The tokens stay on the
disk, mapped into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Windows:
    """The training windows of ``tokens``, an integer array with at least ``context + 1`` entries."""

    def __init__(self, tokens: np.ndarray[Any, Any], context: int, seed: int) -> None:
        self.tokens, self.context, self.seed = tokens, context, seed
        self.count = max(1, len(tokens) // context - 1)
        """Windows of an epoch."""
        self._epoch, self._starts = -1, np.empty(0, np.int64)

    def batch(self, step: int, size: int) -> Tensor:
        """The windows of update ``step``, counted from 0: int64 ``[size, context + 1]``."""
        places = range(step * size, (step + 1) * size)
        return cut(self.tokens, [self._start(place) for place in places], self.context)

    def _start(self, place: int) -> int:
        epoch, index = divmod(place, self.count)
        if epoch != self._epoch:
            order = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            shift = order.integers(len(self.tokens) - self.count * self.context)
            self._epoch, self._starts = epoch, order.permutation(self.count) * self.context + shift
        return int(self._starts[index])


def spread(tokens: np.ndarray[Any, Any], count: int, context: int) -> Tensor:
    """Windows evenly spread over ``tokens``: int64 ``[at most count, context + 1]``, without overlap."""
    count = min(count, len(tokens) // (context + 1))
    return cut(tokens, [i * (len(tokens) - context - 1) // max(1, count - 1) for i in range(count)], context)


def cut(tokens: np.ndarray[Any, Any], starts: list[int], context: int) -> Tensor:
    """The ``context + 1`` tokens from each start on, int64 ``[len(starts), context + 1]``."""
    found = tokens[np.asarray(starts, np.int64)[:, None] + np.arange(context + 1)]
    return torch.from_numpy(found.astype(np.int64))


def ahead(fetch: Callable[[int], Tensor], first: int, last: int, device: torch.device) -> Iterator[Tensor]:
    """``fetch(step)`` on ``device`` for the steps from ``first`` to below ``last``, the next one read meanwhile.

    Neither reading nor copying to a GPU waits for the device.
    """

    def load(step: int) -> Tensor:
        batch = fetch(step)
        return batch.pin_memory() if device.type == "cuda" else batch

    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(load, first) if first < last else None
        for step in range(first, last):
            assert following is not None
            batch = following.result()
            following = reader.submit(load, step + 1) if step + 1 < last else None
            yield batch.to(device, non_blocking=True)
