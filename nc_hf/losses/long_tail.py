"""Supervised losses that know how many images each class has, one value per image.

A class without any image is no longer an option where the counts act as a prior (it leaves the denominator), and is
treated like the rarest class elsewhere, so a count of 0 makes no loss and no gradient infinite.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nc_hf.labels import label_counts
from nc_hf.losses.precision import at_least_float32

SmoothingForm = Literal["concave", "linear", "convex", "exp"]


def balanced_softmax(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Cross entropy of z + log n_k (Ren et al. 2020). Predict with z alone.

    It replaces a class-balanced sampler: with both, classes are balanced twice.

    Args:
        logits: (B, K) floating point; computed in at least float32.
        labels: (B,) integers in [0, K).
        counts: (K,) images of each class; any multiple of them gives the same loss. A class of 0 images leaves the
            denominator.

    Returns:
        (B,).
    """
    return logit_adjustment(logits, labels, counts)


def logit_adjustment(logits: Tensor, labels: Tensor, counts: Tensor, *, tau: float = 1.0) -> Tensor:
    """Cross entropy of z + tau log pi_k, pi_k = n_k / N (Menon et al. 2021). Predict with z alone.

    Use it, or `nc_hf.heads.logit_adjusted` after training, never both. The authors of the paper add 1e-12 inside the
    logarithm, which matters only where pi_k^tau is as small.

    Args:
        logits: (B, K) floating point; computed in at least float32.
        labels: (B,) integers in [0, K).
        counts: (K,) images of each class; one of 0 images leaves the denominator.
        tau: strength, at least 0; 1 is Menon et al.'s, consistent for the balanced error.

    Returns:
        (B,), finite also for a label without images, which counts as one image.

    Raises:
        ValueError: for a negative `tau`.
    """
    _check_at_least_0("tau", tau)
    logits = at_least_float32(logits)
    shift = torch.where(counts > 0, tau * counts.to(logits.dtype).log(), -math.inf)
    own_and_absent = _is_own(logits, labels) & (counts == 0)
    return F.cross_entropy(logits + torch.where(own_and_absent, 0.0, shift), labels, reduction="none")


def arb(logits: Tensor, labels: Tensor, counts: Tensor, *, clamp: float = 30.0) -> Tensor:
    """Attraction-repulsion-balanced loss, -log(e^z_y / sum_k (n_k / n_y) e^z_k) (Xie et al. 2023).

    It is `balanced_softmax` with the same counts, on clamped logits. The authors count the batch in their CIFAR
    configurations and the training set in the large ones.

    Args:
        logits: (B, K) floating point; computed in at least float32.
        labels: (B,) integers in [0, K).
        counts: (K,) images of each class; one of 0 images leaves the denominator.
        clamp: bound of |z|, above 0; 30 in the authors' code. Logits beyond it get no gradient.

    Returns:
        (B,).

    Raises:
        ValueError: for a `clamp` that is not above 0.
    """
    if not clamp > 0:
        raise ValueError(f"`clamp` must be above 0, got {clamp}. The authors take 30.")
    return balanced_softmax(at_least_float32(logits).clamp(-clamp, clamp), labels, counts)


def ldam(logits: Tensor, labels: Tensor, counts: Tensor, *, max_margin: float = 0.5, scale: float = 30.0) -> Tensor:
    """Label-distribution-aware margin loss: cross entropy after z_y - s m_y, m_k ~ n_k^(-1/4) (Cao et al. 2019).

    The logits are s cos(h, w_k), already scaled, as a `CosineHead` of the same scale gives them; on a linear head the
    loss diverges. The authors' form, cross entropy of s (cos - m), is the same.

    Args:
        logits: (B, K) floating point; computed in at least float32.
        labels: (B,) integers in [0, K).
        counts: (K,) images of each class.
        max_margin: margin of the rarest class, a difference of cosines; 0.5 in the authors' code.
        scale: s of the head; 30 in the authors' code.

    Returns:
        (B,).

    Raises:
        ValueError: for a negative `max_margin`, or a `scale` that is not above 0.
    """
    _check_at_least_0("max_margin", max_margin)
    if not scale > 0:
        raise ValueError(f"`scale` must be above 0, got {scale}. The authors take 30, as does CosineHead.")
    logits = at_least_float32(logits)
    margins = ldam_margins(counts.to(logits.dtype), max_margin)
    shifted = torch.where(_is_own(logits, labels), logits - scale * margins, logits)
    return F.cross_entropy(shifted, labels, reduction="none")


def ldam_margins(counts: Tensor, max_margin: float = 0.5) -> Tensor:
    """The margins of `ldam`, (K,): C n_k^(-1/4), with C such that the largest is `max_margin`."""
    counts = _like_the_rarest(counts)
    return max_margin * (counts.min() / counts) ** 0.25


def label_aware_smoothing(
    logits: Tensor,
    labels: Tensor,
    counts: Tensor,
    *,
    head: float = 0.3,
    tail: float = 0.0,
    form: SmoothingForm = "concave",
    power: float | None = None,
) -> Tensor:
    """Label smoothing by an amount that grows with the class's count, of stage two of MiSLAS (Zhong et al. 2021).

    The true class keeps 1 - eps_y + eps_y / K, as in the authors' code; the paper prints 1 - eps_y.

    Args:
        logits: (B, K) floating point; computed in at least float32.
        labels: (B,) integers in [0, K).
        counts: (K,) images of each class.
        head: eps of the most frequent class; the authors take 0.3 on CIFAR-10-LT (r = 100), ImageNet-LT and
            iNaturalist, 0.4 on CIFAR-100-LT (r = 100) and Places-LT.
        tail: eps of the rarest class; 0.0 and 0.1 there.
        form: of the way between; the authors' runs have `"concave"`.
        power: of the form `"exp"`, tail + (head - tail) t^power.

    Returns:
        (B,).

    Raises:
        ValueError: for an eps outside [0, 1], an unknown form, or `"exp"` without a power above 0.
    """
    logits = at_least_float32(logits)
    by_class = smoothing_by_count(counts.to(logits.dtype), head=head, tail=tail, form=form, power=power)
    smoothing = by_class[labels]
    log_probabilities = logits.log_softmax(dim=1)
    own = log_probabilities.gather(1, labels[:, None])[:, 0]
    return -(1 - smoothing) * own - smoothing * log_probabilities.mean(dim=1)


def smoothing_by_count(
    counts: Tensor,
    *,
    head: float = 0.3,
    tail: float = 0.0,
    form: SmoothingForm = "concave",
    power: float | None = None,
) -> Tensor:
    """eps_k of `label_aware_smoothing`, (K,), with its arguments; `head` for all where all counts are equal."""
    for name, value in (("head", head), ("tail", tail)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` of label-aware smoothing must lie in [0, 1], got {value}.")
    if form == "exp" and not (power is not None and power > 0):
        raise ValueError(f"`form: exp` needs a `power` above 0, got {power}.")
    counts = _like_the_rarest(counts)
    spread = counts.max() - counts.min()
    t = torch.where(spread > 0, (counts - counts.min()) / spread.clamp(min=1e-12), 1.0)
    if form == "concave":
        return tail + (head - tail) * torch.sin(math.pi / 2 * t)
    if form == "linear":
        return tail + (head - tail) * t
    if form == "convex":
        return head + (head - tail) * torch.sin(3 * math.pi / 2 + math.pi / 2 * t)
    if form == "exp":
        return tail + (head - tail) * t**power
    raise ValueError(f"`form` must be one of {', '.join(SmoothingForm.__args__)}, got {form!r}.")


def cdt(logits: Tensor, labels: Tensor, counts: Tensor, *, gamma: float = 0.3) -> Tensor:
    """Cross entropy of z_k / a_k, a_k = (n_max / n_k)^gamma (class-dependent temperatures, Ye et al. 2020).

    Predict with z alone.

    Args:
        logits: (B, K) floating point; computed in at least float32.
        labels: (B,) integers in [0, K).
        counts: (K,) images of each class.
        gamma: at least 0. Choose it on a validation split: the best value depends on the imbalance, and lies between
            0.1 and 0.4 for CIFAR-LT.

    Returns:
        (B,).

    Raises:
        ValueError: for a negative `gamma`.
    """
    _check_at_least_0("gamma", gamma)
    logits = at_least_float32(logits)
    counts = _like_the_rarest(counts.to(logits.dtype))
    return F.cross_entropy(logits / (counts.max() / counts) ** gamma, labels, reduction="none")


def lade(logits: Tensor, labels: Tensor, counts: Tensor, *, weight: float = 0.1, remine_lambda: float = 0.1) -> Tensor:
    """Balanced softmax plus a bound that frees the logits of the training prior (LADE, Hong et al. 2021).

    The second part is one number for the batch: minus the mean over the prior, sum_k pi_k, of

        mean_{i: y_i = k} z_ik - R_k - lambda R_k^2,    R_k = log mean_i exp(z_ik - log(K pi_k)).

    It is added to each image, so the mean over images is the authors' loss. A class absent from the batch has no
    first part. The batch is that of one process before accumulation: the second part of a larger one is not the mean
    of those of its parts.

    Args:
        logits: (B, K) floating point; computed in at least float32.
        labels: (B,) integers in [0, K).
        counts: (K,) training images of each class, N pi_k; one of 0 images takes no part.
        weight: of the second part; 0.1 in the authors' code.
        remine_lambda: lambda; 0.1 in the authors' code.

    Returns:
        (B,).

    Raises:
        ValueError: for a negative `weight` or `remine_lambda`.
    """
    _check_at_least_0("weight", weight)
    _check_at_least_0("remine_lambda", remine_lambda)
    logits = at_least_float32(logits)
    prior = counts.to(logits.dtype) / counts.sum()
    safe_prior = torch.where(counts > 0, prior, 1.0)
    in_batch = label_counts(labels, logits.shape[1])
    own_means = torch.where(_is_own(logits, labels), logits, 0.0).sum(dim=0) / in_batch.clamp(min=1)
    log_ratios = logits - (len(counts) * safe_prior).log()
    log_means = log_ratios.logsumexp(dim=0) - math.log(max(len(labels), 1))
    bound = own_means - log_means - remine_lambda * log_means.square()
    return balanced_softmax(logits, labels, counts) - weight * (prior * bound).sum()


def dot_regression(
    logits: Tensor,
    labels: Tensor,
    counts: Tensor | None = None,
    feature_norms: Tensor | None = None,
    norm_penalty: float = 0.0,
) -> Tensor:
    """(h m_y - ||m_y|| ||h||)^2 / (2 ||h||), for a fixed simplex head (dot regression, Yang et al. 2022).

    It pulls each feature to its class's direction and has no term that pushes from the others. The target directions
    are E_k m_k with the lengths of `class_lengths`, where the rows m_k of the head have length 1.

    Args:
        logits: (B, K) h m_k of an `ETFHead`, floating point; computed in at least float32.
        labels: (B,) integers in [0, K).
        counts: (K,) images of each class in the batch, as the authors' CIFAR configurations, or in the training set;
            all lengths are 1 when None.
        feature_norms: (B,) ||h||, for a head that does not normalize features; 1 when None.
        norm_penalty: factor of ||h||, added; 0.01 in the authors' ImageNet configuration.

    Returns:
        (B,).

    Raises:
        ValueError: for a negative `norm_penalty`.
    """
    _check_at_least_0("norm_penalty", norm_penalty)
    logits = at_least_float32(logits)
    norms = logits.new_ones(len(logits)) if feature_norms is None else feature_norms.to(logits.dtype)
    fixed_norms = norms.detach().clamp(min=1e-8)
    own = logits.gather(1, labels[:, None])[:, 0]
    loss = (own - fixed_norms).square() / (2 * fixed_norms)
    if counts is not None:
        loss = class_lengths(counts.to(logits.dtype))[labels].square() * loss
    return loss + norm_penalty * norms


def class_lengths(counts: Tensor) -> Tensor:
    """E_k of `dot_regression`, (K,): sqrt(mean count of the present classes / n_k), and 1 for absent ones."""
    counts = at_least_float32(counts)
    present = counts > 0
    mean = counts.sum() / present.sum().clamp(min=1)
    return torch.where(present, (mean / torch.where(present, counts, 1.0)).sqrt(), 1.0)


def _like_the_rarest(counts: Tensor) -> Tensor:
    """Counts (K,) in floating point, where a class without images has as many as the rarest one with some."""
    counts = at_least_float32(counts)
    rarest = torch.where(counts > 0, counts, math.inf).min()
    return torch.where(counts > 0, counts, rarest)


def _is_own(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K) bool: the place of each image's label."""
    return torch.arange(logits.shape[1], device=logits.device) == labels[:, None]


def _check_at_least_0(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"`{name}` must be at least 0, got {value}.")
