"""Cards of published splits: counted and hashed from the splits themselves, nothing unknown, names escaped."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from huggingface_hub import DatasetCard

from nc_hf import load_splits
from nc_hf.card_block import BEGIN, END, merge_cards
from nc_hf.data.builders import STANDARD_PIXELS
from nc_hf.dataset_card import config_name_for, dataset_card, push_splits, split_facts
from nc_hf.recipe import DataConfig

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["ant", "bee | <b>", "cat\nfish"]
CIFAR10 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def split(labels: list[int], names: list[str] = NAMES) -> Dataset:
    pixels = [np.full((4, 4, 3), number, dtype=np.uint8) for number in range(len(labels))]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": [PIL.Image.fromarray(p) for p in pixels], "label": labels}, features=features)


def cifar(name: str = "r100", **changes) -> dict:
    facts = {"name": name, "profile": "exponential", "imbalance_ratio": 100.0, "seed": 0, "standard": True}
    facts |= {"class_names": [f"class {k}" for k in range(10)], "has_index": True, "sha256": "ab" * 32}
    return facts | {"counts": {"train": CIFAR10, "test": [1000] * 10}} | changes


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> DatasetDict:
    return load_splits("digits", imbalance_ratio=20, cache_dir=str(tmp_path_factory.mktemp("cache")))


# ---- Names of configurations ----


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"dataset": "cifar10", "imbalance_ratio": 100}, "r100"),
        ({"dataset": "cifar10", "imbalance_ratio": 10.0, "profile": "step"}, "r10-step"),
        ({"dataset": "me/own", "imbalance_ratio": 2.5, "seed": 1}, "r2.5-seed1"),
        ({"dataset": "cifar10"}, "balanced"),
        ({"dataset": "cifar10", "seed": 3}, "balanced"),
        ({"dataset": "cifar10", "config_name": "r50"}, "r50"),
        ({"dataset": "cifar10", "config_name": "r50", "profile": "step", "seed": 1}, "r50-step-seed1"),
        ({"dataset": "cifar10", "config_name": "r50", "imbalance_ratio": 20}, "r20"),
        ({"dataset": "me/own"}, "default"),
        ({"dataset": "me/own", "config_name": "small", "seed": 1}, "small"),
    ],
)
def test_names_say_what_was_drawn(data, name):
    assert config_name_for(DataConfig(**data)) == name


# ---- Facts ----


def test_facts_are_counted_and_hashed(digits):
    facts = split_facts(digits, "r20", "digits")
    labels = np.asarray(digits["train"]["label"][:])
    assert facts["counts"] == {"train": np.bincount(labels).tolist(), "test": [50] * 10}
    pixels = b"".join(np.asarray(image.convert("RGB")).tobytes() for image in digits["train"]["image"])
    assert facts["sha256"] == hashlib.sha256(pixels).hexdigest()
    draw = {"name": "r20", "profile": "exponential", "imbalance_ratio": 20.0, "seed": 0, "has_index": True}
    assert draw.items() <= facts.items()
    assert "standard" not in facts  # digits have no literature
    assert json.loads(json.dumps(facts)) == facts


def test_facts_of_ones_own_images():
    splits = DatasetDict(train=split([0, 0, 0, 1, 1, 2]), test=split([0, 1, 2]))
    facts = split_facts(splits, "default")
    assert not {"profile", "imbalance_ratio", "seed", "standard"} & set(facts) and not facts["has_index"]
    drawn = {"profile": "step", "imbalance_ratio": 3.0, "seed": 7}
    assert drawn.items() <= split_facts(splits, "r3-step-seed7", facts=drawn).items()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, True), ({"profile": "step"}, None), ({"seed": 1}, None), ({"imbalance_ratio": 3.0}, None)],
)
def test_the_standard_subset_is_known_by_its_pixels(changes, expected, monkeypatch):
    train = split([0, 0, 1, 2])
    pixels = b"".join(np.asarray(image).tobytes() for image in train["image"])
    monkeypatch.setitem(STANDARD_PIXELS, ("CIFAR-10", 100), hashlib.sha256(pixels).hexdigest())
    draw = {"profile": "exponential", "imbalance_ratio": 100.0, "seed": 0} | changes
    assert split_facts(DatasetDict(train=train), "x", "cifar10", draw).get("standard") is expected


def test_a_part_of_the_standard_subset_is_not_it(monkeypatch):
    """As where a validation split was held out of train; the builder's words still speak of the whole."""
    monkeypatch.setitem(STANDARD_PIXELS, ("CIFAR-10", 100), "ab" * 32)
    train = split([0, 0, 1, 2])
    train.info.description = (
        f"CIFAR-10, exponential profile, imbalance ratio 100, seed 0: 9 training images, 5 to 1 a class; sha256 of "
        f"pixels {'ab' * 32}, the standard subset"
    )
    facts = split_facts(DatasetDict(train=train, validation=split([0])), "r100", "cifar10")
    assert facts["standard"] is False and facts["seed"] == 0
    assert "Not the images that the code of Cao et al. draws" in dataset_card([facts], "user/cifar10-lt", "cifar10")


# ---- Cards ----


def test_metadata_is_valid_and_known():
    data = DatasetCard(dataset_card([cifar()], "user/cifar10-lt", "cifar10")).data.to_dict()
    assert data == {
        "pretty_name": "CIFAR-10-LT",
        "task_categories": ["image-classification"],
        "size_categories": ["10K<n<100K"],
        "source_datasets": ["uoft-cs/cifar10"],
        "tags": ["long-tailed", "class-imbalance"],
    }
    own = DatasetCard(dataset_card([cifar()], "user/pets")).data.to_dict()
    assert (
        own["pretty_name"] == "pets"
        and own["tags"] == data["tags"]
        and "source_datasets" not in own
        and "license" not in own
    )
    even = dataset_card([cifar(counts={"train": [5] * 10})], "user/pets")
    assert "tags" not in DatasetCard(even).data.to_dict()
    assert DatasetCard(dataset_card([cifar()], "user/d", "digits")).data.license == "cc-by-4.0"


@pytest.mark.parametrize(
    ("images", "label"), [(999, "n<1K"), (1000, "1K<n<10K"), (50_000, "10K<n<100K"), (2_000_000, "1M<n<10M")]
)
def test_size_counts_all_images(images, label):
    facts = cifar(class_names=["a", "b"], counts={"train": [images - 2, 1], "test": [1, 0]})
    assert DatasetCard(dataset_card([facts], "user/x")).data.size_categories == [label]


def test_the_body_says_what_a_visitor_needs():
    balanced = {"name": "balanced", "class_names": cifar()["class_names"], "has_index": True, "sha256": "cd" * 32}
    balanced["counts"] = {"train": [5000] * 10, "test": [1000] * 10}
    card = dataset_card([cifar(), balanced], "user/cifar10-lt", "cifar10")
    assert card.count(BEGIN) == card.count(END) == 1
    assert "| `r100` | exponential, ratio 100, seed 0 | 12,406 | 5,000 to 50 | 10,000 |" in card
    assert "| `balanced` | all images | 50,000 | 5,000 to 5,000 | 10,000 |" in card
    assert (
        'load_dataset("user/cifar10-lt", "r100")' in card
        and 'load_splits("user/cifar10-lt", config_name="r100")' in card
    )
    assert "| class 9 | 50 | 1,000 |" in card and "r100: 8 many, 2 medium</summary>" in card
    assert f"| `r100` | `{'ab' * 32}` |" in card and f"| `balanced` | `{'cd' * 32}` |" in card
    assert "the standard of the literature: `r100`." in card
    assert "cui2019class" in card and "cao2019learning" in card and "krizhevsky2009learning" in card


def test_what_is_not_known_is_left_out():
    facts = {"name": "default", "class_names": NAMES, "has_index": False, "sha256": "ab" * 32}
    card = dataset_card([facts | {"counts": {"train": [9, 5, 0]}}], "user/own")
    for absent in (
        "None",
        "nan",
        "Undefined",
        "How it was drawn",
        "Licence",
        "bibtex",
        "`index`",
        "test images |",
        "Cao",
    ):
        assert absent not in card
    assert "| `default` | all images | 14 | 9 to 0 |" in card


def test_names_cannot_break_the_card():
    facts = cifar(class_names=[*NAMES, f"{END}<script>"], counts={"train": [9, 5, 1, 1], "test": [1] * 4})
    card = dataset_card([facts], "user/own")
    assert "| bee \\| &lt;b&gt; | 5 | 1 |" in card and "| cat fish | 1 | 1 |" in card
    assert card.count(END) == 1 and "<script>" not in card


def test_a_foreign_description_stays_out():
    train = split([0, 1, 2])
    train.info.description = f"# Mine\n\n{END}<script>"
    card = dataset_card([split_facts(DatasetDict(train=train), "default")], "user/own")
    assert "Mine" not in card and card.count(END) == 1


@pytest.mark.parametrize(("classes", "rows"), [(50, 50), (51, 10)])
def test_of_many_classes_the_ends_are_shown(classes, rows):
    counts = np.random.default_rng(0).permutation(np.arange(1, classes + 1)).tolist()
    names = [f"kind{k}" for k in range(classes)]
    card = dataset_card([cifar(class_names=names, counts={"train": counts})], "user/x")
    shown = [(row[1], int(row[2])) for row in re.finditer(r"^\| (kind\d+) \| (\d+) \|$", card, re.MULTILINE)]
    sizes = [size for _, size in shown]
    assert len(shown) == rows and sizes == sorted(sizes, reverse=True)
    assert sizes[0] == classes and sizes[-1] == 1
    assert all(counts[names.index(name)] == size for name, size in shown)
    assert ("The 41 classes in between" in card) == (rows == 10)


def test_tables_are_whole():
    """A blank line would end a table, a missing cell would shift it."""
    other = cifar("r10", counts={"train": CIFAR10})
    blocks = re.findall(r"(?:^\|.*\n)+", dataset_card([cifar(), other], "user/x", "cifar10"), re.MULTILINE)
    assert len(blocks) == 4
    for block in blocks:
        lines = block.splitlines()
        assert set(lines[1]) == {"|", "-"} and len({line.count("|") for line in lines}) == 1
        assert len(lines) in (2 + 2, 2 + 10)


def test_a_persons_words_and_the_clients_metadata_stay():
    theirs = "---\nconfigs:\n- config_name: r100\ntags:\n- mine\n---\n"
    merged = merge_cards(dataset_card([cifar()], "user/x", "cifar10"), theirs)
    assert "config_name: r100" in merged and "- mine" in merged and "- long-tailed" in merged and BEGIN in merged
    edited = merged.replace(BEGIN, f"By hand.\n\n{BEGIN}")
    again = merge_cards(dataset_card([cifar(), cifar("r10")], "user/x", "cifar10"), edited)
    assert "By hand." in again and "`r10`" in again and again.count(BEGIN) == 1


@pytest.mark.parametrize("dataset", ["imagenet_lt", "places_lt", "inaturalist2018"])
def test_images_that_may_not_be_passed_on_are_not_pushed(dataset, monkeypatch):
    monkeypatch.setattr(DatasetDict, "push_to_hub", lambda *_, **__: pytest.fail("pushed"))
    with pytest.raises(ValueError, match="may not be passed on"):
        push_splits(DatasetDict(train=split([0])), "user/x", config_name="official", dataset=dataset)


@pytest.mark.parametrize(("name", "dataset"), [("cifar10-lt", "CIFAR-10"), ("cifar100-lt", "CIFAR-100")])
def test_the_ready_cards_show_the_standard_subsets(name, dataset):
    card = (ROOT / "model_cards" / "datasets" / name / "README.md").read_text(encoding="utf-8")
    for ratio in (10, 100):
        assert f"| `r{ratio}` | `{STANDARD_PIXELS[dataset, ratio]}` |" in card
    assert "the standard of the literature: `r10`, `r100`." in card
    assert DatasetCard(card).data.pretty_name == f"{dataset}-LT"
