"""One module for all structures: a drop-in ``nn.Linear`` whose weight is a sum of einsum chains."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import analysis
from ..ops import BACKENDS, backends_on, choice, compose, dense, joined, multiply
from ..ops.chain import check_dtype
from ..ops.contract import autocast, autocast_dtype, seen_through
from ..ops.lowering import Program, literal, lower
from ..padding import described
from ..plan import Plan
from ..spec import Spec
from . import init as initialisation
from .boxcar import BoxcarMask, masks_of
from .boxcar_projection import project_blocks
from .nested import by_values
from .projection import check, project


class StructuredLinear(nn.Module):
    """``y = x W^T + bias`` with ``W`` of the structure ``spec``; a drop-in for ``torch.nn.Linear``.

    >>> layer = StructuredLinear(64, 128, Monarch(nblocks=4))
    >>> layer(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 128])

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        spec: the structure and its hyperparameters.
        bias: whether to add a learnable bias of shape (out_features,), zero at first (but for init="reference").
        device: of the parameters; "meta" allocates nothing.
        dtype: of the parameters, any float or complex type.
        backend: what runs the layer, one of `structlin.ops.BACKENDS`, described in docs/backends.md; "auto" follows
            the environment variable STRUCTLIN_BACKEND where that is set, and else takes what is fastest. May be set at
            any time: ``layer.backend = "copy"``.
        init: how `reset_parameters` draws the factors: "spectral", "variance_matched", "reference" or "orthogonal",
            see `structlin.nn.init`.
        zero_last: whether the last factor of each term and the bias start at zero, for the output of a residual branch.
        recompute: whether the backward pass computes the layer's intermediates again instead of keeping them, which
            saves memory and costs about a sixth more time. Under ``torch.compile`` a norm, an activation or a cast
            before the layer is computed again too. May be set at any time. Backends "bmm", "triton" and "joined",
            also where "auto" takes them.

    Shape: input (*, in_features), output (*, out_features), with any number of leading dimensions of any size.

    The factors are parameters named as the plan names them, contiguous, stored with the axes of its equation. One that
    the structure masks is parametrized: the attribute is the masked factor, `stored` the parameter behind it.

    Raises:
        ValueError: when the shape does not fit the structure, or an input the layer, or the backend the device.
    """

    spec: Spec
    plan: Plan
    bias: nn.Parameter | None
    stands_for: ClassVar[type[nn.Module]] = nn.Linear
    spatial: ClassVar[int] = 0  # dimensions of the input after its features

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: Spec,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        init: str = "spectral",
        zero_last: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"a layer of {out_features}x{in_features} features has no weight; widths start at 1")
        if not isinstance(spec, Spec):
            raise ValueError(f"{spec!r} is no spec; give one, as Monarch(nblocks=4)")
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.init, self.zero_last, self.recompute = initialisation.check(init), zero_last, recompute
        self.plan = spec.plan(out_features, in_features)
        self._padding = self.plan.padded[0] - out_features, self.plan.padded[1] - in_features
        for name, shape in self.plan.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        for name, boxcar in spec.masks(self.plan).items():
            mask = BoxcarMask(boxcar, self.plan.shapes[name][boxcar.feature], device, dtype)
            parametrize.register_parametrization(self, name, mask, unsafe=True)  # it keeps shape and dtype
        self._dense = next(iter(self.plan.factors)) if self.plan.is_dense else None
        self.backend = os.environ.get("STRUCTLIN_BACKEND", backend) if backend == "auto" else backend
        self.reset_parameters()

    @property
    def backend(self) -> str:
        """What runs the layer: one of `structlin.ops.BACKENDS`."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend={name!r} is unknown; allowed: {', '.join(BACKENDS)}")
        self._backend = name
        self._weight: tuple[tuple[object, list[Tensor]], Tensor] | None = None
        # worked out once: forward only replays shapes and strings, so that torch.compile sees a flat graph
        self._step_backend = "bmm" if name in ("auto", "dense", "triton", "joined") else name
        self._program: Program = lower(self.plan) if self._step_backend == "bmm" else literal(self.plan)
        self._joined = joined.joined(self._program)
        self._runs = choice.name(self._program, self.plan.kept)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every factor anew, as ``init`` and ``zero_last`` say."""
        draws: dict[str, initialisation.Draw] = initialisation.draws(self.spec, self.plan, self.init)
        if self.zero_last:
            draws |= dict.fromkeys(("bias", *(term.names[-1] for term in self.plan.terms)), initialisation.ZERO)
        for name in self.plan.factors:
            drawn = initialisation.fill_(self.stored(name), draws[name], self.plan, name)
            if parametrize.is_parametrized(self, name):
                self._put(name, drawn.clone())
        for mask in masks_of(self):
            mask.reset_parameters()
        if self.bias is not None:
            initialisation.fill_(self.bias, draws.get("bias", initialisation.ZERO), self.plan, "bias")

    @torch.no_grad()
    def project_(self, weight: Tensor, inputs: Tensor | None = None) -> Self:
        """Take the factors nearest to ``weight`` (out_features, in_features), in place; the bias stays.

        As `project`; where the structure has trained masks, blocks are found and the edges of the masks become hard.

        Raises:
            ValueError: as `project`, for a weight of more dimensions, and for inputs or a sum where there are masks.
                The layer is unchanged then.
        """
        masks = self.spec.masks(self.plan)
        if weight.dim() != 2:
            raise ValueError(f"a layer takes one weight (out_features, in_features), not {tuple(weight.shape)}")
        check(self.plan, weight, masks)
        if masks and inputs is not None:
            raise ValueError(f"{self.spec} has trained masks and cannot be fitted to inputs; project without inputs")
        if not masks:
            for name, value in project(self.plan, weight, inputs).items():
                self._put(name, value)
            return self
        for name, (value, widths, locations) in project_blocks(self.plan, masks, weight).items():
            self.stored(name).copy_(value)
            mask = self.get_submodule(f"parametrizations.{name}.0")
            assert isinstance(mask, BoxcarMask)
            mask.widths.copy_(widths)
            mask.locations.copy_(locations)
            mask.sigma.fill_(torch.inf)
        return self

    def _put(self, name: str, value: Tensor) -> None:
        """Make ``value`` that of a factor; under a mask, that of what is masked."""
        if parametrize.is_parametrized(self, name) and name not in self.spec.masks(self.plan):
            setattr(self, name, value)
        else:
            self.stored(name).copy_(value)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_weight": None}  # copies make their own

    def stored(self, name: str) -> nn.Parameter:
        """The parameter that holds the factor ``name``, before any parametrization of it."""
        if parametrize.is_parametrized(self, name):
            return self.get_parameter(f"parametrizations.{name}.original")
        return self.get_parameter(name)

    def forward(self, input: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features); a nested tensor (batch, lengths, in_features) to one."""
        x = input
        if x.is_nested:
            return by_values(self, x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"the last dimension of the input must be in_features={self.in_features}, not that of {tuple(x.shape)}"
            )
        backend = self._choose(x) if self._dense is None else ""
        if self._dense is not None:
            y = F.linear(x, getattr(self, self._dense), self.bias)
        elif backend == "dense":
            weight = self._dense_weight()
            check_dtype(autocast_dtype(x), autocast_dtype(weight))
            y = F.linear(x, weight, self.bias)
        else:
            y = self._multiply(x, self._factors(), backend)
        guide = self._modules.get("guide")
        return y if guide is None else guide(x, y, self.bias)

    def _choose(self, x: Tensor) -> str:
        """The backend for this input; never "auto"."""
        if self._backend == "auto":
            # without gradients a layer in training is run as with them: activation checkpoints do both
            training = self.training or (
                torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
            )
            return choice.choose(self._runs, x, training)
        if self._backend == "triton" and "triton" not in (allowed := backends_on(x.device)):
            raise ValueError(
                f"backend='triton' runs on GPUs, with the package triton installed, and the input is on "
                f"{x.device}; allowed there: {', '.join(allowed)}"
            )
        return self._backend

    def _factors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.plan.factors]

    def _multiply(self, x: Tensor, factors: list[Tensor], backend: str) -> Tensor:
        """(*, in_features) -> (*, out_features), by a backend that does not multiply out the weight."""
        if self._padding[1]:
            x = F.pad(x, (0, self._padding[1]))
        bias = None if self._padding[0] else self.bias
        if backend == "joined" and self._joined is not None:
            y = joined.multiply(x, factors, self._joined, not self.recompute, bias)
        elif self._step_backend == "bmm":
            y = multiply(x, factors, self._program, not self.recompute, backend in ("triton", "joined"), bias)
        else:
            y = compose(x, factors, self._program, self._step_backend, bias)
        if not self._padding[0]:
            return y
        y = y[..., : self.out_features]
        # contiguous, as that of nn.Linear is
        return y.contiguous() if self.bias is None else (y + self.bias.to(y.dtype)).contiguous()

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; forgets the weight that the dense backend keeps."""
        self._weight = None
        return super().train(mode)

    def _materialize(self, factors: list[Tensor]) -> Tensor:
        kind = factors[0].device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return dense.weight(self.plan, factors)
        with torch.autocast(kind, enabled=False):  # in the dtype of the factors as they are given
            return dense.weight(self.plan, factors)

    def _narrow(self) -> Tensor:
        """The weight multiplied out of factors in the dtype that autocast gives those of a chain."""
        return self._materialize([autocast(factor) for factor in self._factors()])

    def _dense_weight(self) -> Tensor:
        """The whole weight, (out_features, in_features): kept in inference until a factor changes, else computed.

        A change behind PyTorch's back (``factor.data.copy_(...)``) is not seen; `train` and ``eval`` forget the weight.
        So backend "auto", which nobody asked to keep one, keeps it after ``eval`` only, and uses none in a CUDA graph.
        """
        stored = [*self.parameters(), *self.buffers()]  # a parametrized factor is a new tensor every time
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or any(f.is_inference() for f in stored):
            return self._narrow()
        if seen_through():
            return self._narrow()  # what a transform wraps lies nowhere
        captured = choice.capturing(stored[0].device)
        if self._backend == "auto" and (self.training or captured):
            return self._narrow()
        key = [(f.data_ptr(), f._version, f.dtype, f.device, autocast_dtype(f)) for f in stored]
        if self._weight is None or self._weight[0][0] != key:
            if captured:
                return self._narrow()  # it is not there before the graph is replayed
            # with what it was made of: at the address of a tensor that is gone there may be another one
            self._weight = (key, [f.detach() for f in stored]), autocast(self._materialize(self._factors()))
        return self._weight[1]

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """What this layer does to the identity, guide included: (out_features, in_features), without the bias.

        On the device of the factors, in their dtype or, where that is half precision, in float32.
        """
        factors = self._factors()
        guide: Any = self._modules.get("guide")
        wide = torch.promote_types(factors[0].dtype, torch.float32)
        weight = self._materialize([factor.to(wide) for factor in factors])
        return weight if guide is None else guide.mixed(weight)

    def to_dense(self) -> nn.Linear:
        """The ``nn.Linear`` that computes the same function, guide included, on the same device and in the same dtype.

        Its weight is `matrix`, rounded once where the layer is of half precision.
        """
        factor = self._factors()[0]
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=factor.dtype)
        self._fill(dense, self.matrix())
        return dense.train(self.training)

    def to_dense_layer(self) -> nn.Module:
        """As `to_dense`, but the kind of layer that this one ``stands_for``; what `to_dense_` puts in its place."""
        dense = self._dense_like(self._factors()[0].dtype)
        self._fill(dense, self.as_weight(self.matrix()))
        return dense.train(self.training)

    def _dense_like(self, dtype: torch.dtype) -> nn.Module:
        """A layer of the kind that this one stands for, on the meta device."""
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)

    @torch.no_grad()
    def _fill(self, dense: nn.Module, weight: Tensor) -> None:
        """Give ``dense``, which is on the meta device, ``weight`` and this layer's bias."""
        dense.to_empty(device=weight.device)  # nothing is drawn, so the random state stays as it is
        for name, parameter in dense.named_parameters():
            value = weight if name == "weight" else self.bias
            assert value is not None
            parameter.copy_(value)
        trained = [p.requires_grad for name, p in self.named_parameters() if name != "bias"]
        dense.get_parameter("weight").requires_grad_(any(trained))
        if self.bias is not None:
            dense.get_parameter("bias").requires_grad_(self.bias.requires_grad)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether a ``module`` of the class that this one stands for is a linear layer."""
        return True

    @classmethod
    def shape_of(cls, module: nn.Module) -> tuple[int, int]:
        """Rows and columns of the matrix of ``module``, (out_features, in_features)."""
        assert isinstance(module, nn.Linear)
        return module.out_features, module.in_features

    @classmethod
    def as_matrix(cls, weight: Tensor) -> Tensor:
        """The weight of what this stands for as a matrix (out_features, in_features)."""
        return weight

    @classmethod
    def as_weight(cls, matrix: Tensor) -> Tensor:
        """A matrix (out_features, in_features) as the weight of what this stands for."""
        return matrix

    def extra_repr(self) -> str:
        params, compute = analysis.num_params(self.plan), analysis.compute(self.plan)
        drawn = f", init={self.init!r}" * (self.init != "spectral") + ", zero_last=True" * self.zero_last
        drawn += ", recompute=True" * self.recompute
        padding = f", padded {padded}" if (padded := described(self.plan)) else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, spec={self.spec!r}, "
            f"bias={self.bias is not None}{drawn}, params={params:,}, compute={compute:.1%}{padding}"
        )
