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


LOSSES = {
    "ce": "CE",
    "mse": "MSE",
    "ldam": "LDAM",
    "arb": "ARB-Loss",
    "logit_adjustment": "Logit Adjust",
    "dot_regression": "ETF classifier+DR",
}
HEADS = {"crt": "cRT", "lws": "LWS"}
EPOCHS = 200  # of Table 3


def method_name(recipe: Recipe, head: str = "base") -> str:
    """The paper's name of a recipe's method, such as `NC-DRW-cRT`.

    Args:
        recipe: of the run.
        head: `"base"` of stage one, or another one, whose name is added.
    """
    stage, second, parts = recipe.stage1, recipe.stage2 or {}, []
    if stage is not None:
        parts.append(_learner(recipe) + _terms(stage))
        if parts[0] == "CE+NC":
            parts = ["NC"]
        if stage["sampler"] not in ("instance", "two_views", "bilateral"):
            parts.append("RS")
        if stage["class_weighting"] != "none" and stage["objective"] == "classification":
            parts.append("RW" if stage["drw_epoch"] is None else "DRW")
    if head == "lws" and second.get("loss") == "label_aware_smoothing":
        return "MiSLAS" + "+NC" * (parts[:1] == ["NC"])
    if stage and stage["objective"] == "contrastive":  # which stage two alone teaches to classify
        parts += ["untrained head"] if head == "base" else []
    elif head != "base":
        parts.append(HEADS.get(head, head))
    return "-".join(parts)


def _learner(recipe: Recipe) -> str:
    """What stage one learns by, without the terms."""
    stage = recipe.stage1
    if stage["objective"] == "experts":
        return f"RIDE ({recipe.model.model_args.get('num_experts', 3)} experts)"
    if stage["objective"] == "bilateral":
        return "BBN"
    if stage["objective"] == "contrastive":
        return stage["objective_settings"].get("method", "contrastive").upper()
    added = {
        "label smoothing": stage.get("label_smoothing_factor", 0) > 0,
        "CutMix": stage["cutmix_alpha"] > 0,
        "AutoAugment": recipe.data.augmentation == "auto_augment",
    }
    return "+".join([LOSSES.get(stage["loss"], stage["loss"]), *(name for name, on in added.items() if on)])


def _terms(stage: Mapping[str, Any]) -> str:
    within, between = stage["within_weight"] > 0, stage["between_weight"] > 0
    pull = "+Center Loss" if stage["within_reduction"] == "images" else "+L_W"
    if within and between and pull == "+L_W":
        return "+NC"
    return pull * within + "+L_B" * between


def paper_accuracy(results: Mapping[str, Any], head: str) -> float | None:
    """Top-1 accuracy (%) that Table 3 prints for a run's data, network, epochs and method; None where it has none.

    Args:
        results: content of a `results.json`.
        head: of the run.
    """
    data = results["dataset"]
    if results.get("model") != "resnet32_cifar" or data.get("profile") != "exponential":
        return None
    if results.get("split") != "test" or data.get("test_split") or data.get("validation_fraction"):
        return None  # not the paper's test images, or not all of its training images
    if results.get("training", {}).get("stage1", {}).get("epochs", EPOCHS) != EPOCHS:
        return None
    rows = TABLE3.get((data["name"], data["imbalance_ratio"]), {})
    return rows.get(results.get("methods", {}).get(head))
