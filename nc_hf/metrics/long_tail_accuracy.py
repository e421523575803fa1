"""Accuracy over all images, over classes, and over many-, medium- and few-shot classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FEW_BELOW = 20
MANY_ABOVE = 100


def long_tail_accuracy(
    predictions: Sequence[int],
    references: Sequence[int],
    class_counts: Sequence[int],
    *,
    few_below: int = FEW_BELOW,
    many_above: int = MANY_ABOVE,
) -> dict[str, Any]:
    """Top-1 accuracies in [0, 1], the groups as in Liu et al. 2019 (OLTR).

    The accuracy of a group is the unweighted mean over its classes. `accuracy` counts images alike and
    `class_mean_accuracy` counts classes alike; they differ where the test set is not balanced.

    Args:
        predictions: (N,) integers.
        references: (N,) integers in [0, K).
        class_counts: (K,) training images per class.
        few_below: classes with fewer training images are few.
        many_above: classes with more training images are many; all others are medium.

    Returns:
        `accuracy`, `class_mean_accuracy`, those of `accuracy_many`, `accuracy_medium`, `accuracy_few` whose group has
        a class in the test set, and `per_class_accuracy`, a list of K with None for classes without a test image.

    Raises:
        ValueError: for no images, unequal lengths, labels that are not integers in [0, K), or crossed thresholds.
    """
    predictions, references = _class_ids("predictions", predictions), _class_ids("references", references)
    groups = frequency_groups(class_counts, few_below=few_below, many_above=many_above)
    if len(predictions) != len(references):
        raise ValueError(f"there are {len(predictions)} predictions but {len(references)} references. Pair them up.")
    check_references(references, len(class_counts))
    correct = predictions == references
    totals = np.bincount(references, minlength=len(class_counts))
    present = totals > 0
    per_class = np.bincount(references, weights=correct, minlength=len(class_counts)) / np.maximum(totals, 1)
    metrics = {"accuracy": float(correct.mean()), "class_mean_accuracy": float(per_class[present].mean())}
    for name, members in groups.items():
        if (members & present).any():
            metrics[f"accuracy_{name}"] = float(per_class[members & present].mean())
    metrics["per_class_accuracy"] = [float(a) if p else None for a, p in zip(per_class, present, strict=True)]
    return metrics


def frequency_groups(
    class_counts: Sequence[int], *, few_below: int = FEW_BELOW, many_above: int = MANY_ABOVE
) -> dict[str, np.ndarray]:
    """Masks (K,) of the classes called many, medium and few.

    Args:
        class_counts: (K,) training images per class; a class without any is few.
        few_below: classes with fewer images are few.
        many_above: classes with more images are many.

    Raises:
        ValueError: when a class could be both few and many.
    """
    if few_below > many_above + 1:
        raise ValueError(
            f"`few_below`={few_below} and `many_above`={many_above} overlap: a class could be both. "
            "Use few_below <= many_above + 1."
        )
    counts = np.asarray(class_counts)
    many, few = counts > many_above, counts < few_below
    return {"many": many, "medium": ~(many | few), "few": few}


def check_references(references: np.ndarray, num_classes: int) -> None:
    """Refuse an empty test set and labels that name no class.

    Args:
        references: (N,) integers.
        num_classes: K.

    Raises:
        ValueError: for no references, or one outside [0, K).
    """
    if len(references) == 0:
        raise ValueError("there are no references: the test set is empty.")
    if references.min() < 0 or references.max() >= num_classes:
        row = int(np.argmax((references < 0) | (references >= num_classes)))
        raise ValueError(
            f"references must lie in [0, {num_classes}), the range of `class_counts`; row {row} has {references[row]}."
        )


def _class_ids(name: str, values: Sequence[int]) -> np.ndarray:
    ids = np.asarray(values)
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
        raise ValueError(
            f"`{name}` must be one integer an image, got shape {ids.shape} of {ids.dtype}. "
            "Pass class ids: the argmax of logits, not the logits."
        )
    return ids.astype(np.int64)
