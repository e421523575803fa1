"""Losses of each image that know how many images the classes have.

All take logits (B, K), labels (B,) integers in [0, K) and class_counts (K,), compute in at least float32, and return
(B,). A class without images adds no loss and gets no infinity: in a prior it counts as 1e-30, elsewhere as the rarest
class that has images. Predict with the plain logits; the counts are a matter of training.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SmoothingShape = Literal["concave", "linear", "convex", "exp"]


def logit_adjustment(
    logits: Tensor, labels: Tensor, class_counts: Tensor, *, tau: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """Logit adjustment in training (Menon et al. 2021): CE(z + tau log pi, y) with pi_k = n_k / N.

    The counts are those of the images that are drawn: under class-balanced sampling there is nothing to adjust. It
    replaces the adjustment of a trained head, `nc_hf.heads.logit_adjusted`. The authors add 1e-12 to pi^tau, which
    shows only where pi^tau is below 1e-9; their tau is 1.

    Args:
        logits: (B, K).
        labels: (B,).
        class_counts: (K,).
        tau: >= 0; 0 is cross entropy, 1 is consistent for the balanced error.
        label_smoothing: as in `cross_entropy`.
    """
    check_setting("tau", tau, 0)
    check_setting("label_smoothing", label_smoothing, 0, 1)
    logits = at_least_float32(logits)
    counts = class_counts.to(logits)
    log_prior = (counts / counts.sum()).clamp(min=1e-30).log()
    return F.cross_entropy(logits + tau * log_prior, labels, reduction="none", label_smoothing=label_smoothing)


def balanced_softmax(logits: Tensor, labels: Tensor, class_counts: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Balanced softmax (Ren et al. 2020): CE(z + log n_k, y), which is logit adjustment with tau 1.

    Args:
        logits: (B, K).
        labels: (B,).
        class_counts: (K,) of the images that are drawn; their common factor does not matter.
        label_smoothing: as in `cross_entropy`.
    """
    return logit_adjustment(logits, labels, class_counts, label_smoothing=label_smoothing)


def arb(logits: Tensor, labels: Tensor, class_counts: Tensor, *, clamp: float = 30.0) -> Tensor:
    """ARB-Loss (Xie et al. 2023): -log(exp z_y / sum_k (n_k / n_y) exp z_k), as its authors released it.

    This equals balanced softmax with the same counts, but for the clamp: logits beyond it get no gradient. The
    authors take the counts of the batch for CIFAR, of the training set for large sets.

    Args:
        logits: (B, K).
        labels: (B,).
        class_counts: (K,).
        clamp: of the logits, the authors' 30.
    """
    check_setting("clamp", clamp, 0)
    return balanced_softmax(at_least_float32(logits).clamp(-clamp, clamp), labels, class_counts)


def ldam(
    logits: Tensor, labels: Tensor, class_counts: Tensor, *, max_margin: float = 0.5, scale: float = 30.0
) -> Tensor:
    """LDAM (Cao et al. 2019): CE(s (z - m_y e_y), y) with margins m_k proportional to n_k^(-1/4), of which max m.

    Needs cosines as logits: with a plain linear head it diverges. For a head that multiplies by s itself, as RIDE's,
    take `scale=1, max_margin=s * max m`. Mixed labels each bring their own margin: the loss is not that of the soft
    label. Defaults: the authors' code.

    Args:
        logits: (B, K) cosines.
        labels: (B,).
        class_counts: (K,).
        max_margin: margin of the rarest class.
        scale: s.
    """
    check_setting("max_margin", max_margin, 0)
    check_setting("scale", scale, 0)
    logits = at_least_float32(logits)
    counts = _none_rarer(class_counts.to(logits))
    margins = max_margin * (counts.amin() / counts) ** 0.25
    return F.cross_entropy(scale * (logits - F.one_hot(labels, len(counts)) * margins), labels, reduction="none")


def class_dependent_temperatures(
    logits: Tensor, labels: Tensor, class_counts: Tensor, *, gamma: float = 0.3
) -> Tensor:
    """CDT (Ye et al. 2020): CE(z_k / a_k, y) with a_k = (n_max / n_k)^gamma.

    Args:
        logits: (B, K).
        labels: (B,).
        class_counts: (K,).
        gamma: >= 0; 0 is cross entropy. Values in use lie between 0.1 and 0.4; choose on a validation split.
    """
    check_setting("gamma", gamma, 0)
    logits = at_least_float32(logits)
    counts = _none_rarer(class_counts.to(logits))
    return F.cross_entropy(logits * (counts / counts.amax()) ** gamma, labels, reduction="none")


def label_aware_smoothing(
    logits: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    *,
    smooth_head: float = 0.3,
    smooth_tail: float = 0.0,
    shape: SmoothingShape = "concave",
    power: float = 2.0,
) -> Tensor:
    """Label-aware smoothing (MiSLAS, Zhong et al. 2021): label smoothing whose epsilon grows with the class.

    (1 - eps_y) (-log p_y) + eps_y mean_k (-log p_k), as the authors' code: the true class keeps 1 - eps + eps / K,
    where their paper has 1 - eps. eps rises from tail to head with t = (n_k - n_min) / (n_max - n_min), which is 0
    where all counts are equal. Their settings (head, tail): CIFAR-10-LT .3, 0 at ratio 100, .2, 0 at 50, .1, 0 at 10;
    CIFAR-100-LT .4, .1, then .3, 0 and .2, 0; ImageNet-LT and iNaturalist .3, 0; Places-LT .4, .1.

    Args:
        logits: (B, K).
        labels: (B,).
        class_counts: (K,).
        smooth_head: eps of the largest class.
        smooth_tail: eps of the smallest class.
        shape: of the rise: sin(pi t / 2), t, 1 - cos(pi t / 2) or t^power.
        power: of the shape `"exp"`.

    Raises:
        ValueError: for an unknown shape, or smoothing outside [0, 1].
    """
    check_setting("smooth_head", smooth_head, 0, 1)
    check_setting("smooth_tail", smooth_tail, 0, 1)
    check_setting("power", power, 0)
    logits = at_least_float32(logits)
    counts = _none_rarer(class_counts.to(logits))
    smallest, largest = counts.aminmax()
    t = (counts - smallest) / torch.where(largest > smallest, largest - smallest, 1)
    if shape == "concave":
        rise = (math.pi / 2 * t).sin()
    elif shape == "linear":
        rise = t
    elif shape == "convex":
        rise = 1 - (math.pi / 2 * t).cos()
    elif shape == "exp":
        rise = t**power
    else:
        raise ValueError(f"`shape` must be one of concave, linear, convex, exp, got {shape!r}.")
    smoothing = (smooth_tail + (smooth_head - smooth_tail) * rise)[labels]
    log_p = logits.log_softmax(dim=1)
    return (smoothing - 1) * log_p[torch.arange(len(labels)), labels] - smoothing * log_p.mean(dim=1)


def dot_regression(
    logits: Tensor,
    labels: Tensor,
    class_counts: Tensor | None = None,
    feature_norms: Tensor | None = None,
    *,
    norm_weight: float = 0.0,
) -> Tensor:
    """Dot regression on a fixed ETF (Yang et al. 2022): E_y^2 (z_y - ||h||)^2 / (2 ||h||) with z_k = h m_k, ||m_k|| = 1.

    Scaling the columns to lengths E_k (`class_lengths`) is the weight E_y^2 and nothing else. No other logit of the
    image takes part, and the loss is not linear in the label; the authors mix the losses of both labels, as we do.

    Args:
        logits: (B, K) scalar products with the unit columns of the ETF.
        labels: (B,).
        class_counts: (K,) behind the lengths; those of the batch in the authors' code. None: all lengths are 1.
        feature_norms: (B,) norms ||h||, through which only the next term has a gradient; None: unit features.
        norm_weight: of ||h||, added to the loss. The authors take 0.01 for ImageNet, where features are not unit.
    """
    check_setting("norm_weight", norm_weight, 0)
    logits = at_least_float32(logits)
    norms = logits.new_ones(len(labels)) if feature_norms is None else at_least_float32(feature_norms)
    lengths = norms.detach().clamp(min=1e-8)
    loss = (logits[torch.arange(len(labels)), labels] - lengths).square() / (2 * lengths)
    if class_counts is not None:
        loss = loss * class_lengths(class_counts).to(logits)[labels].square()
    return loss + norm_weight * norms


def class_lengths(class_counts: Tensor) -> Tensor:
    """Lengths E_k of the columns of an ETF under dot regression, sqrt(mean count / n_k); 1 for a class without images.

    Args:
        class_counts: (K,) of a batch or of the training set; the mean is over classes with images.

    Returns:
        (K,) in at least float32.
    """
    counts = at_least_float32(class_counts)
    present = counts > 0
    return torch.where(present, counts.sum() / present.sum() / counts.where(present, 1), 1).sqrt()


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float64 if it is, else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_setting(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuse a setting of a loss outside [low, high], or one that is no number."""
    if not (isinstance(value, int | float) and low <= value <= high and math.isfinite(value)):
        raise ValueError(
            f"`{name}` must be a number of at least {low}{f' and at most {high}' * (high < math.inf)}, got {value!r}."
        )


def _none_rarer(counts: Tensor) -> Tensor:
    return counts.where(counts > 0, counts.where(counts > 0, torch.inf).amin())
