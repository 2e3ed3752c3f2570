"""A checkpoint is a folder: weights in ``model.safetensors`` and the structure of every layer in ``structures.json``.

No pickle anywhere. The structures also stand in the header of the weights file, so that a folder put together from
two saves is found out instead of loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .nn import StructuredLinear
from .spec import Spec
from .surgery import to_structured_
from .version import __version__

FORMAT = 1
WEIGHTS, STRUCTURES = "model.safetensors", "structures.json"

Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write ``model`` into ``folder``, which is made, or replaced as a whole if it holds an earlier save.

    Tensors that several names share are stored once.

    Raises:
        ValueError: when ``folder`` exists and is not a checkpoint.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / STRUCTURES).exists():
        raise ValueError(f"{folder} exists and is not a checkpoint of structlin; choose another folder")
    stored, tied = _untie(model.state_dict(keep_vars=True))
    header = {
        "format": FORMAT,
        "structlin": __version__,
        "structures": {n: m.spec.to_dict() for n, m in model.named_modules() if isinstance(m, StructuredLinear)},
        "tied": tied,
    }
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        save_file(stored, fresh / WEIGHTS, metadata={"structlin": json.dumps(header)})
        (fresh / STRUCTURES).write_text(json.dumps(header, indent=2) + "\n")
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load(model: Model, folder: str | os.PathLike[str], device: str = "cpu") -> Model:
    """Give a dense ``model`` the structures and weights that `save` wrote to ``folder``.

    Args:
        model: of the architecture that was saved, before conversion (layers that are already structured must agree).
            On the meta device nothing is allocated twice: it takes over the loaded tensors, their dtype and ``device``.
            Otherwise its own parameters are filled and keep their device and dtype.
        folder: a checkpoint.
        device: where to load a meta model.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: for a folder that is not a whole checkpoint, a newer format, or tensors that do not fit the model,
            all of them named. The model is unchanged then.
    """
    folder = Path(folder)
    header, shapes = _read_header(folder)
    specs = {name: Spec.from_dict(values) for name, values in header["structures"].items()}
    fresh = _missing_structures(model, specs, folder)
    _compare(_expected(model, fresh), shapes, header["tied"], folder)
    if fresh:
        to_structured_(model, fresh)
    meta = any(tensor.is_meta for tensor in model.state_dict().values())
    with safe_open(folder / WEIGHTS, framework="pt", device=device if meta else "cpu") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    state |= {alias: state[name] for alias, name in header["tied"].items()}
    model.load_state_dict(state, assign=meta)
    if meta:
        _tie(model, header["tied"])
    return model


def _untie(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    first: dict[int, str] = {}
    stored, tied = {}, {}
    for name, tensor in state.items():
        if (known := first.setdefault(id(tensor), name)) != name:
            tied[name] = known
        else:
            stored[name] = tensor.detach().contiguous()
    return stored, tied


def _tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    for alias, name in tied.items():
        owner, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(name))


def _read_header(folder: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    for name in (WEIGHTS, STRUCTURES):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a checkpoint: it has no {name}")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            embedded = json.loads((file.metadata() or {}).get("structlin", "null"))
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, not a dict
        header = json.loads((folder / STRUCTURES).read_text())
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from None
    if not isinstance(header, dict) or header != embedded:
        raise ValueError(f"{folder}: {STRUCTURES} and the header of {WEIGHTS} disagree; they come from different saves")
    if header["format"] > FORMAT:
        raise ValueError(
            f"{folder} has format {header['format']}, written by structlin {header['structlin']}; "
            f"this is structlin {__version__}, which reads up to format {FORMAT}: install a newer one"
        )
    return header, shapes


def _missing_structures(model: nn.Module, specs: Mapping[str, Spec], folder: Path) -> dict[str, Spec]:
    present = {n: m.spec for n, m in model.named_modules() if isinstance(m, StructuredLinear)}
    clashes = [f"{n} is {s}, saved {specs.get(n, 'dense')}" for n, s in present.items() if specs.get(n) != s]
    if clashes:
        raise ValueError(f"the model does not fit {folder}: {'; '.join(clashes)}")
    return {name: spec for name, spec in specs.items() if name not in present}


def _expected(model: nn.Module, specs: Mapping[str, Spec]) -> dict[str, list[int]]:
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, spec in specs.items():
        if len(shapes.get(f"{name}.weight", [])) != 2:
            raise ValueError(f"the model has no linear layer {name!r}, which was saved as {spec}")
        out_features, in_features = shapes.pop(f"{name}.weight")
        shapes |= {f"{name}.{f}": list(shape) for f, shape in spec.plan(out_features, in_features).shapes.items()}
    return shapes


def _compare(
    expected: Mapping[str, list[int]], stored: Mapping[str, list[int]], tied: Mapping[str, str], folder: Path
) -> None:
    found = {**stored, **{alias: stored[name] for alias, name in tied.items() if name in stored}}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in the model" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}, the model wants {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ValueError(f"{folder} does not fit the model:\n  " + "\n  ".join(problems))
