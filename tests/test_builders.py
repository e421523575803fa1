"""Builders of the benchmarks: the literature's subsets from any usual files, and plain words when one is missing."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import DatasetDict, Image

from nc_hf.data.builders import STANDARD_PIXELS, VERSION, Cifar10, Cifar100, pixel_checksum
from nc_hf.data.long_tail import class_counts
from nc_hf.data.sources import folder_source, official_order
from nc_hf.data.splits import load_splits

COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.fixture(scope="module")
def cifar10(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Cifar10:
    builder = Cifar10(
        config_name="r100", data_dir=str(shared / "data"), cache_dir=str(tmp_path_factory.mktemp("cache"))
    )
    builder.download_and_prepare()
    return builder


@pytest.fixture(scope="module")
def cifar10_source(shared: Path) -> dict:
    return folder_source(Cifar10.benchmark, shared / "data")


def pack_builder(shared: Path, tmp_path: Path, **settings) -> Cifar100:
    return Cifar100(config_name="balanced", data_dir=str(shared / "data"), cache_dir=str(tmp_path), **settings)


# ---- CIFAR ----


def test_cifar10_is_the_standard_subset(cifar10: Cifar10) -> None:
    train, test = cifar10.as_dataset("train"), cifar10.as_dataset("test")
    assert class_counts(train).tolist() == COUNTS
    assert class_counts(test).tolist() == [1000] * 10
    assert train.column_names == ["image", "label", "index"]
    assert train.features["label"].names[:3] == ["airplane", "automobile", "bird"]
    assert pixel_checksum(train) == STANDARD_PIXELS["CIFAR-10", 100]
    description = train.info.description
    assert "12406 training images, 5000 to 50 a class" in description
    assert description.endswith(f"pixels {STANDARD_PIXELS['CIFAR-10', 100]}, the standard subset")


def test_index_is_the_row_in_the_original(cifar10: Cifar10, cifar10_source: dict) -> None:
    train, original = cifar10.as_dataset("train"), cifar10_source["train"]
    labels = np.asarray(original["label"][:])
    assert (labels[train["index"][:]] == train["label"][:]).all()
    for row in (0, 7_000, 12_405):
        assert train[row]["image"].tobytes() == original[train[row]["index"]]["image"].tobytes()
    assert cifar10.as_dataset("test")["index"][:] == list(range(10_000))


def test_left_out_images_are_the_rest_of_train(cifar10: Cifar10, shared: Path, tmp_path: Path) -> None:
    train, left_out = cifar10.as_dataset("train"), cifar10.as_dataset("left_out")
    assert sorted(train["index"][:] + left_out["index"][:]) == list(range(50_000))
    assert class_counts(left_out).tolist() == [5000 - count for count in COUNTS]
    settings = {"data_dir": str(shared / "data"), "cache_dir": str(tmp_path)}
    splits = load_splits("cifar10", imbalance_ratio=100, test_split="left_out", **settings)
    assert splits["test"]["index"][:] == left_out["index"][:]
    assert "left_out" not in load_splits("cifar10", imbalance_ratio=100, **settings)


def test_encoded_images_are_copied_as_they_are(cifar10: Cifar10, shared: Path) -> None:
    table = pq.read_table(shared / "data" / "cifar10-train.parquet", columns=["img"])
    originals = set(table["img"].combine_chunks().field("bytes").to_pylist())
    train = cifar10.as_dataset("train").cast_column("image", Image(decode=False))
    assert all(image["bytes"] in originals for image in train[:200]["image"])


def test_cache_needs_no_source(cifar10: Cifar10, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"data_dir": cifar10.config.data_dir, "cache_dir": cifar10._cache_dir_root}
    monkeypatch.setattr(Cifar10, "source", lambda self: pytest.fail("the cache was not used"))
    again = Cifar10(config_name="r100", **settings)
    again.download_and_prepare()
    assert len(again.as_dataset("train")) == 12_406
    assert again.info.description == cifar10.info.description
    assert VERSION in again.cache_dir
    others = [Cifar10(config_name="r100", **settings, **more).cache_dir for more in ({"seed": 1}, {"profile": "step"})]
    others += [Cifar10(config_name="r10", **settings).cache_dir, Cifar100(config_name="r100", **settings).cache_dir]
    assert len({again.cache_dir, *others}) == 5


def test_hub_order_is_put_right(
    cifar10_source: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The Hub's copy has the batches in the archive's order: 4, 3, 2, 5, 1."""
    order = np.concatenate([np.arange(10_000) + 10_000 * batch for batch in (3, 2, 1, 4, 0)])
    hub = DatasetDict(
        train=cifar10_source["train"].select(order).rename_column("image", "img"),
        test=cifar10_source["test"].select(range(50)).rename_column("image", "img"),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **settings: hub)
    builder = Cifar10(config_name="r100", cache_dir=str(tmp_path))
    builder.download_and_prepare()
    assert builder.info.description.endswith("the standard subset")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_unknown_order_is_named(cifar10_source: dict, caplog: pytest.LogCaptureFixture) -> None:
    train = cifar10_source["train"]
    order = np.random.default_rng(0).permutation(len(train))
    assert official_order(train.select(order), Cifar10.benchmark.blocks).with_format("numpy")["label"][
        :5
    ].tolist() == [train[int(row)]["label"] for row in order[:5]]
    builder = Cifar10(config_name="r100")
    assert builder._compared_with_standard("pixels 00") == ", not the standard subset"
    assert "not the standard subset of CIFAR-10 at ratio 100" in caplog.text


@pytest.mark.parametrize(("ratio", "total"), [(100, 10_847), (50, 12_608), (10, 19_573), (20, 15_907)])
def test_cifar100_pack_gives_every_ratio(shared: Path, tmp_path: Path, ratio: float, total: int) -> None:
    source = folder_source(Cifar100.benchmark, shared / "data")
    train = pack_builder(shared, tmp_path, imbalance_ratio=ratio)._thin_out(source["train"])
    expected = [int(500 * (1 / ratio) ** (k / 99)) for k in range(100)]
    assert sum(expected) == total
    assert class_counts(train, "label").tolist() == expected


def test_cifar100_is_the_standard_subset(shared: Path, tmp_path: Path) -> None:
    splits = load_splits("cifar100", data_dir=str(shared / "data"), imbalance_ratio=100, cache_dir=str(tmp_path))
    assert set(splits) == {"train", "test"}
    assert splits["train"].info.description.endswith("the standard subset")
    assert class_counts(splits["test"]).tolist() == [100] * 100
    assert splits["train"].features["label"].names[-1] == "worm"


@pytest.mark.parametrize("settings", [{}, {"imbalance_ratio": 5.0}, {"seed": 1}, {"profile": "step"}])
def test_cifar100_pack_refuses_what_it_cannot_give(shared: Path, tmp_path: Path, settings: dict) -> None:
    if {"seed", "profile"} & set(settings):
        settings["imbalance_ratio"] = 100.0
    with pytest.raises(ValueError, match="already thinned out at ratio 10.*Use the whole data set"):
        pack_builder(shared, tmp_path, **settings)._thin_out(
            folder_source(Cifar100.benchmark, shared / "data")["train"]
        )


def test_a_folder_is_the_same_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train.parquet").write_bytes(b"some")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    spellings = ("~/images", "images", str(tmp_path / "images"))
    builders = [Cifar10(config_name="r100", data_dir=name, cache_dir=str(tmp_path / "cache")) for name in spellings]
    assert {builder.config.data_dir for builder in builders} == {str(tmp_path / "images")}
    assert len({builder.cache_dir for builder in builders}) == 1
    (tmp_path / "images" / "train.parquet").write_bytes(b"others")
    changed = Cifar10(config_name="r100", data_dir="~/images", cache_dir=str(tmp_path / "cache"))
    assert changed.cache_dir != builders[0].cache_dir
