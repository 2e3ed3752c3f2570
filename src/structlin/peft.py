"""LoRA adapters (Hu et al. 2021) of the package peft on structured layers.

peft adapts layers that it knows, and takes others by a mapping that a configuration carries but does not save; so it is
given the mapping for structured layers here, for training and again for loading.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from .nn import StructuredLinear
from .nn.kinds import StructuredConv

Config = TypeVar("Config", bound=LoraConfig)


class LoraStructured(Linear):  # type: ignore[misc]
    """A `StructuredLinear` and what its adapters add; the layer itself is frozen by peft.

    Raises:
        ValueError: for a 1x1 convolution, and from `merge`.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(base_layer, StructuredConv):
            raise ValueError(f"{type(base_layer).__name__} has no LoRA adapter; name linear layers in target_modules")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it does not know the layer; it finds the widths
            super().__init__(base_layer, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always an error: the sum has no place in the factors.

        Raises:
            ValueError: always.
        """
        layer = self.get_base_layer()
        raise ValueError(
            f"{layer.spec} plus an adapter is no longer {layer.spec}, so nothing is merged; keep the adapter, or make "
            "the model dense with structlin.to_dense_ before get_peft_model"
        )


def lora(config: Config) -> Config:
    """Let ``config``, a ``peft.LoraConfig``, adapt structured layers too; returns it.

    ``get_peft_model(model, lora(LoraConfig(target_modules=["up_proj"])))``, and to load what that has saved
    ``PeftModel.from_pretrained(model, folder, config=lora(LoraConfig.from_pretrained(folder)))``.
    """
    config._register_custom_module({StructuredLinear: LoraStructured})
    return config
