"""Class weights against imbalance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

ClassWeighting = Literal["none", "inverse", "effective_number"]


def class_weights(class_counts: Sequence[int], scheme: ClassWeighting, *, beta: float = 0.9999) -> np.ndarray:
    """Loss weight of each class, with mean 1 over the classes that have images.

    Args:
        class_counts: (K,) training images per class.
        scheme: `"none"`: all 1; `"inverse"`: proportional to 1/n_k, the re-weighting (RW) of the paper's text;
            `"effective_number"`: proportional to (1 - beta) / (1 - beta^n_k) (Cui et al. 2019), the RW and DRW of
            LDAM-DRW and of the authors' code.
        beta: of the effective number, in [0, 1).

    Returns:
        (K,) float64; 0 for a class without images. For a loss, in the type of the logits:
        `cross_entropy(logits, labels, weight=torch.tensor(weights, dtype=logits.dtype))`.

    Raises:
        ValueError: for an unknown scheme, a beta outside [0, 1), or when no class has an image.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    present = counts > 0
    if not present.any():
        raise ValueError(f"no class has a training image: class_counts={counts.tolist()[:10]}. Check the labels.")
    if scheme == "none":
        raw = np.ones_like(counts)
    elif scheme == "inverse":
        raw = 1 / np.where(present, counts, 1)
    elif scheme == "effective_number":
        if not 0 <= beta < 1:
            raise ValueError(f"`beta` of the effective number must lie in [0, 1), got {beta}.")
        raw = (1 - beta) / (1 - np.power(beta, np.where(present, counts, 1)))
    else:
        raise ValueError(f"`class_weighting` must be one of none, inverse, effective_number, got {scheme!r}.")
    raw = np.where(present, raw, 0)
    return raw / raw.sum() * present.sum()
