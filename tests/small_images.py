"""Small images for tests: a separable set with the interface of our own image sets, and a tree of files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

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


class SmallStream(IterableDataset):
    """The same images in a row, without a length or labels to look at."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        images = SmallImages()
        for index in range(len(images)):
            yield {name: values[0] for name, values in images.__getitems__([index]).items()}


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


def small_pixels(count: int, seed: int = 0) -> np.ndarray:
    """(count, 32, 32, 3) uint8, noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def png(seed: int = 0, size: tuple[int, int] = (20, 24)) -> bytes:
    """A file of noise, its height and width given."""
    buffer = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    PIL.Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def image_tree(root: Path, counts: list[int], words: tuple[str, ...] = ("train", "val", "test")) -> None:
    """An ImageNet-shaped tree: folders of WordNet ids, JPEG files, and list files beside them."""
    for word in words:
        lines, folder = [], "train" if word == "train" else "val"
        for k, count in enumerate(counts if word == "train" else [2] * len(counts)):
            name = f"n{10_000_000 + k}"
            (root / folder / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                path = f"{folder}/{name}/{word}_{i}.JPEG"
                PIL.Image.fromarray(small_pixels(1, 100 * k + i)[0]).save(root / path)
                lines.append(f"{path} {k}\n")
        (root / f"ImageNet_LT_{word}.txt").write_text("".join(lines))
