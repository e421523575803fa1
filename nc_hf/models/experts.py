"""RIDE (Wang et al. 2021): experts that share the first layers, and one head over all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nc_hf.losses.precision import unit_rows
from nc_hf.models.cifar_resnet import CIFAR_SETTINGS, BasicBlock, CifarResNet
from nc_hf.models.routing import RoutingGates

default_cfgs = {"resnet32_ride_cifar": CIFAR_SETTINGS}


class ExpertsHead(nn.Module):
    """Cosine heads of all experts, whose mean logit is linear in the unit features of all experts side by side.

    The logit of expert e is s cos(h_e, w_ek), without bias; the directions start uniform in [-1, 1] and of length 1,
    as in LDAM and RIDE. `features @ weight.T` is the mean over experts.

    Args:
        num_experts: E.
        feature_dim: P of each expert.
        num_classes: K.
        scale: s; 30 in RIDE.
    """

    bias = None

    def __init__(self, num_experts: int, feature_dim: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        self.num_experts, self.scale = num_experts, scale
        self.directions = nn.Parameter(unit_rows(torch.empty(num_experts, num_classes, feature_dim).uniform_(-1, 1)))

    def extra_repr(self) -> str:
        """The shape, for `print(model)`."""
        experts, classes, width = self.directions.shape
        return f"num_experts={experts}, feature_dim={width}, num_classes={classes}, scale={self.scale}"

    @property
    def weight(self) -> Tensor:
        """(K, E P), computed: s / E times the unit directions."""
        return self.scale / self.num_experts * unit_rows(self.directions).transpose(0, 1).flatten(1)

    def expert_logits(self, features: Tensor) -> Tensor:
        """Unit features (B, E, P) to the logits of each expert (B, E, K), in at least float32."""
        with torch.autocast(features.device.type, enabled=False):
            directions = unit_rows(self.directions).to(features.dtype)
            return self.scale * torch.einsum("bep,ekp->bek", features, directions)

    def forward(self, features: Tensor) -> Tensor:
        """Unit features (B, E P) of all experts to the mean of their logits (B, K), in at least float32."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features, self.weight.to(features.dtype))


class Experts(nn.Module):
    """A network of experts, whatever its layers: a mixin before the class of the stages that experts share.

    That class has timm's interface, `conv1` and `fc`; its `forward_features` makes the map that all experts see. The
    logits are the mean over experts, always of all of them; `nc_hf.models.routing.routed` stops early. Features, the
    input of the head, are the unit features of all experts side by side, P_total = E P.
    """

    def _add_experts(
        self, num_experts: int, new_expert: Callable[[], nn.Module], feature_dim: int, scale: float, routing: bool
    ) -> None:
        """The experts, without a head."""
        if num_experts < 2:
            raise ValueError(f"`num_experts` must be at least 2, got {num_experts}. RIDE has 2, 3 or 4.")
        self.num_experts, self.scale, self.with_routing = num_experts, scale, routing
        self.num_features = self.head_hidden_size = num_experts * feature_dim
        self.experts = nn.ModuleList(new_expert() for _ in range(num_experts))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head with `num_classes` outputs, and new gates; 0 removes both."""
        self.num_classes, width = num_classes, self.num_features // self.num_experts
        head = ExpertsHead(self.num_experts, width, num_classes, self.scale) if num_classes else nn.Identity()
        self.fc = head.to(self.conv1.weight)
        self.routing = None
        if self.with_routing and num_classes:
            self.routing = RoutingGates(self.num_experts, width, num_classes).to(self.conv1.weight)
            self.routing.requires_grad_(False)  # not a part of the network's own training

    def shared_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the feature map that all experts see (B, C, H', W')."""
        return super().forward_features(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the experts' last feature maps side by side (B, E P, H', W')."""
        x = self.shared_features(x)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return torch.cat([checkpoint(expert, x, use_reentrant=False) for expert in self.experts], dim=1)
        return torch.cat([expert(x) for expert in self.experts], dim=1)

    def expert_outputs(self, number: int, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features (B, P) and logits (B, K) of one expert, from `shared_features`."""
        features = unit_rows(self._pool(self.experts[number](shared)))
        with torch.autocast(features.device.type, enabled=False):
            return features, self.scale * F.linear(features, unit_rows(self.fc.directions[number]).to(features.dtype))

    def expert_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the pooled features of each expert (B, E, P), not normalized."""
        return self._pool(self.forward_features(x)).unflatten(1, (self.num_experts, -1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature maps to logits (B, K), or to the head's input (B, E P)."""
        x = unit_rows(self._pool(x).unflatten(1, (self.num_experts, -1))).flatten(1)
        return x if pre_logits else self.fc(x)

    def _pool(self, x: Tensor) -> Tensor:
        return F.dropout(x.mean(dim=(2, 3)), self.drop_rate, self.training)


class ExpertsNetwork(Experts, CifarResNet):
    """A CIFAR ResNet whose first stage is shared by experts with later stages of their own, narrower than usual.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage; P is the last.
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
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        num_experts: int = 3,
        scale: float = 30.0,
        routing: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(depths[:1], widths[:1], num_classes=0, in_chans=in_chans, drop_rate=drop_rate)
        self._add_experts(num_experts, lambda: _later_stages(depths, widths), widths[-1], scale, routing)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.reset_classifier(num_classes)


def _later_stages(depths: tuple[int, ...], widths: tuple[int, ...]) -> nn.Sequential:
    blocks, width_in = [], widths[0]
    for depth, width in zip(depths[1:], widths[1:], strict=True):
        blocks += [BasicBlock(width_in if i == 0 else width, width, 2 if i == 0 else 1, False) for i in range(depth)]
        width_in = width
    return nn.Sequential(*blocks)


@register_model
def resnet32_ride_cifar(pretrained: bool = False, **kwargs: Any) -> ExpertsNetwork:
    """RIDE on ResNet-32 for CIFAR, P = 48 an expert: `num_experts=3`, `routing=False`; widths as the authors' code."""
    settings = {"depths": (5, 5, 5), "widths": (16, 24, 48), **kwargs}
    return build_model_with_cfg(ExpertsNetwork, "resnet32_ride_cifar", pretrained, **settings)
