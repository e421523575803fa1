"""What `NCTrainer` refuses before anything is built, and of its data before the first step."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset
from transformers.trainer_utils import IntervalStrategy, has_length

from nc_hf.argument_checks import PAIRED
from nc_hf.collation import Collator, collate
from nc_hf.models.saved_folder import odd_model_argument
from nc_hf.random_state import unmoved_random_state
from nc_hf.training_args import NCTrainingArguments

logger = logging.getLogger(__name__)

ROWS_LOOKED_AT = 8  # of a training set, for its labels
BY_EPOCH = ("lr_milestones", "lr_cosine", "warmup_epochs", "drw_epoch", "start_epoch")


def check_trainer(args: NCTrainingArguments, given: Mapping[str, Any]) -> None:
    """Refuse arguments of `Trainer` that `NCTrainer` would have to ignore.

    Args:
        args: of the run.
        given: what goes on to `Trainer`, by name.

    Raises:
        ValueError: for a loss function beside ours, several GPUs in one process, another number of processes than
            expected, a draw beside `sampler`, part of an image set, a stream with settings that need its labels or
            length, an optimizer made without the centers, a schedule beside ours, batches that `accelerate` hands
            out in ways that do not resume or cannot be gathered, metrics of predictions that are not joined,
            evaluation in half precision throughout, or weights that a tracker would upload by itself.
        TypeError: for arguments of plain `Trainer`.
    """
    if not isinstance(args, NCTrainingArguments):
        raise TypeError(
            f"NCTrainer takes NCTrainingArguments, got {type(args).__name__}. They have all of its fields: write the "
            "other name."
        )
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
    _check_evaluation(args, given)
    _check_trackers(args)
    dataset = given.get("train_dataset")
    if isinstance(dataset, IterableDataset):
        _check_stream(args, dataset)
    elif dataset is not None:
        _check_accelerator(args)
    if isinstance(dataset, Subset | ConcatDataset) and _has_image_set(dataset):
        raise ValueError(
            f"{type(dataset).__name__} would show the images of load_images without augmentation. Divide or join "
            "the data before load_images: by validation_fraction of load_splits, train_test_split or "
            "datasets.concatenate_datasets."
        )
    optimizer, scheduler = given.get("optimizers") or (None, None)
    scheduled = [name for name in ("lr_milestones", "lr_cosine", "warmup_epochs") if getattr(args, name)]
    if scheduler is not None and scheduled:
        raise ValueError(
            f"`{scheduled[0]}` would be ignored beside the scheduler of `optimizers`. Leave one of them out."
        )
    if (optimizer or given.get("optimizer_cls_and_kwargs")) and args.centers == "learned" and args.collapse_enabled:
        raise ValueError(
            "`centers: learned` are trained in a group of the optimizer that NCTrainer makes, which yours replaces. "
            "Use `centers: ema`, which needs no optimizer, or leave the optimizer to `optim`."
        )


def _check_evaluation(args: NCTrainingArguments, given: Mapping[str, Any]) -> None:
    if given.get("compute_metrics") is not None and not (args.eval_do_concat_batches or args.batch_eval_metrics):
        raise ValueError(
            "`eval_do_concat_batches: False` would hand lists of batches to compute_metrics, where that of "
            "compute_metrics_for takes arrays of all predictions. Leave it at True, or compute_metrics out."
        )
    if args.batch_eval_metrics and hasattr(given.get("compute_metrics"), "bounds"):
        raise ValueError(
            "`batch_eval_metrics` calls compute_metrics for each batch, and that of compute_metrics_for takes all "
            "predictions at once. Leave it out."
        )
    if args.bf16_full_eval or args.fp16_full_eval:
        raise ValueError(
            "`bf16_full_eval` and `fp16_full_eval` would cast the weights and not the images. Leave them out: "
            f"evaluation runs at `precision` ({args.precision}) already."
        )


def _check_trackers(args: NCTrainingArguments) -> None:
    log_model = os.environ.get("WANDB_LOG_MODEL", "false")
    if "wandb" in args.report_to and log_model.lower() not in ("false", "0"):
        raise ValueError(
            f"WANDB_LOG_MODEL is {log_model!r}, and would upload what is trained with its class centers, which "
            "nothing opens. Unset it, and log the folder of save_model as an artifact instead."
        )


def _check_accelerator(args: NCTrainingArguments) -> None:
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "`dispatch_batches` draws other images when a run is resumed within an epoch, and is of use for streams "
            "alone. Leave it out of accelerator_config."
        )
    if args.accelerator_config.split_batches:
        raise ValueError(
            "`split_batches` divides each batch among the processes, where batches are counted here for each of them. "
            "Leave it out of accelerator_config, and set per_device_train_batch_size to the share of one process."
        )
    if not args.accelerator_config.even_batches:
        raise ValueError(
            "`even_batches: False` gives processes batches of different sizes, which class means and evaluation "
            "cannot gather. Leave it out of accelerator_config; dataloader_drop_last=True repeats no image either."
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
    if args.center_init == "data" and args.collapse_enabled and not has_length(dataset):
        raise ValueError(
            "`center_init: data` takes a pass over the training images, which a stream without a length may not end. "
            "Leave it at auto, or give a data set with a length."
        )
    by_epoch = [name for name in BY_EPOCH if getattr(args, name)]
    if by_epoch and not has_length(dataset):
        raise ValueError(
            f"`{'`, `'.join(by_epoch)}` count epochs, which a stream without a length does not have. Switch them off "
            "and use `lr_scheduler_type`, or give a data set with a length."
        )


def warn_of_unsavable(classifier: nn.Module, image_processor: Any) -> None:
    """Say at once of a model that no folder can be made of it, or none that opens again."""
    inner = getattr(classifier, "timm_model", classifier)
    if odd := odd_model_argument(getattr(inner, "_model_args", {})):
        logger.warning(
            "%s was made with %s, which config.json cannot keep. It trains, and its checkpoints resume, but no saved "
            "folder of it opens: make it with the name that timm has for it.",
            *(type(classifier).__name__, odd),
        )
    config = getattr(classifier, "config", None)
    if not hasattr(inner, "pretrained_cfg") and config is not None and image_processor is None:
        logger.warning(
            "%s has no image processor, which a pipeline needs to open what save_model writes. Give NCTrainer the one "
            "that load_classifier returns beside the model, as processing_class.",
            type(classifier).__name__,
        )
    if not (hasattr(classifier, "pretrained_cfg") or hasattr(classifier, "config")):
        logger.warning(
            "%s is neither a timm model nor a transformers one. It trains, and its checkpoints resume, but save_model "
            "and a push will refuse to make a folder of it: save the state_dict of `trainer.classifier` instead.",
            type(classifier).__name__,
        )


# ---- The data ----


def check_data(args: NCTrainingArguments, dataloader: Any, eval_dataset: Any, data_collator: Collator) -> None:
    """Refuse data of which no batch can be made, before the first step. At most one sample of a data set is read.

    A collator of the user's may make a batch of anything, so samples are looked at for ours alone.

    Args:
        args: of the run.
        dataloader: of the training.
        eval_dataset: of the trainer: one, several by name, or None.
        data_collator: of the trainer.

    Raises:
        ValueError: for an epoch without a batch, and for samples without images or without labels to train on.
    """
    if not isinstance(dataloader, DataLoader):
        return
    if has_length(dataloader) and len(dataloader) == 0 and args.dataloader_drop_last:
        _refuse_empty_epochs(args, len(dataloader.dataset))
    if data_collator is not collate:
        return
    _check_sample("train_dataset", dataloader.dataset, dataloader.collate_fn, ("pixel_values", "labels"))
    if args.eval_strategy != IntervalStrategy.NO:
        sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        for name, dataset in sets.items():
            check_evaluated(args, dataset, data_collator, f"eval_dataset {name}".strip())


def check_evaluated(
    args: NCTrainingArguments, dataset: Any, data_collator: Collator, name: str = "the data set to evaluate"
) -> None:
    """Refuse a data set of whose first sample our collator makes no batch of images, with ValueError."""
    if data_collator is collate and not args.remove_unused_columns:
        _check_sample(name, dataset, collate, ("pixel_values",))


def check_told_labels(dataset: Any, told: np.ndarray | None, collator: Collator) -> None:
    """Refuse a data set whose samples have other labels than those that it tells. A few samples are read.

    Class counts, names and the draw of images come from what it tells, a column or an attribute; the loss has the
    labels of the samples.

    Args:
        dataset: of the training.
        told: (N,) integers, `labels_of(dataset)`; nothing is looked at when None.
        collator: of the trainer.

    Raises:
        ValueError: naming an image, and both of its labels.
    """
    if told is None:
        return
    for row in np.linspace(0, len(told) - 1, min(len(told), ROWS_LOOKED_AT), dtype=int).tolist():
        if (rows := _rows(dataset, row)) is None:
            return
        try:
            labels = collator(rows)["labels"]
        except Exception:  # the training meets it in its own place
            return
        if labels.shape != (1,) or labels.is_floating_point():
            return
        if int(labels) != told[row]:
            raise ValueError(
                f"image {row} of the training set has the label {int(labels)} in its sample, and {told[row]} in the "
                "labels from which class counts, names and draws come. Name the column of the labels by NCTrainer's "
                "label_column; where samples have labels of their own, give class_counts, and leave sampler at "
                "instance."
            )


def _refuse_empty_epochs(args: NCTrainingArguments, images: int) -> None:
    each = "twice each" if args.sampler in PAIRED.values() else "once each"
    raise ValueError(
        f"`dataloader_drop_last` leaves no batch of an epoch: {images} images, drawn {each}, do not fill one batch of "
        f"{args.train_batch_size} on {args.world_size} process(es). Lower per_device_train_batch_size, or set "
        "dataloader_drop_last=False."
    )


def _check_sample(name: str, dataset: Any, collator: Collator, needed: tuple[str, ...]) -> None:
    """Refuse a data set if the collator makes no batch with these keys of its first sample."""
    rows = _rows(dataset, 0)
    if rows is None:
        return
    problem: Exception | None = None
    try:
        batch = collator(rows)
        missing = [key for key in needed if key not in batch]
    except Exception as error:  # whatever a collator makes of something unknown
        problem, missing = error, list(needed)
    if missing:
        sample = rows if isinstance(rows, Mapping) else rows[0]
        raise ValueError(
            f"`{name}` gives {_described(sample)}, of which no batch with `{'` and `'.join(missing)}` can be made. "
            "load_images makes a set for NCTrainer of a `datasets.Dataset` with images and labels. A set of your own "
            "must return dicts with `pixel_values`, a tensor (3, H, W), and `labels`, an integer, and nothing else "
            "that cannot be stacked; or give NCTrainer a data_collator."
        ) from problem


def _rows(dataset: Any, index: int) -> Any:
    """What a data loader would get for an index; None for a stream, our own sets, and what cannot be read that way."""
    if dataset is None or isinstance(dataset, IterableDataset) or getattr(dataset, "accepts_draws", False):
        return None
    try:
        if len(dataset) == 0:
            return None
        with unmoved_random_state():
            return dataset.__getitems__([index]) if getattr(dataset, "__getitems__", None) else [dataset[index]]
    except Exception:  # the training meets it in its own place, with the index that it asks for
        return None


def _described(sample: Any) -> str:
    """A sample in a few words, such as "a dict with `image` (PngImageFile), `label` (int)"."""
    if isinstance(sample, Mapping):
        parts = ", ".join(f"`{key}` ({type(value).__name__})" for key, value in sample.items())
        return f"a dict with {parts or 'nothing in it'}"
    if isinstance(sample, tuple | list):
        return f"a {type(sample).__name__} of {', '.join(type(value).__name__ for value in sample) or 'nothing'}"
    return f"a {type(sample).__name__}"
