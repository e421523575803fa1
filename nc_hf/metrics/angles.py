"""Angles between class means, and the best that any arrangement can reach."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 512  # rows of the K x K matrices held at a time


def pairwise_angles(centers: Tensor, *, centered: bool = True) -> Tensor:
    """Angles between the rows, seen from their mean: what Figure 2 of the paper shows.

    Args:
        centers: (K, P).
        centered: subtract the mean of the rows first; False for the rows of a head.

    Returns:
        (K, K) float64, degrees, 0 on the diagonal; NaN where a row coincides with the mean and has no direction.
    """
    centers = centers.double()
    if centered:
        centers = centers - centers.mean(dim=0)
    directions = centers / centers.norm(dim=1, keepdim=True)
    angles = (directions @ directions.T).clamp(-1, 1).arccos().rad2deg()
    return angles.fill_diagonal_(0)


def best_angle(num_classes: int, feature_dim: int) -> tuple[float, bool]:
    """The largest smallest angle between K centered directions in P dimensions, degrees.

    For K <= P + 1 it is that of the simplex, arccos(-1 / (K - 1)); for K <= 2 P it is 90 degrees (Rankin 1955); for
    more classes 90 degrees is an upper bound which nothing reaches.

    Args:
        num_classes: K >= 2.
        feature_dim: P.

    Returns:
        The angle, and whether it can be reached.
    """
    if num_classes <= feature_dim + 1:
        return math.degrees(math.acos(-1 / (num_classes - 1))), True
    return 90.0, num_classes <= 2 * feature_dim


def angle_statistics(centered_means: Tensor) -> dict[str, float]:
    """Equiangularity over all pairs of K >= 2 centered class means, in K x ROWS memory.

    Args:
        centered_means: (K, P) float64 with mean zero.

    Returns:
        `nc2_equiangularity`, the standard deviation of the cosines; `nc2_coherence`, the mean of |cos + 1 / (K - 1)|;
        `nc2_min_angle` and `nc2_mean_angle`, degrees; `nc2_best_angle` from `best_angle`, called
        `nc2_best_angle_bound` where it cannot be reached; `nc2_angle_gap`, that minus the smallest.
    """
    num_classes, feature_dim = centered_means.shape
    directions = centered_means / centered_means.norm(dim=1, keepdim=True)
    sums, smallest = directions.new_zeros(4), directions.new_tensor(math.inf)
    for rows, later in pair_blocks(num_classes, directions.device):
        cosines = (directions[rows] @ directions[rows.start :].T)[later].clamp(-1, 1)
        # Deviations from the simplex, since sums of squares of nearly equal cosines would cancel.
        deviations, angles = cosines + 1 / (num_classes - 1), cosines.arccos().rad2deg()
        sums += torch.stack([deviations.sum(), deviations.square().sum(), deviations.abs().sum(), angles.sum()])
        smallest = torch.minimum(smallest, angles.min())  # keeps NaN, unlike min()
    mean, square, absolute, mean_angle = (sums / (num_classes * (num_classes - 1) / 2)).tolist()
    best, reachable = best_angle(num_classes, feature_dim)
    smallest = smallest.item()
    return {
        "nc2_equiangularity": math.sqrt(max(square - mean**2, 0)),
        "nc2_coherence": absolute,
        "nc2_min_angle": smallest,
        "nc2_mean_angle": mean_angle,
        "nc2_best_angle" if reachable else "nc2_best_angle_bound": best,
        "nc2_angle_gap": best - smallest,
    }


def pair_blocks(num_classes: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """All pairs k < j of K >= 2 classes, by blocks of rows of the K x K matrix.

    Args:
        num_classes: K.
        device: of the masks.

    Yields:
        A slice of at most ROWS rows k, and the mask of their pairs with the columns j from its start on.
    """
    classes = torch.arange(num_classes, device=device)
    for start in range(0, num_classes - 1, ROWS):
        rows = slice(start, start + ROWS)
        yield rows, classes[start:] > classes[rows, None]
