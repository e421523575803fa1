"""Folders that timm and transformers open: writing and reading them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nc_hf.models.classifier import WEIGHTS, find_head, load_classifier

HEADS = "nc_heads.safetensors"
FORMAT = 1


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    image_processor: Any = None,
    heads: Mapping[str, Mapping[str, Tensor]] | None = None,
    active_head: str = "base",
    centers: Tensor | None = None,
    class_means: Tensor | None = None,
    class_counts: Sequence[int] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a classifier so that `timm.create_model("local-dir:…")` and transformers open it.

    `model.safetensors` has the model with its present head, `nc_heads.safetensors` every head by name with class
    centers and means, `config.json` what the model's own library writes plus the key `nc_hf`. The folder is built
    beside its place and moved there file by file, the weights last; no file needs pickle.

    Args:
        model: a plain timm model, a transformers model, or a timm model in transformers' wrapper.
        folder: created if need be; other files in it stay.
        label_names: K names; `"0"` to `"K-1"` when None.
        image_processor: of a transformers model, saved beside it.
        heads: state dicts of heads by name.
        active_head: name of the head in `model.safetensors`.
        centers: (K, P) class centers of the loss.
        class_means: (K, P) means of the training features.
        class_counts: (K,) training images per class.
        metadata: further entries of the key `nc_hf`, JSON values.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    model = getattr(model, "timm_model", model)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        staged = Path(temporary)
        if hasattr(model, "pretrained_cfg"):
            _save_timm(model, staged, label_names)
        else:
            _save_transformers(model, staged, label_names, image_processor)
        extras = {"centers": centers, "class_means": class_means}
        tensors = {name: tensor for name, tensor in extras.items() if tensor is not None}
        for head, state in (heads or {}).items():
            tensors |= {f"heads.{head}.{name}": tensor for name, tensor in state.items()}
        if class_counts is not None:
            tensors["class_counts"] = torch.as_tensor(class_counts)
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, staged / HEADS)
        config = json.loads((staged / "config.json").read_text())
        counts = {} if class_counts is None else {"class_counts": [int(count) for count in class_counts]}
        config["nc_hf"] = {"format": FORMAT, "active_head": active_head, "heads": sorted(heads or {})}
        config["nc_hf"] |= counts | dict(metadata or {})
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        folder.mkdir(exist_ok=True)
        for path in sorted(staged.iterdir(), key=lambda path: path.name == WEIGHTS):
            os.replace(path, folder / path.name)
    return folder


def _save_timm(model: nn.Module, folder: Path, label_names: Sequence[str] | None) -> None:
    from timm.models._hub import save_config_for_hf

    names = list(label_names) if label_names is not None else [str(k) for k in range(model.num_classes)]
    save_file(_contiguous(model), folder / WEIGHTS)
    save_config_for_hf(model, str(folder / "config.json"), model_config={"label_names": names})
    config = json.loads((folder / "config.json").read_text())
    # transformers passes num_classes itself, and timm cannot read a null.
    arguments = {name: value for name, value in (config.get("model_args") or {}).items() if name != "num_classes"}
    config["model_args"] = arguments
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _contiguous(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, packed: weights in channels-last format are not."""
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def _save_transformers(
    model: nn.Module, folder: Path, label_names: Sequence[str] | None, image_processor: Any
) -> None:
    if label_names is not None:
        model.config.id2label = dict(enumerate(label_names))
        model.config.label2id = {name: k for k, name in enumerate(label_names)}
    model.save_pretrained(folder, state_dict=_contiguous(model))
    if image_processor is not None:
        image_processor.save_pretrained(folder)


def load_heads(folder: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Heads by name, and the other tensors (`centers`, `class_means`, `class_counts`), of a saved folder."""
    path = Path(folder) / HEADS
    tensors = load_file(path) if path.is_file() else {}
    heads: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in tensors if name.startswith("heads.")]:
        _, head, parameter = name.split(".")
        heads.setdefault(head, {})[parameter] = tensors.pop(name)
    return heads, tensors


def load_pretrained(
    folder: str | Path, head: str | None = None, *, revision: str | None = None
) -> tuple[nn.Module, Any]:
    """A classifier saved by nc_hf, with the head of your choice, and its image processor.

    Args:
        folder: a local folder or a Hub id.
        head: `"base"`, `"crt"`, …; the one that was saved to be used when None.
        revision: of the Hub id.

    Raises:
        ValueError: when the folder has no such head.
    """
    from nc_hf.models.classifier import local_folder

    folder = local_folder(str(folder), revision)
    model, processor = load_classifier(str(folder))
    if head is not None:
        heads, _ = load_heads(folder)
        if head not in heads:
            raise ValueError(f"{folder.name} has no head {head!r}; it has {', '.join(sorted(heads)) or 'none'}.")
        find_head(model)[1].load_state_dict(heads[head])
    return model, processor
