"""Class weights and samplers against imbalance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Sampler

ClassWeighting = Literal["none", "inverse", "effective_number"]
SamplerName = Literal["instance", "class_balanced", "square_root", "effective_number"]


def class_weights(class_counts: Sequence[int], scheme: ClassWeighting, *, beta: float = 0.9999) -> np.ndarray:
    """Loss weight of each class, with mean 1 over the classes that have images.

    Args:
        class_counts: (K,) training images per class.
        scheme: `"none"`: all 1; `"inverse"`: proportional to 1/n_k, the re-weighting (RW) of the paper's text;
            `"effective_number"`: proportional to (1 - beta) / (1 - beta^n_k) (Cui et al. 2019), the RW and DRW of
            LDAM-DRW and of the authors' code.
        beta: of the effective number, in [0, 1).

    Returns:
        (K,) float64; 0 for a class without images.

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


class EpochSampler(Sampler):
    """Draws of one epoch as a function of (seed, epoch) alone, so all processes see one stream and resume is exact.

    `"instance"` shuffles; the others draw as many images as there are, with replacement: `"class_balanced"` with
    probability 1/n_k, `"square_root"` with n_k^(-1/2), `"effective_number"` with the weights of that name (on
    CIFAR-10-LT r=100 a ratio of 79 is levelled, not 100).

    Args:
        labels: (N,) integers in [0, K).
        name: one of the four.
        seed: of the stream.
        with_draws: yield `(index, draw)` with a counter over all epochs, for data sets that augment by draw; else the
            bare index.

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(self, labels: np.ndarray, name: SamplerName = "instance", *, seed: int, with_draws: bool = False):
        self.labels = torch.as_tensor(np.asarray(labels), dtype=torch.long)
        self.name, self.seed, self.with_draws, self.epoch = name, seed, with_draws, 0
        counts = torch.bincount(self.labels).numpy()
        if name == "instance":
            self.weights = None
        elif name == "square_root":
            self.weights = torch.from_numpy(1 / np.sqrt(np.maximum(counts, 1)))[self.labels]
        elif name in ("class_balanced", "effective_number"):
            scheme = "inverse" if name == "class_balanced" else "effective_number"
            self.weights = torch.from_numpy(class_weights(counts, scheme))[self.labels]
        else:
            raise ValueError(
                f"`sampler` must be one of instance, class_balanced, square_root, effective_number, got {name!r}."
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Draws an epoch: the number of images."""
        return len(self.labels)

    def __iter__(self) -> Iterator[int] | Iterator[tuple[int, int]]:
        """Indices, or (index, draw) pairs, of the current epoch."""
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch))
        if self.weights is None:
            order = torch.randperm(len(self), generator=generator)
        else:
            order = torch.multinomial(self.weights, len(self), replacement=True, generator=generator)
        indices = order.tolist()
        if self.with_draws:
            first = self.epoch * len(self)
            return iter([(index, first + position) for position, index in enumerate(indices)])
        return iter(indices)


def mix_seeds(*numbers: int) -> int:
    """One 63-bit seed from several numbers, far apart for neighbouring ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
