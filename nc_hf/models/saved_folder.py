"""Folders of other people: what is checked before any library builds a model or reads a tensor from one.

Nothing in a folder is trusted. Weights come from safetensors alone; no pickle is opened and no code of a repository is
run, whatever its config asks for. Not checked is what a model does and costs: a well-formed classifier that answers
wrongly looks like any other, and an architecture may be as deep and wide as its config says.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import build_model_with_cfg

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS}.index.json"
SHARD = r"model-\d+-of-\d+\.safetensors"
HEADS = "nc_heads.safetensors"
HUB_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors*", HEADS, "recipe.yaml"]
FORMAT = 1  # of the key `nc_hf` in config.json
LARGEST_JSON = 8 * 2**20  # bytes; the names of 100,000 classes take 2 MB
DEEPEST_JSON = 32
MOST_CLASSES = 1_000_000
# Of timm's factory, not of an architecture: they name other files, load without checking, or build no classifier.
FACTORY_ARGUMENTS = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *("pruned", "features_only", "feature_cls", "out_indices", "device", "dtype"),
}
REFUSED_SETTINGS = ("custom_load", "state_dict")  # of timm's pretrained_cfg
# transformers would read another config or other weights, or need a further library.
REFUSED_ENTRIES = ("configuration_files", "transformers_weights", "quantization_config")
KERNELS = ("attn_implementation", "experts_implementation")  # transformers can fetch their code from the Hub
OWN_KERNELS = (None, "eager", "sdpa")
TENSOR_TYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


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
    path = Path(name_or_path.removeprefix("local-dir:")).expanduser()
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


def weights_checksum(name_or_path: str) -> str | None:
    """SHA-256 of the weights in a folder of this machine; None for a name of timm or a Hub id."""
    if timm.is_model(name_or_path):  # whatever folder is called so here
        return None
    folder = Path(name_or_path.removeprefix("local-dir:")).expanduser()
    digest = hashlib.sha256()
    paths = sorted(folder.glob("model*.safetensors")) if folder.is_dir() else []
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if paths else None


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a saved classifier, after the checks of its whole folder.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    config = _read_json(folder / "config.json")
    ours = config.get("nc_hf") or {}
    if not isinstance(ours, dict) or not isinstance(ours.get("format", FORMAT), int):
        raise ValueError(f"{folder}/config.json has the key nc_hf of another shape: {ours!r:.80}.")
    if ours.get("format", FORMAT) > FORMAT:
        raise ValueError(f"{folder} was written by a newer nc_hf (format {ours['format']}). Upgrade nc_hf.")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter, which names a model of its own. Merge it into the model first.")
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        for key, value in _entries(folder / name) if (folder / name).exists() else ():
            if (key in REFUSED_ENTRIES and value) or (key.endswith(KERNELS) and value not in OWN_KERNELS):
                raise ValueError(f"{folder / name} has {key}={value!r:.80}, which is not accepted.")
    _check_timm_arguments(config, folder / "config.json")
    _check_classes(config, folder / "config.json")
    for path in weight_files(folder, sharded=not is_timm_config(config)):
        check_tensors(path)
    return config


def is_timm_config(config: dict[str, Any]) -> bool:
    """Whether timm opens the folder of this config; transformers' wrapper of timm writes null for `model_args`."""
    return "architecture" in config and config.get("model_args", {}) is not None


def _check_timm_arguments(config: dict[str, Any], path: Path) -> None:
    """Accept plain values for the architecture itself; places of weights in `pretrained_cfg` have no effect here."""
    architecture = config.get("architecture", "")
    if not isinstance(architecture, str) or {":", "/"} & set(architecture):  # timm would go to another place for it
        raise ValueError(f"{path} has the architecture {architecture!r:.80}. It must be a name.")
    for key in ("model_args", "pretrained_cfg"):
        if not isinstance(config.get(key), dict | None):
            raise ValueError(f"{path} must have an object as {key}, found {config[key]!r:.80}.")
    if odd := odd_model_argument(config.get("model_args") or {}):
        raise ValueError(f"{path} has the model argument {odd}, which is not accepted.")
    for name in REFUSED_SETTINGS:
        if (config.get("pretrained_cfg") or {}).get(name):
            raise ValueError(f"{path} has pretrained_cfg.{name}, which is not accepted.")


def odd_model_argument(arguments: Mapping[str, Any]) -> str | None:
    """The first argument of an architecture that is not accepted in a folder, as `name=value`; None where all are.

    A value is plain, a list of plain ones, or an object of these.
    """
    for name, value in arguments.items():
        inner = dict(value) if isinstance(value, Mapping) else {name: value}
        allowed = all(_is_of_architecture(key) for key in (name, *inner))
        if not allowed or not all(_is_plain(part) for part in inner.values()):
            return f"{name}={value!r:.80}"
    return None


def _is_of_architecture(argument: Any) -> bool:
    return isinstance(argument, str) and not argument.startswith("pretrained") and argument not in FACTORY_ARGUMENTS


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(part, str | int | float | None) for part in values)


def stale_files(names: Iterable[str], folder: Path) -> list[str]:
    """Those of some files that would be read with a newly saved model, and are of an earlier one.

    Args:
        names: of files in a folder or repository, to which the model goes.
        folder: where it was saved.
    """
    config = json.loads((folder / "config.json").read_text())
    found = [name for name in names if name in (WEIGHTS, WEIGHTS_INDEX) or re.fullmatch(SHARD, name)]
    if is_timm_config(config):  # whose settings of images are in its config
        found += [name for name in names if name == "preprocessor_config.json"]
    return [name for name in found if not (folder / name).exists()]


def separate_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as safetensors takes it: contiguous, with a copy of each tensor that shares memory with another."""
    separate, seen = {}, set()
    for name, tensor in state.items():
        tensor = tensor.contiguous()
        place = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return separate


def _check_classes(config: dict[str, Any], path: Path) -> None:
    for place in (config, config.get("pretrained_cfg") or {}, config.get("model_args") or {}):
        for key in ("num_classes", "num_labels"):
            count = place.get(key)
            if count is not None and (type(count) is not int or not 0 <= count <= MOST_CLASSES):
                raise ValueError(f"{path} has {key}={count!r:.80}; it must be from 0 to {MOST_CLASSES:,}.")
        names = place.get("label_names") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} must have a list of strings as label_names.")
    names = config.get("id2label") or {}
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} must have an object of strings as id2label.")


def saved_class_names(config: dict[str, Any]) -> list[str]:
    """The names of the classes in a `config.json`, in their order; empty where it has none."""
    names = config.get("id2label") or {}
    by_number = [names[key] for key in sorted(names, key=lambda key: (len(key), key))]
    return config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names") or by_number


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Keys and values of a JSON file, also of the objects in it, level by level."""
    level: list[Any] = [_read_json(path)]
    for _ in range(DEEPEST_JSON):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                yield from value.items()
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = below
    if level:
        raise ValueError(f"{path} is nested deeper than {DEEPEST_JSON} levels.")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        is_checkpoint = (path.parent / "trainer_state.json").is_file()
        saved = [name for name in ("release", "stage2", "stage1") if (path.parent / name / path.name).is_file()]
        hint = " Load the weights into their network and save that by nc_hf.save_pretrained(model, folder)."
        if is_checkpoint:
            hint = " It is a checkpoint, to go on from; trainer.save_model(folder) saves one."
        if saved:
            hint = f" It is the folder of a run: give {path.parent / saved[0]}."
        raise ValueError(f"{path.parent} has no {path.name}: it is not a saved classifier.{hint}")
    _check_place(path)
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than any config. It is not read.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object, found {type(content).__name__}.")
    return content


def _check_place(path: Path) -> None:
    """Refuse a link out of its folder; a Hub snapshot links to its repository's blobs, and these to the cache's."""
    folder = path.parent.resolve()
    blobs = [parent / "blobs" for parent in folder.parents[1:3]] if folder.parent.name == "snapshots" else []
    if not any(path.resolve().is_relative_to(place) for place in (folder, *blobs)):
        raise ValueError(f"{path} is a link out of its folder, to {path.resolve()}. Copy the file into the folder.")


def weight_files(folder: Path, sharded: bool) -> list[Path]:
    """All files of weights of a folder: one, or the shards that an index names; and that of the heads.

    Args:
        folder: of a saved classifier.
        sharded: whether its library reads shards. timm does not, and would take a pickle file instead.

    Raises:
        ValueError: for a folder without safetensors, or an index that leads out of the folder.
    """
    heads = [folder / HEADS] if (folder / HEADS).is_file() else []
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS, *heads]
    if not sharded or not (folder / WEIGHTS_INDEX).is_file():
        raise ValueError(
            f"{folder} has no {WEIGHTS}. Weights in a pickle file are not loaded: a pickle can run code. If you trust "
            "it, convert it: safetensors.torch.save_file(torch.load('pytorch_model.bin', "
            f"weights_only=True), '{WEIGHTS}', metadata={{'format': 'pt'}})."
        )
    shards = _read_json(folder / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{folder / WEIGHTS_INDEX} has no weight_map.")
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / WEIGHTS_INDEX} names the file {name!r:.80}, which is not accepted.")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / WEIGHTS_INDEX} names {name!r}, which is not there. Download it again.")
    return [*(folder / name for name in sorted(set(shards.values()))), *heads]


def check_tensors(path: Path) -> None:
    """Make sure that a safetensors file is whole and holds finite numbers of usual types.

    One pass, one tensor at a time: 0.06 s for 100 MiB of float32, 0.15 s for as much bfloat16 on one core. The reader
    of safetensors itself refuses a header over 100 MB or longer than the file, offsets that leave the file, overlap or
    leave gaps, lengths that do not fit the shape, and a name given twice for different numbers.

    Raises:
        ValueError: naming the first tensor that is not.
    """
    _check_place(path)
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  the file is no mapping
                tensor = file.get_tensor(name)
                if tensor.dtype not in TENSOR_TYPES:
                    raise ValueError(f"{path} has a tensor of type {tensor.dtype}: {name}. Save it as float32.")
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(f"{path} has a tensor that is not finite: {name}. Take an earlier version of it.")
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}). Download it again.") from error
