"""ResNets for 32x32 images, registered with timm: the CIFAR networks of He et al. (2016) and a CIFAR ResNet-18."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CIFAR_SETTINGS = {
    "input_size": (3, 32, 32),
    "num_classes": 10,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "pool_size": (8, 8),
    "fixed_input_size": False,
    "first_conv": "conv1",
    "classifier": "fc",
    "license": "apache-2.0",
}

default_cfgs = {
    name: CIFAR_SETTINGS
    for name in ("resnet20_cifar", "resnet32_cifar", "resnet44_cifar", "resnet56_cifar", "resnet18_cifar")
}


class PaddingShortcut(nn.Module):
    """Option A of He et al.: every second pixel, and zero channels on both sides; no parameters."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + 2 padding, H / 2, W / 2)."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        if stride == 1 and width_in == width:
            self.shortcut = nn.Identity()
        elif projection:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        else:
            self.shortcut = PaddingShortcut((width - width_in) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x), inplace=True)


class CifarResNet(nn.Module):
    """A ResNet whose first stage keeps the resolution of small images, with the interface of timm's models.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage; each but the first halves the resolution.
        width_factor: multiplies the widths; 2 is the wider network of ETF + DR on CIFAR-100.
        projection: 1x1 convolutions in shortcuts instead of zero padding.
        num_classes: outputs; 0 gives features.
        in_chans: image channels.
        drop_rate: dropout before the head.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        width_factor: int = 1,
        projection: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.drop_rate, self.grad_checkpointing = num_classes, drop_rate, False
        widths = tuple(width_factor * width for width in widths)
        self.num_features = self.head_hidden_size = widths[-1]
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages, width_in = [], widths[0]
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
            blocks = [
                BasicBlock(width if i else width_in, width, 2 if number > 1 and i == 0 else 1, projection)
                for i in range(depth)
            ]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            self.stages.append(f"layer{number}")
            width_in = width
        self.fc = self._new_head()
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):  # as LDAM-DRW, MiSLAS and the authors: the head too
                nn.init.kaiming_normal_(module.weight)

    def _new_head(self) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer with `num_classes` outputs; 0 removes it."""
        self.num_classes = num_classes
        device, dtype = self.conv1.weight.device, self.conv1.weight.dtype
        self.fc = self._new_head().to(device=device, dtype=dtype)
        if num_classes:
            nn.init.kaiming_normal_(self.fc.weight)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass."""
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the last feature map (B, P, H / 4, W / 4)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for name in self.stages:
            stage = getattr(self, name)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(stage, x, use_reentrant=False)
            else:
                x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map to logits (B, K), or to the head's input (B, P)."""
        x = F.dropout(x.mean(dim=(2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, K)."""
        return self.forward_head(self.forward_features(x))


def _build(name: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, name, pretrained, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 of He et al. for CIFAR, P = 64."""
    return _build("resnet20_cifar", pretrained, depths=(3, 3, 3), widths=(16, 32, 64), **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 of He et al. for CIFAR, P = 64: the backbone of the paper's CIFAR tables."""
    return _build("resnet32_cifar", pretrained, depths=(5, 5, 5), widths=(16, 32, 64), **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 of He et al. for CIFAR, P = 64."""
    return _build("resnet44_cifar", pretrained, depths=(7, 7, 7), widths=(16, 32, 64), **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 of He et al. for CIFAR, P = 64."""
    return _build("resnet56_cifar", pretrained, depths=(9, 9, 9), widths=(16, 32, 64), **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 with a 3x3 stem and no pooling before the stages, P = 512 (Table 6)."""
    return _build(
        "resnet18_cifar", pretrained, depths=(2, 2, 2, 2), widths=(64, 128, 256, 512), projection=True, **kwargs
    )
