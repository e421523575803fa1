"""What `NCTrainer` refuses before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import ConcatDataset, IterableDataset, Subset
from transformers.trainer_utils import has_length

from nc_hf.training_args import NCTrainingArguments

BY_EPOCH = ("lr_milestones", "lr_cosine", "warmup_epochs", "drw_epoch", "start_epoch")


def check_trainer(args: NCTrainingArguments, given: Mapping[str, Any]) -> None:
    """Refuse arguments of `Trainer` that `NCTrainer` would have to ignore.

    Args:
        args: of the run.
        given: what goes on to `Trainer`, by name.

    Raises:
        ValueError: for a loss function beside ours, several GPUs in one process, another number of processes than
            expected, a draw beside `sampler`, part of an image set, a stream with settings that need its labels or
            length, or an optimizer made without the centers.
    """
    if given.get("compute_loss_func") is not None:
        raise ValueError("`compute_loss_func` would replace the loss of NCTrainer; use `loss`, or plain Trainer.")
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs in one process are not supported: start with `accelerate launch`.")
    if args.expected_processes not in (None, args.world_size):
        raise ValueError(
            f"`expected_processes` is {args.expected_processes} but {args.world_size} started. Launch as many, "
            "with `accelerate launch`, or leave the setting out."
        )
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"`train_sampling_strategy: {args.train_sampling_strategy}` would be ignored: NCTrainer draws images by "
            "`sampler`. Leave it at random."
        )
    dataset = given.get("train_dataset")
    if isinstance(dataset, IterableDataset):
        _check_stream(args, dataset)
    if isinstance(dataset, Subset | ConcatDataset) and _has_image_set(dataset):
        raise ValueError(
            f"{type(dataset).__name__} would show the images of load_images without augmentation. Divide or join "
            "the data before load_images: by validation_fraction of load_splits, train_test_split or "
            "datasets.concatenate_datasets."
        )
    own_optimizer = (given.get("optimizers") or (None, None))[0] or given.get("optimizer_cls_and_kwargs")
    if own_optimizer and args.centers == "learned" and args.collapse_enabled:
        raise ValueError(
            "`centers: learned` are trained in a group of the optimizer that NCTrainer makes, which yours replaces. "
            "Use `centers: ema`, which needs no optimizer, or leave the optimizer to `optim`."
        )


def _has_image_set(dataset: Any) -> bool:
    parts = getattr(dataset, "datasets", [getattr(dataset, "dataset", None)])
    return getattr(dataset, "accepts_draws", False) or any(_has_image_set(part) for part in parts if part is not None)


def _check_stream(args: NCTrainingArguments, dataset: IterableDataset) -> None:
    if args.sampler != "instance":
        raise ValueError(
            f"`sampler: {args.sampler}` draws images by their labels, which a stream ({type(dataset).__name__}) does "
            "not know beforehand. Set sampler: instance, or give a data set with a length."
        )
    by_epoch = [name for name in BY_EPOCH if getattr(args, name)]
    if by_epoch and not has_length(dataset):
        raise ValueError(
            f"`{'`, `'.join(by_epoch)}` count epochs, which a stream without a length does not have. Switch them off "
            "and use `lr_scheduler_type`, or give a data set with a length."
        )
