"""mixup and CutMix over the batches of all processes."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

MixupRule = Literal["weighted", "dominant", "first"]  # labels of a mixed feature in the collapse terms


class Mixing(NamedTuple):
    """How the images of a batch are mixed with partners: share of the first, partners (B,), and a box, or None."""

    share: float
    partners: Tensor
    box: tuple[int, int, int, int] | None = None  # top, bottom, left, right, in pixels


def draw_mixup(batch_size: int, alpha: float, seed: int) -> Mixing:
    """A share ~ Beta(alpha, alpha) and a permutation of partners, functions of the seed alone (Zhang et al. 2018)."""
    generator = np.random.default_rng(seed)
    return Mixing(float(generator.beta(alpha, alpha)), torch.from_numpy(generator.permutation(batch_size)))


def draw_cutmix(batch_size: int, alpha: float, seed: int, size: tuple[int, int]) -> Mixing:
    """One box for the batch, cut from its partners, whose area is 1 - Beta(alpha, alpha) (Yun et al. 2019).

    Args:
        batch_size: B.
        alpha: 1 in the paper.
        seed: of box and partners.
        size: (H, W) of the images in pixels. A box at the border is cut off; the share is what is really left.
    """
    generator = np.random.default_rng(seed)
    share, partners = generator.beta(alpha, alpha), torch.from_numpy(generator.permutation(batch_size))
    sides = [(0, 0), (0, 0)]
    for axis, length in enumerate(size):
        half, center = int(length * np.sqrt(1 - share)) // 2, int(generator.integers(length))
        sides[axis] = max(center - half, 0), min(center + half, length)
    (top, bottom), (left, right) = sides
    area = (bottom - top) * (right - left)
    return Mixing(1 - area / (size[0] * size[1]), partners, (top, bottom, left, right))


def mix(images: Tensor, partner_images: Tensor, mixing: Mixing) -> Tensor:
    """share * images + (1 - share) * partner_images, or images with the partners' box pasted in; both (B, C, H, W)."""
    if mixing.box is None:
        return torch.lerp(partner_images, images, mixing.share)
    top, bottom, left, right = mixing.box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = partner_images[..., top:bottom, left:right]
    return mixed


def mix_batch(
    accelerator: Accelerator, batch: dict[str, Any], *, mixup_alpha: float, cutmix_alpha: float, seed: int
) -> None:
    """Mix the images of a batch, in place, with partners from the batches of all processes, as one process would.

    With both alphas above 0 each batch is of one kind, by the toss of a coin.

    Args:
        accelerator: of the processes, all of which must call this with batches of one size.
        batch: `pixel_values` (B, 3, H, W) are replaced by their mixtures; `partners` (B,), the second labels, and
            `mixing`, the share of the first, are added.
        mixup_alpha: of `draw_mixup`; 0 is off.
        cutmix_alpha: of `draw_cutmix`; 0 is off.
        seed: of all that is drawn.
    """
    images, labels = batch["pixel_values"], batch["labels"]
    all_images, all_labels = accelerator.gather((images, labels))
    cut = cutmix_alpha and (not mixup_alpha or np.random.default_rng((seed, 1)).random() < 0.5)
    if cut:
        mixing = draw_cutmix(len(all_labels), cutmix_alpha, seed, tuple(images.shape[-2:]))
    else:
        mixing = draw_mixup(len(all_labels), mixup_alpha, seed)
    first = accelerator.process_index * len(labels)
    partners = mixing.partners[first : first + len(labels)].to(labels.device, non_blocking=True)
    batch["pixel_values"] = mix(images, all_images[partners], mixing)
    batch["partners"] = all_labels[partners]
    batch["mixing"] = torch.full((), mixing.share, dtype=torch.float32, device=labels.device)
