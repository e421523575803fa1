"""A user's folder without a path, without classes, or with classes that some split lacks."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from small_images import small_pixels

from nc_hf.data.sources import encode_images
from nc_hf.data.splits import load_splits


def labelled(labels: list[int], names: str, first: int = 0) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=names.split())})
    images = encode_images(small_pixels(len(labels), first))
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def class_folders(folder: Path) -> None:
    for i, name in enumerate(("ant", "bee")):
        (folder / name).mkdir(parents=True)
        PIL.Image.fromarray(small_pixels(1, i)[0]).save(folder / name / "1.png")


# ---- Folders ----


@pytest.mark.parametrize("name", ["imagefolder", "parquet", "webdataset", "json"])
def test_files_are_not_looked_for_in_the_working_directory(name: str, tmp_path: Path, monkeypatch) -> None:
    class_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    for data_dir in (None, ""):
        with pytest.raises(ValueError, match=rf"'{name}' needs `data_dir`.*\(--data.data_dir on the command line\)"):
            load_splits(name, data_dir=data_dir, validation_fraction=0.5, cache_dir=str(tmp_path / "cache"))


def test_a_missing_folder_is_what_the_error_is_about(tmp_path: Path) -> None:
    missing = str(tmp_path / "fotos")
    with pytest.raises(FileNotFoundError) as error:
        load_splits("imagefolder", data_dir=missing)
    assert str(error.value) == f"`data_dir` is {missing!r}, and there is no such folder. Correct the path."


@pytest.mark.parametrize("stray", ["loose.png", "train/loose.JPG", None])
def test_images_beside_class_folders_are_named(stray: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    class_folders(folder if stray == "loose.png" else folder / "train")
    if stray is None:
        (folder / "train" / "bee" / "1.png").unlink()
    else:
        PIL.Image.fromarray(small_pixels(1, 7)[0]).save(folder / stray)
    with pytest.raises(ValueError, match="have no labels. Those of an imagefolder come from subfolders") as error:
        load_splits("imagefolder", data_dir=str(folder), validation_fraction=0.5, cache_dir=str(tmp_path / "cache"))
    named = f"{folder / str(stray)} lies beside the class folders: move it into one, or remove it."
    assert (named in str(error.value)) == (stray is not None) == ("lies beside" in str(error.value))


# ---- Classes ----


def test_a_class_in_test_only_is_likened_to_a_trained_one(caplog: pytest.LogCaptureFixture) -> None:
    names = "plain plein zebra yak"
    load_splits(DatasetDict(train=labelled([0, 0], names), test=labelled([1, 0, 2], names, first=1000)))
    assert (
        "3 classes have no training image: 'plein' (in test only; is it 'plain'?), 'zebra' (in test only), "
        "'yak' (in no split)" in caplog.text
    )


def test_trained_classes_that_a_split_lacks_are_named(caplog: pytest.LogCaptureFixture) -> None:
    names = "a b c d e f g"
    data = DatasetDict(
        train=labelled(list(range(7)), names),
        dev=labelled(list(range(6)), names, first=100),
        test=labelled([0], names, first=200),
    )
    load_splits(data, validation_fraction=0.5)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        "1 class has training images and none in validation: 'g'. The per-class accuracies of validation leave "
        "such classes out.",
        "6 classes have training images and none in test: 'b', 'c', 'd', 'e', 'f', and 1 more. The per-class "
        "accuracies of test leave such classes out.",
    ]
    caplog.clear()
    load_splits(labelled([0] * 5 + [1] * 4, "ant bee"), validation_fraction=0.2)
    assert (
        "none in validation: 'bee'. " in caplog.text and "Classes of fewer than 5 images give it none." in caplog.text
    )
