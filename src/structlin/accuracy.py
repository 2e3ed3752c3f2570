"""How far a tensor is from the exact one, and how far it may be: the measures that tests and the benchmark share."""

from __future__ import annotations

import torch
from torch import Tensor


def error(x: Tensor, exact: Tensor) -> float:
    """Relative error of ``x`` in the Frobenius norm; NaN where x has one, 0 for two empty or zero tensors."""
    wide = torch.promote_types(exact.dtype, torch.float64)
    x, exact = x.detach().to(wide), exact.detach().to(wide)
    distance, size = float((x - exact).norm()), float(exact.norm())
    return distance / size if size else distance


def assert_close(x: Tensor, exact: Tensor, tolerance: float = 1e-10) -> None:
    """Same shape, and a relative error of at most ``tolerance``."""
    if x.shape != exact.shape:
        raise AssertionError(f"shape {tuple(x.shape)} instead of {tuple(exact.shape)}")
    if not (found := error(x, exact)) <= tolerance:
        raise AssertionError(f"relative error {found:.1e} exceeds {tolerance:.1e}")


def assert_as_accurate(ours: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Our error against float64 is at most ``factor`` times that of plain PyTorch in the same dtype."""
    if ours.dtype != plain.dtype:
        raise AssertionError(f"dtype {ours.dtype} instead of {plain.dtype}")
    # two roundings are allowed where plain PyTorch happens to be exact; float64 has nothing wider to be judged by
    slack = 100 if plain.dtype in (torch.float64, torch.complex128) else 2
    assert_close(ours, exact, factor * error(plain, exact) + slack * torch.finfo(plain.dtype).eps)
