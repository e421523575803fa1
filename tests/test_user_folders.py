"""A user's folder without a path, without classes, with files left out, or with classes that some split lacks."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from small_images import small_pixels

from nc_hf.data.columns import dataset_labels
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
    with pytest.raises(
        ValueError, match=r"have no labels \(split train\). Those of an imagefolder come from subfolders"
    ) as error:
        load_splits("imagefolder", data_dir=str(folder), validation_fraction=0.5, cache_dir=str(tmp_path / "cache"))
    named = f"{folder / str(stray)} lies beside the class folders: move it into one, or remove it."
    assert (named in str(error.value)) == (stray is not None) == ("lies beside" in str(error.value))


def drawn(folder: Path, **files: tuple[int, str]) -> str:
    """A folder with so many images of this suffix in each place."""
    for place, (count, suffix) in files.items():
        (folder / place.replace("__", "/")).mkdir(parents=True)
        for number in range(count):
            with open(folder / place.replace("__", "/") / f"{number}{suffix}", "wb") as file:
                PIL.Image.fromarray(small_pixels(1, len(place) * 100 + number)[0]).save(file, "png")
    return str(folder)


def test_files_that_are_no_images_for_datasets_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = drawn(tmp_path / "photos", ant=(6, ".png"), bee=(6, ".png"), cat=(3, ".HEIC"), dog=(2, ""))
    (tmp_path / "photos" / ".cache").mkdir()
    (tmp_path / "photos" / ".cache" / "list.txt").write_text("hidden")
    splits = load_splits("imagefolder", data_dir=folder, validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))
    assert splits["train"].features["label"].names == ["ant", "bee"]
    assert (
        "5 files in" in caplog.text
        and "left out (3 .HEIC, 2 no suffix). Nothing is read from cat, dog." in caplog.text
    )


def test_a_folder_that_is_read_whole_is_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = drawn(tmp_path / "photos", ant=(6, ".png"), Train=(6, ".JPG"))
    load_splits("imagefolder", data_dir=folder, validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))
    assert "left out" not in caplog.text and "are read" not in caplog.text


def test_classes_that_lie_in_folders_of_other_names_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    places = ("learn__ant", "learn__bee", "holdout__ant", "holdout__bee")
    folder = drawn(tmp_path / "photos", **dict.fromkeys(places, (6, ".png")))
    (tmp_path / "photos" / "learn" / "cow").mkdir()
    load_splits("imagefolder", data_dir=folder, validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))
    assert "images of class 'ant'" in caplog.text and "several folders (holdout, learn), and all are" in caplog.text
    assert f"there is no image in cow of {folder}: no class is made of it." in caplog.text
    caplog.clear()
    usual = drawn(tmp_path / "usual", **dict.fromkeys(("train__a", "train__b", "test__a", "test__b"), (3, ".png")))
    load_splits("imagefolder", data_dir=usual, cache_dir=str(tmp_path / "cache"))
    assert "several folders" not in caplog.text and "no image in" not in caplog.text


def test_splits_with_capitals_are_not_trained_on_together(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "photos", Train__a=(3, ".png"), Train__b=(3, ".png"), Test__a=(3, ".png"))
    with pytest.raises(ValueError, match="Rename Test, Train to test, train"):
        load_splits(folder, validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="Rename Test, Train to test, train"):
        load_splits("imagefolder", data_dir=folder, validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))


def test_a_class_that_is_called_like_a_split_is_explained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = drawn(tmp_path / "photos", train=(3, ".png"), car=(3, ".png"), bus=(3, ".png"))
    with pytest.raises(ValueError, match="Of the folders bus, car, train, those with names such as train"):
        load_splits("imagefolder", data_dir=folder, validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))
    assert "3 of the 9 images in" in caplog.text


@pytest.mark.parametrize("name", ["train ticket", "toy-train", "test-tube"])
def test_a_class_with_a_word_for_a_split_in_its_name_is_refused(name: str, tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / name).mkdir()
    PIL.Image.fromarray(small_pixels(1, 5)[0]).save(tmp_path / name / "1.png")
    with pytest.raises(ValueError, match=f"[12] of the 3 images in .* are read.* for a split, here {name}. Rename"):
        load_splits("imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), validation_fraction=0.1)


def test_a_folder_that_datasets_hides_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_folders(tmp_path / "photos" / "train")
    class_folders(tmp_path / "photos" / "test")
    (tmp_path / "photos/train/ant").rename(tmp_path / "photos/train/__background__")
    (tmp_path / "photos/__MACOSX").mkdir()
    with suppress(ValueError):  # of classes that the splits do not share
        load_splits("imagefolder", data_dir=str(tmp_path / "photos"), cache_dir=str(tmp_path / "cache"))
    assert "__background__ of" in caplog.text and "names that start with __" in caplog.text
    assert "__MACOSX" not in caplog.text


def test_paths_of_a_table_may_be_those_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(tmp_path / "photos")
    rows = "file,label\nant/1.png,ant\nbee/1.png,bee\n"
    (tmp_path / "photos/train.csv").write_text(rows)
    monkeypatch.chdir(tmp_path)
    found = load_splits(
        "csv", data_dir="photos", image_column="file", test_split="train", cache_dir=str(tmp_path / "cache")
    )
    assert found["train"][1]["image"].size == (32, 32)


def test_the_split_without_labels_is_named(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "photos", train__a=(3, ".png"), train__b=(3, ".png"), test=(3, ".png"))
    with pytest.raises(ValueError, match=r"have no labels \(split train, test\).*a test split without labels another"):
        load_splits("imagefolder", data_dir=folder, cache_dir=str(tmp_path / "cache"))


# ---- Splits ----


def test_a_validation_split_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves 7 images to train on and 0 to validate on"):
        load_splits(labelled([0] * 4 + [1] * 3, "ant bee"), validation_fraction=0.1)


def test_wrong_labels_are_said_with_their_split() -> None:
    images = encode_images(small_pixels(3))
    features = Features({"image": Image(), "label": Value("int64")})
    hidden = Dataset.from_dict({"image": images, "label": [-1, -1, -1]}, features=features)
    train = Dataset.from_dict({"image": images, "label": [0, 1, 1]}, features=features)
    with pytest.raises(ValueError, match="split test: column 'label' has 3 labels below 0.*name another split by"):
        load_splits(DatasetDict(train=train, test=hidden))


def test_names_of_classes_are_numbered_alike_in_all_splits() -> None:
    features = Features({"image": Image(), "label": Value("string")})
    images = encode_images(small_pixels(4))
    train = Dataset.from_dict({"image": images, "label": ["owl", "ant", "owl", "cat"]}, features=features)
    test = Dataset.from_dict({"image": images[:2], "label": ["cat", "bee"]}, features=features)
    splits = load_splits(DatasetDict(train=train, test=test))
    assert splits["train"].features["label"].names == ["ant", "bee", "cat", "owl"]
    assert (splits["train"]["label"][:], splits["test"]["label"][:]) == ([3, 0, 3, 2], [2, 1])
    with pytest.raises(ValueError, match=r'found string.*class_encode_column\("label"\)'):
        dataset_labels(train)
    nameless = Dataset.from_dict({"image": images, "label": ["owl", None, "owl", "cat"]}, features=features)
    with pytest.raises(ValueError, match="split train: column 'label' has 1 missing labels, the first in row 1"):
        load_splits(DatasetDict(train=nameless, test=test))


def test_ids_are_not_taken_for_the_numbers_of_classes() -> None:
    features = Features({"image": Image(), "label": Value("int64")})
    images = Dataset.from_dict({"image": encode_images(small_pixels(3)), "label": [0, 1, 300]}, features=features)
    with pytest.raises(ValueError, match="the labels reach to 300 and there are 3 images: they seem to be ids"):
        load_splits(images, validation_fraction=0.5)


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


@pytest.mark.parametrize("label_column", [None, "label"])
def test_splits_in_capitals_are_refused_whatever_column_is_named(label_column: str | None, tmp_path: Path) -> None:
    """`datasets` would take both folders for the one split to train on."""
    for split in ("Train", "Test"):
        class_folders(tmp_path / "photos" / split)
    with pytest.raises(ValueError, match="Rename Test, Train to test, train"):
        load_splits(
            "imagefolder",
            data_dir=str(tmp_path / "photos"),
            label_column=label_column,
            validation_fraction=0.5,
            cache_dir=str(tmp_path / "cache"),
        )


def test_a_metadata_file_that_hides_the_class_folders_is_named(tmp_path: Path) -> None:
    class_folders(tmp_path / "photos")
    (tmp_path / "photos" / "metadata.csv").write_text("file_name,text\nant/1.png,one\nbee/1.png,two\n")
    with pytest.raises(ValueError, match=r"metadata\.csv the folders are no classes for `datasets`: give it a column"):
        load_splits(
            "imagefolder",
            data_dir=str(tmp_path / "photos"),
            validation_fraction=0.5,
            cache_dir=str(tmp_path / "cache"),
        )
