"""Load any image classifier of timm or transformers, find its head, and change it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from nc_hf.labels import check_class_order
from nc_hf.models.experts import ExpertsHead
from nc_hf.models.feature_tap import FeatureTap, check_tap, logits_of
from nc_hf.models.headed import renew_head
from nc_hf.models.normalized_heads import REPLACEABLE_HEADS
from nc_hf.models.saved_folder import is_timm_config, local_folder, odd_model_argument, read_config, saved_class_names
from nc_hf.models.saved_heads import remember_saved

__all__ = [
    "FeatureTap",
    "check_tap",
    "feature_dim",
    "find_head",
    "freeze_backbone",
    "load_classifier",
    "local_folder",
    "logits_of",
    "reset_head",
    "timm_image_processor",
]

logger = logging.getLogger(__name__)


def load_classifier(
    name_or_path: str,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    *,
    pretrained: bool = False,
    head: str | None = None,
    revision: str | None = None,
    image_size: int | None = None,
    **model_args: Any,
) -> tuple[nn.Module, Any]:
    """A classifier and its image processor.

    All saved weights are loaded, or none: only a head of another size than the saved one is drawn anew, by the
    model's own library, and one log line says so. Weights are read from safetensors; no code of a repository is run.

    Args:
        name_or_path: a timm architecture (`"resnet50"`, `"resnet50.a1_in1k"`), a folder saved by timm, transformers or
            nc_hf, or a Hub id (`"user/name"`, `"hf-hub:user/name@revision"`).
        num_labels: K; that of `label_names`, or the saved head's, when None.
        label_names: K names of the classes.
        pretrained: load the released weights of a timm architecture (downloads them). A folder or a Hub id is always
            loaded with its weights.
        head: module path of the last layer, for a transformers model in which it is not found.
        revision: of the Hub id.
        image_size: side of the input in pixels, for timm models.
        **model_args: further arguments of `timm.create_model`, or entries of a transformers config.

    Returns:
        A plain timm model or a transformers model, and its transformers image processor (None for a transformers
        folder without one).

    Raises:
        ValueError: for a name that is no model, a folder of an architecture that timm does not know or that does not
            pass the checks of `saved_folder`, class names in another order than the saved ones, or arguments that do
            not fit.
        FileNotFoundError: for a Hub id that cannot be read.
    """
    if label_names is not None:
        num_labels = len(label_names) if num_labels is None else num_labels
        if len(label_names) != num_labels:
            raise ValueError(f"{len(label_names)} label names were given for num_labels={num_labels}.")
    if timm.is_model(name_or_path):
        if pretrained and not timm.is_model_pretrained(name_or_path):
            raise ValueError(f"timm has no released weights of {name_or_path!r}. Set pretrained: false.")
        return _load_timm(name_or_path, num_labels, label_names, pretrained, image_size, model_args)
    folder = local_folder(name_or_path, revision)
    config = read_config(folder)
    if label_names is not None:
        check_class_order(name_or_path, saved_class_names(config), label_names)
    model, processor = _open_folder(folder, config, num_labels, label_names, head, image_size, model_args)
    if (config.get("nc_hf") or {}).get("active_head", "base") != "base":
        remember_saved(find_head(model, head=head)[1], folder, config)
    return model, processor


def _open_folder(
    folder: Path,
    config: dict[str, Any],
    num_labels: int | None,
    label_names: Sequence[str] | None,
    head: str | None,
    image_size: int | None,
    model_args: dict[str, Any],
) -> tuple[nn.Module, Any]:
    if is_timm_config(config):
        if not timm.is_model(config["architecture"]):
            name = config["architecture"]
            raise ValueError(f"Unknown model {name!r} in {folder}. Import the package that has it, or upgrade timm.")
        try:
            return _load_timm(f"local-dir:{folder}", num_labels, label_names, True, image_size, model_args)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"timm does not open {folder} as {config['architecture']}: {error}") from error
    if image_size is not None:
        raise ValueError(f"`image_size` is for timm models; {folder} holds a model of transformers.")
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind is not None and str(kind) not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder} is of the type {kind!r}, which this transformers does not know, and code of a repository is "
            "not run. Upgrade transformers, or register the model with its AutoConfig."
        )
    return _load_transformers(folder, num_labels, label_names, head, model_args)


def _load_timm(
    source: str,
    num_labels: int | None,
    label_names: Sequence[str] | None,
    pretrained: bool,
    image_size: int | None,
    model_args: dict[str, Any],
) -> tuple[nn.Module, Any]:
    if num_labels is not None and not pretrained:
        model_args = {"num_classes": num_labels, **model_args}
    if image_size is not None:
        model_args = timm.models.resolve_model_input_args(source, {"img_size": image_size}, **model_args)
        source = model_args.pop("model_name")
    model = timm.create_model(source, pretrained=pretrained, **model_args)
    if odd := odd_model_argument(getattr(model, "_model_args", {})):
        raise ValueError(
            f"the model argument {odd} could not be saved with the model: config.json has names, numbers and "
            "objects of them. Write the name that timm has for it."
        )
    cfg = dict(model.pretrained_cfg)
    if pretrained and model.num_classes != cfg["num_classes"]:  # timm has then let weights be missing
        raise ValueError(f"{source} has {cfg['num_classes']} classes, and model arguments for {model.num_classes}.")
    if image_size is not None:
        cfg |= {"input_size": (cfg["input_size"][0], image_size, image_size), "test_input_size": None}
    if num_labels not in (None, model.num_classes):
        # With another `num_classes`, create_model would load with strict=False.
        logger.info("the head of %s has %d outputs; one with %d is drawn anew", source, model.num_classes, num_labels)
        model.reset_classifier(num_labels)
        renew_head(model)
        cfg |= {"num_classes": num_labels, "label_names": None, "label_descriptions": None}
    if label_names is not None:
        cfg["label_names"] = list(label_names)
    model.pretrained_cfg = model.default_cfg = cfg
    return model, timm_image_processor(model)


def timm_image_processor(model: nn.Module) -> Any:
    """The transformers image processor of a timm model."""
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

    cfg = dict(model.pretrained_cfg)
    return TimmWrapperImageProcessor(pretrained_cfg=cfg, architecture=cfg.get("architecture"))


def _load_transformers(
    folder: Path,
    num_labels: int | None,
    label_names: Sequence[str] | None,
    head: str | None,
    model_args: dict[str, Any],
) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    config, unknown = AutoConfig.from_pretrained(
        folder, trust_remote_code=False, return_unused_kwargs=True, **model_args
    )
    if unknown:
        raise ValueError(f"{type(config).__name__} has no entry {', '.join(sorted(unknown))}.")
    saved = config.num_labels
    if label_names is not None or num_labels not in (None, saved):
        names = [str(k) for k in range(num_labels)] if label_names is None else list(label_names)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: k for k, name in enumerate(names)}
    model, report = AutoModelForImageClassification.from_pretrained(
        folder,
        config=config,
        ignore_mismatched_sizes=True,
        dtype=torch.float32,  # weights saved in half precision would be trained in it
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    renewed = {entry[0] for entry in report["mismatched_keys"]} | set(report["missing_keys"])
    if renewed:
        head_name, layer = find_head(model, head=head)
        if lost := sorted(name for name in renewed if not name.startswith(f"{head_name}.")):
            raise ValueError(f"{folder} lacks weights of its own architecture, for instance {', '.join(lost[:3])}.")
        whole = renewed == set(report["missing_keys"]) and len(renewed) == len(layer.state_dict())
        if num_labels is None or (num_labels == saved and not whole):
            raise ValueError(
                f"{folder} lacks the weights of a head for its {saved} classes: {', '.join(sorted(renewed))}. "
                "Give `num_labels` to have one drawn anew."
            )
        logger.info("the head of %s has %d outputs; one with %d is drawn anew", folder, saved, config.num_labels)
    if hasattr(config, "nc_hf") and report["unexpected_keys"]:  # foreign folders may hold a pooler or a decoder
        extra = ", ".join(sorted(report["unexpected_keys"])[:3])
        raise ValueError(f"{folder} has weights that its architecture has no place for, for instance {extra}.")
    if hasattr(model, "timm_model"):  # saved by transformers' wrapper of timm
        model, names = model.timm_model, [name for _, name in sorted(config.id2label.items())]
        model.pretrained_cfg |= getattr(config, "pretrained_cfg", {}) | {"label_names": names}
        return model, timm_image_processor(model)
    has_processor = (folder / "preprocessor_config.json").is_file()
    return model, AutoImageProcessor.from_pretrained(folder, trust_remote_code=False) if has_processor else None


def find_head(model: nn.Module, num_labels: int | None = None, head: str | None = None) -> tuple[str, nn.Module]:
    """Module path and module of a classifier's last layer.

    It is the only linear layer, 1x1 convolution or head of ours with K outputs in timm's `get_classifier()`, or in a
    transformers model outside its backbone.

    Args:
        model: of timm or transformers, or any module when `head` or `num_labels` is given.
        num_labels: K; what the model says when None.
        head: the module path, for a model in which it is not found.

    Raises:
        ValueError: when there is no such layer, or more than one; the message names the candidates.
    """
    name, modules = type(model).__name__, dict(model.named_modules())
    if head is not None:
        if head not in modules or not _is_linear(modules[head]):
            found = type(modules[head]).__name__ if head in modules else "nothing"
            raise ValueError(f"`head: {head}` of {name} must be a linear layer or a 1x1 convolution, found {found}.")
        return head, modules[head]
    num_labels = _num_labels(model) if num_labels is None else num_labels
    if num_labels == 0:
        raise ValueError(f"{name} has no head: its number of classes is 0. Load it with num_labels=K.")
    root = getattr(model, "timm_model", model)
    declared = root.get_classifier() if hasattr(root, "get_classifier") else root
    if isinstance(declared, tuple | list | nn.ModuleList):
        raise ValueError(
            f"{name} has {len(declared)} heads whose outputs are combined, so no one vector is its feature. "
            "Choose a model with one head, for instance one without distillation."
        )
    backbone = getattr(model, "base_model", model)  # of transformers
    outside = set() if backbone in (model, root) else set(backbone.modules())
    searched = set(declared.modules()) - outside if isinstance(declared, nn.Module) else set()
    candidates = [
        path
        for path, module in modules.items()
        if module in searched and _is_linear(module) and module.weight.shape[0] == num_labels
    ]
    if len(candidates) != 1:
        raise ValueError(
            f"the head of {name} must be its one linear layer with {num_labels} outputs; candidates: "
            f"{', '.join(candidates) or 'none'}. Name it by `head: <module path>`."
        )
    return candidates[0], modules[candidates[0]]


def _num_labels(model: nn.Module) -> int:
    if hasattr(model, "num_classes"):
        return model.num_classes
    if hasattr(getattr(model, "config", None), "num_labels"):
        return model.config.num_labels
    raise ValueError(f"{type(model).__name__} does not tell its number of classes; name its head by `head`.")


def _is_linear(module: nn.Module) -> bool:
    pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    return pointwise or isinstance(module, (*REPLACEABLE_HEADS, ExpertsHead))


def feature_dim(head: nn.Module) -> int:
    """P, the width of a head's input."""
    return head.weight.shape[1]


def reset_head(model: nn.Module, head_name: str, std: float = 0.01) -> None:
    """Draw a head anew: weights from N(0, std), bias 0, as cRT does (Kang et al. 2020)."""
    head = model.get_submodule(head_name)
    nn.init.normal_(head.weight, std=std)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def freeze_backbone(model: nn.Module, head_name: str) -> None:
    """Stop gradients of all parameters but the head's, which stay as they are."""
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{head_name}."):
            parameter.requires_grad_(False)
