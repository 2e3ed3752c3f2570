"""The ceilings of a device, read off records of `structlin bench`, and how far the predictions from them are off.

`structlin bench --preset ceilings` is the short measurement that calibrates a device: seconds on a GPU. Other records
of `bench` serve too. The fit is robust least squares over the logarithms of the times, so every layer counts alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .. import costs
from ..bench.settings import DTYPES
from ..costs import Ceilings, Work
from ..ops.joined import joined
from ..ops.lowering import lower
from ..ops.moves import Kernels
from ..ops.work import joined_work, peak_numbers, work
from ..plan import Plan
from ..report.records import Record
from ..spec import parse
from ..structures import Dense

NO_KERNELS = Kernels(False, False)
MODES = {"forward": False, "forward_backward": True}
"""Mode of `structlin bench` -> whether it trains."""


class Measured(NamedTuple):
    """A layer that was timed: what runs, in how many seconds, and with which memory where that is known."""

    problem: str
    structure: str
    shape: tuple[int, int]
    backend: str
    training: bool
    work: Work
    itemsize: int
    seconds: float
    bytes: int | None
    predicted_bytes: int


def kernels_for(device: str, itemsize: int) -> Kernels:
    """The kernels of ours on a type of device: on a GPU all, those of Hopper included in half precision."""
    return Kernels(device == "cuda", device == "cuda" and itemsize == 2)


def measured(records: Sequence[Record]) -> list[Measured]:
    """What records of `structlin bench` say of layers run dense, by batched GEMMs and by kernels of ours.

    Times are those of CUDA graphs where there are any.

    Raises:
        ValueError: where there is none.
    """
    found = []
    for record in records:
        config, metrics = record["config"], record["metrics"]
        usable = record["kind"] == "bench" and record["status"] == "ok" and "backend" in config
        if not usable or config["backend"] not in ("linear", "bmm", "triton") or " " in config["structure"]:
            continue
        shape, tokens = (config["out_features"], config["in_features"]), config["tokens"]
        spec = Dense() if config["backend"] == "linear" else parse(config["structure"])
        plan, itemsize = spec.plan(*shape), DTYPES[config["dtype"]].itemsize
        kernels = NO_KERNELS if config["backend"] != "triton" else kernels_for(record["device"]["type"], itemsize)
        program = lower(plan)
        for mode, training in MODES.items():
            ms = metrics.get(f"graph_{mode}_ms") or metrics.get(f"eager_{mode}_ms")
            if ms is None:
                continue
            runs = work(program, plan.kept, tokens, kernels, training)
            held, peak = metrics.get(f"{mode}_peak_bytes"), peak_numbers(program, tokens, kernels, training)
            found.append(
                Measured(config["problem"], str(spec), shape, config["backend"], training, runs, itemsize, ms / 1e3,
                         None if held is None else int(held), itemsize * peak)
            )  # fmt: skip
    if not found:
        raise ValueError("no record holds times of a layer; give a file that structlin bench wrote")
    return found


def fit(layers: Sequence[Measured]) -> Ceilings:
    """The ceilings under which the predicted times come nearest to those measured. Needs scipy.

    Raises:
        ValueError: for fewer than ten times, or layers in numbers of several widths.
    """
    from scipy.optimize import least_squares

    sizes = {layer.itemsize for layer in layers}
    if len(layers) < 10 or len(sizes) > 1:
        raise ValueError(
            f"{len(layers)} times of layers with numbers of {sorted(sizes)} bytes cannot calibrate a device; "
            "give ten or more in one dtype"
        )
    itemsize = sizes.pop()
    rate = max(sum(product.flops for product in layer.work.products) / layer.seconds for layer in layers)
    moved = max(sum(itemsize * p.numbers for p in layer.work.products) / layer.seconds for layer in layers)
    start = [rate, 32.0, moved, moved / 3, 1e-6]
    bounds = [(0.5, 4.0), (1 / 32, 64.0), (0.25, 8.0), (0.02, 8.0), (1e-2, 1e3)]

    def ceilings(logs: Sequence[float]) -> Ceilings:
        flops, half, bandwidth, reorder, launch = map(math.exp, logs)
        return Ceilings(flops, half, bandwidth, reorder, launch, itemsize)

    def off(logs: Sequence[float]) -> list[float]:
        device = ceilings(logs)
        return [math.log(costs.seconds(layer.work, device) / layer.seconds) for layer in layers]

    low, high = ([math.log(s * bound[i]) for s, bound in zip(start, bounds, strict=True)] for i in (0, 1))
    found = least_squares(off, [math.log(s) for s in start], loss="soft_l1", f_scale=0.1, bounds=(low, high))
    return ceilings(found.x)


class Check(NamedTuple):
    """A layer that the calibration did not see: its time, and the one predicted."""

    layer: Measured
    seconds: float

    @property
    def error(self) -> float:
        """``|predicted - measured| / measured``."""
        return abs(self.seconds / self.layer.seconds - 1)


def held_out(layers: Sequence[Measured], by: str) -> list[Check]:
    """Every layer predicted from ceilings that were fitted without its kind.

    Args:
        layers: as from `measured`.
        by: "structure": without all layers whose structure has the same name, or "shape": of the same shape.

    Raises:
        ValueError: for another ``by``, or where nothing is left to fit to.
    """
    kinds: dict[str, Callable[[Measured], object]] = {
        "structure": lambda layer: layer.structure.partition(":")[0],
        "shape": lambda layer: layer.shape,
    }
    if by not in kinds:
        raise ValueError(f"by={by!r} is unknown; allowed: {', '.join(kinds)}")
    kind, found = kinds[by], []
    for held in dict.fromkeys(map(kind, layers)):
        device = fit([layer for layer in layers if kind(layer) != held])
        found += [Check(layer, costs.seconds(layer.work, device)) for layer in layers if kind(layer) == held]
    return found


def unseen(records: Sequence[Record], ceilings: Ceilings) -> list[Check]:
    """Layers of other records than those that the ceilings were fitted to, dense and as `auto` runs them, predicted.

    Raises:
        ValueError: where there is none, or one in numbers of another width than that of the ceilings.
    """
    found = []
    for record in records:
        config, metrics = record["config"], record["metrics"]
        usable = record["kind"] == "bench" and record["status"] == "ok" and "backend" in config
        if not usable or config["backend"] not in ("linear", "auto") or " " in config["structure"]:
            continue
        if itemsize_of(config["dtype"]) != ceilings.itemsize:
            raise ValueError(f"{config['dtype']} is measured; the device is calibrated for {ceilings.itemsize} bytes")
        shape, tokens = (config["out_features"], config["in_features"]), config["tokens"]
        spec = Dense() if config["backend"] == "linear" else parse(config["structure"])
        for mode, training in MODES.items():
            ms = metrics.get(f"graph_{mode}_ms") or metrics.get(f"eager_{mode}_ms")
            if ms is None:
                continue
            runs = _fastest(spec.plan(*shape), tokens, ceilings, training, record["device"]["type"])
            layer = Measured(config["problem"], str(spec), shape, config["backend"], training, runs, ceilings.itemsize,
                             ms / 1e3, None, 0)  # fmt: skip
            found.append(Check(layer, costs.seconds(runs, ceilings)))
    if not found:
        raise ValueError("no record holds times of a layer, dense or by auto; give a file that structlin bench wrote")
    return found


def predicted(plan: Plan, tokens: int, ceilings: Ceilings, training: bool = True, device: str = "cuda") -> float:
    """Seconds that a layer takes in a graph as `auto` runs it: by its steps, as one product where a sum can be joined,
    or as one weight, whichever is fastest."""
    return costs.seconds(_fastest(plan, tokens, ceilings, training, device), ceilings)


def _fastest(plan: Plan, tokens: int, ceilings: Ceilings, training: bool, device: str) -> Work:
    kernels, program = kernels_for(device, ceilings.itemsize), lower(plan)
    if plan.is_dense:
        return costs.dense_work(*plan.padded, tokens, training)
    runs = [work(program, plan.kept, tokens, kernels, training), costs.composed_work(plan, tokens, training)]
    if (how := joined(program)) is not None:
        runs.append(joined_work(how, plan.kept, tokens, kernels, training))
    return min(runs, key=lambda one: costs.seconds(one, ceilings))


def memory(plan: Plan, tokens: int, itemsize: int, training: bool = True, device: str = "cuda") -> int:
    """Bytes that a layer holds at most while it runs by its steps, beyond its input and weights."""
    return itemsize * peak_numbers(lower(plan), tokens, kernels_for(device, itemsize), training)


def itemsize_of(dtype: str) -> int:
    """Bytes of a number of a dtype that `structlin bench` knows."""
    found: torch.dtype = DTYPES[dtype]
    return found.itemsize
