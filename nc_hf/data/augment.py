"""Image transforms as functions of (seed, draw, index), for whole batches and for single images."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms_factory import transforms_imagenet_eval
from torch import Tensor
from torchvision.transforms import v2

from nc_hf.choices import check_choice

Augmentation = Literal["none", "crop", "crop_flip", "auto_augment", "resized_crop", "rand_augment"]

BATCHED = ("none", "crop", "crop_flip", "auto_augment")
RAND_AUGMENT = "rand-n2-m10-mstd0.5"


@dataclass(frozen=True)
class ImageTransform:
    """From a decoded image to the model's input.

    Evaluation resizes the shorter side (with `crop_mode="squash"` both sides) to size / crop_pct and crops the center.
    Training does the same and then, by `augmentation`:

    * `"none"`: nothing; `"crop"`: a random crop after padding by an eighth (4 pixels of 32) with black; `"crop_flip"`:
      that and a horizontal flip, the augmentation of CIFAR;
    * `"auto_augment"`: that, the AutoAugment policy of CIFAR-10 (Cubuk et al. 2019) and Cutout of half the side;

    or, from the image in its own size:

    * `"resized_crop"`: RandomResizedCrop, flip, color jitter (0.4, 0.4, 0.4), the standard of ImageNet-LT;
    * `"rand_augment"`: RandomResizedCrop, flip, color jitter (0.4, 0.4, 0.4, 0.1) with probability 0.8, gray with 0.2,
      RandAugment `rand-n2-m10-mstd0.5`, as the authors' code for ImageNet-LT.

    Args:
        size: (H, W) of the input in pixels, at least 8 each for crops to differ.
        mean: of the three channels, for values in [0, 1].
        std: of the three channels, for values in [0, 1].
        interpolation: `"bilinear"`, `"bicubic"`, `"nearest"` or `"lanczos"`.
        crop_pct: share of the resized image that the center crop keeps.
        crop_mode: `"center"`, `"squash"` or `"border"`, as timm's networks name them.
        augmentation: of training images.

    Raises:
        ValueError: for an unknown augmentation.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    augmentation: Augmentation = "none"

    def __post_init__(self) -> None:
        """Check the name of the augmentation."""
        check_choice("augmentation", self.augmentation, Augmentation.__args__)

    @property
    def is_batched(self) -> bool:
        """Whether training images can be kept decoded at the input size and augmented as a batch."""
        return self.augmentation in BATCHED

    def to_size(self, image: PIL.Image.Image) -> Tensor:
        """Resize and center-crop a decoded RGB image, as timm evaluates: (H, W, 3) uint8."""
        if image.size == self.size[::-1] and self.crop_pct == 1:
            return torch.from_numpy(np.array(image))
        return torch.as_tensor(self._evaluation(image)).permute(1, 2, 0)

    def normalize(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to (B, 3, H, W) float32, channels last in memory."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return images.to(torch.float32).mul_(1 / (255 * std)).sub_(mean / std).permute(0, 3, 1, 2)

    def augment_batch(self, images: Tensor, seed: int, draws: np.ndarray, indices: np.ndarray) -> Tensor:
        """Augment images (B, H, W, 3) uint8 of the input size, each by a function of (seed, its draw, its index)."""
        if self.augmentation == "none":
            return images
        if self.augmentation == "auto_augment":
            uniform = draw_uniform(seed, draws, indices, 6)
            return cutout(self._apply_policy(self._crop(images, uniform), uniform[:, 3]), uniform[:, 4:])
        return self._crop(images, draw_uniform(seed, draws, indices, 3))

    def _crop(self, images: Tensor, uniform: np.ndarray) -> Tensor:
        """Crop the padded images, and flip them unless they are only to be cropped."""
        size, height, width, _ = images.shape
        pad_y, pad_x = height // 8, width // 8
        top, left = (uniform[:, i] * (2 * pad + 1) for i, pad in ((0, pad_y), (1, pad_x)))
        rows = top.astype(np.int64)[:, None] + np.arange(height)
        columns = left.astype(np.int64)[:, None] + np.arange(width)
        if self.augmentation != "crop":
            flipped = uniform[:, 2] < 0.5
            columns[flipped] = columns[flipped, ::-1]
        padded = F.pad(images, (0, 0, pad_x, pad_x, pad_y, pad_y))
        # Gathering whole pixels by one flat index takes half the time of indexing by image, row and column.
        rows += np.arange(size)[:, None] * padded.shape[1]
        flat = rows[:, :, None] * padded.shape[2] + columns[:, None, :]
        return padded.view(-1, 3).index_select(0, torch.from_numpy(flat.ravel())).view(images.shape)

    def _apply_policy(self, images: Tensor, uniform: np.ndarray) -> Tensor:
        """Change each image in place by AutoAugment, drawn with a seed of its own."""
        with seeded(0):
            for image, number in zip(images, uniform.tolist(), strict=True):
                torch.default_generator.manual_seed(int(number * 2**32))
                changed = self._training(PIL.Image.fromarray(image.numpy()))
                image.copy_(torch.from_numpy(np.array(changed)))
        return images

    def augment_one(self, image: PIL.Image.Image, seed: int, draw: int, index: int) -> Tensor:
        """Augment one decoded RGB image, for what is not batched: (H, W, 3) uint8."""
        number = draw_uniform(seed, np.array([draw]), np.array([index]), 1)[0, 0]
        with seeded(int(number * 2**32)):
            return torch.from_numpy(np.array(self._training(image)))

    @cached_property
    def _evaluation(self) -> Callable[[PIL.Image.Image], np.ndarray]:
        """To (3, H, W) uint8."""
        return transforms_imagenet_eval(
            self.size,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            interpolation=self.interpolation,
            use_prefetcher=True,
        )

    @cached_property
    def _training(self) -> v2.Transform:
        if self.augmentation == "auto_augment":
            return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
        interpolation = v2.InterpolationMode(self.interpolation)
        steps: list[Any] = [
            v2.RandomResizedCrop(self.size, interpolation=interpolation),
            v2.RandomHorizontalFlip(),
        ]
        if self.augmentation == "resized_crop":
            return v2.Compose([*steps, v2.ColorJitter(0.4, 0.4, 0.4)])
        settings = {
            "translate_const": int(min(self.size) * 0.45),
            "img_mean": tuple(min(255, round(255 * channel)) for channel in self.mean),
        }
        steps += [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            rand_augment_transform(RAND_AUGMENT, settings),
        ]
        return v2.Compose(steps)


def cutout(images: Tensor, uniform: np.ndarray) -> Tensor:
    """Paint a square of half the side black, cut off at the border (DeVries and Taylor 2017).

    Args:
        images: (B, H, W, 3), which are changed.
        uniform: (B, 2) in [0, 1); where the square's center lies, as a share of H and of W.
    """
    height, width = images.shape[1:3]
    half = min(height, width) // 4
    covered = []
    for share, length in zip(uniform.T, (height, width), strict=True):
        distance = np.arange(length) - (share * length).astype(np.int64)[:, None]
        covered.append((distance >= -half) & (distance < half))
    images[torch.from_numpy(covered[0][:, :, None] & covered[1][:, None, :])] = 0
    return images


def draw_uniform(seed: int, draws: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1), (B, count) float64, each row a function of (seed, draw, index) alone.

    A counter-based generator (the finalizer of SplitMix64, Steele et al. 2014): no state, no order, and no Python
    loop over images.
    """
    keys = _scramble(np.uint64(seed) + np.zeros(len(draws), dtype=np.uint64))
    for number in (draws, indices):
        keys = _scramble(keys ^ _scramble(np.asarray(number).astype(np.uint64)))
    counters = _scramble(keys[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (counters >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _scramble(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch's CPU, and put them back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
