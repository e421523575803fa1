"""`datasets` builders of the benchmarks that are published as lists of image files: no image is copied.

    builder = PlacesLT(data_dir="folder/with/lists/and/images")

The folder holds the list files (`.txt` or `.txt.gz`, lines of a path and a label) and the images at those paths. An
official list is recognised by the number of its lines; others, for a part of a benchmark or for one's own images, by
`train`, `val` or `test` in their names.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo

from nc_hf.data.builders import LongTailBuilder, LongTailConfig
from nc_hf.data.columns import dataset_labels
from nc_hf.data.sources import make_dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ListedBenchmark:
    """What tells a benchmark's official lists from others.

    Args:
        name: for messages.
        num_classes: K.
        lines: of each split's list.
        words: in the names of each split's list.
        largest: class of the training list, in images.
        smallest: class of the training list, in images.
        groups: classes with more than 100, 20 to 100 and fewer than 20 training images.
    """

    name: str
    num_classes: int
    lines: dict[str, int]
    words: dict[str, str]
    largest: int
    smallest: int
    groups: tuple[int, int, int]


@dataclass(frozen=True)
class ImageList:
    """One list file: paths relative to the image root, and labels (N,) int64."""

    file: Path
    paths: list[str]
    labels: np.ndarray


class ListedBuilder(LongTailBuilder):
    """What the listed benchmarks share: find the lists, check their counts and that every image is there."""

    BUILDER_CONFIGS = [LongTailConfig(name="official")]
    DEFAULT_CONFIG_NAME = "official"
    SOURCE_FILES = ("*.txt", "*.txt.gz")
    benchmark: ClassVar[ListedBenchmark]

    def _info(self) -> DatasetInfo:
        return DatasetInfo()  # the lists tell the classes

    def source(self) -> dict[str, Dataset]:
        """The images of the lists, by split.

        Raises:
            FileNotFoundError: for a missing folder, list or image.
            ValueError: for a list with the official number of lines but other class counts, or several that fit.
        """
        benchmark, root = self.benchmark, Path(self.config.data_dir or "")
        if self.config.data_dir is None or not root.is_dir():
            raise FileNotFoundError(
                f"`data_dir` {self.config.data_dir} is no folder. {benchmark.name} needs one with its official lists "
                "and its images; neither may be redistributed."
            )
        lists = find_lists(benchmark, root)
        for split, found in lists.items():
            check_counts(benchmark, split, found)
            check_images(found, root)
        names = class_names(benchmark, lists)
        return {split: self._dataset(found, names) for split, found in lists.items()}

    def checksum(self, train: Dataset) -> str:
        """What identifies the chosen training images: sha256 of their paths and labels, as in a list file."""
        images = train.with_format("arrow", columns=["image"])[:].column("image").to_pylist()
        start, labels = len(self._prefix), dataset_labels(train, "label")[0]
        lines = (f"{image['path'][start:]} {label}\n" for image, label in zip(images, labels, strict=True))
        return f"list {hashlib.sha256(''.join(lines).encode()).hexdigest()}"

    @property
    def _prefix(self) -> str:
        return os.path.join(os.path.abspath(self.config.data_dir), "")

    def _dataset(self, found: ImageList, names: list[str]) -> Dataset:
        paths = pa.array([self._prefix + path for path in found.paths], pa.string())
        content = pa.nulls(len(paths), pa.binary())
        return make_dataset(pa.StructArray.from_arrays([content, paths], ["bytes", "path"]), found.labels, names)


def read_list(file: Path) -> ImageList | None:
    """A list file; None for other text."""
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as stream:
        rows = [line.rsplit(maxsplit=1) for line in stream if not line.isspace()]
    if not rows or not all(len(row) == 2 and row[1].isdecimal() for row in rows):
        return None
    return ImageList(file, [row[0] for row in rows], np.array([int(row[1]) for row in rows]))


def find_lists(benchmark: ListedBenchmark, root: Path) -> dict[str, ImageList]:
    """The list of each split in a folder.

    Raises:
        FileNotFoundError: when there is none; the message says what was looked for and what was found.
        ValueError: when there is more than one.
    """
    found = [read_list(file) for file in sorted(root.glob("*.txt")) + sorted(root.glob("*.txt.gz"))]
    found = [one for one in found if one is not None]
    lists = {}
    for split, lines in benchmark.lines.items():
        official = [one for one in found if len(one.paths) == lines]
        named = [one for one in found if benchmark.words[split] in one.file.name.lower()]
        fitting = official or named
        fitting = [one for one in fitting if (root / one.paths[0]).is_file()] or fitting
        if len(fitting) > 1:
            files = ", ".join(one.file.name for one in fitting)
            raise ValueError(f"{files} in {root} may each be the {split} list of {benchmark.name}. Leave one there.")
        if not fitting:
            seen = ", ".join(f"{one.file.name} ({len(one.paths):,} lines)" for one in found) or "no list"
            raise FileNotFoundError(
                f"{root} has no {split} list of {benchmark.name}: looked for .txt or .txt.gz files of lines `path "
                f"label`, the official one with {lines:,} lines, or one with {benchmark.words[split]!r} in its name; "
                f"found {seen}."
            )
        lists[split] = fitting[0]
    return lists


def check_counts(benchmark: ListedBenchmark, split: str, found: ImageList) -> None:
    """Compare a list with the published counts; another number of lines is another list and only logged.

    Raises:
        ValueError: for the official number of lines with other class counts.
    """
    lines, official = len(found.paths), benchmark.lines[split]
    if lines != official:
        logger.warning(
            "%s is not the official %s list of %s: %d lines, not %d",
            found.file.name,
            split,
            benchmark.name,
            lines,
            official,
        )
        return
    counts = np.bincount(found.labels, minlength=benchmark.num_classes)
    many, few = int((counts > 100).sum()), int((counts < 20).sum())
    facts = (len(counts), int(counts.max()), int(counts.min()), (many, len(counts) - many - few, few))
    expected = (benchmark.num_classes, benchmark.largest, benchmark.smallest, benchmark.groups)
    if split != "train":  # the same number of images of each class
        share = official // benchmark.num_classes
        facts, expected = facts[:3], (benchmark.num_classes, share, share)
    if facts != expected:
        raise ValueError(
            f"{found.file} has the {official:,} lines of the {split} list of {benchmark.name}, but not its classes, "
            f"largest, smallest (and many, medium, few): {facts} instead of {expected}. Take the official file."
        )


def check_images(found: ImageList, root: Path) -> None:
    """Look for every image of a list, so that none is missed in the middle of a training run.

    Raises:
        FileNotFoundError: with the number of missing images and the first of them.
    """
    missing = [path for path in found.paths if not os.path.isfile(os.path.join(root, path))]
    if missing:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(found.paths):,} images of {found.file.name} are not in {root}; the first is "
            f"{missing[0]}. `data_dir` must be the folder that these paths start from."
        )


def class_names(benchmark: ListedBenchmark, lists: dict[str, ImageList]) -> list[str]:
    """Names of the classes: the folders of their images, or numbers where those do not tell them apart."""
    official = len(lists["train"].paths) == benchmark.lines["train"]
    num_classes = benchmark.num_classes if official else 1 + max(int(one.labels.max()) for one in lists.values())
    names: dict[int, str] = {}
    for found in lists.values():
        for label, row in zip(*np.unique(found.labels, return_index=True), strict=True):
            names.setdefault(int(label), Path(found.paths[row]).parent.name)
    if len(set(names.values())) == num_classes:
        return [names[k] for k in range(num_classes)]
    return [str(k) for k in range(num_classes)]


class ImageNetLT(ListedBuilder):
    """ImageNet-LT (Liu et al. 2019): 115,846 training images of 1,000 classes, 20 a class to validate, 50 to test."""

    benchmark = ListedBenchmark(
        name="ImageNet-LT",
        num_classes=1000,
        lines={"train": 115_846, "validation": 20_000, "test": 50_000},
        words={"train": "train", "validation": "val", "test": "test"},
        largest=1280,
        smallest=5,
        groups=(385, 479, 136),
    )


class PlacesLT(ListedBuilder):
    """Places-LT (Liu et al. 2019): 62,500 training images of 365 classes, 20 a class to validate, 100 to test."""

    benchmark = ListedBenchmark(
        name="Places-LT",
        num_classes=365,
        lines={"train": 62_500, "validation": 7_300, "test": 36_500},
        words={"train": "train", "validation": "val", "test": "test"},
        largest=4980,
        smallest=5,
        groups=(131, 163, 71),
    )


class INaturalist2018(ListedBuilder):
    """iNaturalist 2018: 437,513 training images of 8,142 species; the published validation images are the test split.

    The literature reports accuracies on those, so nothing may be chosen on them.
    """

    benchmark = ListedBenchmark(
        name="iNaturalist 2018",
        num_classes=8142,
        lines={"train": 437_513, "test": 24_426},
        words={"train": "train", "test": "val"},
        largest=1000,
        smallest=2,
        groups=(842, 4076, 3224),
    )
