"""Which image classifiers of timm and transformers the feature tap works on: writes results/feature_tap.csv.

Finds the head of every timm architecture after giving it seven classes, without weights in memory, and runs the
smallest of each family; runs each transformers image classifier with its default config. Takes about ten minutes.

    python tests/sweep_feature_tap.py
"""

from __future__ import annotations

import csv
import importlib
import warnings
from collections import defaultdict
from pathlib import Path

import timm
import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from nc_hf.models.classifier import check_tap, feature_dim, find_head

NUM_CLASSES = 7
LARGEST_FORWARD = 200_000_000  # parameters
TABLE = Path(__file__).resolve().parents[1] / "results" / "feature_tap.csv"
COLUMNS = ["library", "family", "model", "names", "result", "feature_width", "checked", "why"]


def why_not(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]


def timm_head(name: str) -> tuple[str, int | str, int]:
    """Result, feature width or reason, and number of parameters, from shapes alone."""
    with torch.device("meta"):
        model = timm.create_model(name)
        size = sum(parameter.numel() for parameter in model.parameters())
        try:
            if not hasattr(model, "reset_classifier"):
                raise ValueError(f"{type(model).__name__} has no reset_classifier: it is no classifier.")
            model.reset_classifier(NUM_CLASSES)
            return "works", feature_dim(find_head(model)[1]), size
        except Exception as error:
            return "refused", why_not(error), size


def forward(model: nn.Module, image_size: tuple[int, int]) -> tuple[str, int | str]:
    """Result, and feature width or reason, from one batch."""
    try:
        head_name, head = find_head(model)
        check_tap(model, head_name, torch.randn(2, 3, *image_size))
    except Exception as error:
        return "refused", why_not(error)
    return "works", feature_dim(head)


def timm_rows(family: str) -> list[dict]:
    """One row for each outcome in a family, for its smallest network."""
    outcomes = defaultdict(list)
    for name in timm.list_models(module=family):
        result, detail, size = timm_head(name)
        outcomes[(result, "" if result == "works" else detail)].append((size, name, detail))
    rows = []
    for (result, _), members in sorted(outcomes.items(), reverse=True):
        size, name, detail = min(members)
        checked = "head"
        if result == "works" and size < LARGEST_FORWARD:
            checked, model = "forward", timm.create_model(name, num_classes=NUM_CLASSES)
            result, detail = forward(model, model.pretrained_cfg["input_size"][1:])
        rows.append(row("timm", family, name, len(members), result, detail, checked))
    return rows


def transformers_row(family: str, class_name: str) -> dict:
    """The row of a transformers class, built from its default config."""
    config_class = CONFIG_MAPPING[family]
    try:
        module = importlib.import_module(config_class.__module__.rpartition(".")[0])
        cls = getattr(module, class_name)
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config_class(num_labels=NUM_CLASSES)).parameters())
        checked = "forward" if size < LARGEST_FORWARD else "head"
        with torch.device("cpu" if checked == "forward" else "meta"):
            model = cls(config_class(num_labels=NUM_CLASSES))
        if checked == "forward":
            side = getattr(model.config, "image_size", None)
            side = min(side, 224) if isinstance(side, int) else 224
            result, detail = forward(model, (side, side))
        else:
            result, detail = "works", feature_dim(find_head(model)[1])
    except Exception as error:
        checked, result, detail = "head", "refused", why_not(error)
    return row("transformers", family, class_name, 1, result, detail, checked)


def row(library: str, family: str, model: str, names: int, result: str, detail: int | str, checked: str) -> dict:
    width, why = (detail, "") if result == "works" else ("", detail)
    values = [library, family, model, names, result, width, checked, why]
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for family in timm.list_modules():
            table.writerows(timm_rows(family))
        for family, names in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items():
            for class_name in [names] if isinstance(names, str) else names:
                table.writerow(transformers_row(family, class_name))


if __name__ == "__main__":
    main()
