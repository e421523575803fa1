"""The paper's printed accuracies, and what its tables call the method of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nc_hf.paper_tables import TABLES
from nc_hf.recipe import Recipe

# Table 3, top-1 accuracy (%) of ResNet-32, by name of the data and imbalance ratio.
TABLE3 = {
    (setting.dataset.removesuffix("_lt"), setting.ratio): {
        name: row[k] for name, row in TABLES["table3"].printed.items()
    }
    for k, setting in enumerate(TABLES["table3"].settings)
}


def method_name(recipe: Recipe, head: str = "base") -> str:
    """The paper's name of a recipe's method, such as `NC-DRW-cRT`.

    Args:
        recipe: of the run.
        head: `"base"` of stage one, or another one, whose name is added.
    """
    stage, parts = recipe.stage1, []
    if stage is not None:
        within, between = stage["within_weight"] > 0, stage["between_weight"] > 0
        loss = {"ce": "CE", "mse": "MSE"}.get(stage["loss"], stage["loss"])
        parts.append("NC" if within and between else loss + "+L_W" * within + "+L_B" * between)
        if stage["sampler"] != "instance":
            parts.append("RS")
        if stage["class_weighting"] != "none":
            parts.append("RW" if stage["drw_epoch"] is None else "DRW")
    if head != "base":
        parts.append({"crt": "cRT"}.get(head, head))
    return "-".join(parts)


def paper_accuracy(results: Mapping[str, Any], head: str) -> float | None:
    """Top-1 accuracy (%) that Table 3 prints for a run's data, network and method; None where it has no such row.

    Args:
        results: content of a `results.json`.
        head: of the run.
    """
    data = results["dataset"]
    if results.get("model") != "resnet32_cifar" or data.get("profile") != "exponential":
        return None
    if results.get("split") != "test":
        return None
    rows = TABLE3.get((data["name"], data["imbalance_ratio"]), {})
    return rows.get(results.get("methods", {}).get(head))
