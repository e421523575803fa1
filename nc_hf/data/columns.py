"""Which column holds the images, which the labels, and whether the labels are usable; no image is decoded."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Image

logger = logging.getLogger(__name__)

USUAL_LABELS = ("label", "labels", "fine_label")


def find_image_column(dataset: Dataset, column: str | None = None) -> str:
    """Name of the image column: the given one, else the only column of type `Image`.

    Raises:
        ValueError: when there is no such column, or more than one.
    """
    candidates = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    return _choose(dataset, "image", column, candidates)


def find_label_column(dataset: Dataset, column: str | None = None) -> str:
    """Name of the label column: the given one, else the only `ClassLabel`, else the one with a usual name.

    Raises:
        ValueError: when there is no such column, or more than one.
    """
    return _choose(dataset, "label", column, label_candidates(dataset))


def label_candidates(dataset: Dataset) -> list[str]:
    """Columns that may hold the labels: the only `ClassLabel`, else those of a usual name, else every `ClassLabel`."""
    candidates = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    if len(candidates) != 1:
        candidates = [name for name in candidates or dataset.column_names if name in USUAL_LABELS] or candidates
    return candidates


def _choose(dataset: Dataset, kind: str, column: str | None, candidates: list[str]) -> str:
    if column is not None:
        if column not in dataset.column_names:
            raise ValueError(f"`{kind}_column` is {column!r}; the columns are {', '.join(dataset.column_names)}.")
        return column
    if len(candidates) != 1:
        found = ", ".join(candidates) or f"none among {', '.join(dataset.column_names)}"
        raise ValueError(f"there must be one {kind} column; found {found}. Name it by `{kind}_column`.")
    return candidates[0]


def dataset_labels(dataset: Dataset, label_column: str | None = None) -> tuple[np.ndarray, list[str]]:
    """Labels (N,) int64 and class names (K,) of a data set.

    K comes from the `ClassLabel`, so classes without images count; for a plain integer column it is the largest label
    plus one.

    Raises:
        ValueError: for labels that are not one integer each in [0, K); the message names column, row and range.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"labels can be counted in a datasets.Dataset, not in {type(dataset).__name__}: load the data set without "
            "streaming, and choose one split."
        )
    column = find_label_column(dataset, label_column)
    feature = dataset.features[column]
    values = dataset.with_format("arrow", columns=[column])[:].column(column)
    if not pa.types.is_integer(values.type):
        hint = ""
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            hint = f' Turn names into labels with dataset.class_encode_column("{column}").'
        raise ValueError(f"column {column!r} must hold one integer label an image, found {values.type}.{hint}")
    if values.null_count:
        row = next(row for row, value in enumerate(values) if not value.is_valid)
        raise ValueError(f"column {column!r} has {values.null_count} missing labels, the first in row {row}.")
    labels = values.to_numpy().astype(np.int64)
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        names = [str(k) for k in range(int(labels.max(initial=-1)) + 1)]
        logger.info("column %r has no class names: %d classes are taken from its largest label", column, len(names))
    outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"column {column!r} has {len(outside)} labels {f'outside 0 to {len(names) - 1}' if names else 'below 0'}, "
            f"the first is {labels[row]} in row {row}. Remove or relabel those images."
        )
    return labels, names
