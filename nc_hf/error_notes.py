"""What to do about errors that torch raises in a training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FULL_DEVICE = (
    "Halve per_device_train_batch_size and double gradient_accumulation_steps: an update then has the "
    "same images, but class means of `ema` and `batch` centers are of half as many (`learned`: the same)."
)
ONE_IMAGE = (
    "A BatchNorm of this network sees maps of 1x1, and this batch has one image, so there is nothing to take a "
    "variance of. If it is the last of an epoch, set dataloader_drop_last=True or another batch size "
    "(per_device_train_batch_size); batches of 1 need larger images, or freeze_backbone."
)


@contextmanager
def noted_errors() -> Iterator[None]:
    """Add what to do to an error that is raised inside, where that is known."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(FULL_DEVICE)
        raise
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            error.add_note(ONE_IMAGE)
        raise
