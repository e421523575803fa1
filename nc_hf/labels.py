"""What a data set knows of its labels, without looking at an image."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def labels_of(dataset: Any, column: str | None = None) -> np.ndarray | None:
    """Labels (N,) int64 of a data set that tells them: an attribute `labels`, or a column of labels; else None.

    Args:
        dataset: of any kind.
        column: of a `datasets.Dataset`; found when None.

    Raises:
        ValueError: for a column that is not there, or does not hold one integer an image.
    """
    if hasattr(dataset, "labels"):
        return np.asarray(dataset.labels, dtype=np.int64)
    found = _labels_and_names(dataset, column)
    return None if found is None else found[0]


def counts_of(dataset: Any, column: str | None = None) -> np.ndarray | None:
    """Images per class (K,) int64 of a data set that tells them; else None. Arguments and errors as `labels_of`."""
    if hasattr(dataset, "class_counts"):
        return np.asarray(dataset.class_counts, dtype=np.int64)
    found = _labels_and_names(dataset, column)
    return None if found is None else np.bincount(found[0], minlength=len(found[1]))


def names_of(dataset: Any, column: str | None = None) -> list[str] | None:
    """K class names of a data set that has some; else None. Arguments and errors as `labels_of`."""
    if hasattr(dataset, "class_names"):
        return dataset.class_names
    name = _label_column(dataset, column)
    return None if name is None else getattr(dataset.features[name], "names", None)


def _labels_and_names(dataset: Any, column: str | None) -> tuple[np.ndarray, list[str]] | None:
    name = _label_column(dataset, column)
    if name is None:
        return None
    from nc_hf.data.columns import dataset_labels

    return dataset_labels(dataset, name)


def _label_column(dataset: Any, column: str | None) -> str | None:
    """The column of labels of a `datasets.Dataset`; None where there is no one such column, and for other sets."""
    datasets = sys.modules.get("datasets")  # a data set of that library means the library is imported
    if datasets is None or not isinstance(dataset, datasets.Dataset):
        return None
    from nc_hf.data.columns import find_label_column, label_candidates

    one = column is not None or len(label_candidates(dataset)) == 1
    return find_label_column(dataset, column) if one else None
