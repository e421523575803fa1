"""Calibration: how far a classifier's confidence is from its accuracy."""

from __future__ import annotations

import numpy as np

from nc_hf.metrics.long_tail_accuracy import check_references

NUM_BINS = 15


def expected_calibration_error(
    logits_or_probabilities: np.ndarray, references: np.ndarray, num_bins: int = NUM_BINS
) -> dict[str, float]:
    """Expected and maximum calibration error of the top-1 confidence (Guo et al. 2017), in [0, 1].

    Args:
        logits_or_probabilities: (N, K) floats. Taken as probabilities when every row is non-negative and sums to 1,
            else as logits, to which a softmax is applied.
        references: (N,) integers in [0, K).
        num_bins: equal bins of (0, 1], closed on the right.

    Returns:
        `ece`, the mean gap weighted by the images of each bin, and `mce`, the largest gap.

    Raises:
        ValueError: for scores that are not finite or not (N, K), references outside [0, K), or no images.
    """
    scores, references = np.asarray(logits_or_probabilities, dtype=np.float64), np.asarray(references)
    if scores.ndim != 2 or references.shape != scores.shape[:1]:
        raise ValueError(f"needs scores (N, K) and references (N,), got shapes {scores.shape} and {references.shape}.")
    check_references(references, scores.shape[1])
    if not np.isfinite(scores).all():
        row = int(np.argmax(~np.isfinite(scores).all(axis=1)))
        raise ValueError(f"row {row} of the scores is not finite: {scores[row][:5]}. Check the model's outputs.")
    probabilities = scores if _are_probabilities(scores) else _softmax(scores)
    confidences = probabilities.max(axis=1)
    counts, accuracies, mean_confidences = reliability_bins(
        confidences, probabilities.argmax(axis=1) == references, num_bins
    )
    gaps = np.abs(accuracies - mean_confidences)
    return {"ece": float(gaps @ counts / len(references)), "mce": float(gaps.max())}


def reliability_bins(
    confidences: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bars of a reliability diagram.

    Args:
        confidences: (N,) in [0, 1]; one of exactly 0 lies in no bin.
        correct: (N,) booleans.
        num_bins: equal bins of (0, 1], closed on the right.

    Returns:
        Images, accuracy and mean confidence of each bin, (num_bins,); 0 for an empty bin.

    Raises:
        ValueError: for fewer than one bin.
    """
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1, got {num_bins}.")
    confidences = np.minimum(np.asarray(confidences, dtype=np.float64), 1)  # a rounded softmax may exceed 1
    bins = np.digitize(confidences, np.linspace(0, 1, num_bins + 1), right=True)

    def total(weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(bins, weights=weights, minlength=num_bins + 1)[1:]

    counts = total()
    return counts, total(correct) / np.maximum(counts, 1), total(confidences) / np.maximum(counts, 1)


def _are_probabilities(scores: np.ndarray) -> bool:
    # Rounded to bfloat16, a thousand probabilities sum to 1 within 0.005.
    return bool((scores >= 0).all() and np.allclose(scores.sum(axis=1), 1, atol=1e-2))


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
