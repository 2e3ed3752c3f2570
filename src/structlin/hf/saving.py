"""``save_pretrained`` of a model with structured layers: its structures go into ``config.json``.

transformers lets a quantization method add to the config of a model that it loaded, but not of one that was converted
in memory, and forgets the weights that it is given with a quantizer; nor does it keep which attention runs. So
``save_pretrained`` itself is wrapped, once, for all models; one without structured layers and with transformers' own
attention is saved as ever.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..report.records import write_bytes
from .attention import is_pixelated, keep_attention
from .quantizer import GUARD, METHOD, describe


def install() -> None:
    """Wrap ``PreTrainedModel.save_pretrained``; a second call changes nothing."""
    original = PreTrainedModel.save_pretrained
    if hasattr(original, "structlin"):
        return

    @functools.wraps(original)
    def save_pretrained(
        self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        config = describe(self)
        if kwargs.get("push_to_hub") and (config is not None or is_pixelated(self.config)):
            raise ValueError("push_to_hub=True would upload before the structures are written; save, then push_to_hub")
        if config is None:
            original(self, save_directory, *args, **kwargs)
            keep_attention(self.config, Path(save_directory) / "config.json")
            return
        if getattr(self.config, "quantization_config", None) is not None:
            method = getattr(self.config.quantization_config, "quant_method", "another method")
            raise ValueError(f"the model is quantized with {method} and has structured layers; only one can be saved")
        self.config.quantization_config = config
        try:
            original(self, save_directory, *args, **kwargs)
        finally:
            del self.config.quantization_config
        guard(Path(save_directory) / "config.json")
        keep_attention(self.config, Path(save_directory) / "config.json")

    save_pretrained.structlin = True  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def guard(path: Path) -> None:
    """Make loading without structlin an error that names the import, in a ``config.json`` with structures."""
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (values.get("quantization_config") or {}).get("quant_method") == METHOD:
        values["transformers_weights"] = GUARD
        write_bytes(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
