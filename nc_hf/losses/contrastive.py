"""The supervised contrastive family: losses on unit vectors whose rows have labels.

* FCL, the supervised contrastive loss (Khosla et al. 2020): every other row of the class is a positive.
* KCL (Kang et al. 2021): the row's own key and k keys of its class, drawn from a queue of earlier keys.
* TSC (Li et al. 2022): KCL with fixed, uniformly spread targets, one of which is assigned to each class.

All compute in float32 with autocast off; float64 stays float64. Values are those of the code released with TSC.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from nc_hf.heads import simplex_directions
from nc_hf.labels import label_counts
from nc_hf.losses.precision import at_least_float32, unit_rows


def supervised_contrastive_loss(
    vectors: Tensor, labels: Tensor, temperature: float = 0.07, *, anchors: slice = slice(None)
) -> Tensor:
    """Supervised contrastive loss, L_out of Khosla et al. (2020, Eq. 2), as a mean over the anchors.

        -1/|P(i)| sum_{j in P(i)} log( exp(z_i.z_j / T) / sum_{a != i} exp(z_i.z_a / T) ),
        P(i) the other rows with the label of i

    Their code multiplies this by T / 0.07, which is 1 at the default temperature of theirs and ours.

    Args:
        vectors: (N, D) of length 1; all views of all images, in any order.
        labels: (N,) integers.
        temperature: T > 0.
        anchors: the rows i that the mean is taken over; all rows take part in the denominators.

    Returns:
        A scalar. An anchor that is alone with its label adds 0.
    """
    logits = _similarities(vectors[anchors], vectors, temperature)
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)[anchors]
    log_probabilities = logits.masked_fill(itself, -torch.inf).log_softmax(dim=1)
    positives = (labels[anchors, None] == labels) & ~itself
    sums = torch.where(positives, log_probabilities, 0.0).sum(dim=1)
    return -(sums / positives.sum(dim=1).clamp(min=1)).mean()


def queue_contrastive_loss(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    positives: Tensor,
    temperature: float = 0.07,
    *,
    targets: Tensor | None = None,
    assigned: Tensor | None = None,
) -> dict[str, Tensor]:
    """Loss of KCL (Kang et al. 2021) and, with targets, of TSC (Li et al. 2022), as in the code of the latter.

    With p the softmax of q_i.[k_i, queue, targets] / T, the positives of i are its key, those chosen of the queue and
    its target, m_i in number:

        contrastive = -mean_i 1/m_i (log p(k_i) + sum_{chosen j} log p(queue_j)),   targets = -mean_i 1/m_i log p(t_i)

    Args:
        queries: (B, D) of length 1.
        keys: (B, D) of length 1; row i is the other view of image i.
        queue: (Q, D) of length 1, from before these keys enter it. Each entry is in every denominator.
        positives: (B, Q) bool, the chosen entries; see `sample_positives`.
        temperature: T > 0.
        targets: (K, D) of length 1.
        assigned: (B,) integers, the row of `targets` that belongs to each image's class.

    Returns:
        `{"contrastive": scalar}`, and `"targets"`, not yet weighted, when there are targets.
    """
    own = at_least_float32(queries).mul(at_least_float32(keys)).sum(dim=1, keepdim=True) / temperature
    fixed = torch.cat([queue] if targets is None else [queue, targets])  # a copy: the queue moves on in place
    logits = torch.cat([own, _similarities(queries, fixed, temperature)], dim=1)
    log_probabilities = logits.log_softmax(dim=1)
    from_queue = torch.where(positives, log_probabilities[:, 1 : 1 + len(queue)], 0.0).sum(dim=1)
    number = 1 + positives.sum(dim=1) + (targets is not None)
    terms = {"contrastive": -((log_probabilities[:, 0] + from_queue) / number).mean()}
    if targets is not None:
        of_target = log_probabilities[:, 1 + len(queue) :].gather(1, assigned[:, None])[:, 0]
        terms["targets"] = -(of_target / number).mean()
    return terms


def sample_positives(labels: Tensor, queue_labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Choose keys of each row's own class from the queue, uniformly and without replacement.

    Args:
        labels: (B,) integers >= 0.
        queue_labels: (Q,) integers; -1, an empty slot, is never chosen.
        count: k; all keys of the class are taken where there are not more, or when k is 0.
        generator: of the draws, on the device of the labels.

    Returns:
        (B, Q) bool.
    """
    same = labels[:, None] == queue_labels
    if count == 0:
        return same
    scores = torch.rand(same.shape, generator=generator, device=same.device).masked_fill(~same, -1)
    best = scores.topk(min(count, len(queue_labels)), dim=1)
    return torch.zeros_like(same).scatter(1, best.indices, best.values >= 0)


def uniformity_loss(targets: Tensor, temperature: float = 0.07) -> Tensor:
    """mean_i log sum_j exp(t_i.t_j / T), j = i included: what the targets of TSC minimize (Li et al. 2022).

    Args:
        targets: (K, D) of length 1.
        temperature: T > 0.
    """
    return _similarities(targets, targets, temperature).logsumexp(dim=1).mean()


def uniform_targets(num_classes: int, dimension: int, seed: int, *, steps: int = 10_000) -> Tensor:
    """Unit vectors as far from each other as can be, the targets of TSC.

    Up to D + 1 classes they are the vertices of a regular simplex, in closed form. More are found by Adam on
    `uniformity_loss` from random directions, with the learning rate and the number of steps of the authors' code. That
    takes minutes for 1000 classes on a CPU, and grows with the square of their number.

    Args:
        num_classes: K >= 2.
        dimension: D.
        seed: of the random directions.
        steps: of Adam.

    Returns:
        (K, D) float32.
    """
    if num_classes <= dimension + 1:
        return simplex_directions(num_classes, dimension, seed).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        directions = torch.randn(num_classes, dimension, generator=generator).requires_grad_()
        optimizer = torch.optim.Adam([directions], lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            uniformity_loss(unit_rows(directions)).backward()
            optimizer.step()
    return unit_rows(directions.detach())


def update_centroids(centroids: Tensor, vectors: Tensor, labels: Tensor, momentum: float = 0.9) -> Tensor:
    """Running class centroids of TSC: a blend with the unit mean of each class in the batch, scaled to length 1.

    Args:
        centroids: (K, D) of length 1.
        vectors: (N, D) of length 1.
        labels: (N,) integers in [0, K).
        momentum: of the old centroids; 0.9 is the authors'.

    Returns:
        (K, D); the rows of absent classes are unchanged.
    """
    vectors = at_least_float32(vectors)
    sums = torch.zeros_like(centroids, dtype=vectors.dtype).index_add(0, labels, vectors)
    present = label_counts(labels, len(centroids)) > 0
    blended = unit_rows(momentum * centroids + (1 - momentum) * unit_rows(sums))
    return torch.where(present[:, None], blended, centroids)


def assign_targets(centroids: Tensor, targets: Tensor) -> Tensor:
    """One target for each class so that the sum of their cosines with the centroids is largest (Hungarian method).

    Args:
        centroids: (K, D) of length 1.
        targets: (K, D) of length 1.

    Returns:
        (K,) int64, a permutation: the row of `targets` of each class.
    """
    cosines = _similarities(centroids, targets, 1.0)
    _, columns = linear_sum_assignment(cosines.detach().cpu().numpy(), maximize=True)
    return torch.as_tensor(columns, device=targets.device)


def _similarities(rows: Tensor, others: Tensor, temperature: float) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return at_least_float32(rows) @ at_least_float32(others).T / temperature
