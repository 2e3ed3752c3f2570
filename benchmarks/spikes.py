"""The experiments behind the lowering: who should run which step. Prints what it finds and writes records.

    PYTHONPATH=src python benchmarks/spikes.py results/spikes.json [S1 S8 ...]

S1 a step that stores across, by GEMM and copy or by one kernel, and what the next step takes to read it; S2 copies with
short runs; S3 weight gradients with many tokens; S4 tiny blocks; S5 DYAD's two terms; S6 host time of one operator and
of whole layers; S7 keeping intermediates or recomputing them; S8 block-sparse products, by copies or by the table, a
low-rank term beside or in them, and their tiles; S9 bias and activation in the epilogue of a layer's last step.
docs/log.md says what was concluded. Needs a CUDA device of compute capability 9 or more; times are medians in ms, of
CUDA graphs where the host would be in the way.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from epilogues import TILES, step
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench, do_bench_cudagraph

import structlin as sl
from structlin.kernels import blocks
from structlin.kernels.across import across
from structlin.kernels.relayout import exchange
from structlin.machine import provenance
from structlin.report import records
from structlin.testing import error

TOKENS, SEED = 16384, 0
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
found: list[records.Record] = []


def wall(run: Callable[[], object]) -> float:
    return do_bench(run, warmup=15, rep=60, return_mode="median")


def kernels(run: Callable[[], object]) -> float:
    run()
    torch.cuda.synchronize()
    return do_bench_cudagraph(run, rep=25, return_mode="median")


def host(run: Callable[[], object], times: int = 200) -> float:
    for _ in range(10):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    spent = (time.perf_counter() - start) / times * 1e3
    torch.cuda.synchronize()
    return spent


def note(spike: str, case: str, metrics: dict[str, float]) -> None:
    print(f"{spike} {case}: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True)
    where = provenance(" ".join(["python", *sys.argv]), SEED, DEVICE)
    config = {"spike": spike, "case": case, "tokens": TOKENS, "dtype": "bfloat16"}
    measured = {"config": config, "metrics": metrics, "status": "ok", "error": None}
    found.append({"kind": "spike", "name": f"{spike} {case}", **where, **measured})


def rand(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE) * scale


def across_steps() -> None:
    """S1: [t, g, k] x [g, (o i), k] -> [o, g, i, t], and the next step that reads it; S2: the copy alone."""
    cases = [  # name, groups, k, o, i
        ("monarch4 768->3072 first", 4, 192, 4, 48), ("monarch4 768->3072 second, gradient", 4, 768, 4, 48),
        ("monarch4 1024->4096 first", 4, 256, 4, 64), ("monarch4 1024->4096 second, gradient", 4, 1024, 4, 64),
        ("monarch8 2048->2048", 8, 256, 8, 32), ("monarch8 2048->8192 second, gradient", 8, 1024, 8, 32),
        ("monarch4 4096->4096", 4, 1024, 4, 256), ("monarch16 4096->4096", 16, 256, 16, 16),
        ("monarch16 4096->16384 second, gradient", 16, 1024, 16, 16),
        ("btt4 4096->4096", 64, 64, 64, 4), ("btt1 4096->4096", 64, 64, 64, 1),
    ]  # fmt: skip
    for name, g, k, o, i in cases:
        a, w = rand(TOKENS, g, k), rand(g, o * i, k, scale=k**-0.5)
        z, y = (torch.empty(TOKENS, g, o * i, device=DEVICE, dtype=DTYPE) for _ in range(2))
        last = torch.empty(g, o * i, TOKENS, device=DEVICE, dtype=DTYPE)
        row = {
            "gemm": kernels(lambda: torch.bmm(a.transpose(0, 1), w.transpose(1, 2), out=z.transpose(0, 1))),
            "gemm_tokens_last": kernels(lambda: torch.bmm(w, a.permute(1, 2, 0), out=last)),
        }
        want = torch.einsum("tgk,gnk->gnt", a[:512].double(), w.double()).view(g, o, i, 512).permute(1, 0, 2, 3)
        assert error(across(a, w, TOKENS, g, k, o * i, i, False, True)[..., :512], want) < 5e-3
        row["across_kernel"] = kernels(lambda: across(a, w, TOKENS, g, k, o * i, i, False, True))
        for_second, second = z.view(TOKENS, o, g * i), rand(o, 256, g * i)
        row["second_gemm"] = kernels(lambda: torch.bmm(for_second.transpose(0, 1), second.transpose(1, 2)))
        row["second_gemm_tokens_last"] = kernels(
            lambda: torch.bmm(last.view(o, g * i, TOKENS).transpose(1, 2), second.transpose(1, 2))
        )
        note("S1", name, row)
        exchange(z, y, g, o, i)
        assert torch.equal(y.view(TOKENS, o, g, i), z.view(TOKENS, g, o, i).permute(0, 2, 1, 3))
        row = {
            "torch_copy": kernels(lambda: z.view(TOKENS, g, o, i).permute(0, 2, 1, 3).contiguous()),
            "exchange_kernel": kernels(lambda: exchange(z, y, g, o, i)),
        }
        row["exchange_tb_per_s"] = 4 * z.numel() / row["exchange_kernel"] / 1e9
        note("S2", f"runs of {i}, {name}", row)


def weight_gradients() -> None:
    """S3: [t, g, k], [t, g, n] -> [g, n, k] with 65,536 tokens, all at once or in slices of the tokens."""
    for g, k, n in [(4, 192, 192), (16, 256, 256), (64, 64, 64), (64, 64, 256)]:
        x, dy = rand(4 * TOKENS, g, k), rand(4 * TOKENS, g, n)
        row = {"bmm": kernels(lambda: torch.bmm(dy.permute(1, 2, 0), x.transpose(0, 1)))}
        for s in (4, 16):
            pairs = list(zip(dy.view(s, -1, g, n), x.view(s, -1, g, k), strict=True))
            row[f"in_{s}_slices"] = kernels(
                lambda: torch.stack([torch.bmm(d.permute(1, 2, 0), q.transpose(0, 1)) for d, q in pairs]).sum(0)
            )
        note("S3", f"{g} groups, {k}x{n}, 65536 tokens", row)


def tiny_blocks() -> None:
    """S4: blocks of 8, 16, 32 as they are, or merged into dense blocks of 64."""
    dense = rand(4096, 4096)
    for b in (8, 16, 32):
        x, w = rand(TOKENS, 4096 // b, b), rand(4096 // b, b, b, scale=b**-0.5)
        y = torch.empty_like(x)
        merged = torch.stack([torch.block_diag(*blocks) for blocks in w.view(-1, 64 // b, b, b)])
        xm, ym = (v.view(TOKENS, 64, 64).transpose(0, 1) for v in (x, y))
        row = {
            "bmm": kernels(lambda: torch.bmm(x.transpose(0, 1), w, out=y.transpose(0, 1))),
            "merged": kernels(lambda: torch.bmm(xm, merged, out=ym)),
            "dense": kernels(lambda: F.linear(x.view(TOKENS, 4096), dense)),
        }
        note("S4", f"blocks of {b}, 4096->4096", row)


def dyad_terms() -> None:
    """S5: two products and an add, accumulation into one result, and one product over joined inputs."""
    for n, d_in, d_out in [(4, 768, 3072), (4, 1024, 4096), (8, 4096, 4096)]:
        k, o = d_in // n, d_out // n
        x, lower, upper = rand(TOKENS, n, k), rand(n, k, o, scale=0.02), rand(n, k, o, scale=0.02)
        joined = torch.cat([lower, upper], 1)
        x2 = torch.empty_like(x)
        y, y2 = (torch.empty(TOKENS, n, o, device=DEVICE, dtype=DTYPE) for _ in range(2))
        out, out2 = y.transpose(0, 1), y2.transpose(0, 1)

        def strided() -> Tensor:
            exchange(x, x2, k, n, 1)
            return x2.transpose(0, 1)

        def two() -> Tensor:
            torch.bmm(x.transpose(0, 1), lower, out=out)
            torch.bmm(strided(), upper, out=out2)
            return y + y2

        def accumulate() -> Tensor:
            torch.bmm(x.transpose(0, 1), lower, out=out)
            torch.baddbmm(out, strided(), upper, out=out)
            return y

        def one() -> Tensor:
            strided()
            torch.bmm(torch.cat([x, x2], 2).transpose(0, 1), joined, out=out)
            return y

        exact, dense = two().double(), rand(d_out, d_in)
        row = {"dense": kernels(lambda: F.linear(x.view(TOKENS, d_in), dense)), "copy_of_input": kernels(strided)}
        for label, run in {"two_and_add": two, "accumulate": accumulate, "joined": one}.items():
            assert error(run(), exact) < 1e-2
            row[label] = kernels(run)
        note("S5", f"dyad{n} {d_in}->{d_out}, forward", row)


def host_time() -> None:
    """S6: what a call costs the host, forward alone and forward and backward, for tiny inputs."""
    a, w, x = rand(8, 4, 192), rand(4, 192, 192), rand(8, 768).requires_grad_()
    dy = rand(8, 768)
    with torch.no_grad():
        note("S6", "one product", {
            "bmm": host(lambda: torch.bmm(a.transpose(0, 1), w)),
            "contract": host(lambda: sl.ops.contract(a, w, "t g k, g n k -> t g n")),
        })  # fmt: skip
    monarch = sl.StructuredLinear(768, 768, sl.Monarch(4, order="blocked"), bias=False, device=DEVICE, dtype=DTYPE)
    by_steps = copy.deepcopy(monarch)
    by_steps.backend = "reference"
    layers = {
        "nn.Linear": torch.nn.Linear(768, 768, bias=False, device=DEVICE, dtype=DTYPE),
        "monarch4": monarch,
        "monarch4, step by step": by_steps,
        "monarch4, compiled": torch.compile(monarch),
    }
    for label, layer in layers.items():

        def step() -> None:
            x.grad = None
            layer(x).backward(dy)

        with torch.no_grad():
            forward = host(lambda: layer(x))
        note("S6", label, {"forward": forward, "forward_and_backward": host(step)})


def recompute() -> None:
    """S7: memory held for backward and time of a step, intermediates kept or recomputed."""
    for spec, d_in, d_out in [
        (sl.BTT(rank=4), 4096, 4096), (sl.Monarch(4, order="blocked"), 4096, 4096),
        (sl.Monarch(4, order="blocked"), 1024, 4096),
    ]:  # fmt: skip
        layer = sl.StructuredLinear(d_in, d_out, spec, bias=False, device=DEVICE, dtype=DTYPE)
        x, dy = rand(TOKENS, d_in).requires_grad_(), rand(TOKENS, d_out)
        kept = sl.analysis.saved_activations(layer.plan) - d_in
        row = {"predicted_mb": kept * TOKENS * 2 / 2**20}
        for label, run in {"keep": layer, "recompute": lambda x: checkpoint(layer, x, use_reentrant=False)}.items():
            torch.cuda.synchronize()
            base = torch.cuda.memory_allocated()
            y = run(x)
            row[f"{label}_held_mb"] = (torch.cuda.memory_allocated() - base - y.numel() * 2) / 2**20
            y.backward(dy)
            del y
            row[label] = wall(lambda: run(x).backward(dy))
            x.grad = None
            layer.zero_grad(set_to_none=True)
        note("S7", f"{spec} {d_in}->{d_out}", row)


def sparse_blocks() -> None:
    """S8: 16 x 16 blocks of 256, 4 in a row, looked up by copies or by the table."""
    table = tuple(tuple(row ^ other for other in (0, 1, 2, 4)) for row in range(16))
    used = tuple(tuple((block ^ other) + 4096 * slot for slot, other in enumerate((0, 1, 2, 4))) for block in range(16))
    x, dy, w = rand(TOKENS, 16, 256), rand(TOKENS, 16, 256), rand(16, 256, 4, 256, scale=2**-5)
    index = torch.tensor(table, device=DEVICE).flatten()

    def gathered() -> Tensor:
        found = x.index_select(1, index).view(TOKENS, 16, 1024)
        return torch.bmm(found.transpose(0, 1), w.view(16, 256, 1024).transpose(1, 2)).transpose(0, 1)

    assert error(blocks.sum_of_blocks(x, w, table, False), gathered().double()) < 5e-3
    dense, flat = rand(4096, 4096), x.view(TOKENS, 4096)
    row = {
        "gather_and_bmm": kernels(gathered),
        "table": kernels(lambda: blocks.sum_of_blocks(x, w, table, False)),
        "table_added": kernels(lambda: blocks.sum_of_blocks(x, w, table, False, dy)),
        "table_input_gradient": kernels(lambda: blocks.sum_of_blocks(dy, w, used, True)),
        "table_weight_gradient": kernels(lambda: blocks.gradient_of_blocks(x, dy, table)),
        "mm_of_equal_flops": kernels(lambda: flat[:, :1024] @ dense[:1024]),
        "dense": kernels(lambda: flat @ dense),
    }
    note("S8", "16 blocks of 256, 4 in a row", row)
    z, down, up = rand(TOKENS, 128), rand(128, 4096, scale=2**-6), rand(4096, 128, scale=2**-5)
    low, to_rank, from_rank = rand(TOKENS, 4096), torch.empty_like(z), torch.empty_like(up)

    def after() -> Tensor:
        return blocks.sum_of_blocks(x, w, table, False, torch.mm(z, up.T, out=low))

    def joined() -> Tensor:
        return blocks.sum_of_blocks(x, w, table, False, pair=(z, up))

    want = gathered().double().reshape(TOKENS, 4096) + z.double() @ up.double().T
    assert error(joined().view(TOKENS, 4096), want) < 5e-3
    row = {
        "added_after": kernels(after),
        "joined": kernels(joined),
        "joined_input_gradient": kernels(lambda: blocks.sum_of_blocks(dy, w, used, True, pair=(z, down))),
        "to_rank": kernels(lambda: torch.mm(flat, down.T, out=to_rank)),
        "rank_weight_gradient": kernels(lambda: torch.mm(flat.T, z, out=from_rank)),
    }
    note("S8", "the same and rank 128", row)
    row, processors = {}, blocks._programs(DEVICE)
    for *tile, each in [
        (128, 256, 8, 3, 1), (256, 128, 8, 3, 1), (128, 128, 4, 4, 1), (128, 128, 8, 4, 1), (64, 256, 4, 4, 1),
        (128, 128, 4, 2, 2), (64, 256, 4, 2, 2), (128, 64, 4, 3, 2),
    ]:  # fmt: skip
        blocks._tile, blocks._programs = lambda *_, tile=tile: tile, lambda _, count=each * processors: count
        assert error(joined().view(TOKENS, 4096), want) < 5e-3
        row[" ".join(map(str, (*tile, each)))] = kernels(joined)
    note("S8", "the same, by tokens, features, warps and stages of a tile and programs on a processor", row)


def epilogues() -> None:
    """S9: bias and GELU, or SwiGLU, in the last step of Monarch with 8 blocks, or after it by torch.compile."""
    for name, k, n in [("monarch8 2048->8192", 256, 1024), ("monarch8 4096->16384", 512, 2048)]:
        a, dh, bias = rand(8, k, TOKENS), rand(TOKENS, 8 * n), rand(8 * n)
        w, v = rand(8, n, k, scale=k**-0.5), rand(8, n, k, scale=k**-0.5)
        y, gate = (torch.empty(TOKENS, 8 * n, device=DEVICE, dtype=DTYPE) for _ in range(2))

        def bmm(w: Tensor, y: Tensor) -> Tensor:
            torch.bmm(a.transpose(1, 2), w.mT, out=y.view(TOKENS, 8, n).transpose(0, 1))
            return y

        def gradient(y: Tensor, dh: Tensor) -> Tensor:
            return torch.ops.aten.gelu_backward(dh, y + bias)

        gelu = torch.compile(lambda y: F.gelu(y + bias))
        swiglu = torch.compile(lambda y, gate: y * F.silu(gate))
        slope = torch.compile(gradient)
        slope_and_bias = torch.compile(lambda y, dh: (d := gradient(y, dh), d.sum(0)))
        exact = bmm(w, y)[:512].double() + bias.double()
        gated = bmm(w, y)[:512].double() * F.silu(bmm(v, gate)[:512].double())
        wanted = {"none": y[:512].double(), "gelu": F.gelu(exact), "gelu_and_input": F.gelu(exact)}
        wanted |= {"gelu_gradient": torch.ops.aten.gelu_backward(dh[:512].double(), exact), "swiglu": gated}
        row = {
            "bmm": kernels(lambda: bmm(w, y)),
            "bmm_then_compiled_gelu": kernels(lambda: gelu(bmm(w, y))),
            "two_bmm_then_compiled_swiglu": kernels(lambda: swiglu(bmm(w, y), bmm(v, gate))),
            "compiled_gelu_gradient": kernels(lambda: slope(y, dh)),
            "compiled_gelu_gradient_and_bias": kernels(lambda: slope_and_bias(y, dh)),
        }
        for epilogue, want in wanted.items():
            times = {}
            for tile in TILES:
                try:
                    assert error(step(a, w, epilogue, tile, bias, v, dh)[0][:512], want) < 1e-2
                except OutOfResources:
                    continue
                times[tile] = kernels(lambda: step(a, w, epilogue, tile, bias, v, dh))
            row[f"kernel_{epilogue}"] = min(times.values())
            row[f"kernel_{epilogue}_tile"] = TILES.index(min(times, key=times.__getitem__))
        note("S9", f"{name}, last step", row)


if __name__ == "__main__":
    torch.manual_seed(SEED)
    spikes = {"S1": across_steps, "S3": weight_gradients, "S4": tiny_blocks, "S5": dyad_terms, "S6": host_time}
    spikes |= {"S7": recompute, "S8": sparse_blocks, "S9": epilogues}
    for name in sys.argv[2:] or spikes:
        spikes[name]()
        records.write(sys.argv[1], found)
