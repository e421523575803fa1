"""Results of runs as recipes/train.py would leave them, for tests of the tables, and the rows of a printed table."""

from __future__ import annotations

from pathlib import Path

import torch

from nc_hf import load_classifier, save_pretrained
from nc_hf.paper_tables import CIFAR10_LT, Setting, Table
from nc_hf.recipe import dump_recipe, recipe_digest
from nc_hf.reproduction import TABLES, Plan, plan_row
from nc_hf.results import write_results

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
DESCRIPTION = "CIFAR-10, some images, the standard subset"
TABLE3 = TABLES["table3"]


def measured(plan: Plan, seed: int = 0, accuracy: float = 0.8, precision: str = "bf16", **changed) -> dict:
    """What a run of a plan's recipe would have written."""
    recipe = plan.recipe(seed)
    for stage in filter(None, (recipe.stage1, recipe.stage2)):
        stage["precision"] = precision
    metrics = {"accuracy": accuracy, "per_class_accuracy": [accuracy] * 10}
    return {
        "recipe_digest": recipe_digest(recipe, DESCRIPTION),
        "seed": seed,
        "split": "test",
        "dataset": {
            "name": "cifar10",
            "description": DESCRIPTION,
            "class_counts": COUNTS,
            "class_names": [f"class {k}" for k in range(10)],
        },
        "geometry_course": [
            {
                "epoch": epoch,
                "nc1_variability_balanced": 2 / epoch,
                "nc2_min_angle": 60 + epoch,
                "nc2_best_angle": 96.4,
            }
            | {"nc3_duality_gap": 1 / epoch, "nc4_agreement": 0.9}
            for epoch in (1, 2)
        ],
        "heads": {"base": metrics, "crt": {**metrics, "accuracy": accuracy + 0.01}},
        "training": {"stage1": {"seconds": 2400.0}, "stage2": {"seconds": 120.0}},
    } | changed


def plan_for(name: str, results: Path, table: Table = TABLE3, setting: Setting = CIFAR10_LT, **options) -> Plan:
    return plan_row(setting, table.rows[name], RECIPES, results, **options)


def store(plan: Plan, results: dict) -> None:
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_results(plan.target(results["seed"]), results)


def cells(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def finished_run(run: Path, plan: Plan, seed: int = 0) -> None:
    """What recipes/train.py leaves, with a network that was not trained."""
    model, _ = load_classifier("resnet20_cifar", 10)
    means = torch.randn(10, 64, generator=torch.Generator().manual_seed(seed))
    save_pretrained(model, run / "stage1", heads={"base": model.fc.state_dict()}, class_means=means)
    (run / "recipe.yaml").write_text(dump_recipe(plan.recipe(seed)))
    write_results(run / "results.json", measured(plan, seed))
