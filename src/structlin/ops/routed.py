"""A chain of contractions in which every token visits the experts that its router chose, and no others: by
`ops/mixture.py` where kernels of ours fit, elsewhere by `ops/rows.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..kernels.tiles import Sets
from .chain import check_dtype
from .contract import autocast
from .led import Led, led_mixture
from .mixture import group_by_set, mixture, set_size
from .rows import Chain, Program, Routes, run_rows, sort


def size_of_sets(x: Tensor, experts: int, top_k: int, what: Program) -> int:
    """Of how many experts the sets are by which `arrange` sorts the tokens ``x``; 0 where it sorts by expert."""
    return set_size(x, experts, top_k, [chain.digits for chain in what.chains])


def is_led(x: Tensor, experts: int, top_k: int, what: Program) -> bool:
    """Whether `multiply_led` takes the program: one term, sorted by all experts of a token, on features as they are."""
    whole = len(what.chains) == 1 and not what.pad and what.keep is None
    return whole and size_of_sets(x, experts, top_k, what) == top_k


def arrange(x: Tensor, chosen: Tensor, experts: int, what: Program) -> Routes | Sets:
    """How the tokens ``x`` (tokens, in_features) are sorted for a program, by their ``chosen`` (tokens, top_k) experts,
    int64: by set where `mixture` takes them, of all experts of a token or of one, else by expert."""
    if size := size_of_sets(x, experts, chosen.shape[1], what):
        return group_by_set(chosen.reshape(-1, size), experts)
    return sort(chosen, experts)


def multiply_routed(
    x: Tensor, factors: Sequence[Tensor], gate: Tensor, chosen: Tensor, routes: Routes | Sets, what: Program
) -> Tensor:
    """``y = sum_e gate_e W_e x`` over the experts that each token chose.

    The gate multiplies what the first factor of each term yields: for a BTT with its rank axis as experts, the
    intermediate, as Potapczynski et al. 2024 have it. Its gradient is a product, and nothing is divided by it.

    Args:
        x: (tokens, in_features).
        factors: those of the plan in order, each with the experts as an additional first axis, of the dtype of ``x``.
        gate: (tokens, top_k), any float dtype.
        chosen: (tokens, top_k) int64, the experts.
        routes: what `arrange` made of them, for a program of the same ``digits``.
        what: the program of the matrix of one expert.

    Returns:
        (tokens, out_features), in the dtype that ``nn.Linear`` would give.

    Raises:
        ValueError: when the input and a factor differ in dtype.
    """
    x, *factors = alike(x, factors)
    x = F.pad(x, (0, what.pad)) if what.pad else x
    first = 0
    y: Tensor | None = None
    for chain in what.chains:
        those = factors[first : first + len(chain.stages)]
        if isinstance(routes, Sets):
            found = _run_by_sets(x, those, gate, chosen, routes, chain)
        else:
            found = run_rows(x, those, gate, routes, chain)
        y, first = found if y is None else y + found, first + len(chain.stages)
    assert y is not None
    return y if what.keep is None else y[:, : what.keep].contiguous()


def multiply_led(
    x: Tensor, router: Tensor, bias: Tensor | None, factors: Sequence[Tensor], top_k: int, what: Program
) -> Led:
    """`multiply_routed` along what the router's weight (experts, in_features) chooses, as one operator, where `is_led`.

    Raises:
        ValueError: when the input and a factor differ in dtype.
    """
    (chain,) = what.chains
    assert chain.digits is not None
    c, a, f, o = chain.digits
    x, first, second = alike(x, factors)
    return led_mixture(x, router, bias, first.reshape(-1, c, f, a), second.reshape(-1, f, o, c), top_k)


def alike(x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """The input and the factors in the dtype that they run in; ValueError where these differ."""
    x, factors = autocast(x), [autocast(factor) for factor in factors]
    for factor in factors:
        check_dtype(x.dtype, factor.dtype)
    return [x, *factors]


def _run_by_sets(
    x: Tensor, factors: Sequence[Tensor], gate: Tensor, chosen: Tensor, sets: Sets, chain: Chain
) -> Tensor:
    assert chain.digits is not None
    c, a, f, o = chain.digits
    first, second = factors[0].reshape(-1, c, f, a), factors[1].reshape(-1, f, o, c)
    size, top_k = sets.unit.shape[1], chosen.shape[1]
    if size == top_k:
        return mixture(x, first, second, gate, chosen, sets)
    rows = x[:, None].expand(-1, top_k, -1).reshape(-1, x.shape[1])  # a token for each of its experts
    y = mixture(rows, first, second, gate.reshape(-1, size), chosen.reshape(-1, size), sets)
    return y.view(-1, top_k, f * o).sum(1, dtype=y.dtype)  # or autocast on a GPU would make it float32
