"""What a data set knows of its labels, without looking at an image."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def labels_of(dataset: Any) -> np.ndarray | None:
    """Labels (N,) int64 of a data set that tells them: an attribute `labels`, or a ClassLabel column; else None."""
    if hasattr(dataset, "labels"):
        return np.asarray(dataset.labels, dtype=np.int64)
    if _is_hugging_face(dataset):
        from nc_hf.data.long_tail import dataset_labels

        return dataset_labels(dataset)[0]
    return None


def counts_of(dataset: Any) -> np.ndarray | None:
    """Images per class (K,) int64 of a data set that tells them; else None."""
    if hasattr(dataset, "class_counts"):
        return np.asarray(dataset.class_counts, dtype=np.int64)
    if _is_hugging_face(dataset):
        from nc_hf.data.long_tail import class_counts

        return class_counts(dataset)
    return None


def _is_hugging_face(dataset: Any) -> bool:
    datasets = sys.modules.get("datasets")  # a data set of that library means the library is imported
    return datasets is not None and isinstance(dataset, datasets.Dataset)
