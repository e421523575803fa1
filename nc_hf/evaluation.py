"""What a trained classifier is worth: accuracies by class frequency, calibration, geometry of its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nc_hf.labels import counts_of
from nc_hf.metrics.calibration import expected_calibration_error
from nc_hf.metrics.geometry import measure_geometry
from nc_hf.metrics.long_tail_accuracy import FEW_BELOW, MANY_ABOVE, check_references, long_tail_accuracy
from nc_hf.models.normalized_heads import equivalent_linear
from nc_hf.trainer import NCTrainer


def evaluate_classifier(
    trainer: NCTrainer,
    dataset: Dataset,
    class_counts: Sequence[int],
    *,
    few_below: int = FEW_BELOW,
    many_above: int = MANY_ABOVE,
) -> dict[str, Any]:
    """Accuracies and calibration of a trainer's classifier on one data set, in one pass.

    Args:
        trainer: holds the classifier; all its processes must call this.
        dataset: usually the test split.
        class_counts: (K,) training images per class, which say what is many, medium and few.
        few_below: classes with fewer training images are few.
        many_above: classes with more training images are many.

    Returns:
        `accuracy`, `class_mean_accuracy`, `accuracy_many|medium|few` (an empty group is absent),
        `per_class_accuracy`, `ece`, `mce`, and the number of `images`.

    Raises:
        ValueError: for a data set whose images per class are not known, or not those of its samples.
        RuntimeError: when images were left out or seen twice.
    """
    column = trainer.label_column if trainer.label_column in getattr(dataset, "column_names", ()) else None
    if (expected := counts_of(dataset, column, len(class_counts))) is None:
        raise ValueError(
            f"the images per class of {type(dataset).__name__} are not known. Give it an attribute `class_counts` of "
            "one integer per class, or `labels` of one integer per image."
        )
    batches = [(logits.cpu(), labels.cpu()) for _, logits, labels in trainer.iterate_features(dataset)]
    if not batches:
        raise ValueError(f"{type(dataset).__name__} is empty: there is nothing to evaluate.")
    logits, labels = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
    check_references(labels, max(len(class_counts), len(expected)))
    seen = np.bincount(labels, minlength=max(len(class_counts), len(expected)))
    expected = np.pad(expected, (0, len(seen) - len(expected)))  # classes after its last have no image
    if (seen != expected).any() and len(labels) == expected.sum():
        differing = (seen != expected).argmax()
        raise ValueError(
            f"the samples of {type(dataset).__name__} have {seen[differing]} images of class {differing}, and what it "
            f"tells beside them says {expected[differing]}. Name the column of the labels by NCTrainer's label_column."
        )
    if (seen != expected).any():
        raise RuntimeError(f"the evaluation saw {seen.sum()} images of {len(dataset)}, or some of them twice.")
    metrics = long_tail_accuracy(
        logits.argmax(axis=1), labels, class_counts, few_below=few_below, many_above=many_above
    )
    metrics |= expected_calibration_error(logits, labels)
    return metrics | {"images": len(labels)}


def geometry_of(trainer: NCTrainer, dataset: Dataset, means_and_counts: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """NC1-NC4 of a trainer's classifier on one data set, from one more pass over its images without augmentation.

    Args:
        trainer: holds the classifier; all its processes must call this.
        dataset: the training images, or the test images.
        means_and_counts: `trainer.class_means(dataset)`.
    """
    weight, bias = equivalent_linear(trainer.task.head)

    def batches() -> Any:
        for features, _, labels in trainer.iterate_features(dataset):
            yield features.cpu(), labels.cpu()

    return measure_geometry(
        batches, weight.cpu(), bias.cpu(), trainer.task.num_classes, means_and_counts=means_and_counts
    )
