"""What the GPU did while layers ran: time, bytes and busy share of every kernel, read by Nsight Compute.

    PYTHONPATH=src python benchmarks/counters.py --out results/counters-h200.json SPEC@OUTxIN ...

Each problem runs forward and backward once under ``ncu`` after a warm-up without it, 16,384 tokens in bfloat16. For a
layer that falls short of what its FLOPs promise these numbers say why: memory that is busy where the tensor cores are
not, or neither. Writes one record of kind "spike" per problem, a kernel's numbers at one place of each series.
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys

TOKENS = 16384
COUNTERS = {
    "gpu__time_duration.sum": "time_us",
    "dram__bytes.sum": "dram_mb",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_busy_percent",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2_busy_percent",
    "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active": "tensor_issue_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_busy_percent",
}
UNITS = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3,
         "byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3}  # fmt: skip


def run(problem: str) -> None:
    """Forward and backward of one problem between the marks of the profiler."""
    import torch

    from structlin.bench.problems import read
    from structlin.testing import inputs, make

    what = read(problem)
    layer = make(what.spec, (what.out_features, what.in_features), "cuda", torch.bfloat16, bias=False)
    x, dy = inputs(layer, TOKENS).requires_grad_(), torch.randn(TOKENS, what.out_features, device="cuda").bfloat16()
    for measured in (False, True):
        x.grad = None
        layer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if measured:
            torch.cuda.profiler.start()
        layer(x).backward(dy)
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def profile(problem: str) -> dict[str, list[float] | list[str]]:
    """Kernels of one problem in order: their names, and a list for each of `COUNTERS`."""
    command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw",
               "--metrics", ",".join(COUNTERS), sys.executable, __file__, "--run", problem]  # fmt: skip
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line for line in output.splitlines() if line.startswith('"')]
    units, *kernels = csv.DictReader(io.StringIO("\n".join(lines)))
    found: dict[str, list[float] | list[str]] = {"kernel": [kernel["Kernel Name"] for kernel in kernels]}
    for counter, name in COUNTERS.items():
        if counter in units:
            scale = UNITS.get(units[counter], 1.0)
            found[name] = [scale * float(kernel[counter].replace(",", "")) for kernel in kernels]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="profile layers with Nsight Compute")
    parser.add_argument("problems", nargs="*", metavar="SPEC@OUTxIN")
    parser.add_argument("--out", metavar="FILE.json", help="where the records go")
    parser.add_argument("--run", metavar="SPEC@OUTxIN", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run)
        return
    import torch

    from structlin.machine import provenance
    from structlin.report import records

    found: list[records.Record] = []
    for problem in options.problems:
        series = profile(problem)
        names = series.pop("kernel")
        where = provenance(" ".join(["python", *sys.argv]), 0, torch.device("cuda"))
        print(problem)
        for i, name in enumerate(names):
            print("  " + "  ".join(f"{key} {values[i]:.4g}" for key, values in series.items()) + f"  {name}")
        config = {"spike": "counters", "case": problem, "tokens": TOKENS, "dtype": "bfloat16", "kernels": names}
        totals = {"time_us": sum(series["time_us"]), "dram_mb": sum(series["dram_mb"])}
        found.append({"kind": "spike", "name": f"counters {problem}", **where, "config": config, "metrics": totals,
                      "series": series, "status": "ok", "error": None})  # fmt: skip
    if options.out:
        records.write(options.out, found)


if __name__ == "__main__":
    main()
