"""BBN (Zhou et al. 2020): a shared trunk, and a last block for each of two samplers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from nc_hf.models.cifar_resnet import CIFAR_SETTINGS, BasicBlock, CifarResNet

default_cfgs = {"resnet32_bbn_cifar": CIFAR_SETTINGS}


class BilateralNetwork(CifarResNet):
    """A CIFAR ResNet with its last block twice: one for images drawn uniformly, one for those drawn in reverse.

    Features are those of both blocks side by side (B, 2 P), uniform first, and the head is linear in them: what BBN
    does at test time, where 2 [alpha f_u, (1 - alpha) f_r] has alpha = 1/2.

    Args:
        depths: blocks of each stage, the last one counted once.
        widths: channels of each stage; P is the last.
        num_classes: outputs; 0 gives features.
        in_chans: image channels.
        drop_rate: dropout before the head.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        trunk = (*depths[:-1], depths[-1] - 1)
        super().__init__(trunk, widths, num_classes=0, in_chans=in_chans, drop_rate=drop_rate)
        self.uniform, self.reversed = (BasicBlock(widths[-1], widths[-1], 1, False) for _ in range(2))
        for module in (*self.uniform.modules(), *self.reversed.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.num_features = self.head_hidden_size = 2 * widths[-1]
        self.reset_classifier(num_classes)

    def branch_features(self, x: Tensor, branch: Literal["uniform", "reversed"]) -> Tensor:
        """Images (B, 3, H, W) to the pooled features of one branch (B, P)."""
        block = self.uniform if branch == "uniform" else self.reversed
        return self.forward_head(block(super().forward_features(x)), pre_logits=True)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the feature maps of both branches side by side (B, 2 P, H / 4, W / 4)."""
        x = super().forward_features(x)
        return torch.cat([self.uniform(x), self.reversed(x)], dim=1)


@register_model
def resnet32_bbn_cifar(pretrained: bool = False, **kwargs: Any) -> BilateralNetwork:
    """BBN on ResNet-32 for CIFAR, 2 P = 128."""
    settings = {"depths": (5, 5, 5), "widths": (16, 32, 64), **kwargs}
    return build_model_with_cfg(BilateralNetwork, "resnet32_bbn_cifar", pretrained, **settings)
