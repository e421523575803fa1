"""How the tests tamper with folders, and what they then expect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nc_hf import load_classifier, load_pretrained
from nc_hf.models.saved_folder import WEIGHTS

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def assert_refused(folder: Path, message: str, error: type[Exception] = ValueError) -> None:
    for load in (load_classifier, load_pretrained):
        with pytest.raises(error, match=message):
            load(str(folder))


def head_of(folder: Path) -> str:
    return "fc" if "architecture" in json.loads((folder / "config.json").read_text()) else "classifier"


def first_of_backbone(folder: Path) -> str:
    names = load_file(folder / WEIGHTS)
    return next(name for name in sorted(names) if name.endswith("weight") and not name.startswith(head_of(folder)))


def change(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Put tensors into the weights of a folder, or take them out."""
    tensors = load_file(folder / WEIGHTS) | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
