"""One update of a run: forward, backward, clipping and AdamW, over any number of devices, without waiting for any.

Nothing is read back from the device in a step, so it never idles. A gradient that is not finite sets a flag there;
from then on AdamW leaves the weights as they are, and whoever reads the flag later finds the step and the weights that
failed.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..densify import densify_
from ..guide import Guidance, guide_
from ..nn import StructuredLinear, tune, update_balance_
from ..ops.choice import MEASURED
from . import model as models
from .config import DTYPES, OptionError
from .recipe import Recipe

SEEDS = 1_000_003  # random numbers of a step follow from seed, step and rank alone, so there is no state to keep


class Engine:
    """Model and optimizer of a recipe, ready to train on this process's device.

    Attributes:
        accelerator: which knows processes and devices.
        model: the decoder, without what compilation and parallelism put around it.
        conversion: the layers that were swapped.
        optimizer: AdamW over its parameters.
        guide: of self-guided training, else None.
        backends: what compiled code runs each kind of structured layer with, where `warm_up` measured it.

    Raises:
        OptionError: for devices that are not there or do not divide the batch, and methods that need one process.
    """

    def __init__(self, recipe: Recipe, vocabulary: int, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self.device: torch.device = self.accelerator.device
        world = self.accelerator.num_processes
        if recipe.batch % world:
            raise OptionError("--batch", f"{recipe.batch} windows cannot be shared by {world} processes")
        if world > 1 and recipe.method != "scratch":
            raise OptionError("--method", f"{recipe.method} changes the model while it trains; use one process")
        rows = recipe.batch // world
        if rows > recipe.micro_batch and rows % recipe.micro_batch:
            message = f"{recipe.micro_batch} windows do not divide the {rows} of a process"
            raise OptionError("--micro-batch", message)
        self.model, self.conversion = models.build(recipe, vocabulary, self.device)
        self.guide = self._guide()
        self.wrapped, self.optimizer = self._prepared()
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.densified = False
        self.backends: dict[str, str] = {}
        self.balances = any(router.balance == "bias" for router in models.routers(self.model))
        self.restart()

    def restart(self) -> None:
        """Forget losses and failures: what `loss_sum`, `losses` and `failed` count starts anew."""
        self.loss_sum = torch.zeros((), device=self.device)
        self.losses = 0
        self.failed = torch.zeros((), device=self.device)
        self.healthy = torch.zeros((), device=self.device)  # updates before the failure

    def rows(self, windows: Tensor) -> Tensor:
        """The part of a batch that this process trains on."""
        part = len(windows) // self.accelerator.num_processes
        return windows[part * self.accelerator.process_index :][:part]

    def warm_up(self, windows: Tensor) -> None:
        """One pass without an update, so that backends are chosen and kernels compiled outside of the timed steps."""
        self._tune()
        loss = self.loss(windows[: self.recipe.micro_batch].to(self.device))
        self.accelerator.backward(loss)
        self.optimizer.zero_grad()
        loss.item()  # waits

    def update(self, windows: Tensor, step: int) -> None:
        """Update ``step``, counted from 0, on this process's ``windows``, int64 ``[rows, context + 1]``."""
        torch.manual_seed(self._seed(step))
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.recipe.rate(step)
        pieces = windows.split(self.recipe.micro_batch)
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss = self.loss(piece) * (len(piece) / len(windows))
                self.accelerator.backward(loss)
            self.loss_sum += loss.detach()
        self.losses += 1
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.balances:
            update_balance_(self.model)
        if self.guide:
            self.guide.step(self.optimizer)

    def loss(self, windows: Tensor) -> Tensor:
        """Mean loss over windows, a scalar; products in the recipe's dtype."""
        if self.recipe.compile in ("reduce-overhead", "max-autotune"):
            torch.compiler.cudagraph_mark_step_begin()
        with self.autocast():
            loss: Tensor = self.wrapped(windows)
        return loss

    def autocast(self) -> torch.autocast:
        """Where products have the recipe's dtype; weights stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.dtype == "bfloat16")

    @torch.no_grad()
    def evaluate(self, windows: Tensor) -> float:
        """Mean loss in nats per token over ``windows`` without dropout; every process gets the whole mean."""
        self.wrapped.eval()
        total, rows = torch.zeros((), dtype=torch.float64, device=self.device), self.recipe.micro_batch
        mine = range(self.accelerator.process_index, -(-len(windows) // rows), self.accelerator.num_processes)
        for index in mine:
            piece = windows[index * rows :][:rows].to(self.device)
            total += self.loss(piece).double() * len(piece)
        self.wrapped.train()
        summed: Tensor = self.accelerator.reduce(total, "sum")
        return summed.item() / len(windows)

    def densify(self) -> None:
        """The switch of reverse sparsification; done once, before the step that `switches` says."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak
        densify_(self.model, self.optimizer, self.recipe.moments, self.recipe.lr)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.densified = True

    def switches(self, step: int) -> bool:
        """Whether `densify` is due before ``step``, counted from 0."""
        at = round(self.recipe.switch * self.recipe.steps)
        return self.recipe.method == "sparsify_reverse" and not self.densified and step >= at

    def _clip(self) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.recipe.clip, norm, foreach=True)
        self.failed = torch.maximum(self.failed, (~norm.isfinite()).float())
        self.healthy += 1 - self.failed
        self.optimizer.found_inf = self.failed  # type: ignore[attr-defined]

    def _tune(self) -> None:
        """Measure the layers on devices where their first call would: compiled code measures nothing itself."""
        layers = [module for module in self.model.modules() if isinstance(module, StructuredLinear)]
        if layers and self.recipe.compile != "none" and self.device.type in MEASURED:
            rows = min(self.recipe.batch // self.accelerator.num_processes, self.recipe.micro_batch)
            found = tune(layers, rows * self.recipe.context, dtype=DTYPES[self.recipe.dtype])
            self.backends |= {kind.layer: kind.choice.graph for kind in found}

    def _guide(self) -> Guidance | None:
        if self.recipe.method != "self_guided":
            return None
        return guide_(self.model, max(1, round(self.recipe.guided * self.recipe.steps)), seed=self.recipe.seed)

    def _prepared(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """What runs the model on all processes, and the optimizer of the parameters that it has then."""
        language_model = models.LanguageModel(self.model, self.recipe.compile)
        wrapped, prepared = self.accelerator.prepare(language_model, models.optimizer(self.recipe, self.model))
        return wrapped, prepared.optimizer

    def _seed(self, step: int) -> int:
        rank: int = self.accelerator.process_index
        return ((self.recipe.seed * SEEDS + step) * SEEDS + rank) % 2**63


def accelerator_for(recipe: Recipe, folder: Path | None = None) -> Accelerator:
    """The processes and devices of a run, and its trackers, which write below ``folder``.

    Raises:
        OptionError: for a device that is not there.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device", "cuda is given and there is none; allowed: cpu, auto")
    options: dict[str, Any] = {"cpu": recipe.device == "cpu", "mixed_precision": "no"}
    if recipe.trackers:
        options |= {"log_with": list(recipe.trackers), "project_dir": folder}
    return Accelerator(**options)
