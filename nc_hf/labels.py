"""What a data set knows of its labels, without looking at an image."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PLACEHOLDER = re.compile(r"(LABEL_)?\d+")
MAX_SHOWN = 5  # pairs of names in a warning


def labels_of(dataset: Any, column: str | None = None) -> np.ndarray | None:
    """Labels (N,) int64 of a data set that tells them: an attribute `labels` or `targets`, or a column; else None.

    Args:
        dataset: of any kind.
        column: of a `datasets.Dataset`; found when None.

    Raises:
        ValueError: for a column that is not there, or does not hold one integer an image.
    """
    for name in ("labels", "targets"):  # the second one of torchvision
        if hasattr(dataset, name):
            labels = np.asarray(getattr(dataset, name))
            if (
                hasattr(dataset, "__len__")
                and labels.shape == (len(dataset),)
                and np.issubdtype(labels.dtype, np.integer)
            ):
                return labels.astype(np.int64)  # else it is something else of that name, such as the names of classes
    found = _labels_and_names(dataset, column)
    return None if found is None else found[0]


def counts_of(dataset: Any, column: str | None = None, num_classes: int | None = None) -> np.ndarray | None:
    """Images per class (K,) int64 of a data set that tells them or its labels; else None.

    Args:
        dataset: of any kind.
        column: as for `labels_of`.
        num_classes: K where the data set does not tell it; else its largest label plus one is taken.

    Raises:
        ValueError: as `labels_of`, and for a label below 0.
    """
    if hasattr(dataset, "class_counts"):
        return np.asarray(dataset.class_counts, dtype=np.int64)
    if (found := _labels_and_names(dataset, column)) is not None:
        return np.bincount(found[0], minlength=len(found[1]))
    if (labels := labels_of(dataset)) is None:
        return None
    check_not_negative(labels)
    return np.bincount(labels, minlength=num_classes or 0)


def names_of(dataset: Any, column: str | None = None) -> list[str] | None:
    """K class names of a data set that has some; else None. Arguments and errors as `labels_of`."""
    if hasattr(dataset, "class_names"):
        return dataset.class_names
    classes = getattr(dataset, "classes", None)  # of torchvision
    if isinstance(classes, list | tuple) and classes and all(isinstance(name, str) for name in classes):
        return list(classes)
    name = _label_column(dataset, column)
    return None if name is None else getattr(dataset.features[name], "names", None)


def check_not_negative(labels: np.ndarray) -> None:
    """Refuse labels (N,) of which one is below 0, with ValueError naming the first."""
    if len(rows := np.flatnonzero(labels < 0)):
        raise ValueError(
            f"labels must be 0 or more, got {labels[rows[0]]} of image {rows[0]} ({len(rows)} are below 0). Number "
            "the classes from 0, and leave images without a class out."
        )


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels of a batch that are not one class an image.

    Args:
        labels: of any shape.
        num_classes: K.

    Raises:
        ValueError: for another shape than (B,), a floating point type, or a label outside [0, K).
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"`labels` must be one integer an image, got {tuple(labels.shape)} of {labels.dtype}. To mix "
            "images, set mixup_alpha instead of mixing in the data set."
        )
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.numel():
        raise ValueError(
            f"`labels` must lie in 0 to {num_classes - 1}, the model's outputs, got {outside[0].item()} in a batch. "
            "Number the classes from 0, leave images without a class out, or load the model with more num_labels."
        )


def label_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Images of each class in a batch, without waiting for the device, as `torch.bincount` does.

    Args:
        labels: (B,) integers in [0, K).
        num_classes: K.

    Returns:
        (K,) integers.
    """
    return labels.new_zeros(num_classes).index_add_(0, labels, torch.ones_like(labels))


def check_class_order(source: str, own: Sequence[str] | None, names: Sequence[str]) -> None:
    """Refuse data that number the classes of a model otherwise than the model; warn once of other names.

    Numbers and placeholders (`LABEL_0`) instead of names tell nothing, unless both have the same ones. A model with
    another number of classes is passed, since it gets a new head.

    Args:
        source: of the model.
        own: its K class names, if it has any.
        names: of the data.

    Raises:
        ValueError: for a name of both that is another class in each.
    """
    if not own or len(own) != len(names):
        return
    if set(own) != set(names) and (_are_placeholders(own) or _are_placeholders(names)):
        return
    differing = [k for k in range(len(own)) if own[k] != names[k]]
    known = set(own)
    moved = next((k for k in differing if names[k] in known), None)
    if moved is not None:
        k, name = differing[0], names[moved]
        raise ValueError(
            f"{source} has the classes of the data in another order: its class {k} is {own[k]!r}, and that of the "
            f"data is {names[k]!r}; {name!r} is class {list(own).index(name)} of the model and {moved} of the data. "
            "Give the data the labels that the model was trained with; a class folder renamed shifts those after it."
        )
    if differing:
        pairs = ", ".join(f"{own[k]!r} and {names[k]!r}" for k in differing[:MAX_SHOWN])
        more = f" and {len(differing) - MAX_SHOWN} more" if len(differing) > MAX_SHOWN else ""
        _warn_once(
            f"{source} and the data name {len(differing)} of {len(own)} classes differently: {pairs}{more}. Make sure "
            "that they are the same classes, or train the model on the data."
        )


def _are_placeholders(names: Sequence[str]) -> bool:
    return all(PLACEHOLDER.fullmatch(str(name)) for name in names)


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


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
