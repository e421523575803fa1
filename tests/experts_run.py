"""Known-answer steps of RIDE and BBN, in one process or in the two of distributed_run.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from small_images import SmallImages
from torch import Tensor, nn

from nc_hf.bilateral_task import BilateralTask
from nc_hf.experts_task import ExpertsTask
from nc_hf.losses.collapse import NeuralCollapseLoss
from nc_hf.models.bilateral import BilateralNetwork
from nc_hf.models.experts import ExpertsNetwork
from nc_hf.task import ClassificationTask

COUNTS = (12, 8, 6, 6)
METHODS = ("ride_learned", "ride_ema", "ride_batch", "bbn")
ROWS, STEPS = 32, 4  # rows of an update over all processes


def cross_entropy(logits: Tensor, labels: Tensor, update_counts: Tensor | None = None) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def small_task(method: str) -> ClassificationTask:
    torch.manual_seed(0)
    shape = {"depths": (1, 1, 2), "widths": (4, 6, 8), "num_classes": 4}
    if method == "bbn":
        collapse = NeuralCollapseLoss(4, 8, 0.05, 0.5, "ema")
        task = BilateralTask(BilateralNetwork(**shape), "fc", 4, collapse=collapse)
        task.progress.fill_(0.6)
    else:
        task = ExpertsTask(
            ExpertsNetwork(**shape, num_experts=3),
            "fc",
            4,
            collapse=NeuralCollapseLoss(4, 24, 0.05, 0.5, method.removeprefix("ride_"), num_experts=3),
            class_weights=torch.tensor([0.5, 0.8, 1.2, 1.5]),
            class_counts=COUNTS,
        )
    task.collapse_active = task.weighting_active = True
    return task


def freeze_batch_statistics(task: ClassificationTask) -> ClassificationTask:
    """In training mode, except that batch norms use their running statistics."""
    task.train()
    for module in task.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return task


def all_rows() -> tuple[Tensor, Tensor]:
    images = SmallImages(COUNTS)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    return images.images[order], torch.from_numpy(images.labels)[order]


def counts_of(task: ClassificationTask, labels: Tensor) -> Tensor:
    counted = task.counted_labels(labels) if isinstance(task, BilateralTask) else labels
    return torch.bincount(counted, minlength=4).float()


def train(method: str, rank: int = 0, processes: int = 1) -> dict:
    """Losses summed over processes, and the weights after a few steps of SGD."""
    task = freeze_batch_statistics(small_task(method))
    model = nn.parallel.DistributedDataParallel(task) if processes > 1 else task
    optimizer = torch.optim.SGD(task.parameters(), lr=0.02)
    images, labels = all_rows()
    counts = counts_of(task, labels) / processes
    rows, losses = slice(rank * ROWS // processes, (rank + 1) * ROWS // processes), []
    for _ in range(STEPS):
        loss = model(images[rows], labels[rows], update_counts=counts)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / processes
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return {"losses": losses, "state": {name: t.flatten().tolist() for name, t in task.state_dict().items()}}
