"""A user's folder of files: that there is one, and that the images in it have classes; no image is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import PIL.Image
from datasets import DatasetDict

from nc_hf.data.columns import label_candidates

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


def check_folder_classes(found: DatasetDict, data_dir: str) -> None:
    """Refuse an imagefolder whose images have no labels.

    Args:
        found: its splits.
        data_dir: the folder.

    Raises:
        ValueError: when a split has no column of labels; the message names an image that lies beside class folders.
    """
    if all(label_candidates(split) for split in found.values()):
        return
    stray = next(_stray_images(Path(data_dir).expanduser()), None)
    hint = "" if stray is None else f" {stray} lies beside the class folders: move it into one, or remove it."
    raise ValueError(
        f"the images in {data_dir} have no labels. Those of an imagefolder come from subfolders, one for each of two "
        f"classes or more, all at one depth: data_dir/owl/1.png, or data_dir/train/owl/1.png.{hint}"
    )


def _stray_images(folder: Path) -> Iterator[Path]:
    """Images beside folders, in the folder itself and one level below."""
    suffixes = PIL.Image.registered_extensions()
    for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        entries = sorted(place.iterdir())
        if any(entry.is_dir() for entry in entries):
            yield from (entry for entry in entries if entry.suffix.lower() in suffixes)
