"""The contrastive losses as loops over pairs, from their formulas."""

from __future__ import annotations

import math

from torch import Tensor


def loop_over_pairs(vectors: Tensor, labels: list[int], temperature: float) -> float:
    """L_out of Khosla et al., one anchor and one positive at a time; an anchor alone with its label adds 0."""
    losses = []
    for i, anchor in enumerate(vectors):
        others = [j for j in range(len(vectors)) if j != i]
        normalizer = sum(math.exp(anchor @ vectors[j] / temperature) for j in others)
        positives = [j for j in others if labels[j] == labels[i]]
        shares = [math.log(math.exp(anchor @ vectors[j] / temperature) / normalizer) for j in positives]
        losses.append(-sum(shares) / max(len(positives), 1))
    return sum(losses) / len(losses)


def loop_over_queue(queries, keys, queue, positives, temperature, targets=None, assigned=None) -> tuple[float, float]:
    """The class and the target part of KCL and TSC, one query at a time."""
    class_part = target_part = 0.0
    for i, query in enumerate(queries):
        scores = [math.exp(query @ other / temperature) for other in [keys[i], *queue, *(targets or [])]]
        shares = [math.log(score / sum(scores)) for score in scores]
        chosen = [0] + [1 + j for j in range(len(queue)) if positives[i][j]]
        own = [] if targets is None else [1 + len(queue) + int(assigned[i])]
        class_part -= sum(shares[j] for j in chosen) / len(chosen + own) / len(queries)
        target_part -= sum(shares[j] for j in own) / len(chosen + own) / len(queries)
    return class_part, target_part
