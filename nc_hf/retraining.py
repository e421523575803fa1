"""Stage two: classifier re-training (cRT, Kang et al. 2020) on a frozen backbone."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import IntervalStrategy, set_seed

from nc_hf.models.classifier import find_head, freeze_backbone, reset_head
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import RetrainingArguments

logger = logging.getLogger(__name__)


def retrain_classifier(
    model: nn.Module,
    train_dataset: Dataset,
    args: RetrainingArguments,
    *,
    head: str | None = None,
    resume_from_checkpoint: str | bool | None = None,
    **kwargs: Any,
) -> NCTrainer:
    """Train a new head of a classifier with classes drawn alike; the backbone stays as it is, bit for bit.

    The backbone is in eval mode throughout, so the running statistics of its norms do not move. With
    `features="images"` every draw is augmented afresh; `"cached"` computes features once over several augmented views.

    Args:
        model: a trained classifier of timm or transformers, changed in place.
        train_dataset: as for `NCTrainer`.
        args: `RetrainingArguments`.
        head: module path of the last layer, for a model whose head is not found.
        resume_from_checkpoint: as for `NCTrainer.train`.
        **kwargs: further arguments of `NCTrainer`.

    Returns:
        A trainer that holds the model: `.classifier`, `.evaluate()`, `.save_model(folder)`.

    Raises:
        ValueError: as `NCTrainer`.
        RuntimeError: should the backbone have changed.
    """
    head_name, head_module = find_head(model, head=head)
    if args.head_init == "new":
        set_seed(args.seed)
        reset_head(model, head_name)
    freeze_backbone(model, head_name)
    backbone = {name: t.detach().cpu().clone() for name, t in model.state_dict().items() if not _in(name, head_name)}
    trainer = NCTrainer(model, args, train_dataset=train_dataset, head=head_name, freeze_backbone=True, **kwargs)
    logger.info("stage two trains %s alone; %d backbone tensors are frozen in eval mode", head_name, len(backbone))
    if args.features == "images":
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    else:
        _train_on_cached_features(trainer, head_module, args, resume_from_checkpoint)
    state = model.state_dict()
    changed = [name for name, before in backbone.items() if not torch.equal(before, state[name].cpu())]
    if changed:
        raise RuntimeError(f"the frozen backbone changed in stage two: {', '.join(changed[:5])}.")
    return trainer


def _in(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


class _CachedFeatures(Dataset):
    """Features of several augmented views of each image; each draw takes the next view."""

    accepts_draws = True

    def __init__(self, features: Tensor, labels: np.ndarray, class_counts: np.ndarray) -> None:
        self.features, self.labels, self.class_counts = features, labels, class_counts  # features (V, N, P)

    def __len__(self) -> int:
        return self.features.shape[1]

    def __getitems__(self, draws: list[tuple[int, int]]) -> dict[str, Tensor]:
        index, draw = torch.tensor(draws).T
        features = self.features[draw % len(self.features), index]
        return {"pixel_values": features, "labels": torch.as_tensor(self.labels)[index]}

    @staticmethod
    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch


class _HeadOnly(nn.Module):
    """A linear head as a classifier of its own, with features where images usually are."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        weight = head.weight.detach().flatten(1)
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=head.bias is not None)
        self.head.load_state_dict({**head.state_dict(), "weight": weight})

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(pixel_values)


class _AugmentedView(Dataset):
    """One augmented view of every image, in order."""

    def __init__(self, dataset: Dataset, view: int) -> None:
        self.dataset, self.offset = dataset, view * len(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return self.dataset.__getitems__([(index, self.offset + index) for index in indices])


def _train_on_cached_features(
    trainer: NCTrainer, head: nn.Module, args: RetrainingArguments, resume_from_checkpoint: str | bool | None
) -> None:
    dataset, views = trainer.train_dataset, []
    for view in tqdm(range(args.cached_views), desc="features", disable=args.disable_tqdm):
        images = _AugmentedView(dataset, view) if getattr(dataset, "accepts_draws", False) else dataset
        batches = [(features.cpu(), labels.cpu()) for features, _, labels in trainer.iterate_features(images)]
        views.append(torch.cat([features for features, _ in batches]))
        labels = torch.cat([labels for _, labels in batches]).numpy()
    alone = _HeadOnly(head).to(args.device)
    cached = _CachedFeatures(torch.stack(views), labels, np.bincount(labels, minlength=trainer.task.num_classes))
    head_args = copy.copy(args)
    head_args.eval_strategy = IntervalStrategy.NO  # the head alone cannot take images
    head_trainer = NCTrainer(alone, head_args, train_dataset=cached, head="head", callbacks=trainer.user_callbacks)
    head_trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(alone.head.get_parameter(name).view_as(parameter))
    if args.eval_strategy != IntervalStrategy.NO:
        trainer.evaluate()
