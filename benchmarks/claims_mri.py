"""Rows of docs/claims.md on accelerated MRI, from results/mri-full-cpu.json and results/mri-h200.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from evidence import Finding, finished

from structlin.report.records import Record

RESULTS = Path(__file__).resolve().parents[1] / "results"
PATHS = (RESULTS / "mri-full-cpu.json", RESULTS / "mri-h200.json")
TITLE = "Accelerated MRI"
INTRO = (
    "Published on the SKM-TEA knee scans (two echoes, E1 and E2); here on brain slices with simulated coils, so that "
    "differences between methods compare and absolute numbers do not. SENSE's weight and "
    "brightness are tuned on training slices. The measured k-space at hand has samples at an eighth of its places, so "
    "nobody knows its true image, and nothing is compared on it."
)
SEEDS, FEW = range(3), (1, 5, 20, 100)
Measure = Callable[[], Finding]


def found(paths: Sequence[Path] = PATHS) -> dict[str, Record]:
    """The finished runs by name, of several files that of the last."""
    return {name: record for path in paths for name, record in finished(path).items()}


def value(record: Record, name: str) -> float:
    """A metric that every run has."""
    number = record["metrics"][f"test_{name}"]
    assert number is not None
    return number


def above_sense(accelerations: tuple[int, ...], paths: Sequence[Path] = PATHS) -> Finding:
    """What the learned transform gains over SENSE at its best brightness; reproduced where it
    gains in both with every seed."""
    said, gains, where = [], [], set()
    for acceleration in accelerations:
        runs = [found(paths).get(f"monarch_sense-{acceleration}x-s{seed}") for seed in SEEDS]
        if None in runs:
            return None
        where |= {run["device"]["type"] for run in runs if run}
        texts = []
        for metric, form in (("psnr_db", ".2f"), ("ssim", ".3f")):
            ours = [value(run, metric) for run in runs if run]
            start = [value(run, f"scaled_sense_{metric}") for run in runs if run]
            gains += [a - b for a, b in zip(ours, start, strict=True)]
            half = (max(ours) - min(ours)) / 2
            texts.append(f"{mean(ours):{form}} ± {half:{form}} over {mean(start):{form}}")
        said.append(f"{acceleration}x: {texts[0]} dB, SSIM {texts[1]}")
    device = ", on a CPU" if where == {"cpu"} else ""
    return f"{'; '.join(said)} (3 seeds{device})", min(gains) > 0


def few_shot(paths: Sequence[Path] = PATHS) -> Finding:
    """pSNR and SSIM by number of training slices at 4x; reproduced where the transform leads up to 20 slices."""
    said, leads = [], []
    for shots in FEW:
        scores = {}
        for method in ("monarch_sense", "unet"):
            runs = [found(paths).get(f"{method}-shots{shots}-4x-s{seed}") for seed in SEEDS]
            if None in runs:
                return None
            scores[method] = [mean(value(run, metric) for run in runs if run) for metric in ("psnr_db", "ssim")]
        ours, theirs = scores["monarch_sense"], scores["unet"]
        if shots <= 20:
            leads += [a > b for a, b in zip(ours, theirs, strict=True)]
        said.append(f"{shots}: {ours[0]:.2f} / {ours[1]:.3f} beside {theirs[0]:.2f} / {theirs[1]:.3f}")
    return "slices: Monarch beside U-Net, dB / SSIM, 4x: " + "; ".join(said), all(leads)


def smaller(paths: Sequence[Path] = PATHS) -> Finding:
    """Parameters of the U-Net over those of the transform, a complex number counted as two."""
    runs = [found(paths).get(f"{method}-4x-s0") for method in ("monarch_sense", "unet")]
    if None in runs:
        return None
    counts = [run["metrics"]["model_params"] or 0 for run in runs if run]
    ratio = counts[1] / (2 * counts[0])
    return f"{ratio:.0f} times fewer ({counts[0]:,} complex, {counts[1]:,} real)", ratio >= 100


ROWS: list[tuple[str, str, str, Measure]] = [
    (
        "SENSE with a Monarch transform above SENSE, three accelerations",
        "E1 pSNR 34.3 over 32.8, 32.3 over 30.9, 31.2 over 30.1; SSIM .886 over .871, .843 over .819, .812 over .789",
        "Dao et al. 2022, table 3.4",
        lambda: above_sense((2, 4, 8)),
    ),
    (
        "Better than a U-Net after few training examples",
        "E1, fewest volumes: 33.8 dB, SSIM .886 beside 29.4, .848",
        "Dao et al. 2022, table 3.5",
        few_shot,
    ),
    ("Far fewer parameters than a U-Net", "137 times fewer", "Dao et al. 2022, table 3.5", smaller),
]
"""Claim, published value, source, and what measures it; None where a record is missing."""
