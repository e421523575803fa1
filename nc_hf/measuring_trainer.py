"""The part of `NCTrainer` that measures: features of a data set, from its images or from memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer

from nc_hf.metrics.geometry import class_means
from nc_hf.models.classifier import feature_dim
from nc_hf.processes import share_buffers
from nc_hf.random_state import unmoved_random_state
from nc_hf.task import ClassificationTask

Batch = tuple[Tensor, Tensor, Tensor]

KEPT_BYTES = 2**31  # of all data sets; training and test images of ImageNet-LT have 2.0e9 on a ResNet-50


@dataclass
class _Kept:
    """What a pass over a data set gave: batches of features (B, P), logits (B, K) and labels (B,), on the CPU."""

    dataset: Dataset  # held, since its id is the key
    head: dict[str, Tensor]
    room: int
    batches: list[Batch] = field(default_factory=list)
    nbytes: int = 0

    def add(self, batch: Batch) -> None:
        """Keep a batch, or none at all once there is no room."""
        self.nbytes += sum(part.nbytes for part in batch)
        if self.nbytes > self.room:
            self.batches.clear()
        else:
            self.batches.append(tuple(part.cpu() for part in batch))


class MeasuringTrainer(Trainer):
    """A `Trainer` of a `ClassificationTask` that gives the features of its classifier."""

    task: ClassificationTask
    _kept: dict[int, _Kept] | None = None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, of the very model that a checkpoint of now would hold, and without a trace in training."""
        share_buffers(self.task)
        with unmoved_random_state():  # a data loader draws a seed, which would shift every later draw
            return super().evaluation_loop(*args, **kwargs)

    @contextmanager
    def keeping_features(self, kept: dict[int, _Kept] | None = None) -> Iterator[dict[int, _Kept]]:
        """Within it, passes over a data set after the first read features from memory and run no backbone.

        So the backbone and the images must stay as they are; the head may change. What would bring the features and
        logits kept to more than 2 GiB is passed over each time.

        Args:
            kept: what a trainer of the same backbone has kept.

        Yields:
            What this one keeps, for the next.
        """
        outer, self._kept = self._kept, {} if kept is None else kept
        try:
            yield self._kept
        finally:
            self._kept = outer

    def iterate_features(self, dataset: Dataset, *, of_collapse: bool = False) -> Iterator[Batch]:
        """Features, logits and labels of a data set in eval mode, batch by batch and the same on every process.

        Args:
            dataset: as for `evaluate`; our image sets give their images without augmentation.
            of_collapse: give the features that the collapse terms see, where those are not the head's input.

        Yields:
            Features (B, P) and logits (B, K) in float32, labels (B,).
        """
        task, was_training = self.task, self.task.training
        store = None if of_collapse else self._kept
        task.eval()
        try:
            if store is not None and id(dataset) in store:
                yield from self._from_memory(store[id(dataset)])
            else:
                yield from self._from_images(dataset, of_collapse, store)
        finally:  # also when the caller stops early
            task.train(was_training)

    def class_means(self, dataset: Dataset, *, of_collapse: bool = False) -> tuple[Tensor, Tensor]:
        """Class means (K, P) in float64, zero for absent classes, and class counts (K,), as `iterate_features`."""
        found = self.iterate_features(dataset, of_collapse=of_collapse)
        width = self.task.collapse.feature_dim if of_collapse else feature_dim(self.task.head)
        return class_means(((features, labels) for features, _, labels in found), self.task.num_classes, width)

    def lay_out(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in the memory format of the network; what is no image stays as it is."""
        if self.args.channels_last and images.ndim == 4:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def _from_images(self, dataset: Dataset, of_collapse: bool, store: dict[int, _Kept] | None) -> Iterator[Batch]:
        task = self.task
        forward = task.collapse_features_and_logits if of_collapse else task.features_and_logits
        share_buffers(task)
        room = -1 if store is None else KEPT_BYTES - sum(found.nbytes for found in store.values())
        kept = _Kept(dataset, _state(task.head), room)
        for batch in self.get_eval_dataloader(dataset):
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.accelerator.autocast():
                features, logits = forward(self.lay_out(batch["pixel_values"]))
            found = self.accelerator.gather_for_metrics((features.float(), logits.float(), batch["labels"].long()))
            kept.add(found)
            yield found
        if kept.nbytes <= kept.room:
            store[id(dataset)] = kept

    def _from_memory(self, kept: _Kept) -> Iterator[Batch]:
        device, state = self.args.device, _state(self.task.head)
        same = state.keys() == kept.head.keys() and all(torch.equal(kept.head[name], state[name]) for name in state)
        for features, logits, labels in kept.batches:
            features, labels = features.to(device), labels.to(device)
            if same:
                logits = logits.to(device)
            else:
                with torch.no_grad():
                    logits = self.task.head_logits(features).float()
            yield features, logits, labels


def _state(head: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}
