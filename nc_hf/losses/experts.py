"""The diversity term of RIDE (Wang et al. 2021), and the temperatures of its classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nc_hf.losses.precision import at_least_float32


def diversity(expert_logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """How far each image's experts are from their mean: T^2 sum_e KL(softmax(z_mean / T) || softmax(z_e / T)).

    The mean is a fixed target; over all experts a gradient through it would cancel. With one temperature a class, each
    logit is divided by its own and T^2 is the square of their mean, as in the authors' code. RIDE adds this with a
    negative factor.

    Args:
        expert_logits: (B, E, K) floating point; computed in at least float32.
        temperature: T, or (K,).

    Returns:
        (B,), at least 0.
    """
    logits = at_least_float32(expert_logits)
    temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
    target = (logits.mean(dim=1, keepdim=True) / temperature).log_softmax(dim=2).detach()
    divergence = target.exp() * (target - (logits / temperature).log_softmax(dim=2))
    return temperature.mean().square() * divergence.sum(dim=(1, 2))


def class_temperatures(class_counts: Sequence[int], reweight_factor: float = 0.05) -> Tensor:
    """Temperatures of `diversity` once classes are re-weighted: (K p_k f + 1 - f) / max, p_k = n_k / N (RIDE).

    Args:
        class_counts: (K,) training images per class.
        reweight_factor: f in [0, 1); 0.05 in the authors' CIFAR configuration, 0.02 on ImageNet-LT.

    Returns:
        (K,) float64; 1 for the most frequent class, less for rare ones.

    Raises:
        ValueError: for a factor outside [0, 1), where a class without images would get temperature 0.
    """
    if not 0 <= reweight_factor < 1:
        raise ValueError(f"`reweight_factor` must lie in [0, 1), got {reweight_factor}. RIDE takes 0.05.")
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    raw = len(counts) * counts / counts.sum() * reweight_factor + 1 - reweight_factor
    return raw / raw.max()
