"""How much a layer loses by a structure: what is minimised when structures are allocated.

Three scores, each of one layer changed alone. "projection": the share of the weight, or of its outputs on typical
inputs, that the nearest structured matrix misses, squared. "fisher": what that does to the outputs of the model, to
second order, by the diagonal of the Fisher matrix over the layer's outputs. "ntk": how far the model's neural tangent
kernel moves, the criterion of Dao et al. 2022 for pixelfly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from ..calibration import given_to
from ..nn import StructuredLinear
from ..nn.kinds import StructuredConv, kind_of
from ..spec import Spec
from ..surgery import fit_

SCORES = ("projection", "fisher", "ntk")
"""What `structlin.advise.advise` minimises."""

PROBES = 4  # random directions of the outputs for each batch


class Seen(NamedTuple):
    """What a layer was given on some data, (tokens, in_features), and the mean square of the gradients of the model's
    outputs with respect to each of its own, (tokens, out_features)."""

    inputs: Tensor
    sensitivity: Tensor


def call(model: nn.Module, batch: Any) -> Any:
    """``model`` on a batch: keyword arguments if a dict, positional ones if a tuple, else the one argument."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def probe(output: Any, generator: torch.Generator) -> Tensor:
    """A random scalar of a model's output whose squared gradient is, on average, what the Fisher matrix holds.

    Of logits, the log-likelihood of tokens drawn from them; of other outputs (the first tensor), the product with
    Gaussian noise, which stands for their squared error.
    """
    logits = getattr(output, "logits", None)
    if logits is not None:
        flat = logits.flatten(0, -2).float().log_softmax(-1)
        drawn = torch.multinomial(flat.detach().exp().cpu(), 1, generator=generator)
        likelihood: Tensor = flat.gather(1, drawn.to(flat.device)).sum()
        return likelihood
    tensor = output if isinstance(output, Tensor) else output[0]
    noisy: Tensor = (tensor * torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor)).sum()
    return noisy


def watch(model: nn.Module, names: Sequence[str], batches: Iterable[Any], seed: int = 0) -> dict[str, Seen]:
    """Run ``model`` forward and backward over ``batches`` in evaluation mode and keep what the named layers see.

    Raises:
        ValueError: for a layer that no batch reaches.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    squares: dict[str, list[Tensor]] = {name: [] for name in names}
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        inputs[name].append(_rows(module, x.detach()))
        outputs[name].append(output)

    modules = dict(model.named_modules(remove_duplicate=False))
    hooks = [
        modules[name].register_forward_hook(
            lambda module, given, named, output, name=name: keep(name, module, given_to(given, named), output),
            with_kwargs=True,
        )
        for name in names
    ]
    try:
        with _evaluating(model), torch.enable_grad():
            for batch in batches:
                result = call(model, batch)
                pairs = [(name, output) for name, found in outputs.items() for output in found]
                totals = [torch.zeros_like(output) for _, output in pairs]
                for _ in range(PROBES):
                    scalar = probe(result, generator)
                    found = torch.autograd.grad(scalar, [o for _, o in pairs], retain_graph=True, allow_unused=True)
                    totals = [t if g is None else t + g.square() for t, g in zip(totals, found, strict=True)]
                for (name, _), total in zip(pairs, totals, strict=True):
                    squares[name].append(_rows(modules[name], total / PROBES))
                for kept in outputs.values():
                    kept.clear()
    finally:
        for hook in hooks:
            hook.remove()
    if silent := [name for name, rows in inputs.items() if not rows]:
        raise ValueError(f"{', '.join(silent)}: no batch reaches it; give batches that do, or leave the layer out")
    return {name: Seen(torch.cat(inputs[name]), torch.cat(squares[name])) for name in names}


@torch.no_grad()
def projected(dense: nn.Module, spec: Spec, inputs: Tensor | None) -> tuple[StructuredLinear, float]:
    """The layer nearest to ``dense``, and the share of it that it misses, as `structlin.conversion.Swap` has it."""
    kind = kind_of(dense)
    assert kind is not None
    (rows, columns), weight = kind.shape_of(dense), dense.get_parameter("weight")
    bias = dense._parameters.get("bias")
    layer = kind(columns, rows, spec, bias is not None, weight.device, weight.dtype)
    error = fit_(layer, kind.as_matrix(weight), inputs)
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)
    return layer, error


@torch.no_grad()
def fisher(dense: nn.Module, layer: StructuredLinear, seen: Seen) -> float:
    """``mean_t sum_o s_to ((W - S) x_t)_o^2`` for sensitivities ``s``: the change of the model's outputs."""
    kind = kind_of(dense)
    assert kind is not None
    change = kind.as_matrix(dense.get_parameter("weight")) - layer.matrix()
    moved = seen.inputs.to(change.dtype) @ change.T
    return float((seen.sensitivity.to(change.dtype) * moved.square()).sum(1).mean())


def tangent_kernel(model: nn.Module, names: Sequence[str], batch: Any, seed: int = 0) -> Tensor:
    """(examples, examples): products of the gradients of each example's output with respect to the named layers.

    The output of an example is a fixed random combination of all its numbers, so this is one sample of the empirical
    neural tangent kernel (Jacot et al. 2018).

    Args:
        model: any module.
        names: layers whose parameters count.
        batch: as for `call`; the first dimension of every tensor in it is that of the examples.
        seed: of the combination.
    """
    chosen = {key: p.detach() for key, p in model.named_parameters() if key.rpartition(".")[0] in _inside(model, names)}

    def output(parameters: dict[str, Tensor], example: Any) -> Tensor:
        given = (example,) if isinstance(example, Tensor) else example
        kwargs = given if isinstance(given, dict) else {}
        result = functional_call(model, parameters, () if kwargs else given, kwargs)
        tensor = result if isinstance(result, Tensor) else result[0]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor)
        scalar: Tensor = (tensor * noise).sum() / tensor.numel() ** 0.5
        return scalar

    with _evaluating(model):
        found = [grad(output)(chosen, example) for example in _examples(batch)]
    rows = [torch.stack([one[key].detach().flatten() for one in found]) for key in chosen]
    grams = [matrix @ matrix.T for matrix in rows]
    return torch.stack(grams).sum(0)


def kernel_distance(kernel: Tensor, reference: Tensor) -> float:
    """``|K - R| / |R|`` in the Frobenius norm."""
    return float((kernel - reference).norm() / reference.norm())


@contextmanager
def in_place_of(model: nn.Module, name: str, layer: nn.Module) -> Iterator[None]:
    """``layer`` under ``name`` for as long as the block runs."""
    before = model.get_submodule(name)
    model.set_submodule(name, layer)
    try:
        yield
    finally:
        model.set_submodule(name, before)


def _inside(model: nn.Module, names: Sequence[str]) -> set[str]:
    """The named layers and the modules in them, as parametrizations."""
    return {name for name, _ in model.named_modules() for own in names if name == own or name.startswith(f"{own}.")}


def _examples(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Tensor):
        yield from (batch[i : i + 1] for i in range(len(batch)))
    elif isinstance(batch, dict):
        for parts in zip(*(_examples(value) for value in batch.values()), strict=True):
            yield dict(zip(batch, parts, strict=True))
    else:
        yield from zip(*(_examples(value) for value in batch), strict=True)


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    kind = kind_of(module)
    if kind is not None and issubclass(kind, StructuredConv):
        x = x.movedim(-1 - kind.spatial, -1)
    return x.reshape(-1, x.shape[-1]).clone()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
