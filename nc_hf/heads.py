"""Linear heads that are computed and not trained: tau-normalisation, nearest class mean, least squares, adjustment.

All are affine, so each folds into the weight and bias of a network's last layer, and its folder opens everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MARGIN = 1e3  # between the logit of a class that must never be predicted and another's

Batches = Iterable[tuple[Tensor, ...]]


class LinearHead(NamedTuple):
    """`features @ weight.T + bias`: weight (K, P) and bias (K,)."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, K) of features (B, P)."""
        return features @ self.weight.T + self.bias


def tau_normalized(weight: Tensor, tau: float) -> LinearHead:
    """Weights divided by their norm to the power of tau, and no bias (Kang et al. 2020).

    Args:
        weight: (K, P) of a trained head.
        tau: 0 leaves the weights as they are, 1 makes all norms equal. Choose it on a validation split.
    """
    norms = weight.norm(dim=1, keepdim=True)
    return LinearHead(weight / norms.clamp(min=1e-12) ** tau, weight.new_zeros(len(weight)))


def nearest_class_mean(means: Tensor, counts: Tensor) -> LinearHead:
    """The head that predicts the class of the nearest mean: h mu_k - ||mu_k||^2 / 2.

    Args:
        means: (K, P) class means of the training features.
        counts: (K,) images behind each; a class without any is never predicted.
    """
    bias = -means.square().sum(dim=1) / 2
    return _of_present(LinearHead(means, bias), counts)


def logit_adjusted(head: LinearHead, class_counts: Sequence[int], tau: float = 1.0) -> LinearHead:
    """Logits minus tau log prior, after training (Menon et al. 2021).

    Args:
        head: trained on data with these class counts, without re-balancing.
        class_counts: (K,) training images; a class without any is never predicted.
        tau: strength; 1 is consistent for the balanced error. Choose another one on a validation split.
    """
    counts = torch.as_tensor(class_counts, dtype=head.bias.dtype, device=head.bias.device)
    bias = head.bias - tau * (counts / counts.sum()).clamp(min=1e-30).log()
    return _of_present(LinearHead(head.weight, bias), counts)


def least_squares(
    batches: Batches, means: Tensor, counts: Tensor, *, balanced: bool = True, ridge: float = 0.0
) -> LinearHead:
    """The head of least squared error to one-hot labels on fixed features, in closed form.

    With `balanced` every class weighs alike, as under class-balanced sampling (Eq. 19); else every image does (Eqs. 8
    and 9), and frequent classes get larger weights.

    Args:
        batches: of training features (B, P) and labels (B,); further elements are ignored.
        means: (K, P) class means of the same features.
        counts: (K,) images of each class; those of a class without any are never predicted.
        balanced: see above.
        ridge: added to the eigenvalues of the scatter, relative to their mean.
    """
    means, counts = means.double(), counts.to(means.device)
    present = counts > 0
    weights = present.double() if balanced else counts.double()
    per_image = weights / counts.clamp(min=1)
    scatter = means.new_zeros(means.shape[1], means.shape[1])
    for features, labels, *_ in batches:
        deviations = features.to(means) - means[labels]
        scatter += (deviations * per_image[labels, None]).T @ deviations
    grand = (weights[:, None] * means).sum(dim=0) / weights.sum()
    centered = torch.where(present[:, None], means - grand, 0.0)
    scatter += (weights[:, None] * centered).T @ centered
    scatter += (
        ridge * scatter.trace() / len(scatter) * torch.eye(len(scatter), dtype=scatter.dtype, device=means.device)
    )
    weight = (weights[:, None] * centered) @ torch.linalg.pinv(scatter, hermitian=True)
    bias = weights / weights.sum() - weight @ grand
    return _of_present(LinearHead(weight, bias), counts)


def _of_present(head: LinearHead, counts: Tensor) -> LinearHead:
    """The head with each class without images always below the first one with some, however long features are."""
    present = counts.to(head.weight.device) > 0
    weight, bias = (rows[present.int().argmax()] for rows in head)
    below = bias - MARGIN - bias.abs()  # in any precision
    return LinearHead(torch.where(present[:, None], head.weight, weight), torch.where(present, head.bias, below))


def choose(
    values: Sequence[float], make: Callable[[float], LinearHead], features: Tensor, labels: Tensor, num_classes: int
) -> tuple[float, LinearHead]:
    """The setting of a head with the best class-mean accuracy on a validation split; the first of equals.

    Args:
        values: candidates, such as tau from 0 to 2.
        make: the head of a candidate.
        features: (N, P) of the validation split, never of the test split.
        labels: (N,).
        num_classes: K.

    Raises:
        ValueError: for a validation split without images.
    """
    if len(labels) == 0:
        raise ValueError("there is no image to choose on. Hold out a validation split (data.validation_fraction).")
    totals = torch.bincount(labels, minlength=num_classes)
    best, best_score = None, -1.0
    for value in values:
        head = make(value)
        right = head.logits(features.to(head.weight)).argmax(dim=1) == labels
        hits = torch.bincount(labels, weights=right.double(), minlength=num_classes)
        score = (hits / totals)[totals > 0].mean().item()
        if score > best_score:
            best, best_score = (value, head), score
    return best


def simplex_directions(num_classes: int, feature_dim: int, seed: int = 0) -> Tensor:
    """M^T, (K, P) float64, with M^T M = K/(K-1) (I - 11^T / K) (Definition 1 of the paper) in a random rotation.

    Args:
        num_classes: K, at least 2.
        feature_dim: P, at least K - 1.
        seed: of the rotation.

    Raises:
        ValueError: where there is no such simplex.
    """
    if num_classes < 2 or feature_dim < num_classes - 1:
        raise ValueError(
            f"there is no simplex of {num_classes} directions in {feature_dim} dimensions: it takes 2 or more classes "
            f"and features at least {num_classes - 1} wide. Take a wider network, or a linear or cosine head."
        )
    ones_first = torch.eye(num_classes, dtype=torch.float64)
    ones_first[:, 0] = 1
    across_ones = torch.linalg.qr(ones_first)[0][:, 1:]  # (K, K - 1), orthonormal and orthogonal to the ones
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(feature_dim, num_classes - 1, dtype=torch.float64, generator=generator)
    basis, _ = torch.linalg.qr(drawn)
    return (num_classes / (num_classes - 1)) ** 0.5 * across_ones @ basis.T
