"""The metrics as modules of the library `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

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
        ValueError: when a class could be both few and many; by `compute`, for scores that are not finite.
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
        if not np.isfinite(predictions).all():
            raise ValueError("there are scores that are not finite. Check that training did not diverge.")
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
