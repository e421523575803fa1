"""Angles between each centered class center and its nearest other one, in little memory and with a gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 256  # rows of the cosine matrix held at a time
RELATIVE_FLOOR = 1e-6  # a centered mean this much shorter than the longest has no direction


class NearestAngles(torch.autograd.Function):
    """Angle between each centered row and its nearest other one, (K,) radians, in O(K P) memory."""

    @staticmethod
    def forward(ctx, centers: Tensor, present: Tensor) -> Tensor:
        """Angles (K,) of centers (K, P); classes that are not present (K,) bool get a value without meaning."""
        unit, _ = _unit_rows(centers, present)
        nearest = _nearest_rows(unit, present)
        angles = torch.cat([2 * torch.atan2(*_chord_lengths(unit, nearest, rows)) for rows in _row_slices(unit)])
        ctx.save_for_backward(centers, present, nearest)
        return angles

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_angles: Tensor) -> tuple[Tensor, None]:
        """Gradient to the centers (K, P), with blocks of rows computed again instead of kept."""
        centers, present, nearest = ctx.saved_tensors
        unit, norms = _unit_rows(centers, present)
        grad = torch.zeros_like(unit)
        for rows in _row_slices(unit):
            a, b = unit[rows], unit[nearest[rows]]
            difference, total = a - b, a + b
            s, p = difference.norm(dim=1, keepdim=True), total.norm(dim=1, keepdim=True)
            scale = 2 * grad_angles[rows, None] / (s.square() + p.square()).clamp(min=1e-12)
            # d angle = 2 (p ds - s dp) / (s^2 + p^2); a zero chord has no direction, hence no gradient.
            difference.mul_(torch.where(s > 0, scale * p / s, 0.0))
            total.mul_(torch.where(p > 0, -scale * s / p, 0.0))
            grad[rows] += difference + total
            grad.index_add_(0, nearest[rows], total - difference)
        for rows in _row_slices(unit):  # through the normalisation, a few rows at a time
            radial = (grad[rows] * unit[rows]).sum(dim=1, keepdim=True)
            grad[rows] = (grad[rows] - radial * unit[rows]) / norms[rows, None]
        grad.masked_fill_(~(present & norms.isfinite())[:, None], 0.0)
        grad.sub_(grad.sum(dim=0) / present.sum().clamp(min=1))
        return grad.masked_fill_(~present[:, None], 0.0), None


def _unit_rows(centers: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Rows minus the mean of the present ones at unit length, and their norms: infinite for one without direction."""
    mean = present.to(centers.dtype) @ centers / present.sum().clamp(min=1)
    centered = (centers - mean).masked_fill_(~present[:, None], 0.0)
    norms = centered.norm(dim=1)
    norms = torch.where(norms > RELATIVE_FLOOR * norms.max(), norms, torch.inf)
    return (centered / norms[:, None] if torch.is_grad_enabled() else centered.div_(norms[:, None])), norms


def _nearest_rows(unit: Tensor, present: Tensor) -> Tensor:
    """Index of the other present row with the largest cosine, (K,)."""
    nearest = torch.empty(len(unit), dtype=torch.long, device=unit.device)
    block = unit.new_empty(min(ROWS, len(unit)), len(unit))  # one block for all, or the allocator keeps several
    for rows in _row_slices(unit):
        cosines = torch.mm(unit[rows], unit.T, out=block[: rows.stop - rows.start])
        cosines.masked_fill_(~present, -torch.inf)
        cosines.diagonal(rows.start).fill_(-torch.inf)
        torch.argmax(cosines, dim=1, out=nearest[rows])
    return nearest


def _row_slices(rows: Tensor) -> list[slice]:
    return [slice(start, min(start + ROWS, len(rows))) for start in range(0, len(rows), ROWS)]


def _chord_lengths(unit: Tensor, nearest: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    a, b = unit[rows], unit[nearest[rows]]
    return (a - b).norm(dim=1), (a + b).norm(dim=1)


def gram_norm(centers: Tensor, present: Tensor, count: Tensor) -> Tensor:
    """Frobenius norm of the cosines with -1/(K-1) on the diagonal, through the smaller of the two Gram matrices."""
    unit, norms = _unit_rows(centers, present)
    if unit.shape[0] <= unit.shape[1]:
        off_diagonal = (unit @ unit.T).fill_diagonal_(0.0).square().sum()
    else:
        off_diagonal = (unit.T @ unit).square().sum() - unit.square().sum(dim=1).square().sum()
    diagonal = norms.isfinite().sum() / (count - 1).clamp(min=1).square()
    return (off_diagonal.clamp(min=0) + diagonal).sqrt()
