"""A user's folder of files: that there is one, and that the images in it have classes; no image is read."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
from datasets import DatasetDict
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from nc_hf.data.columns import label_candidates

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {word for words in SPLIT_KEYWORDS.values() for word in words}
SPLIT_WORD = re.compile(rf"(?:^|[-._ 0-9])(?:{'|'.join(sorted(SPLIT_FOLDERS))})(?:[-._ 0-9]|$)")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst")
FILE_FORMATS = ("imagefolder", "parquet", "arrow", "json", "csv", "webdataset")  # of `datasets`, with images in them


def check_data_dir(dataset: str, data_dir: str | None) -> None:
    """Refuse a file format without a folder, which `datasets` would look for in the working directory.

    Args:
        dataset: name of the data set; only those of file formats are looked at.
        data_dir: the folder.

    Raises:
        ValueError: when none is given.
        FileNotFoundError: when it is not there.
    """
    if dataset not in FILE_FORMATS:
        return
    if not data_dir:
        raise ValueError(
            f"the data set {dataset!r} needs `data_dir`, the folder with its files, got {data_dir!r}. Set it "
            "(--data.data_dir on the command line)."
        )
    if not Path(data_dir).expanduser().is_dir():
        raise FileNotFoundError(f"`data_dir` is {data_dir!r}, and there is no such folder. Correct the path.")


def check_folder_classes(found: DatasetDict, data_dir: str, label_column: str | None = None) -> None:
    """Refuse an imagefolder whose images have no labels or whose splits are spelled otherwise; warn of files left out.

    Args:
        found: its splits.
        data_dir: the folder.
        label_column: where a user named it, it is looked for elsewhere.

    Raises:
        ValueError: when a split has no column of labels, the message names an image that lies beside class folders;
            and for folders such as Train and Test, which `datasets` takes for one split.
    """
    folder = Path(data_dir).expanduser()
    places = sorted(path.name for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name))
    if places and all(name.lower() in SPLIT_FOLDERS for name in places) and (odd := _capitals(places)):
        raise ValueError(
            f"{data_dir} has the folders {', '.join(places)}, and `datasets` knows splits by lower-case names alone: "
            f"all of them would be trained on. Rename {', '.join(odd)} to {', '.join(map(str.lower, odd))}."
        )
    _warn_of_files(folder, found)
    if label_column is not None:
        return
    unlabelled = [name for name, split in found.items() if not label_candidates(split)]
    if not unlabelled:
        return
    stray = next(_stray_images(folder), None)
    hint = "" if stray is None else f" {stray} lies beside the class folders: move it into one, or remove it."
    if metadata := next((path for path in _shown_files(folder) if path.stem == "metadata"), None):
        hint += (
            f" Beside {metadata} the folders are no classes for `datasets`: give it a column label, or move it away."
        )
    if any(name.lower() in SPLIT_FOLDERS for name in places):
        hint += (
            f" Of the folders {', '.join(places)}, those with names such as train, test or val are taken for splits. "
            "A class of such a name needs another one, and a test split without labels another place."
        )
    raise ValueError(
        f"the images in {data_dir} have no labels (split {', '.join(unlabelled)}). Those of an imagefolder come from "
        "subfolders, one for each of two classes or more, all at one depth: data_dir/owl/1.png, or "
        f"data_dir/train/owl/1.png.{hint}"
    )


def _capitals(names: list[str]) -> list[str]:
    return [name for name in names if name != name.lower()]


def _warn_of_files(folder: Path, found: DatasetDict) -> None:
    """Warn of files that `datasets` does not take for images, and of images in folders that it does not read."""
    files = list(_shown_files(folder))
    if any(path.stem == "metadata" or path.suffix.lower() in ARCHIVES for path in files):
        return  # which say themselves what is read
    images = [path for path in files if path.suffix.lower() in ImageFolder.EXTENSIONS]
    if len(images) < len(files):
        others = Counter(path.suffix or "no suffix" for path in set(files).difference(images))
        empty = {path.parent for path in files} - {path.parent for path in images} - {folder}
        where = f" Nothing is read from {', '.join(sorted(path.name for path in empty))}." if empty else ""
        logger.warning(
            "%d files in %s are no images for `datasets` and are left out (%s).%s Convert those that are images.",
            *(others.total(), folder, ", ".join(f"{count} {suffix}" for suffix, count in others.most_common()), where),
        )
    if len(found) == 1 and label_candidates(next(iter(found.values()))):
        _warn_of_class_folders(folder, images)
    parents = [folder, *(path for path in folder.iterdir() if path.is_dir() and path.name in SPLIT_FOLDERS)]
    hidden = sorted(path.name for parent in parents for path in parent.glob("__*/") if _has_images(path))
    if hidden:
        logger.warning(
            "%s of %s is not read: `datasets` leaves out folders with names that start with __. Rename it if it is a "
            "class.",
            *(", ".join(hidden), folder),
        )
    read = sum(map(len, found.values()))
    if read < len(images):
        _refuse_split_words(folder, images, read)
        logger.warning(
            "%d of the %d images in %s are read, as %s: where a folder has a name such as train, test or val, "
            "`datasets` takes it for a split and reads no others.",
            *(read, len(images), folder, ", ".join(found)),
        )


def _refuse_split_words(folder: Path, images: list[Path], read: int) -> None:
    """Refuse names that `datasets` takes for splits because of a word in them, where no folder is named for one."""
    names = {part for path in images for part in path.relative_to(folder).parts}
    if names & SPLIT_FOLDERS:
        return
    if worded := sorted(name for name in names if SPLIT_WORD.search(name)):
        raise ValueError(
            f"{read} of the {len(images)} images in {folder} are read: `datasets` takes a name with a word such as "
            f"train, test or val in it for a split, here {', '.join(worded[:5])}. Rename what is a class or an image."
        )


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in ImageFolder.EXTENSIONS for path in folder.iterdir() if not _is_hidden(path.name))


def _warn_of_class_folders(folder: Path, images: list[Path]) -> None:
    """Warn of class folders without an image, and of those of one name in several places, which are one class."""
    empty = sorted(Path(place).name for place, folders, names in os.walk(folder) if not (folders or names))
    if empty := [name for name in empty if not _is_hidden(name)]:
        logger.warning("there is no image in %s of %s: no class is made of it.", ", ".join(empty), folder)
    places: dict[str, set[str]] = {}
    for place in {path.parent for path in images} - {folder}:
        places.setdefault(place.name, set()).add(place.parent.relative_to(folder).as_posix())
    if spread := {name: where for name, where in places.items() if len(where) > 1}:
        name, where = min(spread.items())
        logger.warning(
            "the images of class %r in %s come from several folders (%s), and all are trained on. If these are "
            "splits, name them train, validation and test; if they are the classes, put the images right into them.",
            *(name, folder, ", ".join(sorted(where))),
        )


def _shown_files(folder: Path) -> Iterator[Path]:
    """Files at any depth, without a look at each of them, as there may be a million."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        yield from (Path(place, name) for name in names if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))  # which `datasets` does not read


def _stray_images(folder: Path) -> Iterator[Path]:
    """Images beside folders, in the folder itself and one level below."""
    suffixes = PIL.Image.registered_extensions()
    for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        entries = sorted(place.iterdir())
        if any(entry.is_dir() for entry in entries):
            yield from (entry for entry in entries if entry.suffix.lower() in suffixes)
