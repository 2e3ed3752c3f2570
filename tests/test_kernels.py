"""The Triton kernels against plain PyTorch, on Triton's interpreter where there is no GPU, into poisoned memory."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

EXCHANGES = [(5, 4, 4, 16), (3, 3, 5, 7), (7, 64, 64, 1), (3, 8, 96, 1), (0, 2, 2, 2), (2, 4, 200, 64), (3, 8, 8, 4)]
PRODUCTS = [(70, 4, 64, 4, 16), (33, 3, 32, 2, 32), (128, 4, 48, 4, 24), (64, 2, 80, 1, 64)]


def fenced(tensor):
    """The same values in the middle of NaNs, so that a read past either end shows."""
    memory = torch.full([tensor.numel() + 256], float("nan"), dtype=tensor.dtype, device=tensor.device)
    memory[128:-128] = tensor.flatten()
    return memory[128:-128].view(tensor.shape)


def check_exchange(device):
    from structlin.kernels.relayout import exchange

    for tokens, a, b, r in EXCHANGES:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            x = fenced(torch.randn(tokens, a, b, r, device=device).to(dtype))
            y = torch.full((tokens, b, a, r), float("nan"), dtype=dtype, device=device)
            exchange(x, y, a, b, r)
            assert torch.equal(y, x.permute(0, 2, 1, 3)), (tokens, a, b, r, dtype)
            exchange(x, y, a, b, r, add=True)
            assert torch.equal(y, 2 * x.permute(0, 2, 1, 3)), (tokens, a, b, r, dtype)


def check_across(device):
    from structlin.kernels.across import across
    from structlin.testing import assert_as_accurate

    for tokens, g, k, o, i in PRODUCTS:
        for k_inner in (True, False):
            a = fenced(torch.randn(tokens, g, k, device=device, dtype=torch.float16))
            w = fenced(torch.randn((g, o * i, k) if k_inner else (g, k, o * i), device=device, dtype=torch.float16))
            equation = "tgk,gnk->tgn" if k_inner else "tgk,gkn->tgn"

            def product(a, w, equation=equation, shape=(tokens, g, o, i)):
                return torch.einsum(equation, a, w).view(shape).permute(0, 2, 1, 3)

            ours = across(a, w, g, k, o * i, i, k_inner)
            assert_as_accurate(ours, product(a, w), product(a.double(), w.double()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run compiled where there is a GPU")
@pytest.mark.parametrize("check", ["check_exchange", "check_across"])
def test_on_the_interpreter(check):
    # the interpreter is chosen when triton is imported, so it gets a process of its own
    code = f"import runpy; runpy.run_path({__file__!r})[{check!r}]('cpu')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("check", [check_exchange, check_across])
def test_on_the_gpu(check):
    check("cuda")
