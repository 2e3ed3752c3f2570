"""The rules of the source tree, checked from its syntax: who may import whom, what is public, how long a file may be.

Read `LAYERS` as the map of the package: an import points down the table, never up, and not sideways unless listed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import structlin
from structlin import structures

PACKAGE = Path(structlin.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}

LAYERS = (
    ("once", "options", "progress", "regroup", "version", "widths"),
    ("plan", "masks"),
    ("padding",),
    ("analysis", "spec", "report.records"),
    ("structures", "kernels", "accuracy", "machine", "conversion", "costs"),
    ("ops",),
    ("nn",),
    (
        "surgery",
        "optim",
        "shrinkage",
        "sparsity",
        "checkpoint",
        "guide",
        "densify",
        "moments",
        "testing",
        "describe",
        "calibration",
        "quantization",
        "parallel",
        "peft",
    ),
    ("",),
    ("models", "train", "bench", "evaluate", "hf"),
    ("problems",),
    ("recipes", "search"),
    ("report",),
    ("scaling", "advise"),
    ("commands",),
    ("cli", "__main__"),
)
SIDEWAYS = {
    ("bench", "models"),
    ("checkpoint", "surgery"),
    ("densify", "moments"),
    ("densify", "surgery"),
    ("sparsity", "surgery"),
    ("bench", "models"),
    ("evaluate", "hf"),
    ("train", "hf"),
    ("train", "models"),
    ("__main__", "cli"),
}
WITHOUT_TORCH = ("plan", "masks", "widths", "padding", "analysis", "spec", "structures", "costs", "report", "scaling")

# besides what the package of structures exports
PUBLIC = [
    "Plan",
    "STRUCTURES",
    "Spec",
    "StructuredLinear",
    "__version__",
    "analysis",
    "choices",
    "densify_",
    "explain",
    "guide_",
    "load",
    "magnitude_mask",
    "normalise_",
    "param_groups",
    "project",
    "register",
    "restore_choices",
    "save",
    "shrinkage",
    "sparsify",
    "spec",
    "testing",
    "to_dense_",
    "to_structured_",
    "tune",
]

MAX_LINES = 350
MAX_FUNCTION_LINES = 60

every_module = pytest.mark.parametrize("module", FILES, ids=[module or "structlin" for module in FILES])


def within(module: str, part: str) -> bool:
    return module == part or (part != "" and module.startswith(f"{part}."))


def place(module: str) -> tuple[int, str]:
    """Layer and entry of the table that a module belongs to, by its longest prefix."""
    found = [(layer, part) for layer, parts in enumerate(LAYERS) for part in parts if within(module, part)]
    assert found, f"structlin.{module} has no layer: add it to LAYERS"
    return max(found, key=lambda entry: len(entry[1]))


def imports(module: str) -> Iterator[str]:
    """Full names of the modules that ``module`` imports anywhere in its file: ``"torch"``, ``"structlin.ops"``."""
    package = ["structlin", *module.split(".")] if module else ["structlin"]
    if FILES[module].name != "__init__.py":
        package.pop()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                # `from . import reference` names a module, `from .plan import Plan` something inside one
                name = f"{source}.{alias.name}"
                yield name if name.removeprefix("structlin.") in FILES else source


def own_imports(module: str) -> set[str]:
    """Those of our own modules that ``module`` imports, as keys of `FILES`."""
    return {name.removeprefix("structlin").strip(".") for name in imports(module) if within(name, "structlin")}


@every_module
def test_imports_point_down(module: str) -> None:
    layer, part = place(module)
    for other in own_imports(module):
        other_layer, other_part = place(other)
        allowed = part == other_part or other_layer < layer or (part, other_part) in SIDEWAYS
        assert allowed, f"structlin.{module} (layer {layer}) imports structlin.{other} (layer {other_layer})"
        assert part != "kernels" or other_part == "kernels", f"structlin.{module} imports structlin.{other}"


@every_module
def test_description_and_report_need_no_torch(module: str) -> None:
    if not light(module):
        return
    for name in imports(module):
        assert not within(name, "torch"), f"structlin.{module} imports {name}"
    for other in own_imports(module):
        assert light(other), f"structlin.{module} imports structlin.{other}, which imports torch"


def light(module: str) -> bool:
    return any(within(module, part) for part in WITHOUT_TORCH)


def test_public_names() -> None:
    assert sorted(structlin.__all__) == sorted([*PUBLIC, *structures.__all__])
    for name in structlin.__all__:
        assert hasattr(structlin, name), f"__all__ names {name}, which is not there"


@every_module
def test_files_and_functions_are_short(module: str) -> None:
    lines = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{FILES[module]} has {lines} lines; split it"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} in {FILES[module]} has {length} lines; split it"


@every_module
def test_public_names_have_docstrings(module: str) -> None:
    tree = TREES[module]
    assert ast.get_docstring(tree), f"{FILES[module]} does not open with what it is and why"
    for node in public(tree):
        assert ast.get_docstring(node), f"{node.name} in {FILES[module]} has no docstring"
        for method in public(node) if isinstance(node, ast.ClassDef) else ():
            # an override may leave the words to the class that it overrides, ours or PyTorch's
            cls = getattr(importlib.import_module(f"structlin.{module}"), node.name)
            assert inspect.getdoc(getattr(cls, method.name)), f"{node.name}.{method.name} has no docstring"


def public(node: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.ClassDef]:
    found = [child for child in node.body if isinstance(child, ast.FunctionDef | ast.ClassDef)]
    return [child for child in found if not child.name.startswith("_")]


def test_importing_structlin_leaves_the_optional_packages_alone() -> None:
    code = "import json, sys, structlin; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    optional = {
        "accelerate",
        "datasets",
        "jinja2",
        "matplotlib",
        "onnx",
        "optuna",
        "rich",
        "scipy",
        "tokenizers",
        "torchmetrics",
    }
    optional |= {"cmaes", "peft", "PIL", "ray", "torchao", "transformers", "triton"}
    assert not optional & set(loaded)
