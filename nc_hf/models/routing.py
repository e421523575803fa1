"""Expert assignment, the second stage of RIDE (Wang et al. 2021): after which expert an image may stop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nc_hf.labels import labels_of
from nc_hf.metrics.long_tail_accuracy import FEW_BELOW, MANY_ABOVE, long_tail_accuracy
from nc_hf.sampling import EpochSampler

if TYPE_CHECKING:
    from nc_hf.models.experts import Experts

TOP_LOGITS = 30
HIDDEN = 16
POSITIVE_WEIGHT = 100.0  # few images need another expert


class RoutingGates(nn.Module):
    """For each expert but the last, whether an image should go on to the next one.

    A gate sees the expert's unit feature, through 16 hidden units of its own, and the 30 largest logits of the mean
    over the experts so far, in falling order; the last layer is one for all gates (the authors' code).

    Args:
        num_experts: E.
        feature_dim: P of each expert.
        num_classes: K.
    """

    def __init__(self, num_experts: int, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.top = min(TOP_LOGITS, num_classes)
        self.hidden = nn.ModuleList(nn.Linear(feature_dim, HIDDEN) for _ in range(num_experts - 1))
        self.last = nn.Linear(HIDDEN + self.top, 1)
        for layer in (*self.hidden, self.last):
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, expert: int, features: Tensor, running_logits: Tensor) -> Tensor:
        """Score (B,) of going on after one expert; above 0, a probability over one half, an image does.

        Args:
            expert: its number, from 0.
            features: (B, P) of that expert, of length 1.
            running_logits: (B, K) mean over the experts up to that one.
        """
        hidden = F.relu(self.hidden[expert](features))
        top = running_logits.topk(self.top, dim=1).values
        return self.last(torch.cat([hidden, top], dim=1)).squeeze(1)


def routing_targets(running_logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each image should go on: the experts so far are wrong together and some later number of them is right.

    Args:
        running_logits: (B, E, K) means over the first 1 to E experts.
        labels: (B,) integers in [0, K).

    Returns:
        (B, E - 1) of 0 and 1, float32.
    """
    right = running_logits.argmax(dim=2) == labels[:, None]
    right_later = torch.stack([right[:, e:].any(dim=1) for e in range(1, right.shape[1])], dim=1)
    return (~right[:, :-1] & right_later).float()


def routing_loss(gates: RoutingGates, features: Tensor, expert_logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy of all gates, with the weight 100 on images that should go on.

    Args:
        gates: to be trained.
        features: (B, E, P) of length 1.
        expert_logits: (B, E, K).
        labels: (B,) integers in [0, K).
    """
    numbers = torch.arange(1, expert_logits.shape[1] + 1, device=labels.device)
    running = expert_logits.cumsum(dim=1) / numbers[:, None]
    scores = [gates(e, features[:, e], running[:, e]) for e in range(len(gates.hidden))]
    weight = torch.tensor(POSITIVE_WEIGHT, device=labels.device)
    return F.binary_cross_entropy_with_logits(
        torch.stack(scores, dim=1), routing_targets(running, labels), pos_weight=weight
    )


def train_routing(
    model: Experts,
    dataset: Dataset,
    *,
    epochs: int = 5,
    learning_rate: float = 0.01,
    batch_size: int = 512,
    seed: int = 0,
    num_workers: int = 0,
) -> list[float]:
    """Train the gates of a network that is otherwise frozen, in eval mode, with classes drawn alike.

    SGD with Nesterov momentum 0.9, weight decay 5e-4 and half a cosine over the epochs, all as the authors' CIFAR
    configuration. Draws follow from the seed, so every process may call this and ends with the same gates.

    Args:
        model: a trained `Experts` made with `routing=True`; on the device to train on.
        dataset: training images, as for `NCTrainer`.
        epochs: passes.
        learning_rate: at the start.
        batch_size: images a step.
        seed: of the draws.
        num_workers: processes that read images.

    Returns:
        Mean loss of each epoch.

    Raises:
        ValueError: for a network without gates, or a data set that does not tell its labels.
    """
    gates, labels, device = _gates(model), labels_of(dataset), model.conv1.weight.device
    if labels is None:
        raise ValueError(
            f"balanced draws need the labels of {type(dataset).__name__}: give it an attribute `labels` with one "
            "integer per image."
        )
    sampler = EpochSampler(labels, "class_balanced", seed=seed, with_draws=getattr(dataset, "accepts_draws", False))
    collate = getattr(dataset, "collate", None)
    loader = DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate, num_workers=num_workers)
    was_training = model.training
    model.eval()
    gates.requires_grad_(True)
    optimizer = torch.optim.SGD(gates.parameters(), lr=learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    losses = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for batch in loader:
            features, logits = _expert_outputs(model, batch["pixel_values"].to(device))
            loss = routing_loss(gates, features, logits, batch["labels"].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        schedule.step()
        losses.append(total.item() / len(loader))
    gates.requires_grad_(False)
    model.train(was_training)
    return losses


@torch.no_grad()
def routed(model: Experts, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with early stopping: later experts run only on the images that their gates send on.

    Args:
        model: in eval mode, with trained gates.
        pixel_values: (B, 3, H, W).

    Returns:
        The mean logits of the experts used (B, K), and how many those are (B,), from 1 to E.

    Raises:
        ValueError: for a network without gates.
    """
    gates, shared = _gates(model), model.shared_features(pixel_values)
    rows = torch.arange(len(shared), device=shared.device)
    used = torch.zeros_like(rows)
    sums = shared.new_zeros(len(shared), model.num_classes, dtype=torch.promote_types(shared.dtype, torch.float32))
    for e in range(model.num_experts):
        features, logits = model.expert_outputs(e, shared[rows])
        sums[rows] += logits
        used[rows] += 1
        if e + 1 < model.num_experts:
            rows = rows[gates(e, features, sums[rows] / (e + 1)) > 0]
    return sums / used[:, None], used


def evaluate_routing(
    model: Experts,
    batches: Iterable[dict[str, Tensor]],
    class_counts: Sequence[int],
    *,
    few_below: int = FEW_BELOW,
    many_above: int = MANY_ABOVE,
) -> dict[str, Any]:
    """Accuracies with early stopping, and the mean number of experts that an image took.

    Args:
        model: an `Experts` with trained gates.
        batches: of `pixel_values` (B, 3, H, W) and `labels` (B,), usually the test split.
        class_counts: (K,) training images per class, which say what is many, medium and few.
        few_below: classes with fewer training images are few.
        many_above: classes with more training images are many.

    Returns:
        Those of `long_tail_accuracy`, and `experts_used`, from 1 to E.

    Raises:
        ValueError: for a network without gates.
    """
    was_training, device = model.training, model.conv1.weight.device
    model.eval()
    predictions, labels, used = [], [], []
    for batch in batches:
        logits, numbers = routed(model, batch["pixel_values"].to(device))
        predictions.append(logits.argmax(dim=1).cpu())
        used.append(numbers.cpu())
        labels.append(batch["labels"].cpu())
    model.train(was_training)
    metrics = long_tail_accuracy(
        torch.cat(predictions).numpy(),
        torch.cat(labels).numpy(),
        class_counts,
        few_below=few_below,
        many_above=many_above,
    )
    return metrics | {"experts_used": torch.cat(used).double().mean().item()}


@torch.no_grad()
def _expert_outputs(model: Experts, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Unit features (B, E, P) and logits (B, E, K) of all experts."""
    shared = model.shared_features(pixel_values)
    outputs = [model.expert_outputs(e, shared) for e in range(model.num_experts)]
    features, logits = (torch.stack(parts, dim=1) for parts in zip(*outputs, strict=True))
    return features, logits


def _gates(model: Experts) -> RoutingGates:
    if getattr(model, "routing", None) is None:
        raise ValueError(
            f"{type(model).__name__} has no gates that could route its images. Create the model with routing=True "
            "(recipe: model.model_args.routing)."
        )
    return model.routing
