"""The experiments behind the lowering: who should run which step. Prints a table and writes one JSON of records.

    PYTHONPATH=src python benchmarks/spikes.py results/spikes.json

S1 across steps by copy or by a kernel that stores across; S2 the same for small runs; S3 weight gradients with many
tokens; S4 tiny blocks; S5 DYAD's two terms; S6 overhead of the operator; S7 recomputing intermediates. docs/log.md
says what was concluded. Needs a CUDA device; times are medians in ms with a cold L2 cache.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.testing import do_bench, do_bench_cudagraph

import structlin as sl
from structlin.kernels import across, relayout
from structlin.testing import error

T = 16384
DEVICE, DTYPE = "cuda", torch.bfloat16
results: list[dict] = []


def bench(run) -> float:
    return do_bench(run, warmup=15, rep=60, return_mode="median")


def kernels(run) -> float:
    """Without host time: replays of a graph."""
    run()
    torch.cuda.synchronize()
    return do_bench_cudagraph(run, rep=25, return_mode="median")


def step_graph(step) -> float:
    """One training step of a layer, replayed as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return bench(graph.replay)


def note(spike: str, name: str, **metrics) -> None:
    results.append({"spike": spike, "name": name, "metrics": metrics})
    print(f"{spike} {name}: " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()), flush=True)


def rand(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE) * scale


def guarded(run):
    try:
        return run()
    except Exception as failure:
        print("   failed:", type(failure).__name__, str(failure)[:300], flush=True)
        return None


def across_steps() -> None:
    """S1 and S2: [t, g, k] x [g, (o i), k] -> [t, o, g, i], by GEMM and copy or by one kernel."""
    cases = [  # name, groups, k, o, i
        ("monarch4 768->3072", 4, 192, 4, 48), ("its gradient", 4, 768, 4, 48),
        ("monarch4 1024->4096", 4, 256, 4, 64), ("its gradient", 4, 1024, 4, 64),
        ("monarch8 2048->2048", 8, 256, 8, 32), ("monarch8 2048->8192, gradient", 8, 1024, 8, 32),
        ("monarch4 4096->4096", 4, 1024, 4, 256),
        ("monarch16 4096->4096", 16, 256, 16, 16), ("monarch16 4096->16384, gradient", 16, 1024, 16, 16),
        ("btt4 4096", 64, 64, 64, 4), ("btt1 4096", 64, 64, 64, 1),
    ]  # fmt: skip
    for name, g, k, o, i in cases:
        a, w = rand(T, g, k), rand(g, o * i, k, scale=k**-0.5)
        z, y = (torch.empty(T, g, o * i, device=DEVICE, dtype=DTYPE) for _ in range(2))
        at, zt, wt = a.transpose(0, 1), z.transpose(0, 1), w.transpose(1, 2)
        torch.bmm(at, wt, out=zt)
        row = dict(gemm=kernels(lambda: torch.bmm(at, wt, out=zt)))
        row["torch_copy"] = kernels(lambda: z.view(T, g, o, i).permute(0, 2, 1, 3).contiguous())
        relayout.exchange(z, y, g, o, i)
        assert torch.equal(y.view(T, o, g, i), z.view(T, g, o, i).permute(0, 2, 1, 3))
        row["exchange"] = kernels(lambda: relayout.exchange(z, y, g, o, i))
        row["exchange_tbs"] = 4 * z.numel() / row["exchange"] / 1e9
        want = torch.einsum("tgk,gnk->tgn", a[:512].double(), w.double()).view(512, g, o, i).permute(0, 2, 1, 3)
        wk = wt.contiguous()
        for label, run in dict(across=lambda: across.across(a, w, i), across_kn=lambda: across.across(a, wk, i, False)).items():
            found = guarded(run)
            if found is not None:
                row[label] = kernels(run) if error(found[:512], want) < 5e-3 else float("nan")
                row[label + "_config"] = str(across._tiled.best_config).split(", num_ctas")[0]
        note("S1", name, **row)


def weight_gradients() -> None:
    """S3: [t, g, k], [t, g, n] -> [g, n, k] with 65,536 tokens, all at once or in slices of the tokens."""
    for g, k, n in [(4, 192, 192), (16, 256, 256), (64, 64, 64), (64, 64, 256)]:
        tokens = 65536
        x, dy = rand(tokens, g, k), rand(tokens, g, n)
        whole = bench(lambda: torch.bmm(dy.permute(1, 2, 0), x.transpose(0, 1)))
        row = dict(bmm=whole, floor_ms=2 * (x.numel() + dy.numel()) / 4.2e9)
        for s in (4, 16):
            xs, ds = x.view(s, -1, g, k), dy.view(s, -1, g, n)

            def split(xs=xs, ds=ds):
                parts = [torch.bmm(d.permute(1, 2, 0), q.transpose(0, 1)) for d, q in zip(ds, xs, strict=True)]
                return torch.stack(parts).sum(0)

            row[f"split{s}"] = bench(split)
        note("S3", f"g={g} k={k} n={n}", **row)


def tiny_blocks() -> None:
    """S4: blocks of 8, 16, 32: as they are, or several merged into one dense block of 64 or 128."""
    for b in (8, 16, 32):
        g = 4096 // b
        x, w = rand(T, g, b), rand(g, b, b, scale=b**-0.5)
        y = torch.empty_like(x)
        row = dict(bmm=bench(lambda: torch.bmm(x.transpose(0, 1), w, out=y.transpose(0, 1))))
        for m in (64, 128):
            merged = torch.stack([torch.block_diag(*blocks) for blocks in w.view(-1, m // b, b, b)])
            xm, ym = x.view(T, -1, m).transpose(0, 1), torch.empty(T, 4096 // m, m, device=DEVICE, dtype=DTYPE)
            row[f"merged{m}"] = bench(lambda xm=xm, merged=merged, ym=ym: torch.bmm(xm, merged, out=ym.transpose(0, 1)))
        dense = rand(4096, 4096)
        row["dense"] = bench(lambda: F.linear(x.view(T, 4096), dense))
        note("S4", f"block {b}, 4096->4096", **row)


def dyad_terms() -> None:
    """S5: two batched GEMMs and an add, accumulation into one result, and one GEMM over joined inputs."""
    for n, d_in, d_out in [(4, 1024, 4096), (8, 4096, 4096), (4, 768, 3072)]:
        k, o = d_in // n, d_out // n
        x, lower, upper = rand(T, d_in), rand(n, o, k, scale=0.02), rand(n, o, k, scale=0.02)
        joined = torch.cat([lower, upper], 2)
        y1, y2, y = (torch.empty(T, n, o, device=DEVICE, dtype=DTYPE) for _ in range(3))
        x1 = x.view(T, n, k).transpose(0, 1)
        lo, up, jo = lower.transpose(1, 2), upper.transpose(1, 2), joined.transpose(1, 2)

        x2 = torch.empty(T, n, k, device=DEVICE, dtype=DTYPE)

        def strided():
            relayout.exchange(x, x2, k, n, 1)
            return x2

        def two():
            torch.bmm(x1, lo, out=y1.transpose(0, 1))
            torch.bmm(strided().transpose(0, 1), up, out=y2.transpose(0, 1))
            return y1 + y2

        def accumulate():
            torch.bmm(x1, lo, out=y.transpose(0, 1))
            c = y.transpose(0, 1)
            torch.baddbmm(c, strided().transpose(0, 1), up, out=c)
            return y

        def one():
            both = torch.cat([x.view(T, n, k), strided()], 2)
            torch.bmm(both.transpose(0, 1), jo, out=y.transpose(0, 1))
            return y

        row = dict(copy=kernels(strided), torch_copy=kernels(lambda: x.view(T, k, n).transpose(1, 2).contiguous()))
        exact = two().double()
        for label, run in dict(two=two, accumulate=accumulate, joined=one).items():
            row[label + "_error"] = error(run(), exact)
            row[label] = kernels(run)
        dense = rand(d_out, d_in)
        row["dense"] = bench(lambda: F.linear(x, dense))
        note("S5", f"dyad{n} {d_in}->{d_out}", **row)


def layer_times() -> None:
    """S6: host time per call, eager and compiled; whole layers forward and backward against dense."""
    specs = [
        (sl.Monarch(4, "blocked"), 768, 3072), (sl.Monarch(4), 768, 3072), (sl.Monarch(4, "blocked"), 1024, 4096),
        (sl.Monarch(8, "blocked"), 2048, 2048), (sl.Monarch(8, "blocked"), 2048, 8192),
        (sl.Monarch(4, "blocked"), 4096, 4096), (sl.Monarch(16, "blocked"), 4096, 4096), (sl.Monarch(16), 4096, 4096),
        (sl.Monarch(16, "blocked"), 4096, 16384), (sl.BTT(4), 4096, 4096), (sl.Dyad(4), 1024, 4096),
        (sl.Dyad(8), 4096, 4096), (sl.Dyad(8, "ot"), 4096, 4096), (sl.BTT(1), 4096, 4096), (sl.LowRank(1024), 4096, 4096),
    ]  # fmt: skip
    for spec, d_in, d_out in specs:
        x, dy = rand(T, d_in).requires_grad_(), rand(T, d_out)
        row = {}
        for label, module in dict(
            dense=torch.nn.Linear(d_in, d_out, bias=False, device=DEVICE, dtype=DTYPE),
            ours=sl.StructuredLinear(d_in, d_out, spec, bias=False, device=DEVICE, dtype=DTYPE),
        ).items():

            def step(f=module, module=module):
                x.grad = None
                module.zero_grad(set_to_none=True)
                f(x).backward(dy)

            step()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                step()
            row[f"{label}_host"] = (time.perf_counter() - start) / 20 * 1e3
            torch.cuda.synchronize()
            row[label], row[f"{label}_graph"] = bench(step), guarded(lambda step=step: step_graph(step)) or float("nan")
        note("S6", f"{spec} {d_in}->{d_out}", **row, eager=row["dense"] / row["ours"], graph=row["dense_graph"] / row["ours_graph"])
    layer = sl.StructuredLinear(768, 768, sl.Monarch(4), bias=False, device=DEVICE, dtype=DTYPE)
    x = rand(64, 768)
    a, w = rand(8, 4, 192), rand(4, 192, 192)
    with torch.no_grad():
        host = {}
        for label, run in dict(
            op=lambda: sl.ops.contract(a, w, "t g k, g n k -> t g n"),
            bmm=lambda: torch.bmm(a.transpose(0, 1), w),
            layer=lambda: layer(x),
            linear=lambda: F.linear(x, x),
        ).items():
            for _ in range(20):
                run()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(300):
                run()
            host[label + "_us"] = (time.perf_counter() - start) / 300 * 1e6
            torch.cuda.synchronize()
        note("S6", "host time per call", **host)


def compiled_layers() -> None:
    """S6, continued: torch.compile of our op, of the plain einsum, and of dense, in an MLP with GELU."""
    for d in (1024, 2048):
        x, dy = rand(T, d).requires_grad_(), rand(T, d)

        def mlp(spec, backend="auto", d=d):
            net = torch.nn.Sequential(torch.nn.Linear(d, 4 * d), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(4 * d, d))
            net = net.to(DEVICE, DTYPE)
            torch._dynamo.reset()
            if spec is not None:
                sl.to_structured_(net, {"*": spec})
                for m in net:
                    if isinstance(m, sl.StructuredLinear):
                        m.backend = backend
            return net

        row = {}
        for label, net in dict(
            dense=mlp(None), blocked=mlp(sl.Monarch(8, "blocked")), paper=mlp(sl.Monarch(8)),
            einsum=mlp(sl.Monarch(8, "blocked"), "reference"), dyad=mlp(sl.Dyad(8)),
        ).items():  # fmt: skip
            for kind, f in dict(eager=net, compiled=torch.compile(net)).items():

                def step(f=f, net=net):
                    x.grad = None
                    net.zero_grad(set_to_none=True)
                    f(x).backward(dy)

                step()
                row[f"{label}_{kind}"] = bench(step)
        note("S6", f"MLP {d}", **row)


def recompute() -> None:
    """S7: peak memory and time of forward and backward with intermediates kept, or recomputed in backward."""
    for spec, d_in, d_out in [(sl.BTT(4), 4096, 4096), (sl.Monarch(4, "blocked"), 4096, 4096), (sl.Monarch(4, "blocked"), 1024, 4096)]:
        layer = sl.StructuredLinear(d_in, d_out, spec, bias=False, device=DEVICE, dtype=DTYPE)
        x, dy = rand(T, d_in).requires_grad_(), rand(T, d_out)
        row = {}
        for label, f in dict(keep=layer, recompute=lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False)).items():

            def step(f=f, layer=layer):
                x.grad = None
                layer.zero_grad(set_to_none=True)
                f(x).backward(dy)

            step()
            x.grad = None
            layer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            y = f(x)
            row[f"{label}_held_mb"] = (torch.cuda.memory_allocated() - base - y.numel() * 2) / 2**20
            y.backward(dy)
            del y
            row[f"{label}_peak_mb"] = (torch.cuda.max_memory_allocated() - base) / 2**20
            row[label] = bench(step)
        kept = sl.analysis.saved_activations(layer.plan) - d_in
        note("S7", f"{spec} {d_in}->{d_out}", **row, predicted_mb=kept * T * 2 / 2**20)


if __name__ == "__main__":
    torch.manual_seed(0)
    big = rand(8192, 8192)
    copied = torch.empty(1 << 29, device=DEVICE, dtype=DTYPE)
    source = torch.randn_like(copied)
    note("S0", torch.cuda.get_device_name(), torch=torch.__version__, tflops=2 * 8192**3 / bench(lambda: big @ big) / 1e9,
         tbs=4 * copied.numel() / bench(lambda: copied.copy_(source)) / 1e9)  # fmt: skip
    del copied, source
    for spike in (across_steps, layer_times, dyad_terms, weight_gradients, tiny_blocks, recompute, compiled_layers):
        guarded(spike)
        with open(sys.argv[1], "w") as file:
            json.dump(results, file, indent=1)
