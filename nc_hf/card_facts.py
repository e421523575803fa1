"""What a model card says in words: the data, the size of the images, and the training."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import yaml
from safetensors import safe_open

from nc_hf.card_block import escaped
from nc_hf.data.folders import FILE_FORMATS
from nc_hf.data.provenance import PROVENANCE
from nc_hf.data.splits import BUILDERS
from nc_hf.metrics.long_tail_accuracy import FEW_BELOW, MANY_ABOVE, frequency_groups
from nc_hf.models.saved_folder import WEIGHTS
from nc_hf.recipe_sections import defaults_of
from nc_hf.retraining_args import TRAINED_HEADS
from nc_hf.training_args import resolve_epoch

# What our builders, and `load_splits` of other data, say of a training set.
DESCRIPTION = re.compile(
    r"(?:(?:.* profile, imbalance ratio \S+, seed (?P<seed>\d+)|.*, all images): .* a class; )?"
    r"sha256 of (?P<what>\w+) (?P<sha256>[0-9a-f]{64})(?:, (?P<standard>.*standard subset))?"
)
HASHED = {"pixels": "pixels", "list": "paths and labels"}


def dataset_facts(results: Mapping[str, Any]) -> dict[str, Any]:
    """Name, title and sizes of the data set, and how it was drawn; what is not known is absent or None."""
    facts = dict(results["dataset"])
    if facts.get("name") in FILE_FORMATS:  # which says nothing of the images
        facts["name"] = None
    known, counts = PROVENANCE.get(facts.get("name")), facts.get("class_counts")
    facts["source"] = known.title if known else escaped(facts["name"]) if facts.get("name") else None
    facts["name"] = facts.get("name") or "own images"
    drawn = f"-LT, imbalance ratio {facts['imbalance_ratio']:g}" if facts.get("imbalance_ratio") else ""
    facts["title"] = (facts["source"] or facts["name"]) + drawn
    facts["plain_title"] = (known.title if known else facts["name"]) + drawn  # for YAML, which escapes in its own way
    hub_id = known.hub_id if known else facts["name"] if facts["name"].count("/") == 1 else None
    facts |= {"hub_id": hub_id, "license": known.license if known else None}
    facts |= {"known": known is not None, "classes": len(facts["class_names"])}
    if found := DESCRIPTION.fullmatch(facts.get("description") or ""):
        facts |= found.groupdict() | {"hashed": HASHED.get(found["what"], found["what"]), "description": None}
        # The checksum is of all training images, and that of a user's files says nothing to others.
        if facts.get("validation_fraction") or results.get("skipped_images") or found["what"] == "names":
            facts |= {"sha256": None, "standard": None}
    elif facts.get("description"):
        # In one paragraph, and without the checksum of a user's files.
        facts["description"] = " ".join(re.sub(r"; sha256 of names \w+$", "", facts["description"]).split())
    heads = list(results.get("heads", {}).values())
    facts["tested"] = next((metrics.get("images") for metrics in heads), None)
    # Only on as many images of each class are these the same figure, but for a network that is always right or wrong.
    facts["balanced_test"] = all(
        math.isclose(metrics.get("accuracy", 0), metrics.get("class_mean_accuracy", 0), abs_tol=1e-9)
        and 0 < metrics.get("accuracy", 0) < 1
        for metrics in heads
    )
    if counts is None:
        return facts
    facts |= {"images": sum(counts), "largest": max(counts), "smallest": min(counts)}
    ratio, asked = facts["largest"] / max(1, facts["smallest"]), facts.get("imbalance_ratio")
    if asked and ratio > 1.25 * asked:
        facts["larger_ratio"] = f"{ratio:.3g}"
    accuracies = next((m["per_class_accuracy"] for m in heads if "per_class_accuracy" in m), counts)
    of_each = list(zip(facts["class_names"], counts, accuracies, strict=True))
    facts["untested"] = [escaped(name) for name, n, accuracy in of_each if n > 0 and accuracy is None]
    facts["balanced_test"] &= not facts["untested"]
    facts["empty"] = [escaped(name) for name, n in zip(facts["class_names"], counts, strict=True) if n == 0]
    bounds = {"few_below": facts.get("few_below", FEW_BELOW), "many_above": facts.get("many_above", MANY_ABOVE)}
    groups = frequency_groups(counts, **bounds)
    facts["groups"] = bounds | {name: int(members.sum()) for name, members in groups.items()}
    return facts


def parameters(folder: Path) -> int:
    """Number of a saved model's parameters, without the statistics of its normalization layers."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = [name for name in file.keys() if not name.endswith(("running_mean", "running_var", "batches_tracked"))]
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def input_size(folder: Path) -> tuple[int, int] | None:
    """Height and width of the images that a saved model takes, where its folder tells them."""
    size = (json.loads((folder / "config.json").read_text()).get("pretrained_cfg") or {}).get("input_size")
    if size:
        return size[1], size[2]
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    size = settings.get("crop_size") or settings.get("size") or {}
    height, width = (size.get(side) or size.get("shortest_edge") for side in ("height", "width"))
    return (height, width) if height and width else None


def origin(recipe: str | None) -> str | None:
    """What the network's weights started from: a Hub id, a folder's name, or an architecture of timm with its own.

    Args:
        recipe: YAML of the run; None where there is none.
    """
    model = (yaml.safe_load(recipe) if recipe else {}).get("model") or {}
    name = re.sub("^(local-dir|hf-hub):|@.*$", "", model.get("name") or "")
    return name if name and (model.get("pretrained") or not timm.is_model(name)) else None


def is_public(name: str) -> bool:
    """Whether others can load weights of that name: a Hub id or an architecture of timm, and no folder."""
    return name.count("/") == 1 or timm.is_model(name)


def has_public_data(recipe: str) -> bool:
    """Whether others can load the data of a recipe (YAML): a benchmark, or a Hub id, of which no path was cut off."""
    name = (yaml.safe_load(recipe).get("data") or {}).get("dataset") or ""
    return name in BUILDERS or name.count("/") == 1


def needs_folder(recipe: str) -> bool:
    """Whether the images of a recipe (YAML) lie in a folder: those of a benchmark, but for the embedded digits."""
    name = (yaml.safe_load(recipe).get("data") or {}).get("dataset")
    return name in BUILDERS and name != "digits"


def stages(results: Mapping[str, Any], recipe: str | None) -> list[dict[str, Any]]:
    """The settings of each stage that was run, its schedule in words, and what results say of its training."""
    told = []
    for number, stage in enumerate(("stage1", "stage2"), start=1):
        given = yaml.safe_load(recipe)[stage] if recipe else None
        if given is None or stage not in results.get("training", {}):
            continue
        settings = defaults_of(stage) | given
        # A share of the run is one of its epochs as the trainer counts them, also where it ends within one.
        epochs = math.ceil(results["training"][stage].get("epochs", settings["num_train_epochs"]))
        facts = {"drw": resolve_epoch(settings["drw_epoch"] or 0, epochs), "schedule": _schedule(settings, epochs)}
        facts["start"] = resolve_epoch(settings["start_epoch"], epochs)
        heads = settings.get("heads") or []
        facts["trained"] = [head for head in heads if head in TRAINED_HEADS]
        facts["computed"] = [head for head in heads if head not in TRAINED_HEADS]
        told.append({"number": number, **settings, **results["training"][stage], **facts})
    return told


def further_seeds(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the runs of further seeds were trained, if not all as the first: by device and version of torch."""
    places = [(run.get("device"), run.get("versions", {}).get("torch")) for run in results]
    if len(set(places)) == 1:
        return []
    return [
        f"{run['seed']} on {device or 'a device that is not known'}{f', torch {torch}' if torch else ''}"
        for run, (device, torch) in zip(results[1:], places[1:], strict=True)
    ]


def _schedule(stage: Mapping[str, Any], epochs: int) -> str:
    """How the learning rate changes, such as `times 0.1 after 160 and 180 epochs, warm-up over 5 epochs`."""
    if stage["lr_milestones"]:
        milestones = [f"{resolve_epoch(value, epochs):g}" for value in stage["lr_milestones"]]
        unit = "epoch" if milestones == ["1"] else "epochs"
        schedule = f"times {stage['lr_decay']:g} after {' and '.join(milestones)} {unit}"
    else:
        schedule = "by half a cosine" if stage["lr_cosine"] else f"{stage['lr_scheduler_type']} schedule"
    warmup = resolve_epoch(stage["warmup_epochs"], epochs)
    return schedule + (f", warm-up over {warmup:g} epochs" if warmup > 1 else "")
