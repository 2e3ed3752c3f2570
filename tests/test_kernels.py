"""The Triton kernels against plain PyTorch, on Triton's interpreter where there is no GPU, into poisoned memory."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

EXCHANGES = [(5, 4, 4, 16), (3, 3, 5, 7), (7, 64, 64, 1), (3, 8, 96, 1), (0, 2, 2, 2), (2, 4, 200, 64), (3, 8, 8, 4)]
PRODUCTS = [
    (72, 4, 64, 4, 16),
    (40, 3, 32, 2, 32),
    (128, 4, 48, 4, 24),
    (64, 2, 80, 1, 64),
    (56, 8, 16, 8, 1),
    (8, 2, 64, 16, 4),
    (8, 2, 32, 2, 256),
]


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
        for a_last, k_inner in itertools.product((True, False), repeat=2):
            a = fenced(torch.randn((g, k, tokens) if a_last else (tokens, g, k), device=device, dtype=torch.float16))
            w = fenced(torch.randn((g, o * i, k) if k_inner else (g, k, o * i), device=device, dtype=torch.float16))
            equation = f"{'gkt' if a_last else 'tgk'},{'gnk' if k_inner else 'gkn'}->gnt"

            def product(a, w, equation=equation, shape=(g, o, i, tokens)):
                return torch.einsum(equation, a, w).view(shape).permute(1, 0, 2, 3)

            ours = across(a, w, tokens, g, k, o * i, i, a_last, k_inner)
            assert_as_accurate(ours, product(a, w), product(a.double(), w.double()))


def check_blocks(device):
    from structlin.kernels.blocks import gradient_of_blocks, sum_of_blocks
    from structlin.testing import assert_as_accurate

    for tokens, n, k, slots in [(70, 64, 128, 2), (129, 128, 64, 5), (3, 256, 192, 8)]:
        rows = blocks = 8
        table = tuple(tuple((row ^ slot) for slot in range(slots)) for row in range(rows))
        used = tuple(tuple((b ^ slot) + 4096 * slot for slot in range(slots)) for b in range(blocks))
        half = {"device": device, "dtype": torch.float16}
        x, dy = fenced(torch.randn(tokens, blocks, k, **half)), fenced(torch.randn(tokens, rows, n, **half))
        w = fenced(torch.randn(rows, n, slots, k, **half))
        there, index = torch.randn(tokens, rows, n, **half), torch.tensor(table, device=device)

        def forward(x, dy, w, index=index):
            return torch.einsum("tisk,insk->tin", x[:, index], w)

        def dgrad(x, dy, w, index=index):
            return torch.zeros_like(x).index_add(
                1, index.flatten(), torch.einsum("tin,insk->tisk", dy, w).flatten(1, 2)
            )

        def wgrad(x, dy, w, index=index):
            return torch.einsum("tisk,tin->insk", x[:, index], dy)

        def added(x, dy, w, there=there, forward=forward):
            return there.to(x.dtype) + forward(x, dy, w)

        for ours, plain in (
            (sum_of_blocks(x, w, table, False), forward),
            (sum_of_blocks(x, w, table, False, there.clone()), added),
            (sum_of_blocks(dy, w, used, True), dgrad),
            (gradient_of_blocks(x, dy, table), wgrad),
        ):
            assert_as_accurate(ours, plain(x, dy, w), plain(x.double(), dy.double(), w.double()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run compiled where there is a GPU")
@pytest.mark.parametrize("check", ["check_exchange", "check_across", "check_blocks"])
def test_on_the_interpreter(check):
    # the interpreter is chosen when triton is imported, so it gets a process of its own
    code = f"import runpy; runpy.run_path({__file__!r})[{check!r}]('cpu')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("check", [check_exchange, check_across, check_blocks])
def test_on_the_gpu(check):
    check("cuda")
