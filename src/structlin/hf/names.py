"""From the names in weight files to those in the model, as transformers maps them, and whether all fit.

The names differ where transformers has renamed the layers of an architecture since its weights were published, and
where a model is loaded with or without its head.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from .files import Weights


def model_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, list[str]]:
    """Name in the files -> names in ``model``: one, or several where transformers splits or merges tensors."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_source = {source: converter for converter in converters for source in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    names = {}
    for name in stored:
        new, source = rename_source_key(name, renamings, converters, prefix, state)
        if new not in state and name in state:
            new, source = rename_source_key(name, [], [], prefix, state)
        targets = [None] if source is None else by_source[source].target_patterns
        names[name] = [new if target is None else new.replace(targets[0] or "", target) for target in targets]
    return names


def merged(model: PreTrainedModel, names: dict[str, list[str]]) -> set[str]:
    """The names in the model that transformers makes from stored tensors of other shapes."""
    once = [new for several in names.values() for new in several]
    return {new for several in names.values() for new in several if len(several) > 1 or once.count(new) > 1}


def check_weights(model: PreTrainedModel, weights: Weights, structured: Collection[str], whole: bool) -> None:
    """Hold the headers of ``weights`` against ``model``, which may be on the meta device.

    Args:
        model: with its structured layers in place.
        weights: the files that it is to be loaded from.
        structured: names of the structured layers, whose tensors must all be there.
        whole: whether all other tensors must be there too, as where a model is loaded by the class that saved it.

    Raises:
        ValueError: one message with every tensor that is missing or of another shape.
    """
    names = model_names(model, weights.shapes)
    found = {new: stored for stored, several in names.items() for new in several}
    reshaped = merged(model, names)
    optional = set(model.all_tied_weights_keys)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    problems = []
    for name, tensor in model.state_dict().items():
        ours = name.startswith(tuple(f"{layer}." for layer in structured))
        if name not in found:
            needed = whole and name not in optional and not any(pattern.search(name) for pattern in ignored)
            problems += [f"{name} is missing"] * (ours or needed)
        elif name not in reshaped and weights.shapes[found[name]] != tuple(tensor.shape):
            wanted = "its structure wants" if ours else "the model wants"
            problems.append(f"{name} is {list(weights.shapes[found[name]])}, {wanted} {list(tensor.shape)}")
    if problems:
        folder = weights.files[0].parent
        raise ValueError(f"the weights in {folder} do not fit the model:\n  " + "\n  ".join(problems))
