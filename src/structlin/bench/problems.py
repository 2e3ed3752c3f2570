"""What is measured, as data: a problem is a structure at a shape, a preset a list of problems.

Written as on the command line, ``SPEC@OUTxIN``, and read when asked for, so that a preset is as easy to change as to
read.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..plan import Plan
from ..spec import Spec, parse

WIDTHS = (512, 1024, 2048, 4096, 8192)
MLP_WIDTHS = (768, 1024, 2048, 4096)

PRESETS: dict[str, tuple[str, ...]] = {
    # every structure once, small enough for two CPU cores
    "smoke": (
        "low_rank:rank=128@512x512",
        "block_diagonal:nblocks=4@512x512",
        "kronecker@512x512",
        "monarch:nblocks=4@1024x256",
        "monarch:nblocks=4:order=blocked@1024x256",
        "dyad:nblocks=4@1024x256",
        "btt:rank=1@1024x1024",
    ),
    # linear layers of transformers from 768 to 4096 wide, both output orders of monarch, every structure once
    "h200": (
        "monarch:nblocks=4@3072x768",
        "monarch:nblocks=4:order=blocked@3072x768",
        "monarch:nblocks=4@4096x1024",
        "monarch:nblocks=4:order=blocked@4096x1024",
        "monarch:nblocks=8@2048x2048",
        "monarch:nblocks=8:order=blocked@2048x2048",
        "monarch:nblocks=8@8192x2048",
        "monarch:nblocks=8:order=blocked@8192x2048",
        "monarch:nblocks=4@4096x4096",
        "monarch:nblocks=4:order=blocked@4096x4096",
        "monarch:nblocks=16@4096x4096",
        "monarch:nblocks=16:order=blocked@4096x4096",
        "monarch:nblocks=16@16384x4096",
        "monarch:nblocks=16:order=blocked@16384x4096",
        "dyad:nblocks=4@4096x1024",
        "dyad:nblocks=8@4096x4096",
        "btt:rank=1@4096x4096",
        "btt:rank=4@4096x4096",
        "low_rank:rank=1024@4096x4096",
        "block_diagonal:nblocks=8@4096x4096",
        "kronecker@4096x4096",
        "tensor_train:cores=2:rank=8@4096x4096",
        "block_dense:nblocks=4:rank=1024@4096x4096",
        "block_shuffle:nblocks=8@4096x4096",
        "blast:nblocks=16:rank=1024@4096x4096",
        "einsum:dims=16x1x256x1x256x16x8@4096x4096",
        "block_diagonal:nblocks=8+low_rank:rank=128@4096x4096",
        "pixelfly:block_size=128:nfactors=3:rank=128@4096x4096",
    ),
    # whole blocks, every linear layer structured
    "blocks": (
        "block monarch:nblocks=8:order=blocked@768x1024",
        "block monarch:nblocks=8:order=blocked@1024x1024",
        "block monarch:nblocks=8:order=blocked@2048x2048",
        "block monarch:nblocks=8:order=blocked@4096x2048",
    ),
    # what calibrates the predictions of costs: products of every size, copies between steps, sums
    "ceilings": (
        "low_rank:rank=64@4096x4096",
        "low_rank:rank=1024@2048x2048",
        "block_diagonal:nblocks=64@4096x4096",
        "block_diagonal:nblocks=8@1024x4096",
        "monarch:nblocks=4@3072x768",
        "monarch:nblocks=4:order=blocked@3072x768",
        "monarch:nblocks=16@4096x4096",
        "dyad:nblocks=4@4096x1024",
        "btt:rank=1@1024x1024",
        "kronecker@4096x4096",
    ),
    # both layers of a transformer's MLP, four times as wide inside, as DYAD and Monarch replace them
    "mlp": tuple(
        f"{spec}@{shape}"
        for width in MLP_WIDTHS
        for spec in (
            "dyad:nblocks=4:variant=narrow",
            "dyad:nblocks=8:variant=narrow",
            "monarch:nblocks=4:order=blocked",
            "monarch:nblocks=8:order=blocked",
        )
        for shape in (f"{4 * width}x{width}", f"{width}x{4 * width}")
    ),
    # square layers, for the picture of speed-up against width
    "widths": (
        *(f"low_rank:rank={width // 4}@{width}x{width}" for width in WIDTHS),
        *(f"monarch:nblocks=8@{width}x{width}" for width in WIDTHS),
        *(f"dyad:nblocks=8@{width}x{width}" for width in WIDTHS),
        *(f"btt:rank=1@{width}x{width}" for width in WIDTHS),
    ),
}
"""Problems by preset."""


@dataclass(frozen=True)
class Problem:
    """A structure at a shape: ``monarch:nblocks=4@3072x768`` has 3072 outputs and 768 inputs."""

    spec: Spec
    out_features: int
    in_features: int

    @property
    def plan(self) -> Plan:
        """The matrix; raises ValueError when the shape does not fit the structure."""
        return self.spec.plan(self.out_features, self.in_features)

    @property
    def shape(self) -> str:
        """``"3072x768"``: outputs, then inputs, as the weight of ``nn.Linear`` is stored."""
        return f"{self.out_features}x{self.in_features}"

    def contenders(self, chosen: Sequence[str]) -> Sequence[str]:
        """Names of what is timed, of those that were ``chosen``."""
        return chosen

    def __str__(self) -> str:
        return f"{self.spec}@{self.shape}"


HEAD = 64
"""Features of an attention head of a block."""

BLOCK_CONTENDERS = ("linear", "auto", "recompute")
"""The dense block, the structured one, and the structured one that computes its intermediates again in backward."""


@dataclass(frozen=True)
class BlockProblem:
    """A structure in every linear layer of a block: ``block monarch:nblocks=8@768x1024`` is 768 wide, 1024 tokens long.

    Its three contenders are always all timed.
    """

    spec: Spec
    width: int
    context: int

    @property
    def out_features(self) -> int:
        """The width."""
        return self.width

    @property
    def in_features(self) -> int:
        """The width."""
        return self.width

    def contenders(self, chosen: Sequence[str]) -> Sequence[str]:
        """`BLOCK_CONTENDERS`, whatever was ``chosen``."""
        return BLOCK_CONTENDERS

    def __str__(self) -> str:
        return f"block {self.spec}@{self.width}x{self.context}"


def read_block(text: str) -> BlockProblem:
    """The block written as ``block SPEC@WIDTHxCONTEXT``.

    Raises:
        ValueError: for another form, a width that is no multiple of 64, or one that does not fit the structure.
    """
    found = re.fullmatch(r"block (.+)@(\d+)x(\d+)", text.strip())
    if found is None:
        raise ValueError(
            f"{text!r} is not of the form block SPEC@WIDTHxCONTEXT, as in block monarch:nblocks=8@768x1024"
        )
    problem = BlockProblem(parse(found[1]), int(found[2]), int(found[3]))
    if problem.width < HEAD or problem.width % HEAD or problem.context < 1:
        raise ValueError(f"{text!r}: the width must be a multiple of {HEAD}, and the context positive")
    try:
        for out, into in ((3, 1), (1, 1), (4, 1), (1, 4)):
            problem.spec.plan(out * problem.width, into * problem.width)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    return problem


def read(text: str) -> Problem:
    """The problem written as ``SPEC@OUTxIN``.

    >>> print(read("dyad:nblocks=8@4096x1024").plan)
    g k, g n k -> g n  +  k g, g n k -> g n

    Raises:
        ValueError: for another form, an unknown structure, or a shape that does not fit it.
    """
    found = re.fullmatch(r"(.+)@(\d+)x(\d+)", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not of the form SPEC@OUTxIN, as in monarch:nblocks=4@3072x768")
    problem = Problem(parse(found[1]), int(found[2]), int(found[3]))
    if not (problem.out_features and problem.in_features):
        raise ValueError(f"{text!r} has no features; widths start at 1")
    try:
        problem.plan  # noqa: B018, raises when the shape does not fit
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    return problem


def read_any(text: str) -> Problem | BlockProblem:
    """A layer, as `read` takes it, or a block, as `read_block` does."""
    return read_block(text) if text.strip().startswith("block ") else read(text)


def preset(name: str) -> tuple[Problem | BlockProblem, ...]:
    """The problems of a preset.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{name!r} is unknown; {hint}allowed: {', '.join(PRESETS)}")
    return tuple(map(read_any, PRESETS[name]))
