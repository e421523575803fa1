"""Angles between each centered class center and its nearest other one, in little memory and with a gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 256  # rows of the cosine matrix held at a time
RELATIVE_FLOOR = 1e-6  # a centered mean this much shorter than the longest has no direction
SMALLEST_CHORD = 1e-12


class NearestAngles(torch.autograd.Function):
    """Angle between each centered row and its nearest other one, (K,) radians, in O(K P) memory.

    Absent rows have the angle 0, and so has a row that is alone. Two rows always lie opposite each other: no gradient.
    Few kernels matter here: the terms of a small network on a GPU cost the time to start theirs.
    """

    @staticmethod
    def forward(ctx, centers: Tensor, present: Tensor, count: Tensor) -> Tensor:
        """Angles (K,) of centers (K, P), of which those present (K,) bool, `count` in number or 1, take part."""
        weights = present.to(centers.dtype)
        unit, norms = _unit_rows(centers, weights, count)
        nearest = _nearest_rows(unit, present)
        chords = unit.new_empty(2, len(unit))
        for rows in _row_slices(unit):
            a, b = unit[rows], unit[nearest[rows]]
            torch.linalg.vector_norm(a - b, dim=1, out=chords[0, rows])
            torch.linalg.vector_norm(a + b, dim=1, out=chords[1, rows])
        ctx.save_for_backward(unit, norms, weights, count, nearest, chords)
        return torch.atan2(*chords).mul_(2 * weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_angles: Tensor) -> tuple[Tensor, None, None]:
        """Gradient to the centers (K, P), block by block of rows.

        With s = ||a - b|| and p = ||a + b|| of unit vectors, s^2 + p^2 = 4 and d angle = (p ds - s dp) / 2. An absent
        row, and one without direction, is zero: what it gives its nearest one cancels, and its norm is infinite.
        """
        unit, norms, weights, count, nearest, chords = ctx.saved_tensors
        half = grad_angles * (count > 2) / 2
        # A zero chord has no direction, hence no gradient: whatever it is multiplied by.
        apart, together = half * chords.flip(0) / chords.clamp(min=SMALLEST_CHORD)
        grad = torch.zeros_like(unit)
        for rows in _row_slices(unit):
            a, b = unit[rows], unit[nearest[rows]]
            difference = (a - b).mul_(apart[rows, None])
            total = (a + b).mul_(together[rows, None])
            grad[rows].add_(difference).sub_(total)
            grad.index_add_(0, nearest[rows], difference.add_(total), alpha=-1)
        for rows in _row_slices(unit):  # through the normalisation, a few rows at a time
            radial = (grad[rows] * unit[rows]).sum(dim=1, keepdim=True)
            grad[rows].addcmul_(radial, unit[rows], value=-1).div_(norms[rows, None])
        mean = grad.sum(dim=0).div_(count)
        return grad.addcmul_(weights[:, None], mean, value=-1), None, None


def _unit_rows(centers: Tensor, weights: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Rows minus the mean of the present ones at unit length, and their norms: infinite for one without direction.

    Args:
        centers: (K, P).
        weights: (K,) 1 of present rows, 0 of others.
        count: of present rows, at least 1.
    """
    mean = weights @ centers / count
    centered = (centers - mean) * weights[:, None]
    norms = centered.norm(dim=1)
    norms = norms.masked_fill(~(norms > RELATIVE_FLOOR * norms.max()), torch.inf)
    return (centered / norms[:, None] if torch.is_grad_enabled() else centered.div_(norms[:, None])), norms


def _nearest_rows(unit: Tensor, present: Tensor) -> Tensor:
    """Index of the other present row with the largest cosine, (K,)."""
    nearest, absent = torch.empty(len(unit), dtype=torch.long, device=unit.device), ~present
    block = unit.new_empty(min(ROWS, len(unit)), len(unit))  # one block for all, or the allocator keeps several
    for rows in _row_slices(unit):
        cosines = torch.mm(unit[rows], unit.T, out=block[: rows.stop - rows.start])
        cosines.masked_fill_(absent, -torch.inf)
        cosines.diagonal(rows.start).fill_(-torch.inf)
        torch.argmax(cosines, dim=1, out=nearest[rows])
    return nearest


def _row_slices(rows: Tensor) -> list[slice]:
    return [slice(start, min(start + ROWS, len(rows))) for start in range(0, len(rows), ROWS)]


def gram_norm(centers: Tensor, present: Tensor, count: Tensor) -> Tensor:
    """Frobenius norm of the cosines with -1/(K-1) on the diagonal, through the smaller of the two Gram matrices."""
    unit, norms = _unit_rows(centers, present.to(centers.dtype), count)
    if unit.shape[0] <= unit.shape[1]:
        off_diagonal = (unit @ unit.T).fill_diagonal_(0.0).square().sum()
    else:
        off_diagonal = (unit.T @ unit).square().sum() - unit.square().sum(dim=1).square().sum()
    diagonal = norms.isfinite().sum() / (count - 1).clamp(min=1).square()
    return (off_diagonal.clamp(min=0) + diagonal).sqrt()
