"""The paper's printed accuracies, and what its tables call the method of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nc_hf.recipe import Recipe

# Table 3, top-1 accuracy (%) of ResNet-32. The rows of others were copied by the authors from those papers.
TABLE3 = {
    ("cifar10", 100): {"CE": 70.4, "CE-RS": 72.8, "CE-RW": 74.4, "CE-DRW": 75.1, "NC-DRW": 81.9, "NC-DRW-cRT": 82.6},
    ("cifar10", 10): {"CE": 86.4, "CE-RS": 87.8, "CE-RW": 87.9, "CE-DRW": 86.4, "NC-DRW": 89.8, "NC-DRW-cRT": 90.2},
    ("cifar100", 100): {"CE": 38.4, "CE-RS": 36.7, "CE-RW": 32.5, "CE-DRW": 42.5, "NC-DRW": 48.6, "NC-DRW-cRT": 48.7},
    ("cifar100", 10): {"CE": 55.7, "CE-RS": 57.7, "CE-RW": 58.2, "CE-DRW": 56.2, "NC-DRW": 63.1, "NC-DRW-cRT": 63.6},
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
