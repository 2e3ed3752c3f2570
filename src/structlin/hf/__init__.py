"""Structured layers in models of Hugging Face transformers; importing this package is all that is needed.

After ``import structlin.hf``, ``from_pretrained`` loads models with structured layers, ``save_pretrained`` writes them,
and `to_structured_` converts the ``Conv1D`` layers of GPT-2 too. `pixelate_attention_` makes attention sparse.
Needs the extra ``hf``.
"""

from .attention import pixelate_attention_, register
from .convert import convert, densify
from .layers import StructuredConv1D
from .quantizer import StructlinConfig, StructlinQuantizer
from .saving import install

__all__ = ["StructlinConfig", "StructlinQuantizer", "StructuredConv1D", "convert", "densify", "pixelate_attention_"]

install()
register()
