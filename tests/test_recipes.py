"""Every recipe trains: some on digits in this process, all of CIFAR-10-LT on photographs through the command line."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from nc_hf.recipe import load_recipe
from nc_hf.retraining_args import RetrainingArguments
from nc_hf.training_args import NCTrainingArguments

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "accelerate")
CIFAR10 = [path for path in RECIPES if path.parent.name == "cifar10_lt"]
# One recipe of each kind of network, head, loss or stage two that no other test takes through the script.
FAST = ["ldam_drw", "etf_dr", "mislas", "ce_crt", "tsc", "bbn", "ride"]


@pytest.fixture(scope="module")
def train():
    """The function behind `recipes/train.py`."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "recipes" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_says_what_it_is_and_holds_settings_that_go_together(path):
    assert path.read_text().startswith("# ")
    recipe = load_recipe(path)
    for stage, kind in (("stage1", NCTrainingArguments), ("stage2", RetrainingArguments)):
        if getattr(recipe, stage) is not None:
            kind(output_dir="unused", use_cpu=True, **{**getattr(recipe, stage), "report_to": "none"})


@pytest.mark.parametrize("name", FAST)
def test_recipes_of_each_kind_train_both_stages(train, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--stage1.num_train_epochs", "2", "--data.dataset", "digits", "--data.imbalance_ratio", "20"]
    recipe = load_recipe(ROOT / "recipes" / "cifar10_lt" / f"{name}.yaml")
    if recipe.stage2 is not None:
        short += ["--stage2.num_train_epochs", "1"]
    if name == "ride":
        short += ["--model.model_args", "{num_experts: 2, routing: true}"]
    train([str(ROOT / "recipes" / "cifar10_lt" / f"{name}.yaml"), *short, "--evaluation.geometry_every", "0"])
    results = json.loads((tmp_path / "out" / f"cifar10_lt-{name}" / "results.json").read_text())
    assert set(results["heads"]) == {"base", *(recipe.stage2["heads"] if recipe.stage2 else [])}
    assert all(0 <= metrics["accuracy"] <= 1 for metrics in results["heads"].values())
    assert results["geometry"]["base"]["train"]["nc2_min_angle"] >= 0
    if name == "ride":
        assert 1 <= results["routing"]["experts_used"] <= 2
    assert (tmp_path / "out" / f"cifar10_lt-{name}" / "release" / "README.md").is_file()


@pytest.fixture(scope="session")
def photographs(shared, tmp_path_factory) -> Path:
    """2,000 images of CIFAR-10 with a long tail, and 500 to test on."""
    folder = tmp_path_factory.mktemp("photographs")
    files = {name: str(shared / "data" / f"cifar10-{name}.parquet") for name in ("train", "test")}
    images = load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache"))
    counts = {"train": (600 * 0.6 ** np.arange(10)).astype(int), "test": np.full(10, 50)}
    counts["train"][0] += 2000 - counts["train"].sum()
    for name, split in images.items():
        labels = np.asarray(split["label"])
        rows = [np.flatnonzero(labels == k)[:count] for k, count in enumerate(counts[name])]
        split.select(np.sort(np.concatenate(rows))).to_parquet(str(folder / f"{name}.parquet"))
    return folder


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
    environment = {**os.environ, "HF_DATASETS_CACHE": str(photographs / "cache")}
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / f"cifar10_lt-{path.stem}" / "results.json").read_text())
    assert set(results["heads"]) == {"base", *(recipe.stage2["heads"] if recipe.stage2 else [])}
