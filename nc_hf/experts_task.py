"""RIDE as a task: every expert learns by itself, and all are kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nc_hf.losses.experts import class_temperatures, diversity
from nc_hf.losses.precision import unit_rows
from nc_hf.models.experts import Experts
from nc_hf.task import ClassificationTask, Update


class ExpertsTask(ClassificationTask):
    """A network of experts with the loss of RIDE (Wang et al. 2021).

    The supervised loss is summed over experts, each on logits of its own; to that comes the diversity term, a negative
    factor times `nc_hf.losses.experts.diversity`. Once classes are re-weighted (`weighting_active`) it has a
    temperature for each class. The collapse terms see each expert's features before they are normalized, with centers
    of its own: `collapse` has `num_experts`. In eval mode logits are the mean over experts.

    Args:
        model: the network.
        head_name: module path of its head.
        num_classes: K.
        class_weights: as of `ClassificationTask`.
        class_counts: (K,) training images per class, which the temperatures need; not used without `class_weights`.
        diversity_factor: at most 0. The authors' default is -0.2, their CIFAR-100-LT configuration -0.45.
        reweight_factor: of `class_temperatures`; 0.05 as the authors on CIFAR, 0.02 on ImageNet-LT.
        temperature: of the diversity term; 1 as the authors.
        **settings: further ones of `ClassificationTask`.

    Raises:
        ValueError: for a model of another kind, a setting out of range, or class weights without class counts.
    """

    def __init__(
        self,
        model: Experts,
        head_name: str,
        num_classes: int,
        *,
        class_weights: Tensor | None = None,
        class_counts: Sequence[int] | None = None,
        diversity_factor: float = -0.2,
        reweight_factor: float = 0.05,
        temperature: float = 1.0,
        **settings: Any,
    ) -> None:
        if not isinstance(model, Experts):
            raise ValueError(
                f"RIDE needs a network of experts such as resnet32_ride_cifar, got {type(model).__name__}."
            )
        if not diversity_factor <= 0:
            raise ValueError(
                f"`diversity_factor` must be at most 0, got {diversity_factor}: above it, experts are made alike. "
                "RIDE takes -0.2; 0 switches the term off."
            )
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature}. RIDE takes 1.")
        super().__init__(model, head_name, num_classes, class_weights=class_weights, **settings)
        self.diversity_factor = diversity_factor
        deferred = torch.ones(num_classes)
        if class_weights is not None:
            if class_counts is None:
                raise ValueError("class weights change the temperatures of RIDE, which need `class_counts`.")
            deferred = class_temperatures(class_counts, reweight_factor).float()
        temperatures = temperature * torch.stack([torch.ones(num_classes), deferred])
        self.register_buffer("temperatures", temperatures, persistent=False)  # before and after re-weighting starts

    def collapse_features_and_logits(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """What the collapse terms see (B, E P), not normalized, and the logits (B, K) of images (B, 3, H, W)."""
        features = self.classifier.expert_features(pixel_values)
        return features.flatten(1), self.head(unit_rows(features).flatten(1))

    def training_terms(self, pixel_values: Tensor, labels: Tensor, update: Update) -> tuple[dict[str, Tensor], Tensor]:
        """The supervised loss of every expert, what drives them apart, and the collapse terms of each."""
        features = self.classifier.expert_features(pixel_values)
        expert_logits = self.head.expert_logits(unit_rows(features))
        terms = {"supervised": sum(self.supervised_term(logits, labels, update) for logits in expert_logits.unbind(1))}
        if self.diversity_factor:
            apart = diversity(expert_logits, self.temperatures[int(self.weighting_active)])
            terms["diversity"] = self.diversity_factor * apart.sum() / update.counts.sum()
        return terms | self.collapse_terms(features.flatten(1), labels, update), expert_logits.mean(dim=1)
