"""Image sets that feed a trainer: decoded in memory (`ResidentImages`) or decoded as they are read (`StreamedImages`).

A key of either set is an index, for the image as evaluation sees it, or a pair (index, draw) for its augmentation
number `draw`, a function of (seed, draw, index) alone. So training is the same on any number of processes and workers,
and a resumed run sees the images that the interrupted one would have seen.
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Literal

import numpy as np
import PIL.Image
import PIL.ImageOps
import psutil
import torch
from datasets import Dataset, Image
from datasets.utils.file_utils import is_local_path, xopen
from torch import Tensor
from tqdm.auto import tqdm

from nc_hf.choices import check_choice
from nc_hf.data.augment import ImageTransform
from nc_hf.data.columns import dataset_labels, find_image_column, find_label_column
from nc_hf.processes import processes_here

logger = logging.getLogger(__name__)

InputPath = Literal["auto", "resident", "streamed"]
Key = int | tuple[int, int]

# What Pillow raises, by format.
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, struct.error, PIL.Image.DecompressionBombError)
MAX_RESIDENT_BYTES = 8 * 2**30
LONG_WORK = 5000  # images from which decoding shows its progress


class ImageSet(torch.utils.data.Dataset):
    """What both sets share: labels, class counts, and whole batches ready for the model.

    Attributes:
        labels: (N,) int64.
        class_counts: (K,) int64.
        class_names: K names.
        skipped: unreadable images that were left out.
        description: what the data set says of itself; for the benchmarks, a checksum of their pixels.
    """

    accepts_draws = True

    def __init__(self, dataset: Dataset, transform: ImageTransform, seed: int) -> None:
        self.transform, self.seed, self.skipped = transform, seed, 0
        self.description = dataset.info.description
        self.labels, self.class_names = dataset_labels(dataset)
        column = find_image_column(dataset)
        self.encoded = dataset.select_columns([column]).cast_column(column, Image(decode=False)).with_format(None)
        self.column = column

    @property
    def class_counts(self) -> np.ndarray:
        """Images of each class, (K,) int64."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        """One image without a batch axis."""
        batch = self.__getitems__([key])
        return {name: values[0] for name, values in batch.items()}

    def __getitems__(self, keys: list[Key]) -> dict[str, Tensor]:
        """A ready batch: `pixel_values` (B, 3, H, W) float32, channels last in memory, and `labels` (B,) int64."""
        pairs = [key if isinstance(key, tuple) else (key, -1) for key in keys]
        indices, draws = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        images = self._images(indices, draws)
        return {"pixel_values": self.transform.normalize(images), "labels": torch.from_numpy(self.labels[indices])}

    def _images(self, indices: np.ndarray, draws: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8; a draw of -1 is the image as evaluation sees it."""
        images, drawn = self._at_size(indices), draws >= 0
        if drawn.all():
            return self.transform.augment_batch(images, self.seed, draws, indices)
        if drawn.any():
            rows = torch.from_numpy(np.flatnonzero(drawn))
            images[rows] = self.transform.augment_batch(images[rows], self.seed, draws[drawn], indices[drawn])
        return images

    def _at_size(self, indices: np.ndarray) -> Tensor:
        """Images as evaluation sees them, (B, H, W, 3) uint8."""
        raise NotImplementedError

    @staticmethod
    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The collator of a data loader over this set: batches are ready."""
        return batch

    def _decode(self, row: int) -> PIL.Image.Image:
        return decode_image(self.encoded[row][self.column], f"row {row}")

    def _decode_all(self, use: Callable[[int, PIL.Image.Image], None], on_bad_image: str, task: str) -> np.ndarray:
        """Decode every image on all cores and hand it on with its row; leave unreadable ones out if told to.

        Returns:
            Rows that are kept, ascending.
        """

        def work(row: int) -> str | None:
            try:
                image = self._decode(row)
            except ValueError as error:
                if on_bad_image == "error":
                    raise
                return str(error)
            use(row, image)
            return None

        quiet = None if len(self) >= LONG_WORK else True  # None shows the bar on a terminal
        with ThreadPoolExecutor() as pool:
            errors = list(tqdm(pool.map(work, range(len(self))), task, len(self), disable=quiet))
        kept = np.array([row for row, error in enumerate(errors) if error is None], dtype=np.int64)
        self.skipped = len(errors) - len(kept)
        if self.skipped:
            first = next(error for error in errors if error is not None)
            counted = "1 unreadable image is" if self.skipped == 1 else f"{self.skipped} unreadable images are"
            logger.warning("%s left out; the first: %s", counted, first)
            if not len(kept):
                raise ValueError(f"none of {len(errors)} images can be read; the first: {first}")
            self.labels, self.encoded = self.labels[kept], self.encoded.select(kept)
        return kept


class ResidentImages(ImageSet):
    """All images decoded at the input size in one uint8 tensor, and augmented as batches."""

    def __init__(
        self, dataset: Dataset, transform: ImageTransform, seed: int = 0, on_bad_image: str = "error"
    ) -> None:
        super().__init__(dataset, transform, seed)
        if not transform.is_batched:
            raise ValueError(
                f"`input_path: resident` cannot do augmentation {transform.augmentation!r}, which works on images in "
                "their own size. Use input_path: streamed, or augmentation crop_flip."
            )
        pixels = torch.empty(len(self), *transform.size, 3, dtype=torch.uint8)
        kept = self._decode_all(lambda row, image: pixels[row].copy_(transform.to_size(image)), on_bad_image, "decode")
        self.pixels = pixels[torch.from_numpy(kept)] if self.skipped else pixels

    def _at_size(self, indices: np.ndarray) -> Tensor:
        return self.pixels[torch.from_numpy(indices)]


class StreamedImages(ImageSet):
    """Images decoded when they are asked for, in the workers of a data loader; for sets of any size."""

    def __init__(
        self,
        dataset: Dataset,
        transform: ImageTransform,
        seed: int = 0,
        on_bad_image: str = "error",
        check: bool = False,
    ) -> None:
        super().__init__(dataset, transform, seed)
        if check or on_bad_image == "skip":
            self._decode_all(lambda row, image: None, on_bad_image, "check")

    def _images(self, indices: np.ndarray, draws: np.ndarray) -> Tensor:
        if self.transform.is_batched:
            return super()._images(indices, draws)
        images = []
        for index, draw in zip(indices.tolist(), draws.tolist(), strict=True):
            image = self._decode(index)
            images.append(
                self.transform.to_size(image)
                if draw < 0
                else self.transform.augment_one(image, self.seed, draw, index)
            )
        return torch.stack(images)

    def _at_size(self, indices: np.ndarray) -> Tensor:
        return torch.stack([self.transform.to_size(self._decode(index)) for index in indices.tolist()])


def decode_image(encoded: dict[str, Any] | None, where: str) -> PIL.Image.Image:
    """An image in RGB, whatever its mode was, turned as its EXIF says, as `datasets` and pipelines do.

    Args:
        encoded: `{"bytes": …, "path": …}` as `datasets` stores images; the path may lie in an archive.
        where: names the image in errors, beside its path.

    Raises:
        ValueError: for a file that cannot be read, is cut off, has pixels of 32 bits, or is as large as an attack.
    """
    content, path = (None, None) if encoded is None else (encoded["bytes"], encoded["path"])
    try:
        if content is None and path is None:
            raise ValueError("there is none")
        if content is None and not is_local_path(path):
            with xopen(path, "rb") as file:
                content = file.read()
        with PIL.Image.open(path if content is None else io.BytesIO(content)) as image:
            limit = PIL.Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise ValueError(f"{image.width} x {image.height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS")
            return PIL.ImageOps.exif_transpose(_to_8_bits(image)).convert("RGB")
    except UNREADABLE as error:
        name = f" ({path})" if path else ""
        raise ValueError(
            f"the image in {where}{name} cannot be read: {error}. Repair or remove it, or set on_bad_image: skip."
        ) from error


def _to_8_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image, one of 16 bits scaled down; Pillow would clip it at 255, and make a float image black."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        _tell_of_16_bits()
        scaled = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        scaled.info["exif"] = image.getexif().tobytes()  # which says how it is turned
        return scaled
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (mode {image.mode}) of no known range; save it with 8 bits")
    return image


@cache
def _tell_of_16_bits() -> None:
    """Warn, once a process, that a pipeline does not see such images as the model does."""
    logger.warning(
        "images of 16 bits are scaled down to 8 (divided by 256), where pipelines of transformers and "
        "PIL.Image.convert clip them to almost white: convert images to 8 bits before you give them to a pipeline."
    )


def load_images(
    dataset: Dataset,
    transform: ImageTransform,
    *,
    input_path: InputPath = "auto",
    seed: int = 0,
    on_bad_image: Literal["error", "skip"] = "error",
    check: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSet:
    """The image set of one split, resident when its images fit in memory and are augmented as batches.

    Args:
        dataset: with an image column and a label column.
        transform: to the model's input.
        input_path: `"auto"`, or the one to use; the choice is logged.
        seed: of the augmentation.
        on_bad_image: `"error"` names an unreadable image, `"skip"` leaves it out and counts it.
        check: decode every image once now, also where they are streamed, so that an unreadable one is met at once.
        image_column: found when None.
        label_column: found when None.

    Raises:
        ValueError: for an unknown choice, a missing column, an unreadable image, or when resident images cannot have
            the augmentation.
    """
    check_choice("input_path", input_path, InputPath.__args__)
    check_choice("on_bad_image", on_bad_image, ("error", "skip"))
    if image_column or label_column:
        chosen = {find_image_column(dataset, image_column): "image", find_label_column(dataset, label_column): "label"}
        dataset = dataset.select_columns(list(chosen))
        dataset = dataset.rename_columns({old: new for old, new in chosen.items() if old != new})
    needed = len(dataset) * transform.size[0] * transform.size[1] * 3
    room = min(MAX_RESIDENT_BYTES, psutil.virtual_memory().available // (4 * processes_here()))
    chosen = input_path
    if input_path == "auto":
        chosen = "resident" if transform.is_batched and needed <= room else "streamed"
    logger.info(
        "input path %s (%s): %d images, %.0f MB decoded of %.0f MB allowed, augmentation in training %s%s",
        chosen,
        "chosen by size and augmentation" if input_path == "auto" else "as asked for",
        len(dataset),
        needed / 1e6,
        room / 1e6,
        transform.augmentation,
        "; decoded when they are drawn, by as many processes as dataloader_num_workers" * (chosen == "streamed"),
    )
    if chosen == "resident":
        return ResidentImages(dataset, transform, seed, on_bad_image)
    return StreamedImages(dataset, transform, seed, on_bad_image, check)
