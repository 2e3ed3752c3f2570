"""Tensor parallelism: the factors of a structured layer spread over the processes of a device mesh.

A term of a structure is an einsum, so it can be cut along any of its axes. Each process computes the slice of one axis,
the one that the most parameters have: for Monarch, BTT and block diagonal matrices the blocks of the input or output,
for low rank and BLAST the rank. What is cut decides what is communicated: slices of an axis of the output are gathered,
those of an axis that is summed over are added up. The parameters are DTensors, so that optimizers and distributed
checkpoints know them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.utils import parametrize

from .nn import StructuredLinear
from .nn.kinds import is_hooked
from .ops import backends_on
from .ops.chain import multiply
from .ops.lowering import Program, lower
from .plan import Plan, Term


@dataclass(frozen=True)
class Slice:
    """What one process computes of a term: ``program`` for a part of ``axis``, which stands at these places, if any, in
    the axes of the input and of the output."""

    term: Term
    axis: str
    program: Program
    in_sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]
    into: int | None
    out: int | None


class ShardedLinear(StructuredLinear):
    """A `StructuredLinear` whose factors are spread over the processes of a one-dimensional ``mesh``.

    Input and output are plain tensors, (*, in_features) and (*, out_features), the same in all processes, and so are
    their gradients. Factors keep their names and whole shapes; each is a DTensor, sharded along the axis that its term
    is cut along, or replicated if it does not have that axis. `matrix` and `to_dense` gather them, so that all
    processes have to call these.

    Raises:
        ValueError: where `shard_` raises.
    """

    def __init__(self, layer: StructuredLinear, mesh: DeviceMesh) -> None:
        check(layer, mesh)
        super().__init__(layer.in_features, layer.out_features, layer.spec, layer.bias is not None, device="meta")
        self.mesh = mesh
        self.slices = tuple(_slice(layer.plan, term, mesh.size()) for term in layer.plan.terms)
        for part in self.slices:
            for name, axes in zip(part.term.names, part.term.weights, strict=True):
                placement = Shard(axes.index(part.axis)) if part.axis in axes else Replicate()
                self._spread(name, layer.get_parameter(name), placement)
        if layer.bias is not None:
            self._spread("bias", layer.bias, Replicate())
        self.train(layer.training)

    def _spread(self, name: str, value: nn.Parameter, placement: Shard | Replicate) -> None:
        whole = distribute_tensor(value.detach(), self.mesh, [placement])
        self.register_parameter(name, nn.Parameter(whole, requires_grad=value.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features), the same in all processes."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"the last dimension of the input must be {self.in_features}, not that of {tuple(x.shape)}"
            )
        rows, columns = self.plan.padded
        tokens = F.pad(x.reshape(-1, self.in_features), (0, columns - self.in_features))
        whole = DTensor.from_local(tokens, self.mesh, [Replicate()], run_check=False)
        first, *others = (self._term(part, whole) for part in self.slices)
        y = sum(others, start=first)
        y = y[:, : self.out_features] if rows > self.out_features else y
        if self.bias is not None:
            y = y + _sharded(self.bias).to_local().to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _term(self, part: Slice, x: DTensor) -> Tensor:
        if part.into is None:
            mine = x.to_local(grad_placements=[Partial()])
        else:
            split = _sharded(x.view(-1, *part.in_sizes))
            mine = split.redistribute(self.mesh, [Shard(1 + part.into)]).to_local().flatten(1)
        factors = []
        for name in part.term.names:
            factor = _sharded(getattr(self, name))
            sharded = factor.placements[0].is_shard()
            factors.append(factor.to_local(grad_placements=None if sharded else [Partial()]))
        y = multiply(mine, factors, part.program, kernels="triton" in backends_on(mine.device))
        if part.out is None:
            added = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
            return added.redistribute(self.mesh, [Replicate()]).to_local()
        sizes = list(part.out_sizes)
        sizes[part.out] //= self.mesh.size()
        pieces = DTensor.from_local(y.view(-1, *sizes), self.mesh, [Shard(1 + part.out)], run_check=False)
        return pieces.redistribute(self.mesh, [Replicate()]).to_local().flatten(1)

    @torch.no_grad()
    def whole(self) -> StructuredLinear:
        """The layer as it was before, with the factors as they are now; all processes have to call it."""
        layer = StructuredLinear(self.in_features, self.out_features, self.spec, self.bias is not None, device="meta")
        state = {name: _sharded(value).full_tensor() for name, value in self.named_parameters()}
        layer.load_state_dict(state, assign=True)
        return layer.train(self.training)

    def to_dense(self) -> nn.Linear:
        """As that of `StructuredLinear`, of plain tensors; all processes have to call it."""
        return self.whole().to_dense()

    def to_dense_layer(self) -> nn.Module:
        """As `to_dense`."""
        return self.to_dense()

    def extra_repr(self) -> str:
        """As that of the layer, and the axis that each term is cut along."""
        return f"{super().extra_repr()}, cut along {', '.join(part.axis for part in self.slices)}"


def shard_(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Replace every `StructuredLinear` of ``model`` by a `ShardedLinear` over ``mesh``, in place.

    All processes of the mesh have to call it, with the same weights; those of the first are taken. Make the optimizer
    afterwards.

    Args:
        model: any module; its own root is not replaced.
        mesh: one-dimensional, as ``init_device_mesh("cuda", (2,))``.

    Returns:
        The names of the layers, all of those that have several.

    Raises:
        ValueError: one message with every layer that cannot be cut: no axis is a multiple of the size of the mesh, the
            structure looks up blocks by a table, factors are normalised, masked or shared, a guide, hooks; also for a
            mesh of more dimensions. The model is unchanged then.
    """
    modules = model.named_modules(remove_duplicate=False)
    found = {name: m for name, m in modules if name and isinstance(m, StructuredLinear)}
    if not found:
        raise ValueError("there is no structured layer to shard; see structlin.to_structured_")
    problems = []
    for name, layer in found.items():
        try:
            check(layer, mesh)
        except ValueError as problem:
            problems.append(f"{name}: {problem}")
        if is_hooked(layer):
            problems.append(f"{name}: has hooks, which would be lost; remove them first")
        others = {id(p) for m in model.modules() if m is not layer for p in m.parameters(recurse=False)}
        if shared := [own for own, p in layer.named_parameters(recurse=False) if id(p) in others]:
            problems.append(f"{name}: shares {', '.join(shared)} with another module, and would not any more; untie it")
    if problems:
        raise ValueError("cannot shard the model:\n  " + "\n  ".join(problems))
    cut = {layer: ShardedLinear(layer, mesh) for layer in dict.fromkeys(found.values())}
    for name, layer in found.items():
        model.set_submodule(name, cut[layer])
    return list(found)


def check(layer: StructuredLinear, mesh: DeviceMesh) -> None:
    """Whether ``layer`` can be cut over ``mesh``.

    Raises:
        ValueError: why it cannot, see `shard_`.
    """
    if mesh.ndim != 1:
        raise ValueError(f"a mesh of {mesh.ndim} dimensions is given; allowed: one, as mesh['tp'] of a larger one")
    if parametrize.is_parametrized(layer) or "guide" in layer._modules:
        raise ValueError("has normalised, masked or quantized factors or a guide; shard a plain layer")
    if type(layer) is not StructuredLinear:
        raise ValueError(f"is a {type(layer).__name__}; allowed: StructuredLinear itself")
    for term in layer.plan.terms:
        _slice(layer.plan, term, mesh.size())


def _slice(plan: Plan, term: Term, parts: int) -> Slice:
    if term.table is not None or term.out_table is not None:
        raise ValueError(f"{plan} looks up blocks by a table and cannot be cut")
    own = {axis: plan.sizes[axis] for axes in (term.x, term.y, *term.weights) for axis in axes}
    held = {a: sum(plan.size(axes) for axes in term.weights if a in axes) for a, n in own.items() if n % parts == 0}
    if not any(held.values()):
        sizes = ", ".join(f"{axis}={size}" for axis, size in own.items())
        raise ValueError(f"no axis of {sizes} can be cut into {parts} equal parts; give another number of processes")
    axis = max(held, key=held.__getitem__)
    local = Plan((term,), tuple((name, size // parts if name == axis else size) for name, size in own.items()))
    into, out = (axes.index(axis) if axis in axes else None for axes in (term.x, term.y))
    return Slice(term, axis, lower(local), plan.shape(term.x), plan.shape(term.y), into, out)


def _sharded(value: Tensor) -> DTensor:
    assert isinstance(value, DTensor)
    return value
