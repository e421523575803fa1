"""Load any image classifier of timm or transformers, find its head, and read the features that enter it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import nc_hf.models.cifar_resnet  # noqa: F401  makes the CIFAR networks known to timm

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"


def load_classifier(
    name_or_path: str,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    *,
    pretrained: bool = False,
    revision: str | None = None,
    image_size: int | None = None,
    **model_args: Any,
) -> tuple[nn.Module, Any]:
    """A classifier and its image processor.

    A head of another size than the saved one is re-initialised by the library of the model, which one log line says.
    Weights are read from safetensors only; no code of a repository is run.

    Args:
        name_or_path: a timm architecture (`"resnet50"`), a folder, or a Hub id (`"user/name"`, `"hf-hub:user/name"`).
        num_labels: K; the saved head's when None.
        label_names: K names of the classes.
        pretrained: load the released weights of a timm architecture (needs a network). Folders and Hub ids always load
            their weights.
        revision: of the Hub id.
        image_size: side of the input in pixels, where the architecture leaves it open.
        **model_args: further arguments of `timm.create_model`.

    Returns:
        A plain timm model or a transformers model, and a transformers image processor.

    Raises:
        ValueError: when there is no such model, or it has no safetensors weights.
    """
    if label_names is not None:
        num_labels = len(label_names) if num_labels is None else num_labels
        if len(label_names) != num_labels:
            raise ValueError(f"{len(label_names)} label names were given for num_labels={num_labels}.")
    if image_size is not None:
        model_args["pretrained_cfg_overlay"] = {"input_size": (3, image_size, image_size)}
    folder = None if timm.is_model(name_or_path) else local_folder(name_or_path, revision)
    if folder is None:
        if pretrained and not timm.is_model_pretrained(name_or_path):
            raise ValueError(f"timm has no released weights of {name_or_path!r}. Set pretrained: false.")
        settings = {} if num_labels is None else {"num_classes": num_labels}
        model = timm.create_model(name_or_path, pretrained=pretrained, **settings, **model_args)
    elif "architecture" in (config := _config(folder)):
        model = _load_timm_folder(folder, config, num_labels, model_args)
    else:
        return _load_transformers_folder(folder, num_labels, label_names)
    if label_names is not None:
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": list(label_names)}
    return model, timm_image_processor(model)


def timm_image_processor(model: nn.Module) -> Any:
    """The transformers image processor of a timm model."""
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

    cfg = dict(model.pretrained_cfg)
    return TimmWrapperImageProcessor(pretrained_cfg=cfg, architecture=cfg.get("architecture"))


def local_folder(name_or_path: str, revision: str | None) -> Path:
    path = Path(name_or_path)
    if path.is_dir():
        return path
    repo_id = name_or_path.removeprefix("hf-hub:")
    if repo_id.count("/") != 1:
        raise ValueError(
            f"{name_or_path!r} is no timm architecture, no folder and no Hub id (user/name). "
            "timm.list_models() names the architectures."
        )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo_id, revision=revision, allow_patterns=["*.json", "*.safetensors"]))


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a saved classifier.")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} has no {WEIGHTS}. Weights in a pickle file are not loaded; convert them with safetensors."
        )
    return json.loads((folder / "config.json").read_text())


def _load_timm_folder(
    folder: Path, config: dict[str, Any], num_labels: int | None, model_args: dict[str, Any]
) -> nn.Module:
    if not timm.is_model(config["architecture"]):
        raise ValueError(f"timm does not know the architecture {config['architecture']!r} of {folder}.")
    saved = config.get("num_classes", config["pretrained_cfg"].get("num_classes"))
    num_labels = saved if num_labels is None else num_labels
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=num_labels, **model_args)
    if num_labels != saved:
        logger.info("the head of %s has %s outputs, %s are wanted: it is re-initialised", folder, saved, num_labels)
    return model


def _load_transformers_folder(
    folder: Path, num_labels: int | None, label_names: Sequence[str] | None
) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    saved = config.num_labels
    if num_labels is not None and num_labels != saved or label_names is not None:
        names = list(label_names) if label_names is not None else [str(k) for k in range(num_labels)]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: k for k, name in enumerate(names)}
    model, report = AutoModelForImageClassification.from_pretrained(
        folder,
        config=config,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    head_name, _ = find_head(model)
    renewed = {name for name, *_ in report["mismatched_keys"]} | set(report["missing_keys"])
    if others := sorted(name for name in renewed if not name.startswith(f"{head_name}.")):
        raise ValueError(f"{folder} lacks weights of its own architecture, for instance {', '.join(others[:3])}.")
    if renewed:
        logger.info("the head of %s has %s outputs, %s are wanted: it is re-initialised", folder, saved, num_labels)
    return model, AutoImageProcessor.from_pretrained(folder, use_fast=True)


def image_settings(model: nn.Module, image_processor: Any = None) -> dict[str, Any]:
    """Size (H, W), mean, std, interpolation and crop_pct of a model's images, as `ImageTransform` takes them.

    Args:
        model: of timm, or of transformers with its `image_processor`.
        image_processor: of the model; a timm model needs none.
    """
    timm_model = getattr(model, "timm_model", model)
    if hasattr(timm_model, "pretrained_cfg"):
        cfg = timm.data.resolve_model_data_config(timm_model)
        keys = ("mean", "std", "interpolation", "crop_pct")
        return {"size": tuple(cfg["input_size"][1:]), **{key: cfg[key] for key in keys}}
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    height, width = (size[key] if key in size else size["shortest_edge"] for key in ("height", "width"))
    interpolation = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}[int(image_processor.resample)]
    crop_pct = getattr(image_processor, "crop_pct", None) or 1.0
    mean, std = tuple(image_processor.image_mean), tuple(image_processor.image_std)
    return {"size": (height, width), "mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct}


def find_head(model: nn.Module, num_labels: int | None = None, head: str | None = None) -> tuple[str, nn.Module]:
    """Module path and module of a classifier's last layer.

    It is timm's `get_classifier()` where that is one linear layer, else the only linear layer or 1x1 convolution with
    K outputs.

    Args:
        model: of timm or transformers, or any module when `head` or `num_labels` is given.
        num_labels: K; what the model says when None.
        head: the module path, for a model in which it is not found.

    Raises:
        ValueError: when there is no such layer, or more than one; the message names the candidates.
    """
    name = type(model).__name__
    if head is not None:
        modules = dict(model.named_modules())
        if head not in modules or not _is_linear(modules[head]):
            found = type(modules[head]).__name__ if head in modules else "nothing"
            raise ValueError(f"`head: {head}` of {name} must be a linear layer or a 1x1 convolution, found {found}.")
        return head, modules[head]
    num_labels = _num_labels(model) if num_labels is None else num_labels
    root = getattr(model, "timm_model", model)
    declared = root.get_classifier() if hasattr(root, "get_classifier") else root
    if isinstance(declared, tuple | list):
        raise ValueError(
            f"{name} has {len(declared)} heads whose outputs are averaged, so no one vector is its feature. "
            "Choose a model without distillation, or name one head by `head: <module path>`."
        )
    inside = set(declared.modules()) if isinstance(declared, nn.Module) else set()
    candidates = [
        (path, module)
        for path, module in model.named_modules()
        if module in inside and _is_linear(module) and module.weight.shape[0] == num_labels
    ]
    if len(candidates) != 1:
        found = ", ".join(path for path, _ in candidates) or "none"
        raise ValueError(
            f"the head of {name} must be its one linear layer with {num_labels} outputs; candidates: {found}. "
            "Name it by `head: <module path>`."
        )
    return candidates[0]


def _num_labels(model: nn.Module) -> int:
    if hasattr(model, "num_classes"):
        return model.num_classes
    if hasattr(getattr(model, "config", None), "num_labels"):
        return model.config.num_labels
    raise ValueError(f"{type(model).__name__} does not tell its number of classes; name its head by `head`.")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def feature_dim(head: nn.Module) -> int:
    """P, the width of a head's input."""
    return head.weight.shape[1]


class FeatureTap:
    """Keeps what enters a classifier's head in each forward pass.

    Register it before the model is compiled for the first time: later hooks never fire. Under dropout before the head
    the features are those after it.

    Args:
        model: the classifier.
        head_name: module path of its head, from `find_head`.
    """

    def __init__(self, model: nn.Module, head_name: str) -> None:
        self._features: Tensor | None = None
        self._handle = model.get_submodule(head_name).register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]

    def read(self) -> Tensor:
        """Features (B, P) of the last forward pass, which are then forgotten.

        Raises:
            RuntimeError: when the head was not run since the last reading.
            ValueError: when its input is not one vector per image.
        """
        features, self._features = self._features, None
        if features is None:
            raise RuntimeError("the head did not run: the tap must be made before the model is compiled.")
        if features.ndim == 4 and features.shape[2:] == (1, 1):
            features = features.flatten(1)
        if features.ndim != 2:
            raise ValueError(
                f"the head's input has shape {tuple(features.shape)}, not one vector per image. "
                "Name another layer by `head: <module path>`."
            )
        return features

    def remove(self) -> None:
        """Take the tap off the model."""
        self._handle.remove()


def logits_of(output: Any) -> Tensor:
    """Logits (B, K) from what a classifier returns: a tensor, or an output of transformers."""
    if isinstance(output, Tensor):
        return output
    return output["logits"] if isinstance(output, Mapping) else output.logits


def reset_head(model: nn.Module, head_name: str, std: float = 0.01) -> None:
    """Draw a head anew: weights from N(0, std), bias 0, as cRT does (Kang et al. 2020)."""
    head = model.get_submodule(head_name)
    nn.init.normal_(head.weight, std=std)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def freeze_backbone(model: nn.Module, head_name: str) -> None:
    """Stop gradients of all parameters but the head's."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(f"{head_name}."))


@torch.no_grad()
def check_tap(model: nn.Module, head_name: str, pixel_values: Tensor) -> None:
    """Make sure that the tapped features are what the logits come from, on one batch.

    Args:
        model: a classifier with floating-point weights.
        head_name: module path of its head.
        pixel_values: (B, 3, H, W).

    Raises:
        ValueError: when the head's output is not the model's.
    """
    was_training, tap = model.training, FeatureTap(model, head_name)
    try:
        logits = logits_of(model.eval()(pixel_values))
        features, head = tap.read(), model.get_submodule(head_name)
        again = nn.functional.linear(features, head.weight.flatten(1), head.bias)
    finally:
        tap.remove()
        model.train(was_training)
    if logits.shape != again.shape or not torch.allclose(logits, again, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{type(model).__name__}: the output of {head_name!r} is not the model's logits; it cannot be its head. "
            "Name another layer by `head: <module path>`."
        )
