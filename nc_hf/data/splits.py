"""The train, validation and test split of any labelled image data set, under one pair of column names."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.utils.file_utils import is_local_path

from nc_hf.data.builders import Cifar10, Cifar100, Digits, FashionMnist
from nc_hf.data.columns import dataset_labels, find_image_column, find_label_column, label_candidates
from nc_hf.data.coverage import warn_of_unseen_classes, warn_of_untrained_classes
from nc_hf.data.folders import check_data_dir, check_folder_classes
from nc_hf.data.listed import ImageNetLT, INaturalist2018, PlacesLT
from nc_hf.data.long_tail import Profile, make_long_tailed, train_validation_split

logger = logging.getLogger(__name__)

BUILDERS = {
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "fashion_mnist": FashionMnist,
    "digits": Digits,
    "imagenet_lt": ImageNetLT,
    "places_lt": PlacesLT,
    "inaturalist2018": INaturalist2018,
}
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
MAX_COMPARED_BYTES = 2**31  # above, train and test images are not compared
MAX_COMPARED_IMAGES = 100_000  # nor above this number, since files are opened
COMPARED_END = 4096  # bytes of a file
FILES = [Value(kind) for kind in ("string", "large_string", "binary", "large_binary")]  # paths, or what files hold
FILES += [{"bytes": Value("binary"), "path": Value("string")}, {"path": Value("string"), "bytes": Value("binary")}]


def load_splits(
    dataset: str | Dataset | DatasetDict,
    *,
    data_dir: str | None = None,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    imbalance_ratio: float | None = None,
    profile: Profile = "exponential",
    seed: int = 0,
    validation_fraction: float = 0.0,
    test_split: str | None = None,
    cache_dir: str | None = None,
) -> DatasetDict:
    """Load a data set as `train`, and `validation` and `test` where there are any, with columns `image` and `label`.

    Args:
        dataset: a benchmark of ours (`"cifar10"`, `"cifar100"`, `"fashion_mnist"`, `"digits"`, `"imagenet_lt"`,
            `"places_lt"`, `"inaturalist2018"`), `"imagefolder"` or `"parquet"` with `data_dir`, a Hub id, or a data
            set in memory.
        data_dir: folder with the files.
        config_name: configuration of a Hub data set, or a preset of a benchmark of ours (`"r100"`).
        image_column: found when None.
        label_column: found when None. Names of classes in it are numbered in their alphabetical order.
        imbalance_ratio: thin the training images out to this ratio; None leaves them as they are.
        profile: of the long tail.
        seed: of the long tail and of the validation split.
        validation_fraction: of each training class to hold out where there is no validation split.
        test_split: name of the split to test on; `"test"` when None and there is one. A thinned-out benchmark of ours
            has `"left_out"`, the training images that are not used, to choose settings on.
        cache_dir: of `datasets`.

    Raises:
        ValueError: for unusable columns, labels or splits, or a file format without `data_dir`.
        FileNotFoundError: when the images are not there.
    """
    if isinstance(dataset, str) and dataset in BUILDERS:
        found = _build(dataset, data_dir, config_name, cache_dir, imbalance_ratio, profile, seed)
        imbalance_ratio = None  # done
    else:
        found = _load_any(dataset, data_dir, config_name, cache_dir)
        folder = data_dir if dataset == "imagefolder" else dataset
        if isinstance(folder, str) and Path(folder).expanduser().is_dir() and _is_of_folders(found):
            check_folder_classes(found, folder, label_column)
        if data_dir is not None:
            base = Path(data_dir).expanduser()
            found = DatasetDict({name: _paths_from(base, split, image_column) for name, split in found.items()})
    chosen = _encode_names(_choose_splits(found, test_split, validation_fraction), label_column)
    # Numbers without names reach as far as the largest label of any split.
    names = max((_names_of(name, split, label_column) for name, split in chosen.items()), key=len)
    _check_ids(len(names), chosen, label_column)
    splits = {name: _canonical(split, image_column, label_column, names) for name, split in chosen.items()}
    told = splits["train"].info.description or ""
    if "sha256 of" not in told:  # as our benchmarks say
        checksum = f"sha256 of names {_names_checksum(splits['train'])}"
        splits["train"].info.description = "; ".join(filter(None, [told, checksum]))
    _check_classes(splits)
    if imbalance_ratio is not None:
        splits["train"] = make_long_tailed(splits["train"], imbalance_ratio, profile, seed)
    held_out = bool(validation_fraction) and "validation" not in splits
    if held_out:
        splits["train"], splits["validation"] = train_validation_split(splits["train"], validation_fraction, seed)
        if not min(len(splits["train"]), len(splits["validation"])):
            raise ValueError(
                f"`validation_fraction: {validation_fraction:g}` leaves {len(splits['train'])} images to train on and "
                f"{len(splits['validation'])} to validate on: of each class with five images or more a part is held "
                "out, of smaller ones nothing. Add images, or a folder or split of test images."
            )
    elif validation_fraction:
        logger.info("the data set has a validation split of its own; validation_fraction is not used")
    _warn_of_overlap(splits)
    warn_of_unseen_classes(splits, held_out)
    return DatasetDict(splits)


def preset_ratio(name: str, config_name: str | None) -> float | None:
    """The imbalance ratio of a benchmark's preset, such as 100 of `r100`; None of other data and of all images."""
    presets = BUILDERS[name].BUILDER_CONFIGS if name in BUILDERS else []
    return next((config.imbalance_ratio for config in presets if config.name == config_name), None)


def _build(
    name: str,
    data_dir: str | None,
    config_name: str | None,
    cache_dir: str | None,
    imbalance_ratio: float | None,
    profile: Profile,
    seed: int,
) -> DatasetDict:
    presets = [config.name for config in BUILDERS[name].BUILDER_CONFIGS]
    config_name = config_name or presets[0]
    if config_name not in presets:
        raise ValueError(f"`config_name` of {name} must be one of {', '.join(presets)}, got {config_name!r}.")
    settings = {"data_dir": data_dir, "profile": profile, "seed": seed}
    if imbalance_ratio is not None:
        settings["imbalance_ratio"] = float(imbalance_ratio)
    builder = BUILDERS[name](config_name=config_name, cache_dir=cache_dir, **settings)
    builder.download_and_prepare()
    logger.info("%s", builder.info.description)
    return builder.as_dataset()


def _load_any(
    dataset: str | Dataset | DatasetDict, data_dir: str | None, config_name: str | None, cache_dir: str | None
) -> DatasetDict:
    if isinstance(dataset, Dataset):
        return DatasetDict(train=dataset)
    if isinstance(dataset, DatasetDict):
        return dataset
    if not isinstance(dataset, str):
        raise ValueError(
            f"a data set of type {type(dataset).__name__} has no length and no counts of its classes; load it without "
            "streaming."
        )
    check_data_dir(dataset, data_dir)
    try:
        return load_dataset(dataset, config_name, data_dir=data_dir, cache_dir=cache_dir)
    except Exception as error:  # the library has many kinds of them; all mean that there are no images
        # This kind does not say why the files cannot be read; its cause does.
        cause = (isinstance(error, DatasetGenerationError) and error.__cause__) or error
        raise FileNotFoundError(
            f"the data set {dataset!r} (data_dir {data_dir}) could not be loaded: {type(cause).__name__}: "
            f"{str(cause)[:300]}. It must be one of {', '.join(BUILDERS)}, imagefolder or parquet with data_dir, or a "
            "Hub id (user/name)."
        ) from error


def _is_of_folders(found: DatasetDict) -> bool:
    """Whether `datasets` has read class folders of images, as also from the bare path of a folder."""
    return any(split.info.builder_name == "imagefolder" for split in found.values())


def _choose_splits(found: DatasetDict, test_split: str | None, validation_fraction: float) -> dict[str, Any]:
    names = ", ".join(found)
    if "train" not in found:
        raise ValueError(f"the data set has no split named train; it has {names}.")
    if test_split is not None and test_split not in found:
        raise ValueError(f"`test_split` is {test_split!r}; the data set has {names}.")
    test = test_split or ("test" if "test" in found else None)
    validation = next((name for name in VALIDATION_NAMES if name in found and name != test), None)
    chosen = {"train": found["train"]}
    if validation is not None:
        chosen["validation"] = found[validation]
    if test is not None:
        chosen["test"] = found[test]
    if len(chosen) == 1 and not validation_fraction:
        raise ValueError(
            f"there is nothing to evaluate on: the data set has {names} alone. Name a split by `test_split`, or set "
            "`validation_fraction: 0.1` to hold a part of train out."
        )
    return chosen


def _encode_names(splits: dict[str, Dataset], label_column: str | None) -> dict[str, Dataset]:
    """Splits whose labels are the names of classes with the classes of all of them instead."""
    candidates = [label_column] if label_column else label_candidates(splits["train"])
    column = candidates[0] if len(candidates) == 1 else None
    if any(split.features.get(column) not in (Value("string"), Value("large_string")) for split in splits.values()):
        return splits
    names = sorted({name for split in splits.values() for name in split.unique(column) if name is not None})
    logger.info("column %r names %d classes, numbered in alphabetical order", column, len(names))
    return {name: split.cast_column(column, ClassLabel(names=names)) for name, split in splits.items()}


def _names_of(split: str, dataset: Dataset, label_column: str | None) -> list[str]:
    """Class names of a split, whose name stands before what is wrong with its labels."""
    try:
        return dataset_labels(dataset, label_column)[1]
    except ValueError as error:
        other = "" if split == "train" else " Or name another split by `test_split`."
        raise ValueError(f"split {split}: {error}{other}") from None


def _check_ids(num_classes: int, splits: dict[str, Dataset], label_column: str | None) -> None:
    """Refuse numbers without names that reach further than there are images: ids of another system."""
    train, images = splits["train"], sum(map(len, splits.values()))
    named = isinstance(train.features[find_label_column(train, label_column)], ClassLabel)
    if not named and num_classes > images:
        raise ValueError(
            f"the labels reach to {num_classes - 1} and there are {images} images: they seem to be ids, not classes "
            "numbered from 0. Number them, for instance by `class_encode_column` of `datasets`."
        )


def _paths_from(folder: Path, dataset: Dataset, image_column: str | None) -> Dataset:
    """A column of paths, if those of the working directory are not there, taken from the folder of its table."""
    if image_column is None or dataset.features.get(image_column) not in (Value("string"), Value("large_string")):
        return dataset
    paths = dataset.with_format(None)[image_column][:]
    first = next((path for path in paths if path), None)
    if first is None or not is_local_path(first) or os.path.exists(first) or not (folder / first).exists():
        return dataset
    paths = [str(folder / path) if path else None for path in paths]
    return dataset.remove_columns(image_column).add_column(image_column, paths)


def _canonical(dataset: Dataset, image_column: str | None, label_column: str | None, names: list[str]) -> Dataset:
    """The columns `image` and `label`, with labels of type `ClassLabel`, and the `index` of a benchmark."""
    image, label = find_image_column(dataset, image_column), find_label_column(dataset, label_column)
    index = ["index"] if dataset.features.get("index") == Value("int32") else []
    dataset = dataset.with_format(None).select_columns([image, label, *index])
    if dataset.features[image] in FILES:
        dataset = dataset.cast_column(image, Image())
    if not isinstance(dataset.features[image], Image):
        raise ValueError(
            f"column {image!r} must hold images, file paths or encoded files, found {dataset.features[image]}."
        )
    if not isinstance(dataset.features[label], ClassLabel):
        dataset = dataset.cast_column(label, ClassLabel(names=names))
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    return dataset.rename_columns(renamed) if renamed else dataset


def _check_classes(splits: dict[str, Dataset]) -> None:
    expected = splits["train"].features["label"].names
    for name, split in splits.items():
        names = split.features["label"].names
        if not len(split):
            raise ValueError(f"the split {name} has no images.")
        if names != expected:
            differing = sorted(set(names) ^ set(expected))[:5]
            raise ValueError(
                f"train has {len(expected)} classes and {name} has {len(names)}, not the same ones in the same order "
                f"(differing: {', '.join(differing) or 'the order'}). Labels must mean the same in all splits."
            )
    warn_of_untrained_classes(splits)


def _names_checksum(dataset: Dataset) -> str:
    """sha256 of class names, labels, and the names and sizes of the encoded images; no image is read."""
    digest = hashlib.sha256(repr(dataset.features["label"].names).encode())
    digest.update(dataset_labels(dataset)[0].tobytes())
    for batch in dataset.with_format("arrow", columns=["image"]).iter(1000):
        for images in batch.column("image").chunks:  # together, large images are more than one array can hold
            sizes = pc.binary_length(images.field("bytes")).to_pylist()
            for path, size in zip(images.field("path").to_pylist(), sizes, strict=True):
                if size is None and path is not None and Path(path).is_file():
                    size = Path(path).stat().st_size
                digest.update(f"{Path(path).name if path else None} {size}\n".encode())
    return digest.hexdigest()


def _warn_of_overlap(splits: dict[str, Dataset]) -> None:
    """Warn of images in two splits: the same bytes, whatever their files are called."""
    if len(splits) < 2:
        return
    size, number = sum(split.data.nbytes for split in splits.values()), sum(map(len, splits.values()))
    if size > MAX_COMPARED_BYTES or number > MAX_COMPARED_IMAGES:
        logger.info("not looked for training images among the others: %d images, %.1f GB", number, size / 1e9)
        return
    columns = {name: _contents(split) for name, split in splits.items()}
    kinds = {"train": "training images; accuracies on them mean little", "validation": "validation images"}
    for seen, name in itertools.combinations(sorted(columns, key=["train", "validation", "test"].index), 2):
        if count := pc.sum(pc.is_in(columns[name], columns[seen], skip_nulls=True)).as_py():
            logger.warning("%d of %d %s images are also %s.", count, len(columns[name]), name, kinds[seen])


def _contents(split: Dataset) -> pa.Array:
    """What tells images apart: their encoded bytes; of files size and end, which differ between compressed images."""
    image = split.with_format("arrow", columns=["image"])[:].column("image").combine_chunks()
    # Unlike `field`, which has b"" where there is no image.
    content, paths = pc.struct_field(image, "bytes"), pc.struct_field(image, "path").to_pylist()
    if not content.null_count:
        return content.cast("large_binary")
    rows = zip(content, paths, strict=True)
    return pa.array([data.as_py() if data.is_valid else _size_and_end(path) for data, path in rows], "large_binary")


def _size_and_end(path: str | None) -> bytes | None:
    """Of a file, as a digest; the path itself where it cannot be read as a file, as in an archive."""
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - COMPARED_END))
            return hashlib.sha256(f"{size} ".encode() + file.read()).digest()
    except OSError:
        return path.encode()
