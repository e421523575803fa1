"""Runs have the paper's names, and its number stands beside a run of its data alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nc_hf.paper_results import TABLE3, method_name, paper_accuracy
from nc_hf.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
DATA = {"name": "cifar10", "imbalance_ratio": 100.0, "profile": "exponential"}


@pytest.mark.parametrize(
    ("change", "printed"),
    [
        ({}, 81.9),
        ({"test_split": None, "validation_fraction": 0.0}, 81.9),
        ({"test_split": "left_out"}, None),
        ({"validation_fraction": 0.1}, None),
        ({"profile": "step"}, None),
    ],
)
def test_other_images_are_not_compared(change, printed):
    results = {"model": "resnet32_cifar", "split": "test", "methods": {"base": "NC-DRW"}, "dataset": DATA | change}
    assert paper_accuracy(results, "base") == printed


@pytest.mark.parametrize(("epochs", "printed"), [(200.0, 81.9), (30.0, None)])
def test_a_shorter_run_is_not_compared(epochs, printed):
    results = {"model": "resnet32_cifar", "split": "test", "methods": {"base": "NC-DRW"}, "dataset": DATA}
    assert paper_accuracy(results | {"training": {"stage1": {"epochs": epochs}}}, "base") == printed


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "NC-DRW"),
        ({"within_weight": 0, "between_weight": 0, "centers": "ema"}, "CE-DRW"),
        ({"between_weight": 0}, "CE+L_W-DRW"),
        ({"drw_epoch": None}, "NC-RW"),
        ({"class_weighting": "none", "drw_epoch": None, "sampler": "class_balanced"}, "NC-RS"),
    ],
)
def test_methods_have_the_papers_names(settings, name):
    recipe = load_recipe(ROOT / "recipes/cifar10_lt/nc_drw_crt.yaml")
    recipe.stage1 |= settings
    assert method_name(recipe) == name
    assert method_name(recipe, "crt") == f"{name}-cRT"


@pytest.mark.parametrize(
    ("recipe", "head", "name"),
    [
        ("mislas", "lws", "MiSLAS"),
        ("bbn", "base", "BBN"),
        ("kcl", "crt", "KCL"),
        ("kcl", "base", "KCL-untrained head"),
        ("ldam_drw", "base", "LDAM-DRW"),
        ("arb", "base", "ARB-Loss"),
        ("nc_ride", "base", "RIDE (3 experts)+NC"),
        ("center_loss", "base", "CE+Center Loss-DRW"),
        ("ce_crt", "lws", "CE-LWS"),
        ("cutmix", "base", "CE+CutMix"),
        ("label_smoothing", "base", "CE+label smoothing"),
        ("auto_augment", "base", "CE+AutoAugment"),
    ],
)
def test_recipes_have_the_papers_names(recipe, head, name):
    assert method_name(load_recipe(ROOT / f"recipes/cifar10_lt/{recipe}.yaml"), head) == name


def test_the_papers_table_is_the_printed_one(shared):
    printed = json.loads((shared / "paper_tables.json").read_text())["table3_cifar_lt_top1"]
    for (dataset, ratio), rows in TABLE3.items():
        column = printed["columns"].index(f"{dataset.upper()}-LT r={ratio}")
        assert rows == {name: printed["rows"][name][column] for name in rows}
