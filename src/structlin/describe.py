"""One structure at one shape, in words and as a picture: all that its plan implies, before anything is built."""

from __future__ import annotations

import io
from collections.abc import Sequence
from textwrap import wrap

import torch

from . import analysis
from .nn import StructuredLinear
from .nn.explain import padding_copies
from .ops.lowering import lower
from .padding import described
from .plan import Plan
from .spec import Spec
from .structures import MoE

ITEMSIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number, by the names of dtypes."""

READABLE = 512  # widths whose entries can still be told apart in a picture
LARGEST = 4096  # widths up to which a matrix is drawn all the same where nothing smaller fits


def describe(spec: Spec, out_features: int, in_features: int, tokens: int = 1024, dtype: str = "bfloat16") -> str:
    """What a matrix of this structure is, what it costs and what runs, as a text of several lines.

    Args:
        spec: the structure, or a mixture of experts.
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        tokens: rows of the input, for the bytes that a forward pass moves.
        dtype: of inputs and weights, one of `ITEMSIZES`, for the same.

    Raises:
        ValueError: when the shape does not fit the structure, or for fewer than one token, or an unknown dtype.
    """
    if isinstance(spec, MoE):
        return _mixture(spec, out_features, in_features, tokens, dtype)
    if min(out_features, in_features) < 1:
        raise ValueError(f"a matrix of {out_features}x{in_features} has no weight; widths start at 1")
    if tokens < 1:
        raise ValueError(f"tokens={tokens} is given; allowed: 1 or more")
    if dtype not in ITEMSIZES:
        raise ValueError(f"dtype={dtype!r} is unknown; allowed: {', '.join(ITEMSIZES)}")
    plan = spec.plan(out_features, in_features)
    rows = [
        *_labelled("padding", [text] if (text := described(plan)) else []),
        *_labelled("equation", str(plan).split("  +  ")),
        *_labelled("masks", _masks(spec, plan)),
        *_costs(plan, tokens, dtype),
        *_labelled("runs", _runs(plan)),
    ]
    width = max(len(label) for label, _ in rows)
    lines = [f"{label.ljust(width)}  {value}" for label, value in rows]
    return "\n".join([f"{spec} at {out_features}x{in_features}", "", *lines, "", *_factors(plan)])


def picture(spec: Spec, out_features: int, in_features: int) -> bytes:
    """The magnitudes of a random matrix of this structure, as a PNG, with its equation and factors.

    Blank entries are those that are always zero. Wide matrices are drawn with widths halved until they are at most
    512, as far as the structure has such a member. Needs matplotlib.

    Raises:
        ValueError: when the shape does not fit the structure, or only fits where it is too large to draw.
    """
    from matplotlib import colormaps, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plan = spec.plan(out_features, in_features)
    rows, columns = _drawable(spec, out_features, in_features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight = StructuredLinear(columns, rows, spec, bias=False).to_dense().weight.detach()
    size = weight.abs() / weight.abs().max()
    shades = colormaps["viridis"].with_extremes(bad="white")
    title = wrap(f"{spec} at {out_features}x{in_features}", 56)
    notes = [line for term in str(plan).split("  +  ") for line in wrap(term, 110)]
    notes += [f"{name} {'x'.join(map(str, shape))}" for name, shape in plan.shapes.items()]
    if (rows, columns) != (out_features, in_features):
        notes.append(f"drawn at {rows}x{columns}")
    height = 1.2 + 0.2 * len(title) + 0.18 * len(notes) + 5 * min(2.0, max(0.4, rows / columns))
    with rc_context({"font.size": 9, "figure.dpi": 150}):
        figure = Figure(figsize=(6, height))
        FigureCanvasAgg(figure)
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        # nearest: averaging neighbours would show entries that are zero as small ones
        axes.imshow(size.where(size > 0, torch.nan).numpy(), cmap=shades, vmin=0, interpolation="nearest")
        axes.set(xlabel="input feature", ylabel="output feature")
        axes.set_title("\n".join(title), loc="left", fontweight="bold")
        figure.supxlabel("\n".join(notes), fontsize=7, ha="left", x=0.02)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _drawable(spec: Spec, out_features: int, in_features: int) -> tuple[int, int]:
    """The largest shape of readable widths that halving gives and the structure has, else the smallest it has."""
    fitting, rows, columns = (out_features, in_features), out_features, in_features
    while max(rows, columns) > READABLE and rows % 2 == columns % 2 == 0:
        rows, columns = rows // 2, columns // 2
        try:
            spec.plan(rows, columns)
        except ValueError:
            continue
        fitting = rows, columns
    if max(fitting) > LARGEST:
        raise ValueError(
            f"{spec} at {out_features}x{in_features} is too large to draw, and so is {fitting[0]}x{fitting[1]}, the "
            f"smallest that halving gives; widths may be up to {LARGEST}"
        )
    return fitting


def _mixture(spec: MoE, rows: int, columns: int, tokens: int, dtype: str) -> str:
    """A mixture as a whole, and then one of its experts, for the tokens that visit it where the load is even."""
    each = max(1, tokens * spec.top_k // spec.experts) if tokens >= 1 else tokens
    expert = describe(spec.expert, rows, columns, each, dtype)
    (params, flops), size = spec.costs(rows, columns), rows * columns
    lines = [
        f"{spec} at {rows}x{columns}",
        "",
        f"experts  {spec.experts}, of which {spec.top_k} for each token",
        f"params   {params:,} ({params / size:.2%} of dense), the router with them",
        f"FLOPs    {flops:,} per token forward ({flops / (2 * size):.2%} of dense), those of the experts visited",
        "",
        "Each expert:",
    ]
    return "\n".join([*lines, expert])


def _labelled(label: str, values: Sequence[str]) -> list[tuple[str, str]]:
    return [(label if i == 0 else "", value) for i, value in enumerate(values)]


def _masks(spec: Spec, plan: Plan) -> list[str]:
    """What masks a factor, where something does; the costs of the plan are those of all features."""
    return [
        f"{name}: {len(mask.widths):,} trained intervals of {plan.shapes[name][mask.feature]:,} features, "
        f"{sum(mask.widths) / len(mask.widths):.0%} wide at first in the mean; costs below are without them"
        for name, mask in spec.masks(plan).items()
    ]


def _costs(plan: Plan, tokens: int, dtype: str) -> list[tuple[str, str]]:
    rows, columns, itemsize = plan.out_features, plan.in_features, ITEMSIZES[dtype]
    params, flops = analysis.num_params(plan), analysis.flops(plan)
    unfused, fused = analysis.traffic(plan, tokens, itemsize), analysis.fused_traffic(plan, tokens, itemsize)
    dense = itemsize * (tokens * (rows + columns) + rows * columns)
    saved = analysis.saved_activations(plan)
    omega, psi, nu = analysis.taxonomy(plan)
    return [
        ("params", f"{params:,} ({params / (rows * columns):.2%} of dense)"),
        ("FLOPs", f"{flops:,} per token forward ({flops / (2 * rows * columns):.2%} of dense)"),
        *_labelled(
            f"bytes, {tokens:,} tokens",
            [
                f"{unfused:,} forward, every step for itself ({unfused / dense:.2%} of dense)",
                f"{fused:,} with all steps in one kernel ({fused / dense:.2%} of dense), in {dtype}",
            ],
        ),
        ("saved", f"{saved:,} elements per token for the backward pass ({saved / columns:.2%} of dense)"),
        ("rank", f"{analysis.rank_bound(plan):,} of {min(rows, columns):,} at most"),
        ("density", f"{analysis.density(plan):.2%} of the entries can be other than zero"),
        ("taxonomy", f"omega {omega:.2f}, psi {psi:.2f}, nu {nu:.2f}"),
    ]


def _runs(plan: Plan) -> list[str]:
    """The products and relayouts of the forward pass, in order."""
    if plan.is_dense:
        return ["torch.nn.functional.linear"]
    lines = []
    for chain in lower(plan).chains:
        for stage in chain.stages:
            if stage.relayout is not None:
                lines.append(f"relayout to {stage.equation.partition(',')[0]}")
            lines.append(stage.equation)
        if chain.relayout is not None:
            lines.append("relayout to the order of the output")
    relayouts, (before, after) = sum(line.startswith("relayout") for line in lines), padding_copies(plan)
    return [*before, *lines, *after, f"{_count(len(lines) - relayouts, 'product')}, {_count(relayouts, 'relayout')}"]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _factors(plan: Plan) -> list[str]:
    table = [("factor", "axes", "shape", "params", "fan-in", "fan-out", "init std", "LR scale")]
    for name, (_, step) in plan.factors.items():
        fan_in, fan_out = analysis.fan(plan, name)
        shape = plan.shapes[name]
        table.append((
            name, " ".join(step.w), "x".join(map(str, shape)), f"{plan.size(step.w):,}", f"{fan_in:,}", f"{fan_out:,}",
            f"{analysis.init_std(plan, name):.4g}", f"{analysis.lr_scale(plan, name):.4g}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
