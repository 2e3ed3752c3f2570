"""Dense model folder -> structured model folder and back, one layer at a time.

The model itself is built on the meta device, so it takes no memory: what is held at a time is one dense layer and the
tensors of the file that is being written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..checkpoint import STRUCTURES
from ..conversion import Conversion
from ..nn import StructuredLinear
from ..nn.kinds import kind_of
from ..report.records import write_bytes
from ..spec import Spec
from ..structures.moe import MoE
from ..surgery import fit_, planned, to_structured_
from ..version import __version__
from .files import INDEX, Weights
from .names import check_weights, merged, model_names
from .quantizer import METHOD, StructlinConfig, describe, structure_
from .saving import guard
from .stream import Job, refuse, write

PART_BYTES = 1 << 30
OTHERS = {".json", ".txt", ".model", ".jinja", ".md"}

Folder = str | os.PathLike[str]


def convert(
    source: Folder,
    target: Folder,
    rules: Mapping[str, Spec | None],
    weights: Literal["init", "project"] = "project",
    *,
    inputs: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    dry_run: bool = False,
    part_bytes: int = PART_BYTES,
    tell: Callable[[str], None] = lambda line: None,
) -> Conversion:
    """Write the model in the folder ``source`` with structured layers into the folder ``target``.

    Args:
        source: what ``save_pretrained`` wrote, with safetensors.
        target: must not exist. It appears when all is done; until then ``.NAME.partial`` beside it holds the finished
            parts, with which the same call goes on.
        rules: as for `to_structured_`.
        weights: "project" takes the factors nearest to each dense weight, "init" draws them anew.
        inputs: name of a layer -> typical inputs to fit it to, as for `to_structured_`.
        seed: of drawn factors; each layer has a seed of its own, so that a resumed conversion draws the same.
        dry_run: work out the table, errors included, and write nothing.
        part_bytes: of the source that is read for one file of the target.
        tell: called with a line about every finished layer.

    Returns:
        The layers with their costs and, after a projection, errors.

    Raises:
        ValueError: for a source that is no such folder, is damaged or already structured, weights that do not fit the
            model, all problems of the rules, a target that exists. Nothing is written then.
    """
    source, target = Path(source), Path(target)
    if weights not in ("init", "project"):
        raise ValueError(f"weights={weights!r} is unknown; allowed: 'init', 'project'")
    if not dry_run:
        refuse(target)
    model, stored = open_dense(source)
    conversion, problems = planned(model, rules, "init")
    names = {swap.name for swap in conversion}
    problems += _mixtures(conversion)
    problems += [f"inputs are given for {n!r}, which no rule converts" for n in (inputs or {}) if n not in names]
    if inputs and weights == "init":
        problems.append("inputs are for weights='project'; leave them out")
    if problems:
        raise ValueError(f"cannot convert {source}:\n  " + "\n  ".join(problems))
    jobs = _jobs(model, stored, rules, names, weights, seed, inputs or {})
    if dry_run:
        errors = {job.name: job.make()[1] if weights == "project" else None for job in jobs if job.shown}
    else:
        settings = {
            "convert": {glob: None if spec is None else spec.to_dict() for glob, spec in rules.items()},
            "weights": weights, "seed": seed, "part_bytes": part_bytes, "inputs": _digest(inputs or {}),
            **_source(source, stored),
        }  # fmt: skip
        model.config.quantization_config = describe(model)
        values = model.config.to_diff_dict()
        errors = write(jobs, target, settings, part_bytes, lambda folder: _finish(folder, source, values), tell)
    return Conversion(replace(swap, error=errors[swap.name]) for swap in conversion)


def _mixtures(conversion: Conversion) -> list[str]:
    """What is wrong with rules that make mixtures of experts."""
    return [
        f"{swap.name}: {swap.spec} is a mixture of experts, which no folder of transformers holds; convert the model "
        "in memory and save it with structlin.save"
        for swap in conversion
        if isinstance(swap.spec, MoE)
    ]


def _jobs(
    model: PreTrainedModel,
    stored: Weights,
    rules: Mapping[str, Spec | None],
    names: set[str],
    weights: str,
    seed: int,
    inputs: Mapping[str, Tensor],
) -> list[Job]:
    """Convert the meta ``model`` and give what makes each of its tensors, in the order of the files."""
    kinds = {name: kind_of(model.get_submodule(name)) for name in names}
    to_structured_(model, rules)
    jobs: list[Job] = []
    for key, name in _plain_names(model, stored, names).items():
        layer, _, what = name.rpartition(".")
        if layer not in names:
            jobs.append(_copy(stored, key, name))
        elif what == "weight":
            made = Structured(layer, model.get_submodule(layer), kinds[layer], weights, seed, inputs.get(layer))
            jobs.append(Job(layer, stored.sizes[key], partial(_make, made, stored, key), shown=True))
        elif weights == "project":
            jobs.append(_copy(stored, key, name))
    return jobs


def open_dense(source: Path) -> tuple[PreTrainedModel, Weights]:
    """The dense model in a folder, on the meta device, and its weights, which fit it.

    Raises:
        ValueError: as `convert` for its source.
    """
    config, stored = read_config(source), Weights.of(source)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source} is quantized or structured already; give a dense model, see structlin densify")
    model = _meta(config, source)
    check_weights(model, stored, (), whole=True)
    return model, stored


@dataclass(frozen=True)
class Structured:
    """A layer to be made from a dense weight; ``model`` is what it will be, on the meta device."""

    name: str
    model: nn.Module
    kind: type[StructuredLinear] | None
    weights: str
    seed: int
    inputs: Tensor | None

    def make(self, weight: Tensor) -> tuple[dict[str, Tensor], float | None]:
        """Tensors by their name in the model, and the relative error of a projection."""
        assert isinstance(self.model, StructuredLinear)
        assert self.kind is not None
        fresh, rows = self.weights == "init", (self.model.in_features, self.model.out_features)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed} {self.name}".encode()).digest()[:7]))
            # a bias that stays is copied as it is stored
            layer = self.kind(*rows, self.model.spec, fresh and self.model.bias is not None, dtype=weight.dtype)
            error = None if fresh else fit_(layer, self.kind.as_matrix(weight), self.inputs)
        return {f"{self.name}.{key}": value for key, value in layer.state_dict().items()}, error


def densify(
    source: Folder,
    target: Folder,
    *,
    part_bytes: int = PART_BYTES,
    tell: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Write the structured model in the folder ``source`` with dense layers of the same function into ``target``.

    Arguments, memory and resuming as for `convert`. The target needs transformers only.

    Returns:
        The names of the layers.

    Raises:
        ValueError: for a source that is not structured or is damaged, and a target that exists.
    """
    source, target = Path(source), Path(target)
    refuse(target)
    config, stored = read_config(source), Weights.of(source)
    values = getattr(config, "quantization_config", None)
    if not isinstance(values, dict) or values.get("quant_method") != METHOD:
        raise ValueError(f"{source} is not structured: its config.json has no quantization_config of structlin")
    del config.quantization_config
    if hasattr(config, "transformers_weights"):
        del config.transformers_weights
    model = _meta(config, source)
    names = structure_(model, StructlinConfig(**values))
    check_weights(model, stored, names, whole=True)
    keys = {new: key for key, several in model_names(model, stored.shapes).items() for new in several}

    def restore(name: str) -> tuple[dict[str, Tensor], float | None]:
        layer = model.get_submodule(name)
        assert isinstance(layer, StructuredLinear)
        state = {key: stored[keys[f"{name}.{key}"]] for key in layer.state_dict()}
        layer.load_state_dict(state, assign=True)
        dense = layer.to_dense_layer().state_dict()
        layer.to("meta")
        return {f"{name}.{key}": value for key, value in dense.items()}, None

    jobs = [
        Job(name, sum(stored.sizes[keys[f"{name}.{key}"]] for key in model.get_submodule(name).state_dict()),
            partial(restore, name), shown=True)
        for name in names
    ]  # fmt: skip
    plain, inside = _plain_names(model, stored, names), tuple(f"{name}." for name in names)
    jobs += [_copy(stored, key, name) for key, name in plain.items() if not name.startswith(inside)]
    settings = {"densify": names, "part_bytes": part_bytes, **_source(source, stored)}
    write(jobs, target, settings, part_bytes, lambda folder: _finish(folder, source, config.to_diff_dict()), tell)
    return names


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a model folder.

    Raises:
        ValueError: where there is none, or transformers does not know it.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give a folder that save_pretrained wrote")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    return config


def _meta(config: PreTrainedConfig, source: Path) -> PreTrainedModel:
    """The model of the class that was saved, without values."""
    known = getattr(config, "architectures", None) or ["none"]
    cls = getattr(transformers, known[0], None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ValueError(f"{source / 'config.json'} has architectures={known}; allowed: models of transformers itself")
    with torch.device("meta"):
        return cls(config)


def _plain_names(model: PreTrainedModel, stored: Weights, layers: Collection[str]) -> dict[str, str]:
    """Name in the files -> name in the target: that in the model, but for what transformers splits or merges."""
    names = model_names(model, stored.shapes)
    reshaped = merged(model, names)
    if inside := [name for name in reshaped if name.startswith(tuple(f"{layer}." for layer in layers))]:
        raise ValueError(
            f"{', '.join(inside[:5])}: stored split or merged; save the model again with save_pretrained("
            "save_original_format=False), or keep the layer by a None rule"
        )
    return {key: key if several[0] in reshaped else several[0] for key, several in names.items()}


def _make(made: Structured, stored: Weights, key: str) -> tuple[dict[str, Tensor], float | None]:
    return made.make(stored[key])


def _copy(stored: Weights, key: str, name: str) -> Job:
    return Job(name, stored.sizes[key], lambda: ({name: stored[key]}, None))


def _source(source: Path, stored: Weights) -> dict[str, Any]:
    """What tells whether the source is still the same."""
    files = [*stored.files, source / "config.json"]
    stats = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return {"source": str(source.resolve()), "files": stats, "structlin": __version__}


def _digest(inputs: Mapping[str, Tensor]) -> str:
    """A fingerprint of the inputs that layers are fitted to."""
    whole = hashlib.sha256()
    for name in sorted(inputs):
        whole.update(name.encode() + inputs[name].detach().cpu().to(torch.float32).contiguous().numpy().tobytes())
    return whole.hexdigest()


def _finish(folder: Path, source: Path, config: dict[str, Any]) -> None:
    """The other files of the model: its configuration, and those of tokenizer and generation as they are."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in OTHERS and path.name not in (INDEX, STRUCTURES, "config.json"):
            shutil.copyfile(path, folder / path.name)
    write_bytes(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    guard(folder / "config.json")
