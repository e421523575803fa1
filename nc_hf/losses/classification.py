"""Supervised losses on logits, one value per image; the weighted mean over an update is taken by the task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nc_hf.losses.long_tail import (
    arb,
    at_least_float32,
    balanced_softmax,
    check_setting,
    class_dependent_temperatures,
    dot_regression,
    label_aware_smoothing,
    ldam,
    logit_adjustment,
)

PerImageLoss = Callable[[Tensor, Tensor], Tensor]
CountSource = Literal["none", "batch", "train"]


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each image, (B,) in at least float32.

    Args:
        logits: (B, K).
        labels: (B,) integers in [0, K).
        label_smoothing: epsilon of (1 - epsilon) one-hot + epsilon / K.
    """
    check_setting("label_smoothing", label_smoothing, 0, 1)
    return F.cross_entropy(at_least_float32(logits), labels, reduction="none", label_smoothing=label_smoothing)


def mean_squared_error(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the K outputs of the squared distance to the one-hot label, (B,) in at least float32.

    This is the scale of the authors' code; the paper's Eq. 7, 1/(2n) ||Z - Y||^2, is K/2 times as large. Of two mixed
    labels the weighted sum exceeds the error to the soft label by a constant, so the gradients are the same.

    Args:
        logits: (B, K).
        labels: (B,) integers in [0, K).
        label_smoothing: epsilon of (1 - epsilon) one-hot + epsilon / K.
    """
    check_setting("label_smoothing", label_smoothing, 0, 1)
    logits, num_classes = at_least_float32(logits), logits.shape[1]
    targets = F.one_hot(labels, num_classes) * (1 - label_smoothing) + label_smoothing / num_classes
    return (logits - targets).square().mean(dim=1)


def focal(logits: Tensor, labels: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al. 2017) over the softmax: (1 - p_y)^gamma (-log p_y), (B,) in at least float32.

    With class weights it is w_y (1 - p_y)^gamma (-log p_y), the class-balanced focal loss when these are effective
    numbers. The code of LDAM-DRW raises the probability p_y to w_y first; its gamma is 1, that of Lin et al. 2. Not
    linear in the label: of two mixed labels the task sums both losses.

    Args:
        logits: (B, K).
        labels: (B,) integers in [0, K).
        gamma: >= 0; 0 is cross entropy.
    """
    return _focused(cross_entropy(logits, labels), gamma)


def sigmoid_focal(logits: Tensor, labels: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al. 2017) over K sigmoids, one class against the rest, summed: (B,) in at least float32.

    The base of the class-balanced loss of Cui et al. 2019, with gamma 0.5, 1 or 2 and effective-number weights. Start
    with a head bias of -log((1 - pi) / pi), pi = 0.01, or the sum over many classes drowns the first epochs.

    Args:
        logits: (B, K).
        labels: (B,) integers in [0, K).
        gamma: >= 0; 0 is binary cross entropy.
    """
    logits = at_least_float32(logits)
    targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return _focused(F.binary_cross_entropy_with_logits(logits, targets, reduction="none"), gamma).sum(dim=1)


def _focused(losses: Tensor, gamma: float) -> Tensor:
    check_setting("gamma", gamma, 0)
    # Where p rounds to 1 the power has an infinite slope for gamma < 1; the floor stops it and changes no digit.
    return (-torch.expm1(-losses)).clamp(min=torch.finfo(losses.dtype).eps) ** gamma * losses


SUPERVISED_LOSSES: dict[str, Callable[..., Tensor]] = {
    "ce": cross_entropy,
    "mse": mean_squared_error,
    "focal": focal,
    "sigmoid_focal": sigmoid_focal,
    "balanced_softmax": balanced_softmax,
    "logit_adjustment": logit_adjustment,
    "arb": arb,
    "ldam": ldam,
    "cdt": class_dependent_temperatures,
    "label_aware_smoothing": label_aware_smoothing,
    "dot_regression": dot_regression,
}
# Where class_counts may come from, the authors' choice first; "none" for losses that are not named.
COUNT_SOURCES: dict[str, tuple[CountSource, ...]] = {
    "balanced_softmax": ("train",),
    "logit_adjustment": ("train",),
    "arb": ("batch", "train"),
    "ldam": ("train",),
    "cdt": ("train",),
    "label_aware_smoothing": ("train",),
    "dot_regression": ("batch", "train", "none"),
}
# The head whose logits a loss is made for; "linear" for losses that are not named.
HEADS_OF_LOSSES: dict[str, str] = {"ldam": "cosine", "dot_regression": "etf"}


class SupervisedLoss(nn.Module):
    """One of `SUPERVISED_LOSSES` with its settings and its class counts, which follow the module to a device.

    Args:
        name: of the loss.
        class_counts: (K,) training images per class; needed where the counts are those of the training set.
        counts: class counts of the training set (`"train"`) or of the update (`"batch"`), where a loss leaves the
            choice (`COUNT_SOURCES`); None is its authors' choice.
        **settings: keyword arguments of the function behind the name.

    Raises:
        ValueError: for an unknown name or setting, a value out of range, and counts that are missing or no counts.
    """

    def __init__(
        self,
        name: str,
        class_counts: Sequence[int] | Tensor | None = None,
        *,
        counts: CountSource | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if name not in SUPERVISED_LOSSES:
            raise ValueError(f"`loss` must be one of {', '.join(SUPERVISED_LOSSES)}, got {name!r}.")
        self.name, self.function, self.settings = name, SUPERVISED_LOSSES[name], settings
        known = [p.name for p in inspect.signature(self.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        sources = COUNT_SOURCES.get(name, ("none",))
        self.counts = sources[0] if counts is None else counts
        for setting in settings:
            if setting not in known:
                raise ValueError(f"the loss {name!r} has no setting {setting!r}; it has {', '.join(known)}.")
        if self.counts not in sources:
            raise ValueError(f"`counts` of the loss {name!r} must be one of {', '.join(sources)}, got {counts!r}.")
        if self.counts == "train" and class_counts is None:
            raise ValueError(f"the loss {name!r} needs the number of training images per class: pass class_counts.")
        self.register_buffer(
            "class_counts", None if class_counts is None else _checked(class_counts), persistent=False
        )
        self._refuse_bad_values()

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return ", ".join([self.name, f"counts={self.counts}", *(f"{k}={v}" for k, v in self.settings.items())])

    def forward(self, logits: Tensor, labels: Tensor, update_counts: Tensor | None = None) -> Tensor:
        """Loss of each image, (B,) in at least float32.

        Args:
            logits: (B, K).
            labels: (B,) integers in [0, K).
            update_counts: (K,) images of each class in the update, times any factor; those of `labels` when None.
                Losses without `counts: batch` have no use for it.
        """
        if self.counts == "none":
            return self.function(logits, labels, **self.settings)
        class_counts = self.class_counts if self.counts == "train" else update_counts
        if class_counts is None:
            class_counts = torch.bincount(labels, minlength=logits.shape[1])
        return self.function(logits, labels, class_counts, **self.settings)

    def _refuse_bad_values(self) -> None:
        # One image tells before the first update what is out of range.
        self(torch.zeros(1, 2 if self.class_counts is None else len(self.class_counts)), torch.tensor([0]))


def _checked(class_counts: Sequence[int] | Tensor) -> Tensor:
    counts = torch.as_tensor(class_counts)
    if counts.ndim != 1 or not (counts >= 0).all() or not (counts > 0).any():
        raise ValueError(f"class_counts must be (K,) numbers of images, not all 0, got {counts.tolist()}.")
    return counts.cpu().clone()
