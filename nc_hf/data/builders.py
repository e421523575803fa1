"""`datasets` builders of the long-tailed benchmarks.

    builder = Cifar10(config_name="r100", data_dir="folder/with/cifar10")
    builder.download_and_prepare()
    train = builder.as_dataset("train")

Each has `train` and `test` with the columns `image`, `label` and, of CIFAR and its like, `index`; the test split is
never thinned out. Where `train` is a subset, `left_out` has the other training images: a choice can be made on them
that costs no training image. Without `data_dir` the images come from the Hub. Encoded images are copied as they are,
and a subset is drawn before anything is decoded.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from datasets import (
    ArrowBasedBuilder,
    BuilderConfig,
    ClassLabel,
    Dataset,
    DatasetInfo,
    DownloadManager,
    Features,
    Image,
    SplitGenerator,
    Value,
    Version,
)

from nc_hf.data.cifar_names import CIFAR10_NAMES, CIFAR100_NAMES
from nc_hf.data.images import decode_image
from nc_hf.data.long_tail import Profile, class_counts, long_tailed_counts, make_long_tailed
from nc_hf.data.sources import Benchmark, encode_images, folder_source, hub_source, make_dataset, official_order

logger = logging.getLogger(__name__)

COLUMNS = ["image", "label", "index"]  # index: the row in the whole split, in official order
VERSION = "1.2.0"  # part of the cache's path: raise it with every change of what a builder writes
FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

# sha256 of the uint8 pixels of the literature's subsets (LDAM-DRW's draw, seed 0), rows in the official order.
STANDARD_PIXELS: dict[tuple[str, float], str] = {
    ("CIFAR-10", 1): "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    ("CIFAR-10", 10): "b36a63b4be8bd47624365414126765e0ab099b47b94d9ecc021ed6f27a2bcfbf",
    ("CIFAR-10", 20): "76acae448912347ea9a54d556e9e6c995799eda25c9ea7b524291f15dd39dee1",
    ("CIFAR-10", 50): "6ddeee202f3be304164c413df823f7c5c3411464034743c9003ee7501f286116",
    ("CIFAR-10", 100): "37634b6d42c2f2f66719743afcb9bbd3b876ed038d23462e59d05b5d79d57f92",
    ("CIFAR-10", 200): "83342c60cb3fa48523ef93baa69a008c04f692e67bc3e3ea02dc8cff86309e2b",
    ("CIFAR-100", 10): "5574373e82697880094a1aadd8efb0e093537203c1ef1f4a7aaea0b5fc9d5ef2",
    ("CIFAR-100", 20): "5e1bcfeb10c4d1588185dee124b721a4b8743c2b03219b6241669433378c8a97",
    ("CIFAR-100", 50): "a4ccddabbf1cc2b2d7e32ecf4647ea88f0a2e7d0bab3997699ddd01645a3a57b",
    ("CIFAR-100", 100): "c0e0323bfa67e731bb5a2948847afc5f15c5981126a35bdbc1639f2f8206407e",
    ("CIFAR-100", 200): "d1198ff1623e055b887ceca63a3c9786c359096c3324024546b7419a3c8e973c",
}


@dataclass
class LongTailConfig(BuilderConfig):
    """Which subset of the training images.

    Args:
        imbalance_ratio: r >= 1, largest over smallest class; None keeps all images.
        profile: `"exponential"`, `"step"` or `"pareto"`.
        seed: of the draw; 0 gives the literature's subsets.
    """

    version: Version | str = VERSION
    imbalance_ratio: float | None = None
    profile: Profile = "exponential"
    seed: int = 0


def presets(*ratios: int) -> list[LongTailConfig]:
    """`balanced`, the whole training set, and `r<ratio>` for each ratio."""
    return [LongTailConfig(name="balanced")] + [LongTailConfig(name=f"r{r}", imbalance_ratio=r) for r in ratios]


class LongTailBuilder(ArrowBasedBuilder):
    """What the benchmarks share: take the splits of a source, thin out the training images, keep a checksum."""

    BUILDER_CONFIG_CLASS = LongTailConfig
    BUILDER_CONFIGS = presets(10, 50, 100)
    DEFAULT_CONFIG_NAME = "r100"
    SOURCE_FILES: ClassVar[tuple[str, ...]] = ("**/*.parquet", "**/*.bin", "**/*.gz")
    benchmark: ClassVar[Benchmark]

    def __init__(self, *arguments: Any, data_dir: str | None = None, **kwargs: Any) -> None:
        # The cache is named after the module unless a data set name is given, so all builders here would share it.
        kwargs = {"dataset_name": type(self).__name__} | kwargs
        if data_dir is not None:  # else the cache would know the folder by its spelling alone
            data_dir = os.path.abspath(os.path.expanduser(data_dir))
            kwargs["hash"] = _state_of_files(Path(data_dir), self.SOURCE_FILES)
        super().__init__(*arguments, data_dir=data_dir, **kwargs)

    def _info(self) -> DatasetInfo:
        names = ClassLabel(names=list(self.benchmark.class_names))
        return DatasetInfo(features=Features({"image": Image(), "label": names, "index": Value("int32")}))

    def source(self) -> dict[str, Dataset]:
        """All images of the benchmark, by split."""
        if self.config.data_dir is None:
            splits = hub_source(self.benchmark, self._cache_dir_root)
        else:
            splits = folder_source(self.benchmark, Path(self.config.data_dir))
        return splits | {"train": official_order(splits["train"], self.benchmark.blocks)}

    def checksum(self, train: Dataset) -> str:
        """What identifies the chosen training images: sha256 of their pixels."""
        return f"pixels {pixel_checksum(train)}"

    def _split_generators(self, dl_manager: DownloadManager) -> list[SplitGenerator]:
        splits = {name: _with_index(split) for name, split in self.source().items()}
        self.info.features = Features({name: splits["train"].features[name] for name in COLUMNS})
        whole = splits["train"]
        splits["train"] = train = self._thin_out(whole)
        if len(train) < len(whole):
            splits["left_out"] = whole.select(np.flatnonzero(~np.isin(whole["index"], train["index"])))
        counts, config = class_counts(train, "label"), self.config
        chosen, checksum = "all images", self.checksum(train)
        if config.imbalance_ratio is not None:
            chosen = f"{config.profile} profile, imbalance ratio {config.imbalance_ratio:g}, seed {config.seed}"
        self.info.description = (
            f"{self.benchmark.name}, {chosen}: {counts.sum()} training images, {counts.max()} to {counts.min()} a "
            f"class; sha256 of {checksum}{self._compared_with_standard(checksum)}"
        )
        return [
            SplitGenerator(name=name, gen_kwargs={"dataset": split.select_columns(COLUMNS)})
            for name, split in splits.items()
        ]

    def _generate_tables(self, dataset: Dataset) -> Iterator[tuple[int, pa.Table]]:
        for number, table in enumerate(dataset.with_format("arrow").iter(1000)):
            yield number, table.cast(self.info.features.arrow_schema)

    def _thin_out(self, train: Dataset) -> Dataset:
        config, ratio = self.config, self.config.imbalance_ratio
        if "lt_rank" not in train.column_names:
            if ratio is None:
                return train
            return make_long_tailed(train, ratio, config.profile, config.seed, "label")
        smallest = self.benchmark.packs[len(train)]
        if ratio is None or ratio < smallest or config.profile != "exponential" or config.seed != 0:
            raise ValueError(
                f"{config.data_dir} holds {self.benchmark.name} already thinned out at ratio {smallest:g} "
                f"(exponential, seed 0), which gives every larger ratio but not imbalance_ratio={ratio}, profile="
                f"{config.profile!r}, seed={config.seed}. Use the whole data set for that."
            )
        full = self.benchmark.rows["train"] // len(self.benchmark.class_names)
        counts = long_tailed_counts([full] * len(self.benchmark.class_names), ratio)
        columns = train.with_format("numpy", columns=["label", "lt_rank"])[:]
        return train.select(np.flatnonzero(columns["lt_rank"] < counts[columns["label"]]))

    def _compared_with_standard(self, checksum: str) -> str:
        """Whether this is the literature's subset, where that has a known checksum."""
        config = self.config
        expected = STANDARD_PIXELS.get((self.benchmark.name, config.imbalance_ratio or 1))
        if expected is None or config.profile != "exponential" or config.seed != 0:
            return ""
        if checksum == f"pixels {expected}":
            return ", the standard subset"
        logger.warning(
            "this is not the standard subset of %s at ratio %s: the source has its images in another order, or other "
            "images. Accuracies may differ from the literature's by a point.",
            self.benchmark.name,
            config.imbalance_ratio,
        )
        return ", not the standard subset"


def _state_of_files(folder: Path, patterns: tuple[str, ...]) -> str:
    """A digest of names, sizes and times of the files in a folder, so that changed files are not read from a cache."""
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    state = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def _with_index(dataset: Dataset) -> Dataset:
    if "index" not in dataset.column_names:
        dataset = dataset.add_column("index", np.arange(len(dataset), dtype=np.int32))
    return dataset.cast_column("index", Value("int32"))


def pixel_checksum(dataset: Dataset) -> str:
    """sha256 of the decoded RGB pixels of all images, row by row."""
    digest = hashlib.sha256()
    encoded = dataset.select_columns(["image"]).cast_column("image", Image(decode=False)).with_format(None)
    for row, image in enumerate(encoded):
        digest.update(np.asarray(decode_image(image["image"], f"row {row}")).tobytes())
    return digest.hexdigest()


class Cifar10(LongTailBuilder):
    """CIFAR-10 and CIFAR-10-LT: 50,000 training images of 10 classes, thinned out, and 10,000 test images."""

    benchmark = Benchmark(
        "CIFAR-10",
        "uoft-cs/cifar10",
        CIFAR10_NAMES,
        {"train": 50_000, "test": 10_000},
        record_labels=1,
        blocks=("d829dbdf32167c9d", "5d18f7371ed35ea9", "32cf77b0ee2e790b", "d2815e3f8f656272", "2ddf3ab27d5d0440"),
    )


class Cifar100(LongTailBuilder):
    """CIFAR-100 and CIFAR-100-LT: 50,000 training images of 100 classes, thinned out, and 10,000 test images."""

    benchmark = Benchmark(
        "CIFAR-100",
        "uoft-cs/cifar100",
        CIFAR100_NAMES,
        {"train": 50_000, "test": 10_000},
        label_column="fine_label",
        packs={19_573: 10},
        record_labels=2,
    )


class FashionMnist(LongTailBuilder):
    """Fashion-MNIST and Fashion-MNIST-LT: 60,000 gray 28x28 training images of 10 classes, thinned out."""

    benchmark = Benchmark(
        "Fashion-MNIST", "zalando-datasets/fashion_mnist", FASHION_NAMES, {"train": 60_000, "test": 10_000}
    )


class Digits(LongTailBuilder):
    """Digits and digits-LT: the 1,797 handwritten 8x8 digits inside scikit-learn; needs no file and no network.

    The last 50 images of each class are the test split.
    """

    BUILDER_CONFIGS = presets(10, 20)
    DEFAULT_CONFIG_NAME = "r20"
    benchmark = Benchmark("digits", "", tuple(str(digit) for digit in range(10)), {"train": 1297, "test": 500})

    def __init__(self, *arguments: Any, data_dir: str | None = None, **kwargs: Any) -> None:
        """As any builder.

        Raises:
            ValueError: for a folder, which would be passed over.
        """
        if data_dir is not None:
            raise ValueError(
                f"the digits come with scikit-learn and are in no folder, got data_dir={data_dir!r}. Leave it out, or "
                'name the data set that lies there: "imagefolder" for photographs of your own.'
            )
        super().__init__(*arguments, **kwargs)

    def source(self) -> dict[str, Dataset]:
        """All images, by split."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        last = [np.flatnonzero(digits.target == k)[-50:] for k in range(10)]
        in_test = np.isin(np.arange(len(pixels)), np.concatenate(last))
        names = list(self.benchmark.class_names)
        return {
            split: make_dataset(encode_images(iter(pixels[rows])), digits.target[rows], names)
            for split, rows in (("train", ~in_test), ("test", in_test))
        }
