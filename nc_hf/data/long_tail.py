"""Long-tailed subsets of any labelled data set, by choosing rows; no image is decoded."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from numbers import Real
from typing import Literal

import numpy as np
from datasets import Dataset

from nc_hf.data.columns import dataset_labels

logger = logging.getLogger(__name__)

Profile = Literal["exponential", "step", "pareto"]

PARETO_POWER = 6  # ImageNet-LT (Liu et al. 2019)
FEWEST_TO_SPLIT = 5  # images of a class that gives some to a validation split


def long_tailed_counts(
    class_sizes: Sequence[int], imbalance_ratio: float, profile: Profile = "exponential"
) -> np.ndarray:
    """Images to keep of each class; class 0 is the head.

    With n_max the size of the largest class and k the class index:

    * `"exponential"` (Cao et al. 2019): int(n_max r^(-k / (K - 1))), truncated, which gives the 12,406 images of
      CIFAR-10-LT and the 10,847 of CIFAR-100-LT at r = 100;
    * `"step"`: n_max for the first half of the classes, int(n_max / r) for the others;
    * `"pareto"`: quantiles of a Lomax distribution of power 6 scaled to n_max, at least n_max / r.

    A class smaller than that keeps what it has; no class falls below 1 image unless it is empty.

    Args:
        class_sizes: (K,) images there are.
        imbalance_ratio: r >= 1, largest over smallest class.
        profile: one of the three.

    Returns:
        (K,) int64.

    Raises:
        ValueError: for a ratio below 1 or not finite, or an unknown profile.
    """
    if not isinstance(imbalance_ratio, Real) or not (math.isfinite(imbalance_ratio) and imbalance_ratio >= 1):
        raise ValueError(
            "`imbalance_ratio` is the largest class over the smallest and must be a number of at least 1, got "
            f"{imbalance_ratio!r}."
        )
    sizes = np.asarray(class_sizes, dtype=np.int64)
    num_classes, largest = len(sizes), int(sizes.max(initial=0))
    if profile == "exponential":
        wanted = [int(largest * (1 / imbalance_ratio) ** (k / max(num_classes - 1, 1))) for k in range(num_classes)]
    elif profile == "step":
        heads = num_classes - num_classes // 2
        wanted = [largest if k < heads else int(largest / imbalance_ratio) for k in range(num_classes)]
    elif profile == "pareto":
        quantiles = (1 - (np.arange(num_classes)[::-1] + 0.5) / num_classes) ** (-1 / PARETO_POWER) - 1
        wanted = np.maximum(np.floor(largest * quantiles / quantiles.max(initial=1e-9)), largest / imbalance_ratio)
    else:
        raise ValueError(f"`profile` must be one of exponential, step, pareto, got {profile!r}.")
    wanted = np.asarray(wanted).astype(np.int64)
    if raised := np.flatnonzero((wanted < 1) & (sizes > 0)).tolist():
        logger.warning("imbalance_ratio %s leaves no image to classes %s; each keeps one.", imbalance_ratio, raised)
    return np.minimum(np.maximum(wanted, 1), sizes)


def long_tailed_indices(
    labels: np.ndarray, num_classes: int, imbalance_ratio: float, profile: Profile = "exponential", seed: int = 0
) -> np.ndarray:
    """Rows of a long-tailed subset, ascending.

    The draw is that of LDAM-DRW: numpy's legacy generator, each class in ascending order shuffled and its first n_k
    kept. So seed 0 gives the subset of the literature, and a larger ratio a subset of a smaller one.

    Args:
        labels: (N,) integers in [0, K).
        num_classes: K.
        imbalance_ratio: see `long_tailed_counts`.
        profile: see `long_tailed_counts`.
        seed: of the draw.
    """
    sizes = np.bincount(labels, minlength=num_classes)
    generator, kept = np.random.RandomState(seed), []
    for k, count in enumerate(long_tailed_counts(sizes, imbalance_ratio, profile)):
        rows = np.flatnonzero(labels == k)
        generator.shuffle(rows)
        kept.append(rows[:count])
    return np.sort(np.concatenate(kept))


def make_long_tailed(
    dataset: Dataset,
    imbalance_ratio: float,
    profile: Profile = "exponential",
    seed: int = 0,
    label_column: str | None = None,
) -> Dataset:
    """A long-tailed subset of a labelled data set, of the same type and with the same columns.

    No image is decoded or repeated. Where classes are too small for the ratio, the real one is logged.

    Args:
        dataset: with a `ClassLabel` (or integer) column.
        imbalance_ratio: r >= 1.
        profile: `"exponential"`, `"step"` or `"pareto"`; see `long_tailed_counts`.
        seed: of the draw; 0 gives the literature's CIFAR-LT.
        label_column: found when None.

    Raises:
        ValueError: as `long_tailed_counts` and `dataset_labels`.
    """
    labels, names = dataset_labels(dataset, label_column)
    indices = long_tailed_indices(labels, len(names), imbalance_ratio, profile, seed)
    counts = np.bincount(labels[indices], minlength=len(names))
    present = counts[counts > 0]
    logger.info(
        "long tail: %d of %d images, classes of %d to %d, ratio %.4g (%g asked for)",
        len(indices),
        len(labels),
        present.max(),
        present.min(),
        present.max() / present.min(),
        imbalance_ratio,
    )
    return dataset.select(indices)


def class_counts(dataset: Dataset, label_column: str | None = None) -> np.ndarray:
    """Images of each class, (K,) int64; classes without any count 0."""
    labels, names = dataset_labels(dataset, label_column)
    return np.bincount(labels, minlength=len(names))


def train_validation_split(
    dataset: Dataset, fraction: float = 0.1, seed: int = 0, label_column: str | None = None
) -> tuple[Dataset, Dataset]:
    """Hold a stratified validation split out of a training set, so that nothing is ever chosen on the test split.

    Of each class with at least 5 images max(1, round(fraction n_k)) are held out, but never all, of smaller classes
    none: a validation score is then a mean over the classes present.

    Args:
        dataset: to split.
        fraction: of each class, in (0, 1).
        seed: of the draw.
        label_column: found when None.

    Returns:
        Training part and validation part.

    Raises:
        ValueError: for a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the validation fraction must lie in (0, 1), got {fraction}.")
    labels, names = dataset_labels(dataset, label_column)
    generator, held = np.random.default_rng(seed), []
    for k in range(len(names)):
        rows = np.flatnonzero(labels == k)
        if len(rows) >= FEWEST_TO_SPLIT:
            count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
            held.append(generator.permutation(rows)[:count])
    held = np.sort(np.concatenate(held)) if held else np.empty(0, dtype=np.int64)
    return dataset.select(np.setdiff1d(np.arange(len(labels)), held)), dataset.select(held)
