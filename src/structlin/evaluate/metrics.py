"""How good predictions are, as each task asks, with a standard error for any of it.

The values are torchmetrics'. The standard error is the jackknife's (Efron and Tibshirani 1993, equation 11.5): the
spread of the values that come out when one example is left out. For accuracy it is the sample standard deviation over
the root of the number of examples; for F1, Matthews' and other correlations it needs no other formula and no random
numbers. Examples with the same label and prediction leave out alike, so there are only as many values as there are
different pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of equal entries."""
    return float((predicted == labels).double().mean())


def f1(predicted: Tensor, labels: Tensor) -> float:
    """F1 of class 1 of two; 0 where nothing is predicted or labelled 1."""
    from torchmetrics.functional.classification import binary_f1_score

    return float(binary_f1_score(predicted, labels))


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Matthews' correlation of classes; 0 where all predictions or all labels are the same."""
    from torchmetrics.functional.classification import multiclass_matthews_corrcoef

    if len(predicted.unique()) < 2 or len(labels.unique()) < 2:
        return 0.0
    classes = int(torch.cat([predicted, labels]).max()) + 1
    return float(multiclass_matthews_corrcoef(predicted, labels, num_classes=classes))


def pearson(predicted: Tensor, labels: Tensor) -> float:
    """Pearson's correlation; 0 where all predictions or all labels are the same."""
    from torchmetrics.functional import pearson_corrcoef

    return _correlation(pearson_corrcoef, predicted, labels)


def spearman(predicted: Tensor, labels: Tensor) -> float:
    """Spearman's rank correlation; 0 where all predictions or all labels are the same."""
    from torchmetrics.functional import spearman_corrcoef

    return _correlation(spearman_corrcoef, predicted, labels)


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
"""By name; each takes predictions and labels ``[examples]``, int64 classes or, for the last two, numbers."""


def check_finite(predicted: Tensor) -> None:
    """Raise an ArithmeticError where what a model said holds numbers that are not finite."""
    if wrong := int((~predicted.isfinite()).sum()):
        raise ArithmeticError(f"{wrong} of {predicted.numel()} outputs of the model are not finite")


def measure(names: Sequence[str], predicted: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Each metric in ``names``, and under ``NAME_stderr`` its standard error; null for fewer than three examples.

    Raises:
        ArithmeticError: for predictions that are not finite.
    """
    check_finite(predicted)
    found: dict[str, float | None] = {}
    for name in names:
        found[name] = METRICS[name](predicted, labels)
        found[f"{name}_stderr"] = standard_error(METRICS[name], predicted, labels)
    return found


def standard_error(metric: Callable[[Tensor, Tensor], float], predicted: Tensor, labels: Tensor) -> float | None:
    """Jackknife standard error of ``metric``; None for fewer than three examples."""
    n = len(labels)
    if n < 3:
        return None
    pairs = torch.stack([predicted.double(), labels.double()], dim=1)
    _, kinds, counts = pairs.unique(dim=0, return_inverse=True, return_counts=True)
    keep = torch.ones(n, dtype=torch.bool)
    values = torch.zeros(len(counts), dtype=torch.float64)
    for kind in range(len(counts)):
        one = int((kinds == kind).nonzero()[0])
        keep[one] = False
        values[kind] = metric(predicted[keep], labels[keep])
        keep[one] = True
    mean = (values * counts).sum() / n
    return math.sqrt(float(((values - mean).square() * counts).sum()) * (n - 1) / n)


def _correlation(metric: Callable[[Tensor, Tensor], Tensor], predicted: Tensor, labels: Tensor) -> float:
    if len(predicted.unique()) < 2 or len(labels.unique()) < 2:
        return 0.0
    return float(metric(predicted.double(), labels.double()))
