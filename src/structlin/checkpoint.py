"""A checkpoint is a folder: weights in ``model.safetensors`` and the structure of every layer in ``structures.json``.

No pickle anywhere. The structures also stand in the header of the weights file, so that a folder put together from
two saves is found out instead of loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .nn import RoutedLinear, StructuredLinear, layer_of, normalise_
from .nn.guide import attach
from .nn.kinds import kind_of
from .nn.normalised import is_normalised, unsaveable
from .spec import Spec
from .surgery import to_structured_
from .version import __version__

FORMAT = 2
"""1 has no ``follows``, and is written where there are none."""
WEIGHTS, STRUCTURES = "model.safetensors", "structures.json"

Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write ``model`` into ``folder``, which is made, or replaced as a whole if it holds an earlier save.

    Tensors that several names share are stored once.

    Raises:
        ValueError: when ``folder`` is a file or holds anything but a checkpoint, or for a state that is not all tensors
            with values, of dtypes that safetensors has (complex128 is not one), or factors of a form that `load` does
            not know, as quantized ones. What was in ``folder`` stays then.
    """
    folder = Path(folder).resolve()
    _refuse_to_overwrite(folder)
    layers = _structured(model).items()
    odd = {name: unsaveable(layer) for name, layer in layers if isinstance(layer, StructuredLinear)}
    if any(hasattr(tensor, "device_mesh") for tensor in model.state_dict(keep_vars=True).values()):
        raise ValueError(
            "cannot save a model that is cut over several devices; load its full_state_dict into one that is not"
        )
    if problems := [f"{name or 'the model'}: {why}" for name, why in odd.items() if why]:
        raise ValueError("cannot save the model:\n  " + "\n  ".join(problems))
    stored, tied = _untie(model.state_dict(keep_vars=True))
    follows = _follows(model)
    header = {
        "format": FORMAT if follows else 1,
        "structlin": __version__,
        "structures": {name: module.spec.to_dict() for name, module in _structured(model).items()},
        "tied": tied,
        **({"follows": follows} if follows else {}),
    }
    fresh, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("tmp", "old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        save_file(stored, fresh / WEIGHTS, metadata={"structlin": json.dumps(header)})
        (fresh / STRUCTURES).write_text(json.dumps(header, indent=2) + "\n")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def load(model: Model, folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> Model:
    """Give a dense ``model`` the structures and weights, normalised factors and guides that `save` wrote to ``folder``.

    Args:
        model: of the architecture that was saved, before conversion (layers that are already structured must agree).
            On the meta device nothing is allocated twice: it takes over the loaded tensors, their dtype and ``device``.
            Otherwise its own parameters are filled and keep their device and dtype. Parameters that were one when
            saved are one afterwards.
        folder: a checkpoint.
        device: where to load a meta model.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: for a folder that is not a whole checkpoint, a newer format, or tensors that do not fit the model,
            all of them named. The model is unchanged then.
    """
    folder = Path(folder)
    header = _read_header(folder)
    specs = _specs(header["structures"], folder)
    fresh = _missing_structures(model, specs, folder)
    current = model.state_dict(keep_vars=True)
    meta = any(tensor.is_meta for tensor in current.values())
    with safe_open(folder / WEIGHTS, framework="pt", device=str(device) if meta else "cpu") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    state |= {alias: state[name] for alias, name in header["tied"].items() if name in state}
    extras = _extras(specs, state)
    expected = _expected(model, current, fresh)
    _expect_extras(expected, model, specs, extras)
    problems = _misfits(expected, state, cast=not meta) + _broken_ties(current, state)
    if meta:
        problems += [
            f"{name} is a buffer on the meta device that no checkpoint holds; "
            "give it values first, or make the model on another device"
            for name, buffer in model.named_buffers()
            if buffer.is_meta and name not in current
        ]
    if problems:
        raise ValueError(f"{folder} does not fit the model:\n  " + "\n  ".join(problems))
    if fresh:
        to_structured_(model, {escape(name): spec for name, spec in fresh.items()})
    _add(model, extras)
    for name, leader in header.get("follows", {}).items():
        layer, leads = model.get_submodule(name), model.get_submodule(leader)
        assert isinstance(layer, RoutedLinear)
        assert isinstance(leads, RoutedLinear)
        layer.router, layer.leads = leads.router, False
    model.load_state_dict(state, assign=meta)
    for alias, name in header["tied"].items():
        _tie(model, alias, name)
    return model


def _structured(model: nn.Module) -> dict[str, StructuredLinear | RoutedLinear]:
    """Every name of every structured layer, mixtures of experts included."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, StructuredLinear | RoutedLinear)}


def _follows(model: nn.Module) -> dict[str, str]:
    """Every mixture that goes where another one does -> that one; see `structlin.nn.share_router_`."""
    routed = {name: m for name, m in _structured(model).items() if isinstance(m, RoutedLinear)}
    leaders = {id(layer.router): name for name, layer in routed.items() if layer.leads}
    return {name: leaders[id(layer.router)] for name, layer in routed.items() if not layer.leads}


def _refuse_to_overwrite(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a checkpoint is a folder")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    foreign = found - {WEIGHTS, STRUCTURES} if STRUCTURES in found else found
    if foreign:
        raise ValueError(
            f"{folder} holds more than a checkpoint of structlin: {', '.join(sorted(foreign)[:5])}; "
            "saving would delete it, choose another folder"
        )


def _untie(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, and further name -> name of the same tensor."""
    first: dict[int, str] = {}
    stored, tied, memory = {}, {}, set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name} is not a dense tensor with values and cannot be saved")
        if tensor.dtype == torch.complex128:
            raise ValueError(f"{name} is complex128, which safetensors cannot hold; save the model in complex64")
        if (known := first.setdefault(id(tensor), name)) != name:
            tied[name] = known
            continue
        # safetensors stores bytes: it knows neither lazy conjugates nor different tensors in one piece of memory
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        pointer = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if pointer in memory else plain
        memory.add(pointer)
    return stored, tied


def _add(model: nn.Module, extras: Mapping[str, Extras]) -> None:
    for name, extra in extras.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, StructuredLinear):
            continue
        if extra.normalised and not is_normalised(layer):
            normalise_(layer)
        if extra.guided:
            attach(layer)


def _tie(model: nn.Module, alias: str, name: str) -> None:
    (owner, attribute), (source, original) = (path.rpartition(".")[::2] for path in (alias, name))
    setattr(model.get_submodule(owner), attribute, getattr(model.get_submodule(source), original))


def _read_header(folder: Path) -> dict[str, Any]:
    for name in (WEIGHTS, STRUCTURES):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a checkpoint: it has no {name}")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            embedded = json.loads((file.metadata() or {}).get("structlin", "null"))
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
    return header


def _specs(structures: Mapping[str, dict[str, Any]], folder: Path) -> dict[str, Spec]:
    specs = {}
    for name, values in structures.items():
        try:
            specs[name] = Spec.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{folder}: layer {name!r}: {error}") from None
    return specs


def _missing_structures(model: nn.Module, specs: Mapping[str, Spec], folder: Path) -> dict[str, Spec]:
    present = {name: module.spec for name, module in _structured(model).items()}
    clashes = [f"{n} is {s}, saved {specs.get(n, 'dense')}" for n, s in present.items() if specs.get(n) != s]
    if clashes:
        raise ValueError(f"the model does not fit {folder}: {'; '.join(clashes)}")
    return {name: spec for name, spec in specs.items() if name not in present}


class Extras(NamedTuple):
    """What a saved layer had beside its factors."""

    normalised: bool
    guided: bool


def _extras(specs: Mapping[str, Spec], state: Mapping[str, Tensor]) -> dict[str, Extras]:
    gains = {f".{name}".partition(".parametrizations.")[0][1:] for name in state if name.endswith(".gain")}
    return {name: Extras(name in gains, f"{_prefix(name)}guide.weight" in state) for name in specs}


def _prefix(name: str) -> str:
    """What the tensors of a layer begin with; those of a model that is one layer begin with nothing."""
    return f"{name}." if name else ""


def _expected(model: nn.Module, current: Mapping[str, Tensor], specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    """What the state of the model will be once it has these structures; factors as meta tensors."""
    expected, modules = dict(current), dict(model.named_modules(remove_duplicate=False))
    for name, spec in specs.items():
        dense = modules.get(name)
        kind = None if dense is None else kind_of(dense)
        weight = expected.pop(f"{name}.weight", None)
        if dense is None or kind is None or weight is None:
            raise ValueError(f"the model has no linear layer {name!r}, which was saved as {spec}")
        out_features, in_features = kind.shape_of(dense)
        layer = layer_of(spec, in_features, out_features, bias=False, device="meta")
        expected |= {f"{name}.{key}": tensor.to(weight.dtype) for key, tensor in layer.state_dict().items()}
    return expected


def _expect_extras(
    expected: dict[str, Tensor], model: nn.Module, specs: Mapping[str, Spec], extras: Mapping[str, Extras]
) -> None:
    """Add what normalised factors and guides bring to the state that is ``expected``."""
    for name, extra in extras.items():
        layer = model.get_submodule(name)
        kind = kind_of(layer)
        if isinstance(layer, StructuredLinear | RoutedLinear):
            shape = layer.out_features, layer.in_features
        else:
            assert kind is not None
            shape = kind.shape_of(layer)
        dtype = next(layer.parameters()).dtype
        for factor in specs[name].plan(*shape).factors if extra.normalised else ():
            if f"{_prefix(name)}{factor}" in expected:
                prefix = f"{_prefix(name)}parametrizations.{factor}"
                expected[f"{prefix}.original"] = expected.pop(f"{_prefix(name)}{factor}")
                expected[f"{prefix}.0.gain"] = torch.empty(1, dtype=dtype.to_real(), device="meta")
        if extra.guided:
            expected[f"{_prefix(name)}guide.weight"] = torch.empty(shape, dtype=dtype, device="meta")
            expected[f"{_prefix(name)}guide.alpha"] = torch.empty((), device="meta")


def _misfits(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], cast: bool) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in expected]
    for name, wanted in expected.items():
        if name in state and state[name].shape != wanted.shape:
            problems.append(f"{name} is {list(state[name].shape)}, the model wants {list(wanted.shape)}")
        elif cast and name in state and not torch.can_cast(state[name].dtype, wanted.dtype):
            problems.append(f"{name} is {state[name].dtype}, which {wanted.dtype} of the model cannot hold")
    return problems


def _broken_ties(current: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    first: dict[int, str] = {}
    problems = []
    for name, tensor in current.items():
        known = first.setdefault(id(tensor), name)
        if name in state and known in state and state[name] is not state[known]:
            problems.append(f"{name} and {known} are one tensor in the model, but were saved as two")
    return problems
