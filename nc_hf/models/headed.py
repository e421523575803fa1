"""`normalized_head`: any timm network with a cosine or ETF head, as an architecture that timm can save and open."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import load_pretrained, register_model
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from nc_hf.models.normalized_heads import HEADS, HeadKind, set_head

NAME = "normalized_head"
PREFIX = "head_"  # of the head's settings among the arguments of the network


@register_model
def normalized_head(
    pretrained: bool = False,
    *,
    backbone: str = "resnet32_cifar",
    head_type: HeadKind = "cosine",
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A timm network whose linear head is replaced; `head_scale`, `head_seed` and `head_norm` are the head's settings.

    Raises:
        ValueError: for a `backbone` that is no architecture of timm.
    """
    if not timm.is_model(backbone) or backbone.split(".")[0] == NAME:
        raise ValueError(f"`backbone` must be an architecture of timm, got {backbone!r}.")
    kwargs.pop("pretrained_model_args", None)
    settings = {
        name: kwargs.pop(PREFIX + name) for kind in HEADS for name in HEADS[kind][1] if PREFIX + name in kwargs
    }
    cfg = resolve_pretrained_cfg(NAME, pretrained_cfg, pretrained_cfg_overlay).to_dict() if pretrained_cfg else None
    model = timm.create_model(backbone, **({"num_classes": cfg["num_classes"]} if cfg else {}) | kwargs)
    replace_head(model, head_type, **settings)
    if cfg:
        model.pretrained_cfg = model.default_cfg = cfg
    if pretrained:
        load_pretrained(model, cfg, num_classes=model.num_classes, in_chans=model.pretrained_cfg["input_size"][0])
    return model


def replace_head(model: nn.Module, kind: HeadKind, **settings: Any) -> nn.Module:
    """Give a timm network another kind of head, and the name under which it is saved.

    Args:
        model: of timm, changed in place.
        kind: `"cosine"`, `"etf"`, or `"linear"`, with which it is an ordinary network again.
        **settings: of the head, see `set_head`.

    Returns:
        The new head.

    Raises:
        ValueError: for a model of another library, and as `set_head`.
    """
    from nc_hf.models.classifier import find_head

    if not hasattr(model, "pretrained_cfg"):
        raise ValueError(
            f"a {kind} head can be saved with networks of timm alone, got {type(model).__name__}. "
            "Set head_type: linear."
        )
    head = set_head(model, find_head(model)[0], kind, **settings)
    arguments = {name: value for name, value in getattr(model, "_model_args", {}).items() if name not in _arguments()}
    architecture = getattr(model, "_model_args", {}).get("backbone", model.pretrained_cfg["architecture"])
    if kind != "linear":
        arguments |= {
            "backbone": architecture,
            "head_type": kind,
            **{PREFIX + name: settings[name] for name in settings},
        }
        architecture = NAME
    model._model_args = arguments
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": architecture}
    return head


def renew_head(model: nn.Module) -> None:
    """After `reset_classifier`, which makes a linear head, put one of the network's own kind in its place."""
    arguments = getattr(model, "_model_args", {})
    if kind := arguments.get("head_type"):
        known = HEADS[kind][1]
        replace_head(model, kind, **{name: arguments[PREFIX + name] for name in known if PREFIX + name in arguments})


def _arguments() -> tuple[str, ...]:
    return ("backbone", "head_type", *(PREFIX + name for _, names in HEADS.values() for name in names))
