"""How transformers loads a model with structured layers: through its extension point for quantization methods.

The ``quantization_config`` in ``config.json`` names the structure of every layer. On loading, the layers are put into
the empty model, the headers of all weight files are held against it, and only then is a tensor read. The loaded model
keeps no quantizer: what it is shows in its layers, so that training, casting and saving treat it as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from glob import escape
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..nn import RoutedLinear, StructuredLinear, normalise_
from ..nn.normalised import is_normalised, unsaveable
from ..spec import Spec
from ..surgery import to_structured_
from ..version import __version__
from .files import Weights
from .names import check_weights

METHOD, FORMAT = "structlin", 1

# Without `import structlin.hf` transformers takes this for the name of the weights file and puts it into its error;
# it would skip a quantization method that it does not know, and leave the layers with random weights.
GUARD = "this model has structured layers: run `import structlin.hf` before loading it (pip install 'structlin[hf]')"


@register_quantization_config(METHOD)
class StructlinConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a model with structured layers.

    Args:
        layers: name of a layer, as in ``named_modules()`` -> its spec, as `Spec.to_dict` gives it.
        normalised: names of the layers whose factors are normalised, see `normalise_`.
        version: of structlin, which wrote it.
        format: of this entry; larger where an older structlin could not read it.

    Raises:
        ValueError: for a newer format, entries that are not known, or a spec that is none; all specs in one message.
    """

    def __init__(
        self,
        layers: Mapping[str, dict[str, Any]] | None = None,
        normalised: Sequence[str] = (),
        version: str = __version__,
        format: int = FORMAT,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if not isinstance(format, int) or format > FORMAT or unknown:
            what = f"entries {', '.join(unknown)}" if isinstance(format, int) and format <= FORMAT else f"{format=}"
            raise ValueError(
                f"the quantization_config was written by structlin {version} and has {what}; this is structlin "
                f"{__version__}, which reads up to format {FORMAT}: pip install -U 'structlin[hf]'"
            )
        if not isinstance(layers, Mapping) or not layers:
            raise ValueError(f"the quantization_config has layers={layers!r}; it must give each layer its spec")
        self.quant_method = quant_method  # type: ignore[assignment] # a name that transformers does not list
        self.layers, self.normalised = dict(layers), list(normalised)
        self.version, self.format = version, format
        self.specs()

    def specs(self) -> dict[str, Spec]:
        """Name of a layer -> its spec."""
        specs, problems = {}, []
        for name, values in self.layers.items():
            try:
                specs[name] = Spec.from_dict(values)
            except (ValueError, AttributeError) as error:
                problems.append(f"{name}: {error}")
        if problems:
            raise ValueError("the quantization_config has layers that are no structures:\n  " + "\n  ".join(problems))
        return specs


def describe(model: PreTrainedModel) -> StructlinConfig | None:
    """The configuration of ``model`` as its layers are now; None where no layer is structured.

    Raises:
        ValueError: for a layer with a guide, factors of a form that no load knows, or a weight that the model's own
            configuration ties to another, and for a mixture of experts.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
    tied = {key for pair in model.get_expanded_tied_weights_keys(all_submodels=True).items() for key in pair}
    problems = [f"{n}: has a guide; drop it first" for n, layer in layers.items() if "guide" in layer._modules]
    problems += [f"{name}: {why}" for name, layer in layers.items() if (why := unsaveable(layer))]
    problems += [
        f"{name}: is a mixture of experts, which transformers would load as a fresh dense layer; save the model with "
        "structlin.save"
        for name, module in model.named_modules()
        if isinstance(module, RoutedLinear)
    ]
    problems += [
        f"{name}: the config of the model ties its weight; set tie_word_embeddings=False in it"
        for name in layers
        if f"{name}.weight" in tied
    ]
    if problems:
        raise ValueError("cannot save the model:\n  " + "\n  ".join(problems))
    if not layers:
        return None
    normalised = [name for name, layer in layers.items() if is_normalised(layer)]
    return StructlinConfig({name: layer.spec.to_dict() for name, layer in layers.items()}, normalised)


def structure_(model: nn.Module, config: StructlinConfig) -> list[str]:
    """Put the layers that ``config`` names into the dense ``model``, in place; their names in this model.

    A name may have the prefix of the base model more or less, as where a head is loaded without it.

    Raises:
        ValueError: for layers that the model has not, or that do not fit their spec; the model is unchanged then.
    """
    modules = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    specs, where, missing = config.specs(), {}, []
    for name in specs:
        found = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules]
        if found:
            where[name] = found[0]
        else:
            missing.append(name)
    if missing:
        raise ValueError(
            f"a {type(model).__name__} has no layer {', '.join(missing)}, which the saved model has; "
            "load it with the class that saved it, see architectures in config.json"
        )
    to_structured_(model, {escape(where[name]): spec for name, spec in specs.items()})
    for name in config.normalised:
        normalise_(model.get_submodule(where[name]))
    return list(where.values())


@register_quantizer(METHOD)
class StructlinQuantizer(HfQuantizer):
    """What transformers calls while it loads a model with structured layers; made by ``from_pretrained``.

    Raises:
        ValueError: where ``from_pretrained`` is asked to structure a dense model; weight files that are not
            safetensors, are damaged, or do not fit the structures. Nothing is loaded then.
    """

    def __init__(self, quantization_config: StructlinConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "from_pretrained cannot structure a dense model; load it without quantization_config and call "
                "structlin.to_structured_, or run: structlin convert"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Take away what keeps transformers from loading the model without structlin; attention stays as it is."""
        if getattr(config, "transformers_weights", None) == GUARD:
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if not checkpoint_files:
            raise ValueError("structured layers load from the safetensors files of a folder, not from a state_dict")
        weights = Weights(checkpoint_files)
        config = self.quantization_config
        assert isinstance(config, StructlinConfig)
        structured = structure_(model, config)
        whole = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
        check_weights(model, weights, structured, whole)
        for layer in map(model.get_submodule, structured):
            # what initialises missing weights in some models, as GPT-2, asks for the weight of every layer
            assert isinstance(layer, StructuredLinear)
            dense = layer.as_weight(torch.empty(layer.out_features, layer.in_features, device="meta"))
            vars(dense)["_is_hf_initialized"], vars(layer)["weight"] = True, dense
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        for module in model.modules():
            if isinstance(module, StructuredLinear):
                vars(module).pop("weight", None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        return model

    def is_serializable(self) -> bool:
        """Yes: the factors are what is stored."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes: the factors are parameters."""
        return True
