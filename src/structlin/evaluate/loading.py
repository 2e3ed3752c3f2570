"""A language model or an encoder from a folder: config of transformers, safetensors, and structures if there are any.

A folder with ``structures.json`` was written by `structlin.save`, with the config added; the model is built from the
config and `structlin.load` gives it structures and weights. Without it, the folder is one of transformers, written
by ``save_pretrained`` or ``structlin convert``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .. import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(folder: Path, device: str = "cpu", dtype: str = "float32", body: bool = False) -> nn.Module:
    """The causal language model in ``folder``, in eval mode, without a cache of keys and values.

    Args:
        folder: holds ``config.json``, and ``model.safetensors`` with ``structures.json`` or weights of transformers.
        device: where to put it.
        dtype: "float32" or "bfloat16", of all weights.
        body: load it without a head, as encoders (BERT) are loaded; it gives hidden states. One that was trained
            as a masked language model has no pooler then.

    Raises:
        ValueError: for a folder without these files, a config that transformers does not know, weights that do not fit
            or leave some of the model without values, and an unknown dtype.
    """
    transformers: Any = _transformers()
    from .. import hf  # noqa: F401, structures fit the layers of GPT-2 from here on, and converted folders load

    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is given; allowed: {', '.join(DTYPES)}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; allowed: folders of a transformers config and its weights")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no weights; allowed: safetensors")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if not body and _encodes(config):
            raise ValueError(f"{folder} holds an encoder ({config.model_type}); allowed: causal language models")
        headed = body and _is_masked(folder, config)
        name = ("AutoModelForMaskedLM" if headed else "AutoModel") if body else "AutoModelForCausalLM"
        auto = getattr(transformers, name)
        if (folder / checkpoint.STRUCTURES).is_file():
            for entry in ("quantization_config", "transformers_weights"):  # structures.json says the same
                if hasattr(config, entry):
                    delattr(config, entry)
            model = auto.from_config(config, dtype=torch.float32)
        else:
            model = _pretrained(auto, folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from None
    if (folder / checkpoint.STRUCTURES).is_file():
        checkpoint.load(model, folder)
    model = model.base_model if headed else model
    model.config.use_cache = False
    found: nn.Module = model.to(device=device, dtype=DTYPES[dtype]).eval()
    return found


def is_encoder(folder: Path) -> bool:
    """Whether ``folder`` holds a bidirectional encoder, as BERT, and no causal language model.

    Raises:
        ValueError: for a folder whose config cannot be read.
    """
    transformers: Any = _transformers()
    try:
        return _encodes(transformers.AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no config.json that can be read: {str(error).splitlines()[0]}") from None


def _is_masked(folder: Path, config: Any) -> bool:
    """Whether the weights of an encoder are those of a masked language model, without the pooler of its body."""
    return not any("pooler." in name for name in _names(folder)) and any(
        name.endswith("ForMaskedLM") for name in config.architectures or ()
    )


def _names(folder: Path) -> Iterator[str]:
    """Names of the tensors in a folder."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                yield from file.keys()
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def _encodes(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    both_ways = not getattr(config, "is_decoder", False) and not getattr(config, "is_encoder_decoder", False)
    return config.model_type in MASKED and both_ways


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a folder, or in a ``tokenizer.json``, which does not say which tokens are special.

    Raises:
        ValueError: when there is none.
    """
    transformers: Any = _transformers()
    try:
        if path.is_dir() and (path / "tokenizer_config.json").is_file():
            return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{file} does not exist; allowed: tokenizer.json, or a folder with a tokenizer")
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises this class for every file that it cannot parse
        raise ValueError(f"{path} is not a tokenizer: {str(error).splitlines()[0]}") from None


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """See that every id of the tokenizer has a row in the embedding of the model.

    Raises:
        ValueError: when the tokenizer has more tokens than the model.
    """
    size, rows = max(tokenizer.get_vocab().values()) + 1, int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    if size > rows:
        raise ValueError(
            f"the tokenizer has {size} tokens, the model {rows}; give the tokenizer that it was trained with"
        )


def _pretrained(auto: Any, folder: Path) -> Any:
    model, report = auto.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    problems = {key: sorted(map(str, report[key])) for key in ("missing_keys", "mismatched_keys") if report.get(key)}
    if problems:
        told = "; ".join(f"{key.replace('_', ' ')}: {', '.join(names[:5])}" for key, names in problems.items())
        raise ValueError(f"{folder} does not fit its config: {told}")
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError("needs transformers; install with: pip install 'structlin[eval]'") from None
    return transformers
