"""Gaussian noise on test images, the same on any number of processes (Table 6 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nc_hf.choices import check_choice
from nc_hf.data.images import ImageSet
from nc_hf.results import aligned

if TYPE_CHECKING:
    from nc_hf.trainer import NCTrainer

NoiseScale = Literal["pixels", "normalized"]


def check_noise(std: float, seed: int = 0) -> None:
    """Refuse noise that means nothing.

    Raises:
        ValueError: for a standard deviation that is negative or not finite, or a negative seed.
    """
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"the standard deviation of the noise must be 0 or more, got {std}.")
    if seed < 0:
        raise ValueError(f"the seed of the noise must be 0 or more, got {seed}.")


class NoisyImages(Dataset):
    """An image set with white Gaussian noise on each image, its labels and classes unchanged.

    The noise of an image is a function of (seed, index), so it does not depend on batches or processes, and images at
    two standard deviations have the same noise at another strength. Values that leave the range of an image are not
    cut off: the noise that the network sees is Gaussian.

    Args:
        images: whose batches are normalized by `transform.mean` and `transform.std`.
        std: standard deviation of the noise; 0 leaves the images as they are.
        scale: `"normalized"`, where the network sees the image; or `"pixels"`, where it lies in [0, 1] before that,
            which is stronger (5 times on CIFAR). The paper does not say; its accuracies are those of the first, while
            the second brings ResNet-32 on CIFAR-10-LT from 81 to 23 percent at 0.1 already.
        seed: of the noise.

    Raises:
        ValueError: as `check_noise`, or for an unknown scale.
    """

    def __init__(self, images: ImageSet, std: float, scale: NoiseScale = "normalized", seed: int = 0) -> None:
        check_noise(std, seed)
        check_choice("scale", scale, get_args(NoiseScale))
        self.images, self.std, self.seed = images, std, seed
        self.labels, self.class_counts, self.class_names = images.labels, images.class_counts, images.class_names
        self._divisor = torch.tensor(images.transform.std)[:, None, None] if scale == "pixels" else torch.ones(1)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A ready batch of the image set, `pixel_values` (B, 3, H, W) float32 with noise added."""
        batch = self.images.__getitems__(indices)
        if self.std:
            shape = batch["pixel_values"].shape[1:]
            noise = torch.stack([self._noise(index, shape) for index in indices])
            batch["pixel_values"] = batch["pixel_values"] + self.std * noise / self._divisor
        return batch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One image without a batch axis."""
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def _noise(self, index: int, shape: torch.Size) -> Tensor:
        generator = np.random.default_rng((self.seed, index))
        return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def noisy_accuracies(trainer: NCTrainer, noisy: Sequence[NoisyImages]) -> list[float]:
    """Top-1 accuracy of a trainer's classifier at each standard deviation of the noise.

    Args:
        trainer: holds the classifier; all its processes must call this.
        noisy: the same images, usually the test split, with noise of each standard deviation.
    """
    accuracies = []
    for images in noisy:
        # Without noise they are the images that an evaluation before may have kept the features of.
        found = trainer.iterate_features(images if images.std else images.images)
        right = sum((logits.argmax(dim=1) == labels).sum().item() for _, logits, labels in found)
        accuracies.append(right / len(images))
    return accuracies


def noise_table(noise: dict[str, Any]) -> str:
    """Percentages of each head as aligned text, one column a standard deviation."""
    rows = [[f"noise std ({noise['scale']})", *(f"{std:g}" for std in noise["std"])]]
    rows += [[head, *(f"{100 * value:.2f}" for value in values)] for head, values in noise["accuracy"].items()]
    return "\n".join(aligned(rows))
