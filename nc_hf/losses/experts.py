"""Losses over several experts: the diversity term of RIDE (Wang et al. 2021), and collapse terms for each expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nc_hf.losses.collapse import NeuralCollapseLoss, between_class_loss, within_class_loss


def diversity(expert_logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """How far each image's experts are from their mean: T^2 sum_e KL(softmax(z_mean / T) || softmax(z_e / T)).

    The mean is a fixed target; over all experts a gradient through it would cancel. With one temperature a class, each
    logit is divided by its own and T^2 is the square of their mean, as in the authors' code. RIDE adds this with a
    negative factor.

    Args:
        expert_logits: (B, E, K) floating point; computed in at least float32.
        temperature: T, or (K,).

    Returns:
        (B,), at least 0.
    """
    logits = expert_logits if expert_logits.dtype == torch.float64 else expert_logits.float()
    temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
    target = (logits.mean(dim=1, keepdim=True) / temperature).log_softmax(dim=2).detach()
    divergence = target.exp() * (target - (logits / temperature).log_softmax(dim=2))
    return temperature.mean().square() * divergence.sum(dim=(1, 2))


def class_temperatures(class_counts: Sequence[int], reweight_factor: float = 0.05) -> Tensor:
    """Temperatures of `diversity` once classes are re-weighted: (K p_k f + 1 - f) / max, p_k = n_k / N (RIDE).

    Args:
        class_counts: (K,) training images per class.
        reweight_factor: f in [0, 1); 0.05 in the authors' CIFAR configuration, 0.02 on ImageNet-LT.

    Returns:
        (K,) float64; 1 for the most frequent class, less for rare ones.

    Raises:
        ValueError: for a factor outside [0, 1), where a class without images would get temperature 0.
    """
    if not 0 <= reweight_factor < 1:
        raise ValueError(f"`reweight_factor` must lie in [0, 1), got {reweight_factor}. RIDE takes 0.05.")
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    raw = len(counts) * counts / counts.sum() * reweight_factor + 1 - reweight_factor
    return raw / raw.max()


class ExpertsCollapseLoss(NeuralCollapseLoss):
    """The terms of `NeuralCollapseLoss` for each expert's features and centers, averaged over experts.

    Features and centers of the E experts stand side by side, so there is one tensor of centers (K, E P). A step on
    learned centers moves each expert's as far as it would if that expert were alone.

    Args:
        num_classes: K.
        feature_dim: E P, the width of all experts' features together.
        *args: of `NeuralCollapseLoss`.
        num_experts: E.
        **kwargs: of `NeuralCollapseLoss`.

    Raises:
        ValueError: as `NeuralCollapseLoss`, or when the features cannot be split among the experts.
    """

    def __init__(self, num_classes: int, feature_dim: int, *args: Any, num_experts: int, **kwargs: Any) -> None:
        super().__init__(num_classes, feature_dim, *args, **kwargs)
        if num_experts < 1 or feature_dim % num_experts:
            raise ValueError(f"feature_dim={feature_dim} cannot be split among num_experts={num_experts}.")
        self.num_experts = num_experts

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        partner_labels: Tensor | None = None,
        mixing: float | Tensor = 1.0,
        class_counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The weighted terms of one batch, as `NeuralCollapseLoss.forward`.

        Args:
            features: (B, E P), before they are normalized.
            labels: (B,) integers in [0, K).
            partner_labels: (B,) the second labels of mixed-up images.
            mixing: the mixup coefficient lambda in [0, 1].
            class_counts: (K,) the n_k of L_W.

        Returns:
            `{"within": lambda_1 L_W, "between": lambda_2 L_B}`, scalars; a term of weight 0 is left out.
        """
        assignments = [(labels, 1.0)] if partner_labels is None else [(labels, mixing), (partner_labels, 1 - mixing)]
        with torch.autocast(features.device.type, enabled=False):
            features = features if features.dtype == torch.float64 else features.float()
            pull, push, present = self._centers(features, assignments)
            terms = {}
            if self.within_weight:
                pairs = zip(self._by_expert(features), self._by_expert(pull), strict=True)
                terms["within"] = sum(self._within(h, mu, assignments, class_counts) for h, mu in pairs)
                terms["within"] = terms["within"] / self.num_experts
            if self.between_weight:
                between = [
                    between_class_loss(mu, objective=self.between_objective, present=present)
                    for mu in self._by_expert(push)
                ]
                terms["between"] = self.between_weight * sum(between) / self.num_experts
        return terms

    def _within(
        self,
        features: Tensor,
        centers: Tensor,
        assignments: list[tuple[Tensor, float | Tensor]],
        class_counts: Tensor | None,
    ) -> Tensor:
        """lambda_1 L_W of one expert."""
        options = {"reduction": self.within_reduction, "class_counts": class_counts}
        loss = sum(weight * within_class_loss(features, y, centers, **options) for y, weight in assignments)
        return self._within_factor(features) * loss

    def _by_expert(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.chunk(self.num_experts, dim=1)

    def _centers(
        self, features: Tensor, assignments: list[tuple[Tensor, float | Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        pull, push, present = super()._centers(features, assignments)
        if self.mode == "learned":  # the mean over experts must not slow the centers down
            pull = push = pull.detach() + self.num_experts * (pull - pull.detach())
        return pull, push, present
