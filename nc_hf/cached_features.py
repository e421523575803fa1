"""Stage two on features that are computed once, over several augmented views of each image."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import IntervalStrategy

from nc_hf.retraining_args import RetrainingArguments
from nc_hf.trainer import NCTrainer


class CachedFeatures(Dataset):
    """Features (V, N, P) of V augmented views of each image; each draw takes the next view."""

    accepts_draws = True

    def __init__(self, features: Tensor, labels: np.ndarray, class_counts: np.ndarray) -> None:
        self.features, self.labels, self.class_counts = features, labels, class_counts

    def __len__(self) -> int:
        """Number of images."""
        return self.features.shape[1]

    def __getitems__(self, draws: list[tuple[int, int]]) -> dict[str, Tensor]:
        """A ready batch, with features (B, P) where images usually are."""
        index, draw = torch.tensor(draws).T
        features = self.features[draw % len(self.features), index]
        return {"pixel_values": features, "labels": torch.as_tensor(self.labels)[index]}

    @staticmethod
    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Batches are ready."""
        return batch


class _AugmentedView(Dataset):
    """One augmented view of every image, in order."""

    def __init__(self, dataset: Dataset, view: int) -> None:
        self.dataset, self.offset = dataset, view * len(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return self.dataset.__getitems__([(index, self.offset + index) for index in indices])


class _HeadOnly(nn.Module):
    """A linear head as a classifier of its own, with features where images usually are."""

    config = None  # it is saved as a part of the classifier that it came from

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        weight = head.weight.detach().flatten(1)
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=head.bias is not None)
        self.head.load_state_dict({**head.state_dict(), "weight": weight})

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(pixel_values)


def train_on_cached_features(
    trainer: NCTrainer,
    make_trainer: Any,
    head: nn.Module,
    args: RetrainingArguments,
    resume_from_checkpoint: str | bool | None,
) -> None:
    """Train a linear head on cached features, and give the classifier what came out.

    Args:
        trainer: holds the classifier, whose backbone is frozen.
        make_trainer: of the head alone, from `(model, args, train_dataset=, head=, callbacks=)`.
        head: the classifier's head, a linear layer or 1x1 convolution, changed in place.
        args: of stage two.
        resume_from_checkpoint: as for `NCTrainer.train`.
    """
    dataset, views = trainer.train_dataset, []
    for view in tqdm(range(args.cached_views), desc="features", disable=args.disable_tqdm):
        images = _AugmentedView(dataset, view) if getattr(dataset, "accepts_draws", False) else dataset
        batches = [(features.cpu(), labels.cpu()) for features, _, labels in trainer.iterate_features(images)]
        views.append(torch.cat([features for features, _ in batches]))
        labels = torch.cat([labels for _, labels in batches]).numpy()
    alone = _HeadOnly(head).to(args.device)
    cached = CachedFeatures(torch.stack(views), labels, np.bincount(labels, minlength=trainer.task.num_classes))
    head_args = copy.copy(args)
    # The head alone cannot take images, and is no classifier to push.
    head_args.eval_strategy, head_args.eval_on_start, head_args.push_to_hub = IntervalStrategy.NO, False, False
    given = {"class_counts": trainer.class_counts, "callbacks": trainer.user_callbacks}
    head_trainer = make_trainer(alone, head_args, train_dataset=cached, head="head", **given)
    head_trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    head_trainer.finish_head()
    trainer.num_epochs, trainer.state = head_trainer.num_epochs, head_trainer.state
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(alone.head.get_parameter(name).view_as(parameter))
    if args.eval_strategy != IntervalStrategy.NO:
        trainer.evaluate()
