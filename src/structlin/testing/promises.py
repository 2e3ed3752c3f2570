"""The promises, each a function of ``(spec, (out_features, in_features), device)`` that raises AssertionError where it
is broken, and who has to keep which."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from .. import analysis
from ..accuracy import assert_as_accurate, assert_close
from ..nn import RoutedLinear, StructuredLinear, layer_of
from ..nn.boxcar import masks_of
from ..ops import contract, reference
from ..spec import Spec, parse
from ..structures import MoE
from .layers import Layer, Shape, inputs, make, plain

Promise = Callable[[Spec, Shape, str], None]


def _matrix(spec: Spec, shape: Shape, device: str, dtype: torch.dtype = torch.float64) -> StructuredLinear:
    layer = make(spec, shape, device, dtype)
    assert isinstance(layer, StructuredLinear)
    return layer


def is_the_matrix_it_says(spec: Spec, shape: Shape, device: str) -> None:
    """The forward pass is a product with `to_dense`, and both are what the plan says."""
    layer = _matrix(spec, shape, device)
    x = inputs(layer, 3, 7)
    assert_close(layer(x), plain(layer, x))
    assert_close(layer(x), layer.to_dense()(x))


def is_the_mixture_it_says(spec: Spec, shape: Shape, device: str) -> None:
    """Output and every gradient, the router's too, are those of all experts computed and multiplied by the gate."""
    layer = make(spec, shape, device)
    x = inputs(layer, 3, 7).requires_grad_()
    ours, wanted = layer(x), plain(layer, x)
    assert_close(ours, wanted)
    weights, dy = (x, *layer.parameters()), inputs(layer, 3, 7).new_ones(3, 7, layer.out_features).cumsum(-1)
    for a, b in zip(torch.autograd.grad(ours, weights, dy), torch.autograd.grad(wanted, weights, dy), strict=True):
        assert_close(a, b)


def takes_any_batch(spec: Spec, shape: Shape, device: str) -> None:
    """Any leading shape, no token, one, an odd number, and inputs that are not contiguous."""
    layer = make(spec, shape, device)
    for leading in ((), (0,), (1,), (13,), (2, 0, 3), (2, 3, 5)):
        x = inputs(layer, *leading)
        assert_close(layer(x), plain(layer, x))
    x = inputs(layer, 6, 5).transpose(0, 1)
    assert_close(layer(x), plain(layer, x))
    empty = inputs(layer, 0).requires_grad_()
    layer(empty).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.grad is None or parameter.grad.abs().sum() != 0:
            raise AssertionError(f"the gradient of {name} for no tokens is not zero")


def refuses_a_wrong_width(spec: Spec, shape: Shape, device: str) -> None:
    """One feature more or less, or none, is an error."""
    layer = make(spec, shape, device)
    for x in (inputs(layer, 3)[:, 1:], torch.cat([inputs(layer, 3)] * 2, -1), inputs(layer, 3)[0, 0]):
        try:
            layer(x)
        except ValueError as refusal:
            if str(layer.in_features) not in str(refusal):
                raise AssertionError("the error does not name in_features") from refusal
        else:
            raise AssertionError(f"an input of shape {tuple(x.shape)} was accepted")


def _functional(layer: Layer) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)
        return result

    return run, tuple(layer.parameters())


def has_right_gradients(spec: Spec, shape: Shape, device: str) -> None:
    """First and second derivatives in input and parameters, real and complex, with no mask rounded."""
    for dtype in (torch.float64, torch.complex128)[: 1 if isinstance(spec, MoE) else 2]:  # experts have an order
        layer = make(spec, shape, device, dtype)
        for mask in masks_of(layer):
            mask.rounding = False
        run, parameters = _functional(layer)
        x = inputs(layer, 3).requires_grad_()
        for derivatives in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            try:
                derivatives(run, (x, *parameters), fast_mode=True, nondet_tol=1e-9)  # a GPU sums in any order
            except GradcheckError as wrong:
                raise AssertionError(f"{derivatives.__name__}: {wrong}") from wrong


def works_under_transforms(spec: Spec, shape: Shape, device: str) -> None:
    """torch.func.grad, vjp, jvp and vmap, and forward-mode AD, agree with plain PyTorch."""
    layer = _matrix(spec, shape, device)
    run, parameters = _functional(layer)
    x, dx = inputs(layer, 3), inputs(layer, 3).flip(0)
    dense, bias = layer.to_dense().weight.detach(), layer.get_parameter("bias")

    def loss(parameters: tuple[Tensor, ...]) -> Tensor:
        return run(x, *parameters).square().sum()

    for ours, theirs in zip(
        torch.func.grad(loss)(parameters), torch.autograd.grad(loss(parameters), parameters), strict=True
    ):
        assert_close(ours, theirs)
    y, dy = torch.func.jvp(lambda x: run(x, *parameters), (x,), (dx,))  # type: ignore[misc]
    assert_close(y, x @ dense.T + bias)
    assert_close(dy, dx @ dense.T)
    assert_close(torch.func.vjp(lambda x: run(x, *parameters), x)[1](y)[0], y @ dense)
    assert_close(torch.vmap(lambda row: run(row, *parameters))(x), x @ dense.T + bias)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, dx)
        assert_close(torch.autograd.forward_ad.unpack_dual(run(dual, *parameters)).tangent, dx @ dense.T)


def costs_what_it_says(spec: Spec, shape: Shape, device: str) -> None:
    """Parameters (but for those of masks) and FLOPs are those that PyTorch counts; of a mixture, the active ones."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton where that is installed

    layer, tokens = make(spec, shape, device, bias=False), 7
    costs = analysis.num_params(layer.plan), analysis.flops(layer.plan)
    params, flops = layer.spec.costs(*shape) if isinstance(layer, RoutedLinear) else costs
    x, said = inputs(layer, tokens), tokens * flops
    for run in (lambda: layer(x), lambda: plain(layer, x))[: 1 if isinstance(layer, RoutedLinear) else 2]:
        with FlopCounterMode(display=False) as counted:
            run()
        found = counted.get_total_flops()
        padded = isinstance(layer, RoutedLinear) and device != "cpu"  # the rows of an expert, to whole blocks there
        if found < said or (found > said and not padded):
            raise AssertionError(f"{found} FLOPs counted, {said} said")
    placed = sum(p.numel() for mask in masks_of(layer) for p in mask.parameters())
    if sum(p.numel() for p in layer.parameters()) != params + placed:
        raise AssertionError("num_params is not the number of elements")


def has_the_rank_it_says(spec: Spec, shape: Shape, device: str) -> None:
    """Random factors reach the rank bound; those of a padded matrix do not exceed it."""
    layer = _matrix(spec, shape, device)
    rank, bound = torch.linalg.matrix_rank(layer.to_dense().weight).item(), analysis.rank_bound(layer.plan)
    if rank > bound or (rank < bound and layer.plan.kept is None):
        raise AssertionError(f"rank {rank}, rank_bound says {bound}")


def starts_at_spectral_scale(spec: Spec, shape: Shape, device: str) -> None:
    """Every factor's standard deviation is the spectral one, measured on a layer eight times as wide where it fits."""
    out_features, in_features = shape
    try:
        plan = spec.plan(64 * out_features, 64 * in_features)
    except ValueError:
        return
    layer = _matrix(spec, (64 * out_features, 64 * in_features), device)
    for name in plan.factors:
        fan_in, fan_out = analysis.fan(plan, name)
        wanted = (min(1, fan_out / fan_in) / fan_in / len(plan.terms)) ** 0.5
        factor = layer.stored(name)
        slack = 4 / factor.numel() ** 0.5  # four standard errors of a standard deviation, and more
        if not abs(factor.std().item() / wanted - 1) < slack:
            raise AssertionError(f"{name} has standard deviation {factor.std().item():.3g}, not {wanted:.3g}")


def survives_json(spec: Spec, shape: Shape, device: str) -> None:
    """Through JSON, and through the text of the command line."""
    if Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) != spec or parse(str(spec)) != spec:
        raise AssertionError(f"{spec!r} does not survive")


def compiles_whole(spec: Spec, shape: Shape, device: str) -> None:
    """torch.compile(fullgraph=True) gives the same output and gradients."""
    layer = make(spec, shape, device)
    x = inputs(layer, 5).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
    found = torch.autograd.grad(compiled(x).square().sum(), (x, *layer.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)


def exports(spec: Spec, shape: Shape, device: str) -> None:
    """torch.export gives a program of plain PyTorch operations, for any number of tokens."""
    layer = make(spec, shape, device)
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(layer, (inputs(layer, 5),), dynamic_shapes={"input": {0: tokens}})
    own = [str(node.target) for node in program.graph.nodes if "structlin" in str(node.target)]
    if own:
        raise AssertionError(f"the exported program calls {own}")
    x = inputs(layer, 9)
    assert_close(program.module()(x), layer(x))


def keeps_its_state(spec: Spec, shape: Shape, device: str) -> None:
    """state_dict through a layer on the meta device, deepcopy, and reset_parameters over all of the memory."""
    layer = make(spec, shape, device)
    x = inputs(layer, 5)
    other = layer_of(spec, shape[1], shape[0], device="meta", dtype=torch.float64)
    other.load_state_dict(layer.state_dict(), assign=True)
    if isinstance(other, StructuredLinear) and isinstance(layer, StructuredLinear):
        other.backend = layer.backend
    assert_close(other(x), layer(x), 0)
    assert_close(copy.deepcopy(layer)(x), layer(x), 0)
    for name, parameter in layer.named_parameters():
        if not parameter.is_contiguous() or parameter.dim() < 1:
            raise AssertionError(f"{name} is not a contiguous tensor of one or more dimensions")
        nn.init.constant_(parameter, float("nan"))
    layer.reset_parameters()
    if not all(torch.isfinite(parameter).all() for parameter in layer.parameters()):
        raise AssertionError("reset_parameters leaves memory as it was")


def is_accurate(spec: Spec, shape: Shape, device: str) -> None:
    """Outputs and gradients in half, single and double precision lose at most twice what plain PyTorch loses."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        layer = make(spec, shape, device, dtype)
        exact = make(spec, shape, device)
        exact.load_state_dict(layer.state_dict())
        x = inputs(layer, 33)
        dy = torch.randn(33, layer.out_features).to(x)

        def run(f: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
            x = x.detach().requires_grad_()
            y = f(x)
            return [y, *torch.autograd.grad(y, (x, *weights), dy)]

        weights = list(layer.parameters())
        ours, theirs = run(layer, x, dy, weights), run(lambda x, layer=layer: plain(layer, x), x, dy, weights)  # type: ignore[misc]
        truth = run(lambda x, exact=exact: plain(exact, x), x.double(), dy.double(), list(exact.parameters()))  # type: ignore[misc]
        for a, b, c in zip(ours, theirs, truth, strict=True):
            assert_as_accurate(a, b, c)


def casts_as_linear_does(spec: Spec, shape: Shape, device: str) -> None:
    """Under autocast the output has nn.Linear's dtype, float64 included, and parameters get gradients of their own."""
    for dtype in (torch.float32, torch.float64):
        layer, linear = make(spec, shape, device, dtype), nn.Linear(shape[1], shape[0], dtype=dtype, device=device)
        x = inputs(layer, 5)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            y, wanted = layer(x), linear(x)
        if y.dtype != wanted.dtype:
            raise AssertionError(f"{y.dtype} under autocast, nn.Linear gives {wanted.dtype}")
        assert_close(y, layer(x), 0.05)
        y.sum().backward()
        if any(p.grad is None or p.grad.dtype != dtype for p in layer.parameters()):
            raise AssertionError("a parameter has no gradient of its own dtype")


def passes_opcheck(spec: Spec, shape: Shape, device: str) -> None:
    """PyTorch's own checks of a custom op, on every contraction of the plan."""
    layer = _matrix(spec, shape, device)
    for name, (_, step) in layer.plan.factors.items():
        z = torch.randn(3, *layer.plan.shape(step.x), dtype=torch.float64, device=device).requires_grad_()
        w = layer.stored(name)
        torch.library.opcheck(torch.ops.structlin.contract.default, (z, w, step.equation))
        assert_close(contract(z, w, step.equation), reference.contract(z, w, step.equation))


CONTRACT: tuple[Promise, ...] = (
    is_the_matrix_it_says,
    takes_any_batch,
    refuses_a_wrong_width,
    has_right_gradients,
    works_under_transforms,
    costs_what_it_says,
    has_the_rank_it_says,
    starts_at_spectral_scale,
    survives_json,
    compiles_whole,
    exports,
    keeps_its_state,
    is_accurate,
    casts_as_linear_does,
    passes_opcheck,
)


MIXTURE_CONTRACT: tuple[Promise, ...] = (
    is_the_mixture_it_says,
    takes_any_batch,
    refuses_a_wrong_width,
    has_right_gradients,
    costs_what_it_says,
    survives_json,
    compiles_whole,
    exports,
    keeps_its_state,
    is_accurate,
    casts_as_linear_does,
)
"""What a mixture of experts promises: all that is not about one matrix, without torch.func and forward-mode AD."""


def check(spec: Spec, shape: Shape, device: str = "cpu") -> None:
    """Hold one spec at one (out_features, in_features) to the whole contract.

    Raises:
        AssertionError: naming the first promise that it breaks.
    """
    for promise in MIXTURE_CONTRACT if isinstance(spec, MoE) else CONTRACT:
        try:
            promise(spec, shape, device)
        except Exception as broken:
            what = str(broken) if isinstance(broken, AssertionError) else repr(broken)
            raise AssertionError(f"{spec} at {shape[0]}x{shape[1]}: {promise.__name__}: {what}") from broken
