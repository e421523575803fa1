"""Every recipe trains: some on digits in this process, all of CIFAR-10-LT on photographs through the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from small_images import image_tree

from nc_hf.recipe import dump_recipe, load_recipe, recipe_digest
from nc_hf.retraining_args import RetrainingArguments
from nc_hf.training_args import NCTrainingArguments

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "accelerate")
CIFAR10 = [path for path in RECIPES if path.parent.name == "cifar10_lt"]
# One recipe of each kind of network, head, loss or stage two that no other test takes through the script.
FAST = ["ldam_drw", "etf_dr", "mislas", "ce_crt", "tsc", "bbn", "ride"]


@pytest.fixture
def train(script, monkeypatch):
    """The function behind `recipes/train.py`; the number of threads stays that of the tests."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return script("train").main


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_says_what_it_is_and_holds_settings_that_go_together(path, tmp_path):
    assert path.read_text().startswith("# ")
    recipe, dumped = load_recipe(path), tmp_path / "recipe.yaml"
    dumped.write_text(dump_recipe(recipe))
    assert load_recipe(dumped) == recipe and recipe_digest(load_recipe(dumped)) == recipe_digest(recipe)
    for stage, kind in (("stage1", NCTrainingArguments), ("stage2", RetrainingArguments)):
        if getattr(recipe, stage) is not None:
            kind(output_dir="unused", use_cpu=True, **{**getattr(recipe, stage), "report_to": "none"})


@pytest.mark.parametrize("name", FAST)
def test_recipes_of_each_kind_train_both_stages(train, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--stage1.num_train_epochs", "2", "--data.dataset", "digits", "--data.imbalance_ratio", "20"]
    short += ["--model.image_size", "16"]
    recipe = load_recipe(ROOT / "recipes" / "cifar10_lt" / f"{name}.yaml")
    if recipe.stage2 is not None:
        short += ["--stage2.num_train_epochs", "1"]
    if name == "ride":
        short += ["--model.model_args", "{num_experts: 2, routing: true}"]
    train([str(ROOT / "recipes" / "cifar10_lt" / f"{name}.yaml"), *short, "--evaluation.geometry_every", "0"])
    results = json.loads((tmp_path / "out" / f"cifar10_lt-{name}" / "results.json").read_text())
    assert set(results["heads"]) == {"base", *(recipe.stage2["heads"] if recipe.stage2 else [])}
    for metrics in results["heads"].values():  # ten test images of each class
        assert metrics["accuracy"] == pytest.approx(np.mean(metrics["per_class_accuracy"])) and metrics["ece"] > 0
    geometry = results["geometry"]["base"]["train"]
    assert 0 < geometry["nc2_min_angle"] < geometry["nc2_best_angle"]
    if name == "ride":
        assert 1 <= results["routing"]["experts_used"] <= 2
    assert (tmp_path / "out" / f"cifar10_lt-{name}" / "release" / "README.md").is_file()


def test_a_validation_split_is_watched_and_chooses_tau(train, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    short = ["--stage1.num_train_epochs", "2", "--stage2.heads", "[tau_norm]", "--data.validation_fraction", "0.1"]
    with caplog.at_level("INFO", logger="nc_hf"):
        train([str(ROOT / "recipes/digits_lt/nc_drw_crt.yaml"), *short, "--name", "watched"])
    logged = [json.loads(line) for line in (tmp_path / "out/watched/log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in logged if "eval_class_mean_accuracy" in record] == [1, 2]
    results = json.loads((tmp_path / "out/watched/results.json").read_text())
    assert results["dataset"]["validation_fraction"] == 0.1 and results["split"] == "test"
    tau = re.search(r"tau_norm: tau (\S+) chosen on \d+ validation images", caplog.text)[1]
    assert results["taus"] == {"tau_norm": float(tau)} and results["taus_chosen_on"] == "validation"
    card = (tmp_path / "out/watched/release/README.md").read_text()
    assert f"weights normalized (`tau_norm`), tau {float(tau):g} (chosen on validation images) |" in card


def test_the_recipe_of_imagenet_trains_on_a_tree_of_its_shape(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_tree(tmp_path / "images", [12, 6, 3])
    short = ["--data.data_dir", str(tmp_path / "images"), "--data.cache_dir", str(tmp_path / "cache")]
    short += ["--model.name", "test_resnet", "--model.image_size", "32", "--stage1.expected_processes", "null"]
    for stage in ("stage1", "stage2"):
        short += [f"--{stage}.max_steps", "2", f"--{stage}.per_device_train_batch_size", "8"]
        short += [f"--{stage}.dataloader_num_workers", "0", f"--{stage}.dataloader_persistent_workers", "false"]
    train([str(ROOT / "recipes/imagenet_lt/nc_drw_crt.yaml"), *short, "--name", "tree"])
    results = json.loads((tmp_path / "out/tree/results.json").read_text())
    assert set(results["heads"]) == {"base", "crt"} and results["dataset"]["class_counts"] == [12, 6, 3]
    assert results["heads"]["crt"]["images"] == 6


@pytest.fixture(scope="session")
def photographs(shared, tmp_path_factory) -> Path:
    """2,000 images of CIFAR-10 with a long tail, and 500 to test on."""
    folder = tmp_path_factory.mktemp("photographs")
    files = {name: str(shared / "data" / f"cifar10-{name}.parquet") for name in ("train", "test")}
    (folder / "images").mkdir()
    images = load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache"))
    counts = {"train": (600 * 0.6 ** np.arange(10)).astype(int), "test": np.full(10, 50)}
    counts["train"][0] += 2000 - counts["train"].sum()
    for name, split in images.items():
        labels = np.asarray(split["label"])
        rows = [np.flatnonzero(labels == k)[:count] for k, count in enumerate(counts[name])]
        split.select(np.sort(np.concatenate(rows))).to_parquet(str(folder / "images" / f"{name}.parquet"))
    return folder / "images"  # in which `datasets` takes any file for images, so its cache lies beside it


@pytest.mark.slow
@pytest.mark.parametrize("terms", [(), ("--stage1.within_weight", "0.01", "--stage1.between_weight", "0.1")])
@pytest.mark.parametrize("path", CIFAR10, ids=lambda path: path.stem)
def test_every_recipe_of_cifar10_lt_trains_on_photographs(photographs, path, terms, tmp_path):
    recipe = load_recipe(path)
    arguments = ["--data.dataset", "parquet", "--data.data_dir", str(photographs), "--data.imbalance_ratio", "null"]
    arguments += ["--stage1.num_train_epochs", "2", *terms, "--stage1.feature_scale", "none"]
    if recipe.stage2 is not None:
        arguments += ["--stage2.num_train_epochs", "2"]
    script = [sys.executable, str(ROOT / "recipes" / "train.py"), str(path), *arguments]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(photographs.parent / "cache")}
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / f"cifar10_lt-{path.stem}" / "results.json").read_text())
    assert set(results["heads"]) == {"base", *(recipe.stage2["heads"] if recipe.stage2 else [])}
