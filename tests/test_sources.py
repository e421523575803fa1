"""Where images come from: archives, parquet, list files, the digits inside scikit-learn."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import shutil
import struct
import tarfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets import Image
from small_images import image_tree, small_pixels

from nc_hf.data.builders import Cifar10, FashionMnist
from nc_hf.data.listed import ImageNetLT, INaturalist2018, PlacesLT, find_lists
from nc_hf.data.long_tail import class_counts
from nc_hf.data.sources import Benchmark, encode_images, folder_source, make_dataset
from nc_hf.data.splits import load_splits

SMALL = Benchmark("small", "none/small", ("cat", "dog"), {"train": 6, "test": 4}, record_labels=1)


COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.fixture(scope="module")
def cifar10(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Cifar10:
    builder = Cifar10(
        config_name="r100", data_dir=str(shared / "data"), cache_dir=str(tmp_path_factory.mktemp("cache"))
    )
    builder.download_and_prepare()
    return builder


def decoded(dataset: datasets.Dataset) -> np.ndarray:
    return np.stack([np.asarray(image.convert("RGB")) for image in dataset["image"]])


# ---- Sources ----


def test_binary_archive(tmp_path: Path) -> None:
    images, labels = small_pixels(10), np.array([0, 1, 1, 0, 1, 0, 0, 0, 1, 1], dtype=np.uint8)
    records = [
        bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(images, labels, strict=True)
    ]
    contents = {"data_batch_1.bin": records[:3], "data_batch_2.bin": records[3:6], "test_batch.bin": records[6:]}
    with tarfile.open(tmp_path / "any-name.tar.gz", "w:gz") as archive:
        for name in reversed(contents):
            member = tarfile.TarInfo(f"batches/{name}")
            member.size = len(b"".join(contents[name]))
            archive.addfile(member, io.BytesIO(b"".join(contents[name])))
    unpacked = tmp_path / "unpacked" / "batches"
    unpacked.mkdir(parents=True)
    for name, content in contents.items():
        (unpacked / name).write_bytes(b"".join(content))
    for folder in (tmp_path, tmp_path / "unpacked"):
        splits = folder_source(SMALL, folder)
        assert np.array_equal(decoded(splits["train"]), images[:6])
        assert np.array_equal(decoded(splits["test"]), images[6:])
        assert splits["train"]["label"][:] + splits["test"]["label"][:] == labels.tolist()


def test_idx_files(tmp_path: Path) -> None:
    benchmark = Benchmark("small gray", "none/gray", ("cat", "dog"), {"train": 6, "test": 4})
    gray = small_pixels(10)[:, :28, :28, 0]
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 0, 1, 1], dtype=np.uint8)
    for name, array in (("a", gray[:6]), ("b", labels[:6]), ("c", gray[6:]), ("d", labels[6:])):
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))
    splits = folder_source(benchmark, tmp_path)
    assert np.array_equal(decoded(splits["train"])[..., 0], gray[:6])
    assert splits["test"]["label"][:] == labels[6:].tolist()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.gz").write_bytes((tmp_path / "a.gz").read_bytes())
    assert np.array_equal(decoded(folder_source(benchmark, tmp_path)["train"])[..., 0], gray[:6])  # a copy
    header = bytes([0, 0, 8, 3]) + struct.pack(">3I", *gray[:6].shape)
    (tmp_path / "other" / "a.gz").write_bytes(gzip.compress(header + (255 - gray[:6]).tobytes()))
    with pytest.raises(ValueError, match="could both be the train split of small gray: MNIST's files"):
        folder_source(benchmark, tmp_path)


def test_parquet_shards_under_any_name(tmp_path: Path) -> None:
    images = small_pixels(10)
    whole = make_dataset(encode_images(iter(images)), np.arange(10) % 2, list(SMALL.class_names))
    (tmp_path / "data").mkdir()
    for shard in range(2):
        rows = range(3 * shard, 3 * shard + 3)
        whole.select(rows).to_parquet(tmp_path / "data" / f"x-0000{shard}-of-00002.parquet")
    whole.select(range(6, 10)).rename_column("image", "picture").to_parquet(tmp_path / "y.parquet")
    other = make_dataset(encode_images(iter(images[:6])), np.arange(6) % 2, ["cat", "bee"])
    other.to_parquet(tmp_path / "other-classes.parquet")
    spelled = Benchmark("small", "none/small", ("C at", "D/o g"), {"train": 6, "test": 4})
    for benchmark in (SMALL, spelled):
        splits = folder_source(benchmark, tmp_path)
        assert np.array_equal(decoded(splits["train"]), images[:6])
        assert np.array_equal(decoded(splits["test"]), images[6:])
    (tmp_path / "y.parquet").write_bytes((tmp_path / "y.parquet").read_bytes()[:100])
    with pytest.raises(ValueError, match="y.parquet cannot be read.*complete"):
        folder_source(SMALL, tmp_path)


def test_missing_source_says_what_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"a pickle")
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "data_batch_1", "cifar-10-batches-py/data_batch_1")
    with pytest.raises(FileNotFoundError) as error:
        Cifar10(data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache")).source()
    for words in (str(tmp_path), "50,000 images (train)", "airplane", "cifar-10-python.tar.gz", "binary one"):
        assert words in str(error.value)
    whole = (tmp_path / "cifar-10-python.tar.gz").read_bytes()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(whole[:40])
    with pytest.raises(ValueError, match="cifar-10-python.tar.gz cannot be read.*complete"):
        Cifar10(data_dir=str(tmp_path)).source()
    with pytest.raises(FileNotFoundError, match="nowhere is no folder.*CIFAR-10"):
        Cifar10(data_dir=str(tmp_path / "nowhere")).source()

    def unreachable(*arguments, **settings):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match="zalando-datasets/fashion_mnist.*no route to host.*set data_dir"):
        FashionMnist(cache_dir=str(tmp_path)).source()


def test_digits_need_nothing(tmp_path: Path) -> None:
    splits = load_splits("digits", imbalance_ratio=20, cache_dir=str(tmp_path))
    assert class_counts(splits["test"]).tolist() == [50] * 10
    counts = class_counts(splits["train"])
    largest = class_counts(load_splits("digits", cache_dir=str(tmp_path))["train"]).max()
    assert counts[0] <= largest and counts[-1] == largest // 20
    assert (np.diff(counts) <= 0).all()
    assert splits["train"][0]["image"].size == (8, 8)
    preset = load_splits("digits", config_name="r20", cache_dir=str(tmp_path))
    assert preset["train"]["label"][:] == splits["train"]["label"][:]
    with pytest.raises(ValueError, match="`config_name` of digits must be one of balanced, r10, r20, got 'r7'"):
        load_splits("digits", config_name="r7", cache_dir=str(tmp_path))


# ---- Lists ----


def test_own_lists_of_an_imagenet_tree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "images"
    image_tree(root, [6, 3, 1])
    (root / "notes.txt").write_text("not a list at all\n")
    splits = load_splits("imagenet_lt", data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 10, "validation": 6, "test": 6}
    assert splits["train"].features["label"].names == ["n10000000", "n10000001", "n10000002"]
    assert class_counts(splits["train"]).tolist() == [6, 3, 1]
    assert splits["test"][0]["image"].size == (32, 32)
    row = splits["train"].cast_column("image", Image(decode=False))[7]["image"]
    assert row["bytes"] is None and row["path"] == str(root / "train/n10000001/train_1.JPEG")
    assert "ImageNet_LT_train.txt is not the official train list of ImageNet-LT: 10 lines, not 115846" in caplog.text
    assert "sha256 of list" in splits["train"].info.description
    thinned = load_splits("imagenet_lt", data_dir=str(root), imbalance_ratio=3, cache_dir=str(tmp_path / "cache"))
    assert class_counts(thinned["train"]).tolist() == [6, 3, 1]


def test_cache_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, counts in (("a", [6, 3, 1]), ("b", [4, 2])):
        image_tree(tmp_path / name / "images", counts)
        monkeypatch.chdir(tmp_path / name)  # the same relative folder, other images
        splits = load_splits("imagenet_lt", data_dir="images", cache_dir=str(tmp_path / "cache"))
        assert class_counts(splits["train"]).tolist() == counts
    found = tmp_path / "b" / "images" / "ImageNet_LT_train.txt"
    found.write_text("".join(found.read_text().splitlines(keepends=True)[1:]))
    again = load_splits("imagenet_lt", data_dir="images", cache_dir=str(tmp_path / "cache"))
    assert class_counts(again["train"]).tolist() == [3, 2]
    assert again["train"]._fingerprint != splits["train"]._fingerprint


def test_list_checksum_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        image_tree(tmp_path / name, [3, 2])
        builder = ImageNetLT(data_dir=str(tmp_path / name), cache_dir=str(tmp_path))
        found.append(builder.checksum(builder.source()["train"]))
    assert found[0] == found[1]


def test_missing_lists_and_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`data_dir` None is no folder. ImageNet-LT needs"):
        ImageNetLT().source()
    image_tree(tmp_path, [3, 2], words=("train", "val"))
    with pytest.raises(FileNotFoundError, match=r"no test list.*50,000 lines.*ImageNet_LT_train.txt \(5 lines\)"):
        ImageNetLT(data_dir=str(tmp_path)).source()
    shutil.copy(tmp_path / "ImageNet_LT_val.txt", tmp_path / "test.txt")
    (tmp_path / "train/n10000001/train_1.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 5 images.*the first is train/n10000001/train_1.JPEG"):
        ImageNetLT(data_dir=str(tmp_path)).source()
    shutil.copy(tmp_path / "ImageNet_LT_train.txt", tmp_path / "my_train.txt")
    with pytest.raises(ValueError, match="ImageNet_LT_train.txt, my_train.txt.*Leave one"):
        ImageNetLT(data_dir=str(tmp_path)).source()


def test_official_places_lists(shared: Path, tmp_path: Path) -> None:
    """The real lists, under other names, over a tree of 106,300 links to a few images."""
    root = tmp_path / "places"
    for word, name in (("train", "a"), ("val", "b"), ("test", "c")):
        lines = gzip.decompress((shared / "data" / "splits" / f"Places_LT_{word}.txt.gz").read_bytes()).decode()
        (root / "").mkdir(exist_ok=True)
        (root / f"{name}.txt").write_text(lines)
        made = set()
        for number, line in enumerate(lines.splitlines()):
            path = root / line.split()[0]
            if path.parent not in made:
                path.parent.mkdir(parents=True, exist_ok=True)
                made.add(path.parent)
            if not number % 20_000:  # a file system bounds the links to one file
                image = root / f"{word}{number}.png"
                PIL.Image.fromarray(small_pixels(1, number)[0]).save(image)
            os.link(image, path)
    builder = PlacesLT(data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    expected = json.loads((shared / "data" / "splits" / "Places_LT_train_class_counts.json").read_text())["counts"]
    splits = builder.as_dataset()
    assert class_counts(splits["train"]).tolist() == expected
    assert class_counts(splits["validation"]).tolist() == [20] * 365
    assert class_counts(splits["test"]).tolist() == [100] * 365
    assert splits["train"].features["label"].names[:2] == ["airfield", "airplane_cabin"]
    assert splits["test"][0]["image"].size == (32, 32)


def test_official_number_of_lines_with_other_counts_is_refused(tmp_path: Path, caplog) -> None:
    image_tree(tmp_path, [2, 1], words=("val", "test"))
    lines = ["val/n10000000/val_0.JPEG 0\n"] * 62_499 + ["val/n10000000/val_0.JPEG 1\n"]
    (tmp_path / "list.txt").write_text("".join(lines))
    with pytest.raises(ValueError, match="the 62,500 lines of the train list of Places-LT, but not its classes"):
        PlacesLT(data_dir=str(tmp_path)).source()


def test_inaturalist_test_split_is_the_published_validation_list(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared / "data" / "splits" / "iNaturalist18_val.txt.gz", tmp_path / "list.txt.gz")
    (tmp_path / "train.txt").write_text("train_val2018/Plantae/5/x.jpg 5\n")
    lists = find_lists(INaturalist2018.benchmark, tmp_path)
    assert len(lists["test"].paths) == 24_426
    assert np.bincount(lists["test"].labels).tolist() == [3] * 8142
    assert lists["train"].labels.tolist() == [5]


def test_logs_are_quiet_for_official_data(cifar10: Cifar10, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        splits = load_splits("cifar10", data_dir=cifar10.config.data_dir, config_name="r100", profile="exponential",
                             cache_dir=cifar10._cache_dir_root)  # fmt: skip
    assert class_counts(splits["train"]).tolist() == COUNTS
    assert not [record for record in caplog.records if record.name.startswith("nc_hf")]
