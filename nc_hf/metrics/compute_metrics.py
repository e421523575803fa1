"""A `compute_metrics` for any Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nc_hf.metrics.calibration import expected_calibration_error
from nc_hf.metrics.long_tail_accuracy import (
    FEW_BELOW,
    MANY_ABOVE,
    check_references,
    frequency_groups,
    long_tail_accuracy,
)

if TYPE_CHECKING:
    from transformers import EvalPrediction


def compute_metrics_for(
    class_counts: Sequence[int],
    *,
    few_below: int = FEW_BELOW,
    many_above: int = MANY_ABOVE,
    test_counts: Sequence[int] | None = None,
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for any Trainer: accuracies and calibration from logits and labels.

    Args:
        class_counts: (K,) training images per class.
        few_below: classes with fewer training images are few.
        many_above: classes with more training images are many.
        test_counts: (K,) images per class of the evaluated set; when given, every evaluation must have counted each
            image exactly once, whatever the number of processes.

    Returns:
        A function to floats: `accuracy`, `class_mean_accuracy`, `accuracy_many|medium|few` of groups that have a test
        image, `ece`, `mce`. It raises ValueError when the images counted are not those of `test_counts`.

    Raises:
        ValueError: when a class could be both few and many.
    """
    bounds = {"few_below": few_below, "many_above": many_above}
    frequency_groups(class_counts, **bounds)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, np.asarray(prediction.label_ids)
        if isinstance(logits, tuple):  # models with further outputs put the logits first
            logits = logits[0]
        if test_counts is not None:
            _check_counted_once(labels, np.asarray(test_counts))
        metrics = long_tail_accuracy(logits.argmax(axis=1), labels, class_counts, **bounds)
        del metrics["per_class_accuracy"]
        return metrics | expected_calibration_error(logits, labels)

    compute_metrics.bounds = bounds
    return compute_metrics


def _check_counted_once(labels: np.ndarray, test_counts: np.ndarray) -> None:
    check_references(labels, len(test_counts))
    counted = np.bincount(labels, minlength=len(test_counts))
    if not np.array_equal(counted, test_counts):
        wrong = int(np.argmax(counted[: len(test_counts)] != test_counts))
        raise ValueError(
            f"{len(labels)} images were evaluated but the set has {test_counts.sum()}: class {wrong} was counted "
            f"{counted[wrong]} times and has {test_counts[wrong]} images. Gather with `gather_for_metrics`."
        )
