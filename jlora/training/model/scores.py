"""What a validation is told by: mean loss with perplexity, or with the metrics of a confusion matrix."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jlora.training.model.losses import Sums
from jlora.training.model.preferences import told


def summarize(found: Sums, classify: bool) -> dict[str, Any]:
    """Mean loss; perplexity of language models, accuracy, F1 and Matthews of classes, what is told of preferences."""
    loss = float(found.loss) / float(found.weight)
    accuracy = float(found.correct) / float(found.weight)
    if found.more:
        return {"loss": loss, "accuracy": accuracy, **told(found.more)}
    if not classify:
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    confusion = np.asarray(found.confusion, np.float64)
    return {"loss": loss, "accuracy": accuracy, "f1": f1(confusion), "matthews": matthews(confusion)}


def f1(confusion: np.ndarray) -> float:
    """The F1 score, `2 TP / (2 TP + FP + FN)`, as scikit-learn has it.

    Of two labels it is that of the second one, as in GLUE; of more the mean over all labels (macro). A label that neither
    occurs nor is predicted has 0.

    Args:
        confusion: `[labels, labels]`, rows of each label (first axis) by the one that was predicted.
    """
    both = confusion.sum(0) + confusion.sum(1)
    each = 2 * np.diag(confusion) / np.where(both > 0, both, 1.0)
    return float(each[1] if len(each) == 2 else each.mean())


def matthews(confusion: np.ndarray) -> float:
    """The Matthews correlation coefficient of any number of labels; 0 where all rows have, or get, one label.

    Args:
        confusion: as for `f1`.

    Reference:
        Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006.
    """
    true, predicted, total = confusion.sum(1), confusion.sum(0), confusion.sum()
    covariance = np.trace(confusion) * total - true @ predicted
    scale = math.sqrt((total**2 - true @ true) * (total**2 - predicted @ predicted))
    return float(covariance / scale) if scale > 0 else 0.0
