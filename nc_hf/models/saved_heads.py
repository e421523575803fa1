"""Heads beside the one in use: those that a folder keeps, and stage one's of a model that has a newer one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from nc_hf.models.saved_folder import HEADS, check_tensors

HeadState = dict[str, Tensor]


def load_heads(folder: str | Path) -> tuple[dict[str, HeadState], HeadState]:
    """Heads by name, and the other tensors (`centers`, `class_means`, `class_counts`), of a saved folder."""
    path, tensors = Path(folder) / HEADS, {}
    if path.is_file():
        check_tensors(path)
        tensors = load_file(path)
    heads: dict[str, HeadState] = {}
    for name in [name for name in tensors if name.startswith("heads.")]:
        head, _, parameter = name.removeprefix("heads.").partition(".")
        heads.setdefault(head, {})[parameter] = tensors.pop(name)
    return heads, tensors


def stage_one_state(layer: nn.Module) -> HeadState | None:
    """Weights of stage one's head: those in `layer`, or those that were there before a head of stage two.

    Args:
        layer: the last one of a classifier.

    Returns:
        A copy; None where a head of stage two has taken its place and what was there before is not known.
    """
    state = layer.__dict__.get("stage_one", layer.state_dict())
    return None if state is None else {name: tensor.detach().clone() for name, tensor in state.items()}


def remember_stage_one(layer: nn.Module, state: HeadState | None) -> None:
    """Keep stage one's weights (None when they are not known) by a layer that has others; no state dict shows them."""
    layer.stage_one = state


def forget_stage_one(layer: nn.Module) -> None:
    """Let what is in the layer be stage one's, as after a training of the whole network."""
    layer.__dict__.pop("stage_one", None)


def remember_saved(layer: nn.Module, folder: Path, config: dict[str, Any]) -> None:
    """Remember stage one's head of a folder whose model has another one, unless a new one was drawn.

    Args:
        layer: the last one of the model that was loaded.
        folder: of the model.
        config: its config.json.
    """
    heads, (active, own) = load_heads(folder)[0], (config["nc_hf"]["active_head"], layer.state_dict())
    if {name: tensor.shape for name, tensor in heads.get(active, own).items()} == {k: v.shape for k, v in own.items()}:
        remember_stage_one(layer, heads.get("base"))
