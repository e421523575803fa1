"""A small separable image set with the interface of our own image sets, for tests of training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

COUNTS = (60, 30, 12, 6)


class SmallImages(Dataset):
    """Noisy class patterns; a draw shifts the image by a function of (draw, index)."""

    accepts_draws = True
    class_names = ["ant", "bee", "cat", "dog"]

    def __init__(self, counts: tuple[int, ...] = COUNTS, seed: int = 0, size: int = 16) -> None:
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.randn(len(counts), 3, size, size, generator=torch.Generator().manual_seed(99))
        self.labels = np.repeat(np.arange(len(counts)), counts)
        noise = torch.randn(len(self.labels), 3, size, size, generator=generator)
        self.images = patterns[torch.from_numpy(self.labels)] + noise
        self.class_counts = np.asarray(counts)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: list) -> dict[str, Tensor]:
        images = []
        for key in keys:
            index, shift = (key[0], (key[0] + key[1]) % 3) if isinstance(key, tuple) else (key, 0)
            images.append(torch.roll(self.images[index], shift, dims=-1))
        indices = [key[0] if isinstance(key, tuple) else key for key in keys]
        return {"pixel_values": torch.stack(images), "labels": torch.from_numpy(self.labels[indices])}

    @staticmethod
    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch


class NoBatchStatistics(nn.Module):
    """A classifier whose outputs do not depend on the rest of the batch."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.Tanh())
        self.head = nn.Linear(8, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.body(pixel_values))


def network_without_batch_statistics() -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return NoBatchStatistics()
