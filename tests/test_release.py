"""From a run folder to a repository folder: complete, without paths of this machine, and only from a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from nc_hf import build_release, load_classifier, save_pretrained
from nc_hf.doors import check_doors
from nc_hf.hub import load_heads
from nc_hf.recipe import dump_recipe, load_recipe
from nc_hf.results import write_results

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"class {k}" for k in range(10)]
COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def finished_run(folder: Path, *, seed: int = 0, method: str = "NC-DRW", accuracy: float = 0.8) -> Path:
    """What recipes/train.py leaves, with a network that was not trained."""
    folder.mkdir()
    torch.manual_seed(seed)
    model, _ = load_classifier("resnet20_cifar", 10, NAMES)
    heads = {"base": model.fc.state_dict()}
    for stage, head in (("stage1", "base"), ("stage2", "crt")):
        heads = heads | {head: model.fc.state_dict()}
        means = torch.randn(10, 64)
        save_pretrained(model, folder / stage, heads=heads, active_head=head, class_means=means, class_counts=COUNTS)
    recipe = load_recipe(ROOT / "recipes/cifar10_lt/nc_drw_crt.yaml", ["--data.data_dir", "/home/me/images"])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    metrics = {
        "accuracy": accuracy,
        "class_mean_accuracy": accuracy,
        "per_class_accuracy": [accuracy] * 10,
        "ece": 0.1,
    }
    dataset = {"name": "cifar10", "imbalance_ratio": 100.0, "profile": "exponential"}
    course = [
        {"epoch": 10 * k, "nc1_variability_balanced": 1 / k, "nc2_angle_gap": 9 / k, "nc4_agreement": 0.9}
        for k in (1, 2)
    ]
    results = {
        "seed": seed,
        "model": "resnet20_cifar",
        "split": "test",
        "dataset": dataset | {"class_names": NAMES, "class_counts": COUNTS},
        "methods": {"base": method, "crt": f"{method}-cRT"},
        "heads": {"base": metrics, "crt": metrics},
        "geometry_course": course,
        "training": {},
    }
    write_results(folder / "results.json", results)
    return folder


def test_a_release_has_all_that_a_visitor_wants(tmp_path):
    run = finished_run(tmp_path / "run")
    twin = finished_run(tmp_path / "twin", method="CE-DRW", accuracy=0.7)
    other = finished_run(tmp_path / "other", seed=1, accuracy=0.82)
    folder = build_release(run, tmp_path / "release", repo_id="me/model", twin=twin, seeds=[other], license="mit")
    assert check_doors(folder)
    assert set(load_heads(folder)[0]) == {"base", "crt"}
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "angles.png", "classes.png", "collapse.png", "norms.png"
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "| CE-DRW: the same without the collapse terms | 70.0 |" in card
    assert "| 81.0 ± 1.4 |" in card and "license: mit" in card
    assert "/home/me" not in (folder / "recipe.yaml").read_text() and "/home/me" not in card
    assert load_recipe(folder / "recipe.yaml").stage1 == load_recipe(run / "recipe.yaml").stage1
    (evaluation,) = (folder / ".eval_results").glob("*.yaml")
    entries = yaml.safe_load(evaluation.read_text())
    assert [entry["value"] for entry in entries] == [80.0, 80.0]
    assert {entry["dataset"]["id"] for entry in entries} == {"uoft-cs/cifar10"}


def test_a_release_built_anew_forgets_twin_and_seeds(tmp_path):
    run = finished_run(tmp_path / "run")
    twin = finished_run(tmp_path / "twin", method="CE-DRW", accuracy=0.7)
    folder = build_release(run, twin=twin, seeds=[finished_run(tmp_path / "other", seed=1)])
    assert "CE-DRW" in (folder / "README.md").read_text()
    build_release(run)
    assert not (folder / "twin.json").exists() and not (folder / "seeds").exists()
    assert "CE-DRW" not in (folder / "README.md").read_text()


def test_a_release_can_be_built_again(tmp_path):
    run = finished_run(tmp_path / "run")
    first = {path: path.read_bytes() for path in build_release(run).rglob("*") if path.is_file()}
    assert {path: path.read_bytes() for path in build_release(run).rglob("*") if path.is_file()} == first


def test_an_unfinished_run_is_refused(tmp_path):
    run = finished_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    write_results(run / "results.json", results | {"heads": {}})
    with pytest.raises(FileNotFoundError, match="Let the run finish first"):
        build_release(run)
    assert not (run / "release").exists()
