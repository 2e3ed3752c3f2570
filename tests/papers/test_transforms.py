"""Fast transforms are members of the Monarch class, where Dao et al. 2022 (section 3) prove it: found by projection."""

import math

import pytest
import torch

import structlin as sl

N, M = 16, 4
COMPLEX = torch.complex128


def transposition(m):
    """The permutation that reads the index (a, b) as (b, a)."""
    return torch.eye(m * m, dtype=torch.float64)[torch.arange(m * m).reshape(m, m).T.flatten()]


def member(spec, weight):
    layer = sl.StructuredLinear(weight.shape[1], weight.shape[0], spec, bias=False, dtype=weight.dtype)
    layer.load_state_dict(sl.project(layer.plan, weight))
    return layer


def fourier(n):
    return torch.fft.fft(torch.eye(n, dtype=COMPLEX), dim=0)


def cosine(n):
    """The DCT-II, orthogonal but for scale."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    return torch.cos(math.pi * (2 * i + 1) * k / (2 * n))


def evens_then_odds_reversed(n):
    """The permutation that turns a cosine transform into the real part of a Fourier transform (Makhoul 1980)."""
    return torch.eye(n, dtype=torch.float64)[[*range(0, n, 2), *range(n - 1, 0, -2)]]


def hadamard(n):
    return torch.ones(1, 1, dtype=torch.float64) if n == 1 else torch.kron(TWO, hadamard(n // 2))


TWO = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)

TRANSFORMS = {
    "hadamard": (sl.Monarch(M), hadamard(N)),
    "hadamard, few blocks": (sl.Monarch(2), hadamard(N)),
    "fourier": (sl.Monarch(M), fourier(N) @ transposition(M).to(COMPLEX).T),
    "fourier, real part": (sl.Monarch(M, rank=2), fourier(N).real @ transposition(M).T),
    "fourier, imaginary part": (sl.Monarch(M, rank=2), fourier(N).imag @ transposition(M).T),
    "cosine": (sl.Monarch(M, rank=2), cosine(N) @ evens_then_odds_reversed(N).T @ transposition(M).T),
}


@pytest.mark.parametrize(("spec", "transform"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform_is_a_monarch_matrix(spec, transform):
    torch.testing.assert_close(member(spec, transform).to_dense().weight.detach(), transform)


def test_order_three_holds_a_fourier_transform_with_its_digits_reversed():
    n = 27
    reverse = torch.arange(n).reshape(3, 3, 3).permute(2, 1, 0).flatten()
    permuted = fourier(n)[:, reverse]
    layer = member(sl.Monarch(3, factors=3), permuted)
    torch.testing.assert_close(layer.to_dense().weight.detach(), permuted)


def test_product_of_monarch_and_transposed_monarch_is_a_convolution():
    """MM* holds circulant matrices: F^-1 diag(F h) F with F = M P and F = F^T = P^T M^T."""
    torch.manual_seed(0)
    kernel = torch.randn(N, dtype=COMPLEX)
    circulant = torch.stack([kernel.roll(i) for i in range(N)], 1)
    p = transposition(M).to(COMPLEX)
    monarch = fourier(N) @ p.T
    spectrum = p @ torch.diag(torch.fft.fft(kernel)) @ p.T
    left = member(sl.Monarch(M), monarch.conj() @ spectrum / N)
    right = member(sl.Monarch(M), monarch)
    product = sl.StructuredLinear(N, N, sl.Monarch(M) @ sl.Monarch(M).T, bias=False, dtype=COMPLEX)
    product.load_state_dict(
        {
            "second": right.second, "first": right.first,
            "first1": left.first, "second1": left.second,
        }
    )  # fmt: skip
    torch.testing.assert_close(product.to_dense().weight.detach(), circulant)
