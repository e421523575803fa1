"""A user's own images: found columns and splits, and a plain message for each fault of labels and files."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets
from small_images import png

from nc_hf.data import splits as splits_module
from nc_hf.data.augment import ImageTransform
from nc_hf.data.images import load_images
from nc_hf.data.long_tail import class_counts
from nc_hf.data.splits import load_splits

SMALL = ImageTransform((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def labelled(labels: list, feature=None, first: int = 0, **columns) -> Dataset:
    feature = ClassLabel(names=["ant", "bee", "cat"]) if feature is None else feature
    features = Features({"image": Image(), "label": feature} | {name: Image() for name in columns})
    images = [{"bytes": png(first + i), "path": None} for i in range(len(labels))]
    return Dataset.from_dict({"image": images, "label": labels} | {n: images for n in columns}, features=features)


def in_memory(labels: list, feature=None) -> DatasetDict:
    return DatasetDict(train=labelled(labels, feature), test=labelled(labels, feature, first=1000))


# ---- Splits of a user's data ----


def test_caltech_as_a_users_parquet(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.parquet").symlink_to(shared / "data" / f"caltech101-s128-{split}.parquet")
    splits = load_splits("parquet", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    counts = class_counts(splits["train"])
    assert (len(counts), counts.min(), counts.max(), counts.sum()) == (101, 21, 790, 7667)
    assert class_counts(splits["test"]).tolist() == [10] * 101
    assert splits["train"].column_names == ["image", "label"]
    few = splits["train"].select(range(0, 7667, 400))
    transform = ImageTransform((64, 64), (0.5,) * 3, (0.5,) * 3, crop_pct=0.875, augmentation="rand_augment")
    images = load_images(few, transform)
    batch = images.__getitems__([(i, 7) for i in range(len(few))])
    assert batch["pixel_values"].shape == (20, 3, 64, 64)
    assert batch["pixel_values"].std() > 0.1
    assert batch["labels"].tolist() == few["label"][:]
    thinned = load_splits("parquet", data_dir=str(folder), cache_dir=str(tmp_path / "cache"), imbalance_ratio=50)
    assert len(thinned["train"]) < 7667 and class_counts(thinned["train"]).min() == 15


def test_image_folder_with_a_held_out_part(tmp_path: Path) -> None:
    for name, count in (("owl", 10), ("bat", 6)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(png(i))
    arguments = {"data_dir": str(tmp_path / "photos"), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match="nothing to evaluate on.*has train alone.*`validation_fraction: 0.1`"):
        load_splits("imagefolder", **arguments)
    splits = load_splits("imagefolder", **arguments, validation_fraction=0.2)
    assert splits["train"].features["label"].names == ["bat", "owl"]
    assert class_counts(splits["train"]).tolist() == [5, 8]
    assert class_counts(splits["validation"]).tolist() == [1, 2]


def test_columns_are_found_or_named() -> None:
    data = in_memory([0, 1, 2])
    renamed = DatasetDict({k: v.rename_columns({"image": "photo", "label": "species"}) for k, v in data.items()})
    for splits in (load_splits(renamed), load_splits(renamed, image_column="photo", label_column="species")):
        assert splits["train"].column_names == ["image", "label"]
        assert splits["train"]["label"][:] == [0, 1, 2]
    two = labelled([0, 1], thumbnail=None)
    with pytest.raises(ValueError, match="one image column; found image, thumbnail. Name it by `image_column`"):
        load_splits(two, test_split="train")
    assert load_splits(two, test_split="train", image_column="thumbnail")["train"].column_names[0] == "image"
    with pytest.raises(ValueError, match="`label_column` is 'kind'; the columns are image, label"):
        load_splits(data, label_column="kind")
    with pytest.raises(ValueError, match="one label column; found none among image"):
        load_splits(DatasetDict({name: split.select_columns(["image"]) for name, split in data.items()}))


def test_two_class_columns_need_a_name_but_for_cifars() -> None:
    data = labelled([0, 1, 2])
    coarse = Dataset.from_dict({"coarse_label": [0, 0, 1]}, features=Features({"coarse_label": ClassLabel(2)}))
    both = Dataset.from_dict(
        {"image": data["image"][:], "genus": [0, 1, 2], "family": [0, 0, 1]},
        features=Features({"image": Image(), "genus": ClassLabel(3), "family": ClassLabel(2)}),
    )
    with pytest.raises(ValueError, match="found genus, family. Name it by `label_column`"):
        load_splits(both, test_split="train")
    assert coarse.features["coarse_label"].num_classes == 2
    cifar = both.rename_columns({"genus": "fine_label", "family": "coarse_label"})
    assert load_splits(cifar, test_split="train")["train"].features["label"].num_classes == 3


def test_file_paths_are_read_as_images(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    data = Dataset.from_dict({"file": [str(tmp_path / "0.png"), str(tmp_path / "1.png")], "label": [0, 1]})
    splits = load_splits(data, image_column="file", test_split="train")
    assert splits["train"][1]["image"].size == (24, 20)
    with pytest.raises(ValueError, match="column 'label' must hold images, file paths or encoded files"):
        load_splits(data, image_column="label", label_column="label", test_split="train")


def test_splits_are_chosen_by_name() -> None:
    data = in_memory([0, 1, 2])
    named = DatasetDict(train=data["train"], val=data["test"], holdout=labelled([2, 2], first=50))
    assert set(load_splits(named)) == {"train", "validation"}
    splits = load_splits(named, test_split="holdout", validation_fraction=0.5)
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "validation": 3, "test": 2}
    with pytest.raises(ValueError, match="`test_split` is 'final'; the data set has train, val, holdout"):
        load_splits(named, test_split="final")
    with pytest.raises(ValueError, match="no split named train; it has val"):
        load_splits(DatasetDict(val=data["test"]))


def test_streaming_data_are_refused() -> None:
    with pytest.raises(ValueError, match="IterableDataset has no length.*without streaming"):
        load_splits(labelled([0, 1]).to_iterable_dataset())


def test_unknown_data_set_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments, **settings):
        raise FileNotFoundError("Couldn't find it")

    monkeypatch.setattr(splits_module, "load_dataset", missing)
    with pytest.raises(FileNotFoundError, match="'cifra10'.*Couldn't find it.*one of cifar10, cifar100"):
        load_splits("cifra10")


def test_files_in_large_columns_are_images() -> None:
    features = Features({"image": Value("large_binary"), "label": ClassLabel(names=["ant", "bee"])})
    train = Dataset.from_dict({"image": [png(0), png(1)], "label": [0, 1]}, features=features)
    splits = load_splits(DatasetDict(train=train, test=train), image_column="image")
    assert splits["train"].features["image"] == Image() and splits["train"][0]["image"].size == (24, 20)


def test_data_of_a_user_are_told_apart(tmp_path: Path) -> None:
    """By what a run's digest then covers: classes, labels, and the images' names and sizes; not where they lie."""

    def told(labels: list[int], names: list[str] | None = None, folder: str = "here", first: int = 0) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        rows = []
        for i in range(len(labels)):
            path = tmp_path / folder / f"{first + i}.png"
            path.write_bytes(png(first + i))
            rows.append(str(path))
        feature = ClassLabel(names=names or ["ant", "bee", "cat"])
        data = Dataset.from_dict(
            {"image": rows, "label": labels}, features=Features({"image": Value("string"), "label": feature})
        )
        return load_splits(data, test_split="train", image_column="image")["train"].info.description

    first = told([0, 1, 2, 0])
    assert first.startswith("sha256 of names ") and told([0, 1, 2, 0], folder="there") == first
    others = [
        told([0, 1, 2, 1]),
        told([0, 1, 2]),
        told([0, 1, 2, 0], ["ant", "cat", "bee"]),
        told([0, 1, 2, 0], first=9),
    ]
    assert len({first, *others}) == 5


# ---- Labels ----


def test_classes_without_images_are_kept_and_named(caplog: pytest.LogCaptureFixture) -> None:
    splits = load_splits(in_memory([0, 2, 2]))
    assert class_counts(splits["train"]).tolist() == [1, 0, 2]
    assert "1 class has no training image: 'bee' (in no split)" in caplog.text


@pytest.mark.parametrize("bad", [-1, -100, 3, 40])
def test_labels_out_of_range_are_located(bad: int) -> None:
    data = in_memory([0, 1, 2, 1], Value("int64"))
    train = data["train"].add_column("row", [0, 1, 2, 3]).map(lambda row: {"label": bad if row["row"] > 1 else 0})
    table = train.data.table.cast(Features(train.features | {"label": ClassLabel(3)}).arrow_schema)
    features = Features(train.features | {"label": ClassLabel(names=["ant", "bee", "cat"])})
    train = Dataset(train.data.__class__(table), info=train.info.__class__(features=features))
    with pytest.raises(ValueError, match=f"'label' has 2 labels outside 0 to 2, the first is {bad} in row 2"):
        load_splits(train, validation_fraction=0.5)


def test_negative_label_without_class_names_is_located() -> None:
    with pytest.raises(ValueError, match="1 labels outside 0 to 1, the first is -100 in row 1"):
        load_splits(in_memory([0, -100, 1], Value("int64")))


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0.0, 1.5], Value("float32"), "one integer label an image, found float"),
        ([[0, 1], [1, 0]], List(Value("int64")), "one integer label an image, found list"),
        ([True, False], Value("bool"), "one integer label an image, found bool"),
        ([0, None], Value("int64"), "1 missing labels, the first in row 1"),
    ],
)
def test_unusable_labels_are_refused(labels: list, feature, message: str) -> None:
    with pytest.raises(ValueError, match=f"column 'label'.*{message}"):
        load_splits(in_memory(labels, feature))


def test_integer_labels_become_classes() -> None:
    splits = load_splits(in_memory([0, 2, 1], Value("int32")))
    assert splits["train"].features["label"].names == ["0", "1", "2"]


def test_integer_labels_reach_as_far_as_the_largest_of_any_split() -> None:
    data = DatasetDict(train=labelled([0, 2, 1], Value("int64")), test=labelled([0, 1], Value("int64"), first=1000))
    for splits in (load_splits(data), load_splits(DatasetDict(train=data["test"], test=data["train"]))):
        assert {split.features["label"].num_classes for split in splits.values()} == {3}


def test_splits_must_share_their_classes() -> None:
    data = in_memory([0, 1, 2])
    for names, words in ((["ant", "bee"], "cat"), (["bee", "ant", "cat"], "the order")):
        other = labelled([0, 1], ClassLabel(names=names))
        with pytest.raises(ValueError, match=f"train has 3 classes and test has {len(names)}.*{words}"):
            load_splits(DatasetDict(train=data["train"], test=other))


def test_empty_split_is_refused() -> None:
    data = in_memory([0, 1, 2])
    with pytest.raises(ValueError, match="the split test has no images"):
        load_splits(DatasetDict(train=data["train"], test=data["test"].select([])))


def test_training_images_in_the_test_split_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_splits(in_memory([0, 1, 2]))
    assert "also training images" not in caplog.text
    load_splits(DatasetDict(train=labelled([0, 1, 2]), test=labelled([0, 1, 2], first=1)))
    assert "2 of 3 test images are also training images" in caplog.text
    caplog.clear()
    paths = []
    for i in range(3):
        paths.append(str(tmp_path / f"{i}.png"))
        Path(paths[-1]).write_bytes(png(i))
    train, test = (Dataset.from_dict({"image": p, "label": [0, 1]}).cast_column("image", Image())
                   for p in (paths[:2], paths[1:]))  # fmt: skip
    load_splits(DatasetDict(train=train, test=test))
    assert "1 of 2 test images are also training images" in caplog.text
    caplog.clear()
    for split, numbers in {"train": (0, 1, 2), "test": (5, 1, 7)}.items():  # files of one name, and one content
        for i, number in enumerate(numbers):
            folder = tmp_path / "tree" / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{split}{i}.png").write_bytes(png(number))
    load_splits("imagefolder", data_dir=str(tmp_path / "tree"), cache_dir=str(tmp_path / "cache"))
    assert "1 of 3 test images are also training images" in caplog.text


def test_repeated_images_are_met_in_a_validation_split_that_is_held_out(caplog: pytest.LogCaptureFixture) -> None:
    """Each image twice: most of those held out are trained on too."""
    twice = labelled(10 * [0], first=0)
    train = concatenate_datasets([twice, twice])
    splits = load_splits(DatasetDict(train=train), validation_fraction=0.3)
    assert f"of {len(splits['validation'])} validation images are also training images" in caplog.text
    caplog.clear()
    three = [labelled(3 * [0], first=number) for number in (0, 20, 20)]
    load_splits(DatasetDict(zip(("train", "validation", "test"), three, strict=True)))
    assert "3 of 3 test images are also validation images" in caplog.text
    assert "training images" not in caplog.text


def test_rows_without_an_image_are_nothing_to_compare(caplog: pytest.LogCaptureFixture) -> None:
    rows = [None, {"bytes": png(1), "path": None}]
    features = Features({"image": Image(), "label": ClassLabel(2)})
    split = Dataset.from_dict({"image": rows, "label": [0, 1]}, features=features)
    load_splits(DatasetDict(train=split, test=split))
    assert "1 of 2 test images are also training images" in caplog.text


def test_a_folder_for_the_embedded_digits_is_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the digits come with scikit-learn and are in no folder"):
        load_splits("digits", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
