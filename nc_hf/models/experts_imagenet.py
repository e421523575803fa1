"""RIDE (Wang et al. 2021) for ImageNet: experts on the first two stages of a ResNeXt."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import Bottleneck, ResNet, downsample_conv
from torch import nn

from nc_hf.models.experts import Experts

IMAGENET_SETTINGS = {  # of images as timm's resnext50_32x4d, so that rows of a table differ in the method alone
    "input_size": (3, 224, 224),
    "num_classes": 1000,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "interpolation": "bicubic",
    "crop_pct": 0.95,
    "pool_size": (7, 7),
    "fixed_input_size": False,
    "first_conv": "conv1",
    "classifier": "fc",
    "license": "apache-2.0",
}

default_cfgs = {"resnext50_ride": IMAGENET_SETTINGS}


class ResNeXtExperts(Experts, ResNet):
    """A ResNeXt whose stem and first two stages are shared by experts with narrower last two stages of their own.

    Weights start as in timm's ResNets: He et al. (2015) by the outputs, and residual branches at zero.

    Args:
        depths: blocks of each of the four stages.
        widths: of each stage, as a ResNet counts them: its output has 4 times as many channels, so P = 4 widths[3].
        cardinality: groups of the 3x3 convolutions.
        base_width: channels of a group at the width 64.
        num_experts: E; 2, 3 or 4 in the paper.
        scale: s of the cosine heads.
        routing: with gates for `train_routing`, which until then are not trained.
        num_classes: outputs; 0 gives features.
        in_chans: image channels.
        drop_rate: dropout before the head.

    Raises:
        ValueError: for fewer than 2 experts.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        widths: tuple[int, int, int, int],
        *,
        cardinality: int = 32,
        base_width: int = 4,
        num_experts: int = 3,
        scale: float = 30.0,
        routing: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        groups = {"cardinality": cardinality, "base_width": base_width}
        shared = {"layers": depths[:2], "channels": widths[:2], **groups}
        super().__init__(Bottleneck, num_classes=0, in_chans=in_chans, drop_rate=drop_rate, **shared)
        self.layer3, self.layer4 = nn.Sequential(), nn.Sequential()  # timm's forward pass runs four stages
        del self.global_pool  # `Experts` has its own, and timm would save this one as an argument
        feature_dim = widths[-1] * Bottleneck.expansion
        self._add_experts(num_experts, lambda: _later_stages(depths, widths, groups), feature_dim, scale, routing)
        self.init_weights()
        self.reset_classifier(num_classes)


def _later_stages(depths: tuple[int, ...], widths: tuple[int, ...], groups: dict[str, int]) -> nn.Sequential:
    blocks, width_in = [], widths[1] * Bottleneck.expansion
    for depth, width in zip(depths[2:], widths[2:], strict=True):
        width_out = width * Bottleneck.expansion
        shortcut = downsample_conv(width_in, width_out, kernel_size=1, stride=2)
        blocks.append(Bottleneck(width_in, width, stride=2, downsample=shortcut, **groups))
        blocks += [Bottleneck(width_out, width, **groups) for _ in range(depth - 1)]
        width_in = width_out
    return nn.Sequential(*blocks)


@register_model
def resnext50_ride(pretrained: bool = False, **kwargs: Any) -> ResNeXtExperts:
    """RIDE on ResNeXt-50 32x4d, P = 1536 an expert: `num_experts=3`, `routing=False`; widths as the authors' code."""
    settings = {"depths": (3, 4, 6, 3), "widths": (64, 128, 192, 384), **kwargs}
    return build_model_with_cfg(ResNeXtExperts, "resnext50_ride", pretrained, **settings)
