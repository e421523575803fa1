"""Samplers: which images an epoch draws, as a function of (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from nc_hf.choices import check_choice
from nc_hf.labels import check_not_negative
from nc_hf.rebalancing import class_weights

SamplerName = Literal[
    "instance",
    "class_balanced",
    "square_root",
    "effective_number",
    "progressive",
    "class_aware",
    "reversed",
    "bilateral",
    "two_views",
]
NAMES = SamplerName.__args__

IMAGES_PER_CLASS = 4  # in a row by "class_aware", as decoupling and MiSLAS


class EpochSampler(Sampler):
    """Draws of one epoch as a function of (seed, epoch) alone, so all processes see one stream and resume is exact.

    `"instance"` shuffles. The others draw as many images as there are, and but for `"class_aware"` with replacement:

    * `"class_balanced"`: class k with probability 1/K, an image with one in proportion to 1/n_k;
    * `"square_root"`: class k in proportion to n_k^(1/2) (Kang et al. 2020);
    * `"effective_number"`: images with the class weights of that name, as the code of LDAM-DRW and of the authors (on
      CIFAR-10-LT r=100 a ratio of 79 is levelled, not 100);
    * `"progressive"`: from n_k/N in the first epoch to 1/K after the last (Kang et al. 2020);
    * `"reversed"`: class k in proportion to 1/n_k (Zhou et al. 2020);
    * `"class_aware"`: four images of one class after the other, classes and their images in shuffled cycles (Shen et
      al. 2016), cut to one epoch as decoupling and MiSLAS do.

    Two give twice as many draws, for methods that look at pairs: `"bilateral"` alternates between `"instance"` and
    `"reversed"` (BBN), `"two_views"` draws each image of a shuffle twice in a row (contrastive losses).

    A pass takes the epoch of the last `set_epoch`, as the Trainer calls it, and each further pass the next one:

        sampler = EpochSampler(labels, "class_balanced", seed=0)
        loader = DataLoader(dataset, batch_size=64, sampler=sampler)
        losses = [train_step(batch) for epoch in range(10) for batch in loader]  # other draws in each epoch

    Args:
        labels: (N,) integers in [0, K).
        name: one of the above.
        seed: of the stream.
        num_epochs: of the run; `"progressive"` needs it.
        with_draws: yield `(index, draw)` with a counter over all epochs, for data sets that augment by draw; else the
            bare index.
        effective_number_beta: of `"effective_number"`; 0.9999 in the code of LDAM-DRW.

    Raises:
        ValueError: for an unknown name, labels that are no integers or below 0, no label, or `"progressive"` without a
            number of epochs.
    """

    def __init__(
        self,
        labels: np.ndarray,
        name: SamplerName = "instance",
        *,
        seed: int,
        num_epochs: float | None = None,
        with_draws: bool = False,
        effective_number_beta: float = 0.9999,
    ) -> None:
        check_choice("sampler", name, NAMES)
        if name == "progressive" and not (num_epochs and num_epochs > 0):
            raise ValueError(
                "`sampler: progressive` needs the length of the run: set num_train_epochs, not max_steps."
            )
        labels = np.asarray(labels)
        if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"labels must be (N,) integers of at least one image, got {labels.dtype} of shape {labels.shape}. "
                'Strings become integers by `dataset.class_encode_column("label")`.'
            )
        check_not_negative(labels)
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        self.counts = torch.bincount(self.labels).numpy()
        self.name, self.seed, self.num_epochs = name, seed, num_epochs
        self.with_draws, self.effective_number_beta = with_draws, effective_number_beta
        self.epoch, self._taken = 0, False  # whether a pass has taken this epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch, self._taken = epoch, False

    def __len__(self) -> int:
        """Draws an epoch: the number of images, or twice that."""
        return len(self.labels) * (2 if self.name in ("bilateral", "two_views") else 1)

    def __iter__(self) -> Iterator[int] | Iterator[tuple[int, int]]:
        """Indices, or (index, draw) pairs, of the epoch that was set, else of the one after the last pass."""
        self.epoch, self._taken = self.epoch + self._taken, True
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch))
        indices = self._order(generator).tolist()
        if self.with_draws:
            first = self.epoch * len(self)
            indices = [(index, first + position) for position, index in enumerate(indices)]
        yield from indices

    def _order(self, generator: torch.Generator) -> Tensor:
        count = len(self.labels)
        if self.name == "class_aware":
            return class_aware_order(self.labels, IMAGES_PER_CLASS, count, generator)
        if self.name in ("instance", "two_views", "bilateral"):
            order = torch.randperm(count, generator=generator)
            if self.name == "instance":
                return order
            second = order if self.name == "two_views" else self._weighted(generator)
            return torch.stack([order, second], dim=1).flatten()
        return self._weighted(generator)

    def _weighted(self, generator: torch.Generator) -> Tensor:
        weights = torch.from_numpy(self._image_weights())[self.labels]
        return torch.multinomial(weights, len(weights), replacement=True, generator=generator)

    def _image_weights(self) -> np.ndarray:
        """(K,) in proportion to the chance of one image of each class."""
        counts = np.maximum(self.counts, 1).astype(np.float64)
        if self.name == "square_root":
            return counts**-0.5
        if self.name in ("reversed", "bilateral"):
            return counts**-2.0
        if self.name == "effective_number":
            return class_weights(self.counts, "effective_number", beta=self.effective_number_beta)
        if self.name == "progressive":
            balanced = min(self.epoch / self.num_epochs, 1.0)
            return (1 - balanced) / self.counts.sum() + balanced / ((self.counts > 0).sum() * counts)
        return 1 / counts


def class_aware_order(labels: Tensor, images_per_class: int, count: int, generator: torch.Generator) -> Tensor:
    """Indices that take several images of one class, then of the next; classes and images in shuffled cycles.

    Args:
        labels: (N,) integers.
        images_per_class: in a row; a class with fewer repeats some.
        count: number of indices.
        generator: of the shuffles.
    """
    classes, visits = labels.unique(), -(-count // images_per_class)
    sequence = _cycles(classes, visits, generator)
    order = torch.empty(visits, images_per_class, dtype=torch.long)
    # Places in either, class by class: one sort instead of a scan for each class.
    places = (
        values.argsort(stable=True).split(torch.bincount(values, minlength=int(classes[-1]) + 1)[classes].tolist())
        for values in (sequence, labels)
    )
    for rows, images in zip(*places, strict=True):
        order[rows] = _cycles(images, len(rows) * images_per_class, generator).view(-1, images_per_class)
    return order.flatten()[:count]


def _cycles(items: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Shuffles of the items, one after the other, cut to a length."""
    shuffles = [items[torch.randperm(len(items), generator=generator)] for _ in range(-(-count // len(items)))]
    return torch.cat([*shuffles, items[:0]])[:count]


def mix_seeds(*numbers: int) -> int:
    """One 63-bit seed from several numbers, far apart for neighbouring ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
