"""Folders of other people: what is checked before any library builds a model or reads a tensor from one.

Nothing in a folder is trusted. Weights come from safetensors alone, whose reader checks lengths, offsets and types; no
pickle is opened and no code of a repository is run, whatever its config asks for. Not checked is what a model does: a
well-formed classifier that answers wrongly looks like any other.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS}.index.json"
HEADS = "nc_heads.safetensors"
HUB_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors*", HEADS]
FORMAT = 1  # of the key `nc_hf` in config.json
LARGEST_JSON = 20 * 2**20  # bytes; the names of 100,000 classes take 2 MB
# What would make timm read another file, download something, or return no classifier.
REFUSED_ARGUMENTS = (
    "pretrained",
    "checkpoint",
    "cache_dir",
    "scriptable",
    "exportable",
    "features_only",
    "out_indices",
)
REFUSED_SETTINGS = ("custom_load", "state_dict")


def local_folder(name_or_path: str, revision: str | None = None) -> Path:
    """The folder of that name, or that of a Hub id after downloading config and safetensors.

    The commit that a Hub id was resolved to is logged, and is the last part of the path.

    Args:
        name_or_path: a folder, or `user/name`, `hf-hub:user/name@revision`.
        revision: branch, tag or commit of the Hub id.

    Raises:
        ValueError: when it can be neither.
        FileNotFoundError: when the Hub has no such repository, or cannot be reached.
    """
    path = Path(name_or_path.removeprefix("local-dir:"))
    if path.is_dir():
        return path
    repo_id, _, tag = name_or_path.removeprefix("hf-hub:").partition("@")
    if repo_id.count("/") != 1:
        raise ValueError(
            f"{name_or_path!r} is no timm architecture, no folder and no Hub id (user/name). "
            "timm.list_models() names the architectures."
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, revision=revision or tag or None, allow_patterns=HUB_FILES))
    except OSError as error:
        raise FileNotFoundError(f"{name_or_path!r} is no folder here, and not readable on the Hub: {error}") from error
    logger.info("%s at commit %s", repo_id, folder.name)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a saved classifier, after the checks of its whole folder.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    config = _read_json(folder / "config.json")
    for name, value in (config.get("model_args") or {}).items():
        values = value if isinstance(value, list) else [value]
        known = isinstance(name, str) and not name.startswith(REFUSED_ARGUMENTS)
        if not known or not all(isinstance(v, str | int | float | None) for v in values):
            raise ValueError(f"{folder}/config.json has the model argument {name}={value!r}, which is not accepted.")
    for name in REFUSED_SETTINGS:
        if (config.get("pretrained_cfg") or {}).get(name):
            raise ValueError(f"{folder}/config.json has pretrained_cfg.{name}, which is not accepted.")
    ours = config.get("nc_hf") or {}
    if not isinstance(ours, dict) or not isinstance(ours.get("format", FORMAT), int):
        raise ValueError(f"{folder}/config.json has the key nc_hf of another shape: {ours!r}.")
    if ours.get("format", FORMAT) > FORMAT:
        raise ValueError(f"{folder} was written by a newer nc_hf (format {ours['format']}). Upgrade nc_hf.")
    for path in weight_files(folder):
        check_tensors(path)
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: it is not a saved classifier.")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than any config. It is not read.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object, found {type(content).__name__}.")
    return content


def weight_files(folder: Path) -> list[Path]:
    """All files of weights of a folder: one, or the shards that an index names; and that of the heads.

    Raises:
        ValueError: for a folder without safetensors, or an index that leads out of the folder.
    """
    heads = [folder / HEADS] if (folder / HEADS).is_file() else []
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS, *heads]
    if not (folder / WEIGHTS_INDEX).is_file():
        raise ValueError(
            f"{folder} has no {WEIGHTS}. Weights in a pickle file are not loaded; convert them with safetensors."
        )
    shards = _read_json(folder / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{folder / WEIGHTS_INDEX} has no weight_map.")
    for name in set(shards.values()):
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / WEIGHTS_INDEX} names the file {name!r}, which is not accepted.")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / WEIGHTS_INDEX} names {name!r}, which is not there. Download it again.")
    return [*(folder / name for name in sorted(set(shards.values()))), *heads]


def check_tensors(path: Path) -> None:
    """Make sure that a safetensors file is whole and holds finite numbers; one pass over it, one tensor at a time.

    Raises:
        ValueError: naming the first tensor that is not.
    """
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  the file is no mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(f"{path} has a tensor that is not finite: {name}. Take an earlier version of it.")
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}). Download it again.") from error
