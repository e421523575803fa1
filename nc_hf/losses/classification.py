"""Supervised losses on logits, one value per image; the weighted mean over an update is taken by the task."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

PerImageLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each image, (B,) in float32.

    Args:
        logits: (B, K).
        labels: (B,) integers in [0, K).
        label_smoothing: epsilon of (1 - epsilon) one-hot + epsilon / K.
    """
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)


def mean_squared_error(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the K outputs of the squared distance to the one-hot label, (B,) in float32.

    This is the scale of the authors' code; the paper's Eq. 7, 1/(2n) ||Z - Y||^2, is K/2 times as large.

    Args:
        logits: (B, K).
        labels: (B,) integers in [0, K).
        label_smoothing: epsilon of (1 - epsilon) one-hot + epsilon / K.
    """
    num_classes = logits.shape[1]
    targets = F.one_hot(labels, num_classes).to(logits.device) * (1 - label_smoothing) + label_smoothing / num_classes
    return (logits.float() - targets).square().mean(dim=1)


SUPERVISED_LOSSES: dict[str, Callable[..., Tensor]] = {"ce": cross_entropy, "mse": mean_squared_error}
