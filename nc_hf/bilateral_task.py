"""BBN as a task: attention moves from images drawn uniformly to images drawn in reverse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nc_hf.models.bilateral import BilateralNetwork
from nc_hf.task import ClassificationTask, Update


def uniform_share(progress: Tensor | float) -> Tensor | float:
    """alpha = 1 - progress^2, BBN's cumulative schedule (Zhou et al. 2020).

    Args:
        progress: finished epochs / all epochs, in [0, 1). The authors' code divides by 100 and 200 in runs of 90 and
            180 epochs, so there alpha ends a little higher.
    """
    return 1 - progress**2


class BilateralTask(ClassificationTask):
    """A network of two branches with the loss of BBN (Zhou et al. 2020).

    A training batch holds images drawn uniformly in the even rows and images drawn in reverse in the odd rows, which
    is what `sampler: bilateral` gives. With alpha = `uniform_share(progress)` the head sees the mixture
    2 [alpha f_u, (1 - alpha) f_r] of each pair, and the loss is alpha loss(y_u) + (1 - alpha) loss(y_r), a mean over
    pairs. The two halves pass the trunk one after the other, as in the authors' code, so norm layers see each by
    itself. The collapse terms see the features of the uniform branch and the uniform labels.

    The buffer `progress` of the base class, finished epochs / all epochs, is what the trainer sets at each epoch.

    Args:
        model: the network.
        head_name: module path of its head.
        num_classes: K.
        class_weights: must be None.
        **settings: further ones of `ClassificationTask`; its `collapse` has P features, not 2 P.

    Raises:
        ValueError: for a model of another kind, or class weights.
    """

    def __init__(
        self,
        model: BilateralNetwork,
        head_name: str,
        num_classes: int,
        *,
        class_weights: Tensor | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(model, BilateralNetwork):
            raise ValueError(
                f"BBN needs a network of two branches such as resnet32_bbn_cifar, got {type(model).__name__}."
            )
        if class_weights is not None:
            raise ValueError("BBN re-balances by its reversed draws: set class_weighting to none.")
        super().__init__(model, head_name, num_classes, **settings)

    @staticmethod
    def counted_labels(labels: Tensor) -> Tensor:
        """The labels (B,) of a batch (2 B,) whose counts make `update_counts`: one of each pair, the uniform one."""
        return labels[0::2]

    def collapse_features_and_logits(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """What the collapse terms see (B, P), the uniform half, and the logits (B, K) of images (B, 3, H, W)."""
        features, logits = self.features_and_logits(pixel_values)
        return features[:, : features.shape[1] // 2], logits

    def training_terms(self, pixel_values: Tensor, labels: Tensor, update: Update) -> tuple[dict[str, Tensor], Tensor]:
        """The supervised loss of the mixed features, and the collapse terms of the uniform branch.

        Args:
            pixel_values: (2 B, 3, H, W), uniform draws in even rows and reversed ones in odd rows.
            labels: (2 B,) integers in [0, K).
            update: with the counts of `counted_labels`.

        Raises:
            ValueError: for mixed images, or an odd number of rows.
        """
        if update.partners is not None:
            raise ValueError("BBN mixes features of two draws already: set mixup_alpha (and cutmix_alpha) to 0.")
        if len(labels) % 2:
            raise ValueError(
                f"{len(labels)} rows are not pairs of a uniform and a reversed draw. Set `sampler: bilateral` and an "
                "even batch size, with dataloader_drop_last."
            )
        uniform_labels, reversed_labels = labels[0::2], labels[1::2]
        alpha = uniform_share(self.progress)
        uniform = self.classifier.branch_features(pixel_values[0::2], "uniform")
        other = self.classifier.branch_features(pixel_values[1::2], "reversed")
        logits = self.head(2 * torch.cat([alpha * uniform, (1 - alpha) * other], dim=1))
        self.tap.read()  # the mixture, which nobody needs, would keep its graph
        # Two labels of one mixed feature, as in mixup.
        mixed = update._replace(partners=reversed_labels, mixing=alpha)
        terms = {"supervised": self.supervised_term(logits, uniform_labels, mixed)}
        return terms | self.collapse_terms(uniform, uniform_labels, update), logits
