"""The metrics as modules of the library `evaluate`, and a `compute_metrics` for the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction

from nc_hf.metrics.calibration import NUM_BINS, expected_calibration_error
from nc_hf.metrics.long_tail_accuracy import FEW_BELOW, MANY_ABOVE, frequency_groups, long_tail_accuracy

CLASS_IDS = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
SCORES = datasets.Features(
    {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
)
INPUTS = """
Args:
    predictions: class ids (N,), or logits or probabilities (N, K).
    references: class ids (N,).
"""


class LongTailAccuracy(evaluate.Metric):
    """`long_tail_accuracy` as a module of `evaluate`; predictions are class ids (N,) or scores (N, K).

    Args:
        class_counts: (K,) training images per class.
        few_below: classes with fewer training images are few.
        many_above: classes with more training images are many.
        **kwargs: those of `evaluate.Metric`, such as `num_process`, `process_id` and `experiment_id`.

    Raises:
        ValueError: when a class could be both few and many.
    """

    def __init__(
        self,
        class_counts: Sequence[int],
        *,
        few_below: int = FEW_BELOW,
        many_above: int = MANY_ABOVE,
        **kwargs: Any,
    ) -> None:
        """Check the thresholds before anything is evaluated."""
        frequency_groups(class_counts, few_below=few_below, many_above=many_above)
        self.class_counts, self.thresholds = class_counts, {"few_below": few_below, "many_above": many_above}
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy over images, over classes, and over many-, medium- and few-shot classes.",
            citation="Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019.",
            inputs_description=INPUTS,
            features=[CLASS_IDS, SCORES],
        )

    def _compute(self, *, predictions: list, references: list) -> dict[str, Any]:
        predictions = np.asarray(predictions)
        predictions = predictions if predictions.ndim == 1 else predictions.argmax(axis=1)
        return long_tail_accuracy(predictions, references, self.class_counts, **self.thresholds)


class CalibrationError(evaluate.Metric):
    """`expected_calibration_error` as a module of `evaluate`; predictions are logits or probabilities (N, K).

    Args:
        num_bins: equal bins of (0, 1].
        **kwargs: those of `evaluate.Metric`.
    """

    def __init__(self, *, num_bins: int = NUM_BINS, **kwargs: Any) -> None:
        """Keep the number of bins."""
        self.num_bins = num_bins
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Expected and maximum calibration error of the top-1 confidence.",
            citation="Guo et al., On Calibration of Modern Neural Networks, ICML 2017.",
            inputs_description=INPUTS,
            features=SCORES,
        )

    def _compute(self, *, predictions: list, references: list) -> dict[str, float]:
        return expected_calibration_error(predictions, references, self.num_bins)


def compute_metrics_for(
    class_counts: Sequence[int],
    *,
    few_below: int = FEW_BELOW,
    many_above: int = MANY_ABOVE,
    num_bins: int = NUM_BINS,
    test_counts: Sequence[int] | None = None,
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for any Trainer: accuracies and calibration from logits and labels.

    Args:
        class_counts: (K,) training images per class.
        few_below: classes with fewer training images are few.
        many_above: classes with more training images are many.
        num_bins: of the calibration error.
        test_counts: (K,) images per class of the evaluated set; when given, every evaluation must have counted each
            image exactly once, whatever the number of processes.

    Returns:
        A function to floats: `accuracy`, `class_mean_accuracy`, `accuracy_many|medium|few` of groups that have a test
        image, `ece`, `mce`. It raises ValueError when the images counted are not those of `test_counts`.

    Raises:
        ValueError: when a class could be both few and many.
    """
    accuracy = LongTailAccuracy(class_counts, few_below=few_below, many_above=many_above, keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, np.asarray(prediction.label_ids)
        if isinstance(logits, tuple):  # models with further outputs put the logits first
            logits = logits[0]
        if test_counts is not None:
            _check_counted_once(labels, np.asarray(test_counts))
        # Class ids, not scores: a copy of N x K scores in Arrow would be large for many classes.
        metrics = accuracy.compute(predictions=logits.argmax(axis=1), references=labels)
        del metrics["per_class_accuracy"]
        return metrics | expected_calibration_error(logits, labels, num_bins)

    return compute_metrics


def _check_counted_once(labels: np.ndarray, test_counts: np.ndarray) -> None:
    counted = np.bincount(labels, minlength=len(test_counts))
    if not np.array_equal(counted, test_counts):
        wrong = int(np.argmax(counted[: len(test_counts)] != test_counts))
        raise ValueError(
            f"{len(labels)} images were evaluated but the set has {test_counts.sum()}: class {wrong} was counted "
            f"{counted[wrong]} times and has {test_counts[wrong]} images. Gather with `gather_for_metrics`."
        )
