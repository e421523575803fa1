"""The one module that is trained: a classifier together with its loss."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nc_hf.choices import check_choice
from nc_hf.labels import label_counts
from nc_hf.losses.classification import SupervisedLoss
from nc_hf.losses.collapse import NeuralCollapseLoss
from nc_hf.mixing import MixupRule
from nc_hf.models.classifier import FeatureTap, check_tap, logits_of
from nc_hf.models.feature_tap import apply_head

logger = logging.getLogger(__name__)


class Update(NamedTuple):
    """What a batch must know of the update that it is a part of.

    Attributes:
        counts: (K,) float32, images of each class in the update divided by the number of processes.
        batches: number of batches accumulated.
        partners: (B,) the second labels of mixed-up images, or None.
        mixing: the mixup coefficient of the first labels.
    """

    counts: Tensor
    batches: int = 1
    partners: Tensor | None = None
    mixing: float | Tensor = 1.0


class ClassificationTask(nn.Module):
    """A classifier, the class centers and the class weights; `forward` returns the loss.

    Everything a loss learns lives in here, so data parallel wrappers average it, checkpoints keep it and resume
    restores it. What changes while training is plain state of this module: `collapse_active`, `weighting_active`,
    `progress`.

    In training the loss is this batch's share of the update's loss: sums over its images are divided by counts of the
    whole update (all accumulated batches of all processes), so that summing over the accumulated batches and
    averaging over the processes gives the loss of one large batch.

    Args:
        model: an image classifier, of timm or of transformers; kept as it is.
        head_name: module path of its last layer.
        num_classes: K.
        supervised: the supervised loss; cross entropy when None.
        collapse: the two feature terms, or None.
        class_weights: (K,) weight of each class in the supervised loss while `weighting_active`.
        freeze_backbone: train the head alone, with the backbone in eval mode through every `train()` call.
        moving_statistics: let the batch norms of a frozen backbone follow the images (MiSLAS's shifted BatchNorm).
        mixup_rule: labels of a mixed feature in the collapse terms, `"weighted"` (both), `"dominant"` or `"first"`.
        within_counts: (K,) the n_k of L_W; those of the update when None.

    Raises:
        ValueError: for an unknown `mixup_rule`.
    """

    accepts_loss_kwargs = False
    config = None  # the Trainer looks for one; this module is no PreTrainedModel
    main_input_name = "pixel_values"

    def __init__(
        self,
        model: nn.Module,
        head_name: str,
        num_classes: int,
        *,
        supervised: SupervisedLoss | None = None,
        collapse: NeuralCollapseLoss | None = None,
        class_weights: Tensor | None = None,
        freeze_backbone: bool = False,
        moving_statistics: bool = False,
        mixup_rule: MixupRule = "weighted",
        within_counts: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_choice("mixup_rule", mixup_rule, MixupRule.__args__)
        self.classifier, self.head_name, self.num_classes = model, head_name, num_classes
        self.collapse, self.mixup_rule = collapse, mixup_rule
        self.supervised = SupervisedLoss("ce") if supervised is None else supervised
        weights = torch.ones(num_classes) if class_weights is None else torch.as_tensor(class_weights)
        self.register_buffer("class_weights", weights.float(), persistent=False)
        counts = None if within_counts is None else torch.as_tensor(within_counts).float()
        self.register_buffer("within_counts", counts, persistent=False)
        self.register_buffer("centers_ready", torch.tensor(False))
        self.register_buffer("progress", torch.tensor(0.0), persistent=False)  # finished epochs / all epochs
        self.freeze_backbone, self.moving_statistics = freeze_backbone, moving_statistics
        self.collapse_active = self.weighting_active = False
        self.tap, self._tap_is_checked = FeatureTap(model, head_name), False

    @property
    def head(self) -> nn.Module:
        """The last layer of the classifier."""
        return self.classifier.get_submodule(self.head_name)

    @property
    def learned_centers(self) -> nn.Parameter | None:
        """Class centers (K, P) that an optimizer trains, if any."""
        return self.collapse.centers if self.collapse is not None and self.collapse.mode == "learned" else None

    def train(self, mode: bool = True) -> ClassificationTask:
        """Like `nn.Module.train`, except that a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.classifier.eval()
            self.head.train(mode)
            if self.moving_statistics:
                for module in self.classifier.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.train(mode)
        return self

    def check_tap_once(self, pixel_values: Tensor) -> None:
        """Before the first update, make sure on two images that the tapped features are what the logits come from."""
        if not self._tap_is_checked:
            check_tap(self.classifier, self.head_name, pixel_values[:2])
            self._tap_is_checked = True

    def features_and_logits(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """One forward pass.

        Args:
            pixel_values: (B, 3, H, W).

        Returns:
            The input of the head (B, P) and the logits (B, K).
        """
        logits, features = logits_of(self.classifier(pixel_values)), self.tap.read()
        if not self.training and torch.is_autocast_enabled(features.device.type):
            logits = self.head_logits(features)
        return features, logits

    def head_logits(self, features: Tensor) -> Tensor:
        """Logits (B, K) of the head's input (B, P), at the precision of the head's weights.

        Rounded to bf16 or fp16, logits that are nearly equal would tie, and a tie goes to the class that comes first:
        in long-tailed data, to the more frequent one.
        """
        with torch.autocast(features.device.type, enabled=False):
            return apply_head(self.head, features.to(self.head.weight.dtype))

    def collapse_features_and_logits(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """As `features_and_logits`, with the features that the collapse terms see."""
        return self.features_and_logits(pixel_values)

    @staticmethod
    def counted_labels(labels: Tensor) -> Tensor:
        """The labels of a batch whose counts make `update_counts`."""
        return labels

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        *,
        partners: Tensor | None = None,
        mixing: float | Tensor = 1.0,
        update_counts: Tensor | None = None,
        update_batches: int = 1,
        **ignored: Any,
    ) -> dict[str, Tensor]:
        """Loss, logits and, in training, the terms of the loss.

        Args:
            pixel_values: (B, 3, H, W), already mixed when `partners` is given.
            labels: (B,) integers in [0, K); None gives logits alone.
            partners: (B,) the second labels of mixed-up images.
            mixing: the mixup coefficient of `labels`.
            update_counts: (K,) images of each class in the whole update divided by the number of processes; those of
                this batch when None.
            update_batches: number of batches accumulated in the update.
            **ignored: other columns of the data set.
        """
        if labels is None or not self.training:
            _, logits = self.features_and_logits(pixel_values)
            loss = {} if labels is None else {"loss": self.supervised(logits, labels.long()).mean()}
            return {"logits": logits} | loss
        if update_counts is None:
            update_counts = label_counts(self.counted_labels(labels), self.num_classes)
        update = Update(update_counts.to(torch.float32), update_batches, partners, mixing)
        terms, logits = self.training_terms(pixel_values, labels, update)
        return {"loss": sum(terms.values()), "logits": logits, **{f"loss_{name}": t for name, t in terms.items()}}

    def training_terms(self, pixel_values: Tensor, labels: Tensor, update: Update) -> tuple[dict[str, Tensor], Tensor]:
        """What training minimizes: the one method that another objective has of its own.

        Args:
            pixel_values: (B, 3, H, W).
            labels: (B,) integers in [0, K).
            update: that the batch is a part of.

        Returns:
            This batch's share of each term of the loss, by name, and the logits (B, K).
        """
        features, logits = self.features_and_logits(pixel_values)
        terms = {"supervised": self.supervised_term(logits, labels, update)}
        return terms | self.collapse_terms(features, labels, update), logits

    def supervised_term(self, logits: Tensor, labels: Tensor, update: Update) -> Tensor:
        """The class-weighted mean of the supervised loss over an update: this batch's share, a scalar."""
        # mixup permutes the images of the update, so first and second labels have the same counts.
        weights = self.class_weights if self.weighting_active else torch.ones_like(self.class_weights)
        total = (weights * update.counts).sum()
        loss = (weights[labels] * self.supervised(logits, labels, update.counts)).sum() / total
        if update.partners is None:
            return loss
        partners = update.partners
        partners_loss = (weights[partners] * self.supervised(logits, partners, update.counts)).sum() / total
        return update.mixing * loss + (1 - update.mixing) * partners_loss

    def collapse_terms(self, features: Tensor, labels: Tensor, update: Update) -> dict[str, Tensor]:
        """The two weighted feature terms: this batch's share; none before their epoch."""
        if self.collapse is None:
            return {}
        # DDP waits for a gradient of each parameter, also where learned centers do not take part yet.
        idle = {} if self.learned_centers is None else {"within": 0 * self.learned_centers.sum()}
        if not self.collapse_active:
            return idle
        partners = update.partners
        if partners is not None and self.mixup_rule == "dominant":
            labels = torch.where(torch.as_tensor(update.mixing, device=labels.device) >= 0.5, labels, partners)
        terms = self.collapse(
            features,
            labels,
            partner_labels=partners if self.mixup_rule == "weighted" else None,
            mixing=update.mixing,
            class_counts=update.counts if self.within_counts is None else self.within_counts,
            batches=update.batches,
        )
        if "between" in terms:  # whole in every accumulated batch, unlike sums over images
            terms["between"] = terms["between"] / update.batches
        if self.collapse.frozen and idle:
            terms["within"] = terms["within"] + idle["within"]
        return terms

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Recompute activations of the classifier in the backward pass; warns of batch norms that move twice then.

        Raises:
            ValueError: for a classifier that cannot.
        """
        if hasattr(self.classifier, "activation_checkpointing_enable"):
            self.classifier.activation_checkpointing_enable(
                activation_checkpointing_kwargs=activation_checkpointing_kwargs,
                every_n_layers=every_n_layers,
                offload=offload,
            )
        elif hasattr(self.classifier, "set_grad_checkpointing"):
            self.classifier.set_grad_checkpointing(True)
        else:
            raise ValueError(
                f"{type(self.classifier).__name__} cannot recompute activations; leave activation_checkpointing off."
            )
        if moving := self._moving_norms():
            logger.warning(
                "%s has %d batch norms. Those inside what is recomputed see each batch twice, and their running "
                "statistics move twice an update: the evaluation differs a little from that of a run without "
                "activation checkpointing.",
                *(type(self.classifier).__name__, moving),
            )

    def _moving_norms(self) -> int:
        """Number of batch norms whose running statistics follow the training."""
        if self.freeze_backbone and not self.moving_statistics:
            return 0
        norms = (module for module in self.classifier.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        return sum(norm.track_running_stats for norm in norms)
