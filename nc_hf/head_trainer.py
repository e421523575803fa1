"""`HeadTrainer`: the training of a head alone, with the factors of LWS and the radius of MaxNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nc_hf.retraining_args import RetrainingArguments
from nc_hf.schedule import move_to_own_group
from nc_hf.trainer import NCTrainer


class HeadTrainer(NCTrainer):
    """An `NCTrainer` of a head alone: what is special about its parameters.

    With `learns_scales` each class's logit gets a learned factor (LWS), and the weights learn at a share of the
    learning rate; with `max_norm_threshold` rows are projected after each update (Alshammari et al. 2022).
    """

    keeps_stage_one = True

    def __init__(
        self, model: nn.Module, args: RetrainingArguments, *, learns_scales: bool = False, **kwargs: Any
    ) -> None:
        self.heads: dict[str, dict[str, Tensor]] = {}  # by name, once `retrain_classifier` is done
        self.taus: dict[str, float] = {}
        super().__init__(model, args, freeze_backbone=True, **kwargs)
        self._hook, self._radius, layer = None, None, self.task.head
        if args.max_norm_threshold is not None:  # not with the optimizer: a resumed run has other weights by then
            self._radius = max_norm_radius(layer.weight.detach(), args.max_norm_threshold)
        if learns_scales:
            layer.scale = nn.Parameter(torch.ones(len(layer.weight), device=layer.weight.device))
            self._hook = layer.register_forward_hook(_multiply_by_scale)
            layer.weight.requires_grad_(args.lws_weight_factor > 0)
            if layer.bias is not None:
                layer.bias.requires_grad_(args.lws_weight_factor > 0)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in `NCTrainer`, with the weights of LWS in groups of their own, and MaxNorm after each step."""
        fresh, layer = self.optimizer is None, self.task.head
        optimizer = super().create_optimizer(model)
        factor = self.args.lws_weight_factor
        if fresh and self._hook is not None and factor > 0:
            for parameter in (p for p in (layer.weight, layer.bias) if p is not None):
                group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
                settings = {"lr": factor * optimizer.defaults["lr"], "weight_decay": group["weight_decay"]}
                move_to_own_group(optimizer, parameter, **settings)
        if fresh and self._radius is not None:
            optimizer.register_step_post_hook(lambda *_: project_rows(layer.weight, self._radius))
        return optimizer

    def finish_head(self) -> None:
        """Fold the learned factors into weight and bias, so that the head is a plain one again."""
        if self._hook is None:
            return
        layer = self.task.head
        with torch.no_grad():
            layer.weight.mul_(layer.scale.view(-1, *[1] * (layer.weight.ndim - 1)))
            if layer.bias is not None:
                layer.bias.mul_(layer.scale)
        self.drop_factors()

    def drop_factors(self) -> None:
        """Take the factors off the head, as if they were 1."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            del self.task.head.scale


def _multiply_by_scale(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * layer.scale.view(-1, *[1] * (output.ndim - 2))


def max_norm_radius(weight: Tensor, threshold: float) -> float:
    """Smallest norm of the rows of `weight` (K, P), plus `threshold` times their range (Alshammari et al. 2022)."""
    norms = weight.flatten(1).norm(dim=1)
    return (norms.min() + threshold * (norms.max() - norms.min())).item()


@torch.no_grad()
def project_rows(weight: Tensor, radius: float) -> None:
    """Shorten the rows of `weight` (K, P) whose norm is above `radius` to that norm, in place."""
    rows = weight.flatten(1)
    shrink = (radius / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    weight.copy_((rows * shrink).view_as(weight))
