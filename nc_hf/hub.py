"""Folders that timm and transformers open: writing and reading them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from nc_hf.models.classifier import find_head, load_classifier
from nc_hf.models.saved_folder import FORMAT, HEADS, WEIGHTS, local_folder, separate_tensors, stale_files
from nc_hf.models.saved_heads import load_heads, remember_stage_one


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
    centers and means, `config.json` what the model's own library writes plus the key `nc_hf`. All is
    built in a folder inside and moved file by file, the weights last; no file needs pickle.

    Args:
        model: a plain timm model, a transformers model, or a timm model in transformers' wrapper.
        folder: created if need be; other files in it stay, but for weights and image settings of an earlier model.
        label_names: K names; the model's own, or else `"0"` to `"K-1"`, when None.
        image_processor: of a transformers model, saved beside it.
        heads: state dicts of heads by name.
        active_head: name of the head in `model.safetensors`.
        centers: (K, P) class centers of the loss.
        class_means: (K, P) means of the training features.
        class_counts: (K,) training images per class.
        metadata: further entries of the key `nc_hf`, JSON values.

    Raises:
        ValueError: for a model of neither library, or another number of names than classes.
    """
    folder, inner = Path(folder), getattr(model, "timm_model", model)
    label_names = label_names_of(model, label_names)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".staged-") as temporary:  # the folder may be a mount
        staged = Path(temporary)
        if hasattr(inner, "pretrained_cfg"):
            _save_timm(inner, staged, label_names)
        else:
            _save_transformers(inner, staged, label_names, image_processor)
        tensors = {"centers": centers, "class_means": class_means}
        tensors["class_counts"] = None if class_counts is None else torch.as_tensor(class_counts)
        for head, state in (heads or {}).items():
            tensors |= {f"heads.{head}.{name}": tensor for name, tensor in state.items()}
        # A clone each, since safetensors refuses tensors that share memory.
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items() if t is not None}
        save_file(tensors, staged / HEADS)
        config = json.loads((staged / "config.json").read_text())
        config["nc_hf"] = {"format": FORMAT, "active_head": active_head, "heads": sorted(heads or {})}
        if class_counts is not None:
            config["nc_hf"]["class_counts"] = [int(count) for count in class_counts]
        config["nc_hf"] |= metadata or {}
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in staged.glob("*.safetensors"):
            shutil.copymode(staged / "config.json", path)  # safetensors makes files that only their owner reads
        stale = stale_files([path.name for path in folder.iterdir()], staged)
        for path in sorted(staged.iterdir(), key=lambda path: path.name == WEIGHTS):
            os.replace(path, folder / path.name)
        for name in stale:
            (folder / name).unlink()
    return folder


def label_names_of(model: nn.Module, label_names: Sequence[str] | None = None) -> list[str]:
    """The K names that a saved model has: those given, else the model's own, else numbers.

    Raises:
        ValueError: for a model of neither library, or another number of names than classes.
    """
    if hasattr(model, "pretrained_cfg"):
        num_labels, own = model.num_classes, model.pretrained_cfg.get("label_names")
    elif hasattr(model, "config"):
        num_labels, own = model.config.num_labels, [name for _, name in sorted(model.config.id2label.items())]
    else:
        raise ValueError(
            f"{type(model).__name__} is neither a timm model nor a transformers one, so no other library could open "
            "its folder. Save its state_dict with safetensors instead."
        )
    if label_names is not None and len(label_names) != num_labels:
        raise ValueError(f"{len(label_names)} label names were given for a model with {num_labels} classes.")
    if label_names is None and isinstance(own, list | tuple) and len(own) == num_labels:
        label_names = own
    return [str(k) for k in range(num_labels)] if label_names is None else [str(name) for name in label_names]


def _save_timm(model: nn.Module, folder: Path, label_names: list[str]) -> None:
    hook = model.register_state_dict_post_hook(_separate)
    try:
        save_for_hf(model, str(folder), safe_serialization=True, model_config={"label_names": label_names})
    finally:
        hook.remove()
    config = json.loads((folder / "config.json").read_text())
    # transformers passes num_classes itself, and timm cannot read a null.
    arguments = {name: value for name, value in (config.get("model_args") or {}).items() if name != "num_classes"}
    config["model_args"] = arguments
    config["pretrained_cfg"].pop("label_names", None)  # the same as at the top
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _separate(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    state.update(separate_tensors(state))


def _save_transformers(model: nn.Module, folder: Path, label_names: list[str], image_processor: Any) -> None:
    model.config.id2label = dict(enumerate(label_names))
    model.config.label2id = {name: k for k, name in enumerate(label_names)}
    model.save_pretrained(folder)
    if image_processor is not None:
        image_processor.save_pretrained(folder)


def load_pretrained(
    folder: str | Path, head: str | None = None, *, revision: str | None = None
) -> tuple[nn.Module, Any]:
    """A classifier saved by nc_hf in evaluation mode, with the head of your choice, and its image processor.

    Args:
        folder: a local folder or a Hub id.
        head: `"base"`, `"crt"`, …; the one that was saved to be used when None.
        revision: of the Hub id.

    Raises:
        ValueError: when the folder has no such head, or as `load_classifier`.
        FileNotFoundError: as `load_classifier`.
    """
    folder = local_folder(str(folder), revision)
    model, processor = load_classifier(str(folder))
    if head is not None:
        heads, _ = load_heads(folder)
        if head not in heads:
            raise ValueError(f"{folder.name} has no head {head!r}; it has {', '.join(sorted(heads)) or 'none'}.")
        layer = find_head(model)[1]
        layer.load_state_dict(heads[head])
        remember_stage_one(layer, heads.get("base"))
    return model.eval(), processor
