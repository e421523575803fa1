"""Ghost batch normalization: batch norms that see a few images at a time, as on several devices."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class GhostBatchNorm:
    """What `set_ghost_batches` puts before the class of a batch norm: in training it normalizes parts of a batch.

    Running statistics move once a batch, towards the mean of those of the parts. In eval mode, and for batches that
    are small enough, it is the batch norm itself.
    """

    kind: type[_BatchNorm]  # the class that it was
    ghost_batch_size: int

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled by `kind`, since its own class is made on the fly."""
        return _new_ghost, (self.kind,), self.__dict__

    def forward(self, images: Tensor) -> Tensor:
        """Normalize (B, ...) in nearly equal parts of at most `ghost_batch_size` images."""
        num_parts = -(-len(images) // self.ghost_batch_size)
        if not self.training or num_parts < 2:
            return super().forward(images)
        whole, rest = divmod(len(images), num_parts)
        sizes = [whole + 1] * rest + [whole] * (num_parts - rest)  # `tensor_split` itself has a slow backward
        tracked, momentum = self.num_batches_tracked, self.momentum
        of_all = momentum is None and tracked is not None  # a mean over all batches
        share = (1 / (tracked.item() + 1) if of_all else momentum or 0.0) / num_parts
        try:
            outputs = []
            for number, part in enumerate(images.split(sizes), start=1):
                self.momentum = share / (1 - (num_parts - number) * share)  # each part counts `share` at the end
                outputs.append(super().forward(part))
        finally:
            self.momentum = momentum
        if tracked is not None:
            tracked.sub_(num_parts - 1)
        return torch.cat(outputs)


def set_ghost_batches(model: nn.Module, size: int | None) -> None:
    """Let the batch norms of a model normalize parts of at most `size` images in training (Hoffer et al. 2017).

    Several devices do so by themselves: each normalizes its own images. With it, one device trains as several with as
    many images each. The state dict stays as it is. Not for `SyncBatchNorm`, which is there for the opposite.

    Args:
        model: changed in place.
        size: images a part; None gives whole batches back.

    Raises:
        ValueError: for a size and a model without such batch norms.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    if size is not None and not norms:
        raise ValueError(
            f"`ghost_batch_size` is {size}, and {type(model).__name__} has no batch norms, or synchronized ones "
            "alone. Leave it out."
        )
    for norm in norms:
        if isinstance(norm, GhostBatchNorm):
            norm.__class__ = norm.kind
            del norm.ghost_batch_size
        if size is not None:
            norm.__class__, norm.ghost_batch_size = _ghost_class(type(norm)), size


@cache
def _ghost_class(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"Ghost{kind.__name__}", (GhostBatchNorm, kind), {"kind": kind})


def _new_ghost(kind: type[_BatchNorm]) -> _BatchNorm:
    return _BatchNorm.__new__(_ghost_class(kind))
