"""The tables of the pages on images, MRI, attention and sparse models are those of the records that they quote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from structlin.report import records

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
LABELS = {"dense": "dense", "monarch4": "Monarch, 4 blocks", "dyad4": "DYAD, 4 blocks", "btt4": "BTT, rank 4",
          "btt2": "BTT, rank 2", "dyad8": "DYAD, 8 blocks", "pixelfly": "Pixelfly"}  # fmt: skip


def metrics(name: str) -> dict[str, dict[str, Any]]:
    """The metrics of a file's finished records by name."""
    return {run["name"]: run["metrics"] for run in records.read(RESULTS / name) if run["status"] == "ok"}


def vision_rows(name: str, recipes: dict[str, str], milliseconds: str, digits: int = 1) -> list[str]:
    """Accuracies of each seed, and the time of a step alone on the device, of every structure with three seeds."""
    found, rows = metrics(name), []
    for recipe, model in recipes.items():
        for label, shown in LABELS.items():
            if f"{recipe}-{label}-s2" in found:
                runs = [found[f"{recipe}-{label}-s{seed}"] for seed in range(3)]
                accuracies = ", ".join(f"{100 * run['test_accuracy']:.{digits}f}" for run in runs)
                step = 1e3 * found[f"step-{recipe}-{label}"]["step_seconds"]
                share = 100 * runs[0]["params_share"]
                rows.append(f"| {model} | {shown} | {share:.0f} | {accuracies} | {step:{milliseconds}} |")
    return rows


def small_models() -> list[str]:
    return vision_rows("vision-cpu.json", {"vit_mnist": "ViT", "mixer_mnist": "Mixer"}, ".0f")


def on_a_gpu() -> list[str]:
    mixer = vision_rows("vision-h200.json", {"mixer_cifar10": "Mixer, CIFAR-10"}, ".1f")
    return mixer + vision_rows("vision-h200.json", {"mnist_mlp": "perceptron, MNIST"}, ".2f", 2)


def steps_of_the_paper() -> list[str]:
    """Milliseconds of a step of the models of table 3.1."""
    found, rows = metrics("vision-h200.json"), []
    names = {"vit_s16": "ViT-S/16", "vit_b16": "ViT-B/16", "mixer_s16": "Mixer-S/16", "mixer_b16": "Mixer-B/16"}
    for model, shown in names.items():
        labels = ("dense", "monarch4", "dyad8", "btt4")
        steps = [1e3 * found[f"step-{model}-{label}"]["step_seconds"] for label in labels]
        others = " | ".join(f"{step:.1f}, {steps[0] / step:.2f}" for step in steps[1:])
        rows.append(f"| {shown} | {steps[0]:.1f} | {others} |")
    return rows


def mri_rows(name: str, columns: list[tuple[str, str]]) -> list[str]:
    """pSNR and SSIM, means over three seeds, of the models and methods of ``columns``."""
    runs, rows = metrics(name), []
    for acceleration in (2, 4, 8):
        cells = []
        for model, method in columns:
            found = [runs[f"{model}-{acceleration}x-s{seed}"] for seed in range(3)]
            psnr, ssim = (sum(run[f"test_{method}{n}"] for run in found) / 3 for n in ("psnr_db", "ssim"))
            cells.append(f"{psnr:.2f} / {ssim:.3f}")
        rows.append(f"| {acceleration}x | {' | '.join(cells)} |")
    return rows


def mri() -> list[str]:
    classical = [("monarch_sense", f"{method}_") for method in ("zero_filled", "sense", "scaled_sense")]
    learned = [*classical, ("monarch_sense", "")]
    small = mri_rows("mri-cpu.json", [*learned, ("unet", "")])
    return [*small, *mri_rows("mri-full-cpu.json", learned)]


def mri_on_a_gpu() -> list[str]:
    return mri_rows("mri-h200.json", [("monarch_sense", "scaled_sense_"), ("monarch_sense", ""), ("unet", "")])


def mri_of_few_slices() -> list[str]:
    """At 4x, for every number of slices to train on, pSNR and SSIM as means over three seeds."""
    runs, rows = metrics("mri-h200.json"), []
    for shots in ("1", "5", "20", "100"):
        cells = []
        for model, method in (("monarch_sense", "scaled_sense_"), ("monarch_sense", ""), ("unet", "")):
            found = [runs[f"{model}-shots{shots}-4x-s{seed}"] for seed in range(3)]
            psnr, ssim = (sum(run[f"test_{method}{n}"] for run in found) / 3 for n in ("psnr_db", "ssim"))
            cells.append(f"{psnr:.2f} / {ssim:.3f}")
        rows.append(f"| {shots} | {' | '.join(cells)} |")
    return rows


def attention() -> list[str]:
    rows = []
    for run in records.read(RESULTS / "attention-h200.json"):
        config, found = run["config"], run["metrics"]
        if "length" in config and run["status"] == "ok":
            cells = [f"{found['dense_forward_ms']:.3f}, {found['dense_ms']:.3f}"]
            for name in ("eighth", "quarter", "butterfly"):
                speeds = [found.get(f"{name}_{mode}speedup") for mode in ("forward_", "")]
                cells.append(f"{found[f'{name}_compute']:.3f}: {speeds[0]:.2f}, {speeds[1]:.2f}" if speeds[1] else "-")
            kind = "causal" if config["causal"] else "full"
            rows.append(f"| {kind} | {config['length']} | {config['head_dim']} | {' | '.join(cells)} |")
    order = ("causal", "full")
    return sorted(rows, key=lambda row: (order.index(row.split()[1]), int(row.split()[5]), int(row.split()[3])))


def sparse_models() -> list[str]:
    """Steps of whole models: milliseconds of dense, and how many times as fast the others are."""
    found = metrics("sparsify-h200.json")
    rows = []
    for model, shown in (("gpt2_medium", "GPT-2 medium"), ("vit_b", "ViT-B"), ("mixer_b", "Mixer-B")):
        dense = found[f"{model} dense d1.0"]["step_ms"]
        others = [found[f"{model} {name}"]["step_ms"] for name in
                  ("pixelfly d0.25", "random d0.25", "butterfly d0.25", "pixelfly d0.1")]  # fmt: skip
        rows.append(f"| {shown} | {dense:.1f} | {' | '.join(f'{dense / step:.2f}' for step in others)} |")
    return rows


def sparse_layers() -> list[str]:
    rows = []
    for run in records.read(RESULTS / "sparsify-h200.json"):
        if run["name"].startswith("layer "):
            found, specs = run["metrics"], run["config"]["specs"]
            rows_, columns = run["config"]["shape"]
            blocks = specs["pixelfly"].split("block_size=")[1].split(":")[0]
            factors = int(specs["butterfly"].split("nfactors=")[1])
            cells = [f"{found[f'{name}_speedup']:.2f}" for name in ("pixelfly", "random", "magnitude", "butterfly")]
            cells[3] += f" ({factors})"
            rows.append(f"| {rows_}x{columns} | {run['config']['density']} | {blocks} | {found['dense_ms']:.3f} | "
                        f"{' | '.join(cells)} |")  # fmt: skip
    return rows


def sparse_losses() -> list[str]:
    """Losses at the better of two rates: mean of three seeds and half their range, and the first seed at both rates."""
    found, rows = metrics("sparsify-h200.json"), []
    for name in ("dense", "magnitude", "random", "butterfly", "pixelfly"):
        first = {rate: found[f"quality {name} lr{rate} s0"]["valid_loss"] for rate in ("0.0003", "0.001")}
        rate = min(first, key=lambda rate: first[rate])
        runs = [found[f"quality {name} lr{rate} s{seed}"] for seed in range(3)]
        losses = [run["valid_loss"] for run in runs]
        share = runs[0].get("density", 1.0)
        spread = f"{sum(losses) / 3:.3f} ± {(max(losses) - min(losses)) / 2:.3f}"
        rows.append(f"| {name} | {share:.3f} | {first['0.0003']:.3f} | {first['0.001']:.3f} | {spread} |")
    return rows


def navier_stokes() -> list[str]:
    found = metrics("operators-h200.json")
    return [f"{found[f'{model}-1e-3-s0']['test_relative_l2']:.4f}" for model in ("fno", "monarch_no")]


def burgers() -> list[str]:
    found = metrics("burgers-cpu.json")
    said = []
    for model in ("fno", "monarch_no"):
        values = [found[f"burgers-{model}-s{seed}"]["test_relative_l2"] for seed in range(3)]
        said.append(f"{sum(values) / 3:.4f} ± {(max(values) - min(values)) / 2:.4f}")
    return said


PAGES = {
    "vision.md": [small_models, on_a_gpu, steps_of_the_paper],
    "mri.md": [mri, mri_on_a_gpu, mri_of_few_slices],
    "attention.md": [attention],
    "sparsify.md": [sparse_models, sparse_layers, sparse_losses],
    "operators.md": [burgers, navier_stokes],
}


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_records(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    missing = [row for make in PAGES[page] for row in make() if row not in text]
    assert not missing, "\n".join(missing)


def test_few_slices_in_the_page_on_mri_are_those_of_the_record() -> None:
    page, runs = (ROOT / "docs" / "mri.md").read_text(encoding="utf-8"), metrics("mri-cpu.json")
    for shots, ours, theirs in ((1, "17.45", "20.97"), (5, "20.24", "21.12"), (20, "22.08", "21.24")):
        few = [runs[f"monarch_sense-shots{shots}-4x-s{seed}"] for seed in range(3)]
        means = [f"{sum(run[name] for run in few) / 3:.2f}" for name in ("test_psnr_db", "test_scaled_sense_psnr_db")]
        assert means == [ours, theirs]
        assert ours in page
