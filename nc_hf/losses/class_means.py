"""Class means of a batch that is spread over processes, with gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def class_means(
    features: Tensor, assignments: list[tuple[Tensor, float | Tensor]], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Class means over the batches of all processes, with a gradient to each process's own features.

    Args:
        features: (B, P) of this process; every process has the same B.
        assignments: pairs of labels (B,) and the weight with which they hold.
        num_classes: K.

    Returns:
        Means (K, P), zero for absent classes, and which classes are present (K,) bool.
    """
    sums = features.new_zeros(num_classes, features.shape[1])
    masses = features.new_zeros(num_classes)
    everywhere = gather_with_gradient(features)
    for labels, weight in assignments:
        labels = gather_with_gradient(labels)
        sums = sums.index_add(0, labels, weight * everywhere)
        mass = weight.to(features.dtype) if isinstance(weight, Tensor) else features.new_full((), weight)
        masses = masses.index_add(0, labels, mass.expand(labels.shape))
    present = masses > 0
    return sums / torch.where(present, masses, 1.0)[:, None], present


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Rows of all processes in rank order, (W * B, ...); the gradient flows back to each process's own rows."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tensor
    return _Gather.apply(tensor.contiguous())


class _Gather(torch.autograd.Function):
    """`torch.distributed` has no gathering with a gradient that is public in all its versions."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, tensor)
        return torch.cat(everywhere)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # others may hold it too
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.rows :][: ctx.rows]
