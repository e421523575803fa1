"""Image augmentation; mixup."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def draw_mixup(batch_size: int, alpha: float, seed: int) -> tuple[float, Tensor]:
    """One lambda ~ Beta(alpha, alpha) and a permutation of partners (batch_size,), functions of the seed alone."""
    generator = np.random.default_rng(seed)
    return float(generator.beta(alpha, alpha)), torch.from_numpy(generator.permutation(batch_size))


def mix(pixel_values: Tensor, partner_values: Tensor, lam: float) -> Tensor:
    """lam * pixel_values + (1 - lam) * partner_values."""
    return torch.lerp(partner_values, pixel_values, lam)
