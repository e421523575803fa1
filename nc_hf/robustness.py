"""Gaussian noise on test images, the same on any number of processes (Table 6 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nc_hf.data.images import ImageSet

if TYPE_CHECKING:
    from nc_hf.trainer import NCTrainer

NoiseScale = Literal["pixels", "normalized"]
PAPER_STDS = (0.0, 0.1, 0.2, 0.3, 0.4)  # of Table 6


def check_noise(std: float, scale: str, seed: int = 0) -> None:
    """Refuse settings of noise that mean nothing.

    Raises:
        ValueError: for a standard deviation that is negative or not finite, an unknown scale, or a negative seed.
    """
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"the standard deviation of the noise must be 0 or more, got {std}.")
    if scale not in get_args(NoiseScale):
        raise ValueError(f"the scale of the noise must be one of {', '.join(get_args(NoiseScale))}, got {scale!r}.")
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
            which is stronger (4 times on CIFAR). The paper does not say; its accuracies are those of the first, while
            the second brings ResNet-32 on CIFAR-10-LT from 81 to 23 percent at 0.1 already.
        seed: of the noise.

    Raises:
        ValueError: as `check_noise`.
    """

    def __init__(self, images: ImageSet, std: float, scale: NoiseScale = "normalized", seed: int = 0) -> None:
        check_noise(std, scale, seed)
        self.images, self.std, self.seed = images, std, seed
        self.labels, self.class_counts, self.class_names = images.labels, images.class_counts, images.class_names
        self.collate = images.collate
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


def noisy_accuracies(
    trainer: NCTrainer, images: ImageSet, std: Sequence[float], scale: NoiseScale = "normalized", seed: int = 0
) -> list[float]:
    """Top-1 accuracy of a trainer's classifier at each standard deviation of the noise.

    Args:
        trainer: holds the classifier; all its processes must call this.
        images: without noise, usually the test split.
        std: standard deviations.
        scale: as for `NoisyImages`.
        seed: of the noise.
    """
    accuracies = []
    for value in std:
        right = 0
        for _, logits, labels in trainer.iterate_features(NoisyImages(images, value, scale, seed)):
            right += (logits.argmax(dim=1) == labels).sum().item()
        accuracies.append(right / len(images))
    return accuracies


def noise_settings(
    std: Sequence[str] | None, scale: str | None = None, seed: str | None = None
) -> dict[str, Any] | None:
    """Arguments of `noisy_accuracies` from words of a command line; None when no standard deviation is given.

    Raises:
        ValueError: for values that are not numbers, or that `NoisyImages` would refuse.
    """
    if std is None:
        if scale or seed:
            raise ValueError("--noise-scale and --noise-seed need --noise-std and its standard deviations.")
        return None
    try:
        settings = {
            "std": [float(word) for word in std],
            "scale": scale or "normalized",
            "seed": int(seed or 0),
        }
    except ValueError as error:
        raise ValueError(f"--noise-std and --noise-seed take numbers, such as 0 0.1 0.2: {error}.") from None
    for value in settings["std"]:
        check_noise(value, settings["scale"], settings["seed"])
    return settings


def noise_table(noise: dict[str, Any]) -> str:
    """Percentages of each head as aligned text, one column a standard deviation."""
    rows = [[f"noise std ({noise['scale']})", *(f"{std:g}" for std in noise["std"])]]
    rows += [[head, *(f"{100 * value:.2f}" for value in values)] for head, values in noise["accuracy"].items()]
    width = max(len(row[0]) for row in rows)
    return "\n".join("  ".join([row[0].rjust(width), *(cell.rjust(5) for cell in row[1:])]) for row in rows)
