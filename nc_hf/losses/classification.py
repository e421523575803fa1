"""Supervised losses on logits, one value per image; the weighted mean over an update is taken by the task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nc_hf.choices import check_choice
from nc_hf.labels import label_counts
from nc_hf.losses import long_tail
from nc_hf.losses.precision import at_least_float32

CountsOf = Literal["batch", "train", "none"]


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each image.

    Args:
        logits: (B, K) floating point; computed in at least float32.
        labels: (B,) integers in [0, K).
        label_smoothing: epsilon of (1 - epsilon) one-hot + epsilon / K; 0.1 in Szegedy et al. 2016.

    Returns:
        (B,).

    Raises:
        ValueError: for an epsilon outside [0, 1].
    """
    _check_smoothing(label_smoothing)
    return F.cross_entropy(at_least_float32(logits), labels, reduction="none", label_smoothing=label_smoothing)


def mean_squared_error(
    logits: Tensor, labels: Tensor, *, target_scale: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """Mean over the K outputs of the squared distance to the one-hot label.

    This is the scale of the authors' code; the paper's Eq. 7, 1/(2n) ||Z - Y||^2, is K/2 times as large.

    Args:
        logits: (B, K) floating point; computed in at least float32.
        labels: (B,) integers in [0, K).
        target_scale: output that is wanted for the true class, above 0; 1 in the authors' code. A larger one helps
            where K is 100 or more, since the gradient shrinks with K.
        label_smoothing: epsilon of (1 - epsilon) one-hot + epsilon / K.

    Returns:
        (B,).

    Raises:
        ValueError: for a `target_scale` that is not above 0, or an epsilon outside [0, 1].
    """
    _check_smoothing(label_smoothing)
    if not target_scale > 0:
        raise ValueError(f"`target_scale` must be above 0, got {target_scale}. The authors take 1.")
    logits, num_classes = at_least_float32(logits), logits.shape[1]
    one_hot = F.one_hot(labels, num_classes).to(logits.dtype)
    targets = target_scale * (one_hot * (1 - label_smoothing) + label_smoothing / num_classes)
    return (logits - targets).square().mean(dim=1)


def focal(logits: Tensor, labels: Tensor, *, gamma: float = 1.0) -> Tensor:
    """(1 - p_y)^gamma times the cross entropy, p the softmax of the logits (Lin et al. 2017).

    Class weights multiply it afterwards. LDAM-DRW's code multiplies the cross entropy before it takes p_y = exp(-l),
    which then is no probability.

    Args:
        logits: (B, K) floating point; computed in at least float32.
        labels: (B,) integers in [0, K).
        gamma: at least 0; 1 in the code of LDAM-DRW, 2 in Lin et al.

    Returns:
        (B,).

    Raises:
        ValueError: for a negative `gamma`.
    """
    _check_gamma(gamma)
    log_probabilities = at_least_float32(logits).log_softmax(dim=1)
    loss = -log_probabilities.gather(1, labels[:, None])[:, 0]
    # log(1 - p_y) over the other classes stays finite, and so does its gradient, where p_y rounds to 1.
    others = log_probabilities.scatter(1, labels[:, None], -torch.inf)
    return (gamma * others.logsumexp(dim=1)).exp() * loss.clamp(min=0)


def focal_sigmoid(logits: Tensor, labels: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Focal loss of K yes-or-no questions, summed over them (Lin et al. 2017).

    With it the head's bias should start at -log((1 - q) / q), q = 0.01, else the K - 1 negatives rule at first.

    Args:
        logits: (B, K) floating point; computed in at least float32.
        labels: (B,) integers in [0, K).
        gamma: at least 0; 2 in Lin et al.

    Returns:
        (B,).

    Raises:
        ValueError: for a negative `gamma`.
    """
    _check_gamma(gamma)
    logits = at_least_float32(logits)
    signed = logits * (1 - 2 * F.one_hot(labels, logits.shape[1]).to(logits.dtype))
    return ((gamma * F.logsigmoid(signed)).exp() * F.softplus(signed)).sum(dim=1)


class LossEntry(NamedTuple):
    """A supervised loss, and the counts it may use, the default first."""

    function: Callable[..., Tensor]
    counts: tuple[CountsOf, ...] = ("none",)

    @property
    def settings(self) -> dict[str, Any]:
        """Names of the settings, with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


SUPERVISED_LOSSES: dict[str, LossEntry] = {
    "ce": LossEntry(cross_entropy),
    "mse": LossEntry(mean_squared_error),
    "focal": LossEntry(focal),
    "focal_sigmoid": LossEntry(focal_sigmoid),
    "balanced_softmax": LossEntry(long_tail.balanced_softmax, ("train", "batch")),
    "arb": LossEntry(long_tail.arb, ("batch", "train")),
    "ldam": LossEntry(long_tail.ldam, ("train",)),
    "logit_adjustment": LossEntry(long_tail.logit_adjustment, ("train",)),
    "label_aware_smoothing": LossEntry(long_tail.label_aware_smoothing, ("train",)),
    "dot_regression": LossEntry(long_tail.dot_regression, ("batch", "train", "none")),
    "cdt": LossEntry(long_tail.cdt, ("train",)),
    "lade": LossEntry(long_tail.lade, ("train",)),
}


class SupervisedLoss(nn.Module):
    """A supervised loss with its settings and class counts.

    Args:
        name: one of `SUPERVISED_LOSSES`.
        class_counts: (K,) training images per class, where known; only for a loss that uses them.
        counts: `"train"`: those; `"batch"`: of the update, and in eval mode all classes count alike, since the order
            of an evaluation says nothing; `"none"`; the default of the loss when None.
        **settings: of the loss, such as `gamma`; the others keep their defaults.

    Raises:
        ValueError: for an unknown loss, setting or kind of counts, a setting out of range, or counts that are missing
            or wrong.
    """

    def __init__(
        self,
        name: str = "ce",
        class_counts: Sequence[int] | None = None,
        *,
        counts: CountsOf | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        check_choice("loss", name, SUPERVISED_LOSSES)
        entry = SUPERVISED_LOSSES[name]
        if unknown := sorted(set(settings) - set(entry.settings)):
            known = ", ".join(entry.settings) or "none"
            raise ValueError(f"`loss: {name}` has no setting {', '.join(unknown)}. Its settings: {known}.")
        counts = entry.counts[0] if counts is None else counts
        if counts not in entry.counts:
            raise ValueError(
                f"`loss_counts` of `loss: {name}` must be one of {', '.join(entry.counts)}, got {counts!r}."
            )
        self.name, self.counts, self.settings = name, counts, {**entry.settings, **settings}
        # integers stay exact when a model is cast to bfloat16
        buffer = _checked_counts(name, class_counts) if counts == "train" else None
        self.register_buffer("class_counts", buffer, persistent=False)
        trial = torch.zeros(1, 2 if buffer is None else len(buffer))
        self(trial, torch.zeros(1, dtype=torch.long))  # a setting out of range is refused here

    def extra_repr(self) -> str:
        """Name and settings, for `print(model)`."""
        settings = "".join(f", {key}={value}" for key, value in self.settings.items())
        return f"{self.name!r}, counts={self.counts!r}{settings}"

    def forward(self, logits: Tensor, labels: Tensor, update_counts: Tensor | None = None) -> Tensor:
        """Loss of each image, (B,) in at least float32.

        Args:
            logits: (B, K) floating point.
            labels: (B,) integers in [0, K).
            update_counts: (K,) images of each class in the whole update, or any multiple of them, for
                `counts="batch"`; those of `labels` when None.
        """
        function = SUPERVISED_LOSSES[self.name].function
        if self.counts == "none":
            return function(logits, labels, **self.settings)
        if self.counts == "train":
            return function(logits, labels, self.class_counts, **self.settings)
        if not self.training:
            update_counts = torch.ones(logits.shape[1], device=logits.device)
        elif update_counts is None:
            update_counts = label_counts(labels, logits.shape[1])
        return function(logits, labels, update_counts, **self.settings)


def _checked_counts(name: str, class_counts: Sequence[int] | None) -> Tensor:
    if class_counts is None:
        raise ValueError(
            f"`loss: {name}` needs the number of training images per class, which the training set does not tell. "
            "Pass class_counts=[...] to NCTrainer."
        )
    counts = np.asarray(class_counts)
    if counts.ndim != 1 or not (counts == np.round(counts)).all() or (counts < 0).any() or not counts.any():
        raise ValueError(f"class counts must be (K,) whole numbers, not all 0, got {counts.tolist()[:10]}.")
    return torch.as_tensor(counts.astype(np.int64))


def _check_smoothing(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"`label_smoothing` must lie in [0, 1], got {value}. Szegedy et al. take 0.1.")


def _check_gamma(value: float) -> None:
    if not value >= 0:
        raise ValueError(f"`gamma` of a focal loss must be at least 0, got {value}. Lin et al. take 2.")
