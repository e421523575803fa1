"""The doors of a saved folder: every library that can open it, and a check that all see the same classifier."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import timm
import torch
from torch import Tensor, nn

from nc_hf.hub import load_pretrained
from nc_hf.models.classifier import logits_of
from nc_hf.models.saved_folder import is_timm_config

TOLERANCE = 1e-6  # of logits on a CPU in float32; the same weights at another address differ in the last bit


def doors_of(folder: str | Path) -> list[str]:
    """Names of the doors that a saved folder has: `timm`, `transformers`, `pipeline`, `nc_hf`."""
    config = json.loads((Path(folder) / "config.json").read_text())
    return [*(["timm"] if is_timm_config(config) else []), "transformers", "pipeline", "nc_hf"]


def needs_nc_hf(folder: str | Path) -> bool:
    """Whether the folder opens only after `import nc_hf`, since timm does not ship its architecture."""
    architecture = json.loads((Path(folder) / "config.json").read_text()).get("architecture")
    if architecture is None:
        return False
    return timm.model_entrypoint(architecture.split(".")[0]).__module__.startswith("nc_hf.")


def check_doors(folder: str | Path) -> list[str]:
    """Open a saved folder through every door, and compare weights and logits.

    Weights must be bit-equal through all doors (transformers keeps some under other names in the file), logits of one
    random image equal to 1e-6, and the scores of the pipeline to the softmax of those.

    Args:
        folder: as `save_pretrained` writes it, in one file of weights.

    Returns:
        Names of the doors.

    Raises:
        RuntimeError: naming the door that does not open, or opens to another classifier.
    """
    folder, doors = Path(folder), doors_of(folder)
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    random_state = torch.get_rng_state()  # building a model draws numbers that a training run would miss
    try:
        opened = {}
        for door in doors:
            try:
                opened[door] = OPENERS[door](folder)
            except Exception as error:
                reason = " ".join(str(error).split())
                raise RuntimeError(f"{folder.name} does not open through {door}: {reason}") from error
        processor = _image_processor(folder)
    finally:
        torch.set_rng_state(random_state)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    reference = opened["nc_hf"]
    state, expected = _weights(reference), _logits(reference, pixels)
    for door, model in opened.items():
        if door != "pipeline":
            _check_weights(_weights(model), state, f"{folder.name} through {door}")
            _compare(_logits(model, pixels), expected, f"{folder.name} gives other logits through {door}")
    labels = opened["pipeline"].model.config.id2label
    answers, scores = opened["pipeline"](image, top_k=len(labels)), expected.softmax(dim=-1)[0]
    place = {label: k for k, label in labels.items()}
    if len(place) == len(labels):
        answers.sort(key=lambda answer: place[answer["label"]])
    else:  # classes of one name are told apart by their scores alone
        scores = scores.sort(descending=True).values
    given = torch.tensor([answer["score"] for answer in answers])
    _compare(given, scores, f"{folder.name} gives other scores through pipeline")
    return doors


def _image_processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder)


def _open_transformers(folder: Path) -> nn.Module:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True)


def _open_pipeline(folder: Path) -> Any:
    from transformers import pipeline

    return pipeline("image-classification", model=str(folder), device="cpu", dtype=torch.float32)


OPENERS: dict[str, Callable[[Path], Any]] = {
    "timm": lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True),
    "transformers": _open_transformers,
    "pipeline": _open_pipeline,
    "nc_hf": lambda folder: load_pretrained(folder)[0],
}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in getattr(model, "timm_model", model).state_dict().items()}


def _logits(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        return logits_of(model.cpu().float().eval()(pixels))


def _check_weights(weights: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    if set(weights) != set(expected):
        raise RuntimeError(f"{what} has other tensors: {', '.join(sorted(set(weights) ^ set(expected))[:3])}.")
    for name, tensor in expected.items():
        if not torch.equal(weights[name], tensor):
            raise RuntimeError(f"{what} has another {name} than through nc_hf.")


def _compare(given: Tensor, expected: Tensor, what: str) -> None:
    distance = (given - expected).abs().max().item()
    if not distance <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise RuntimeError(f"{what}: they differ by {distance:.2g}.")
