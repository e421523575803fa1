"""mixup over the batches of all processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from nc_hf.data.augment import draw_mixup, mix


def mix_batch(accelerator: Accelerator, batch: dict[str, Any], alpha: float, seed: int) -> None:
    """Mix the images of a batch, in place, with partners from the batches of all processes, as one process would.

    Args:
        accelerator: of the processes, all of which must call this with batches of one size.
        batch: `pixel_values` (B, 3, H, W) are replaced by their mixtures; `partners` (B,), the second labels, and
            `mixing`, the coefficient of the first, are added.
        alpha: lambda ~ Beta(alpha, alpha), one for all images.
        seed: of lambda and partners.
    """
    images, labels = batch["pixel_values"], batch["labels"]
    all_images, all_labels = accelerator.gather((images, labels))
    mixing, partners = draw_mixup(len(all_labels), alpha, seed)
    first = accelerator.process_index * len(labels)
    partners = partners[first : first + len(labels)].to(labels.device)
    batch["pixel_values"] = mix(images, all_images[partners], mixing)
    batch["partners"] = all_labels[partners]
    batch["mixing"] = torch.tensor(mixing, dtype=torch.float32, device=labels.device)
