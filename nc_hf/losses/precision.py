"""The precision in which losses and heads compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """float64 as it is, any other type as float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def unit_rows(vectors: Tensor) -> Tensor:
    """Rows (..., D) scaled to length 1, in at least float32."""
    return F.normalize(at_least_float32(vectors), dim=-1)
