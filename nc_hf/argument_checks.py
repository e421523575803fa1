"""What `NCTrainingArguments` refuses: values out of range, and settings of schedule and centers that do not fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nc_hf.training_args import NCTrainingArguments

NOT_NEGATIVE = (
    *("within_weight", "between_weight", "start_epoch"),
    *("mixup_alpha", "cutmix_alpha", "warmup_epochs", "momentum", "centers_learning_rate"),
)
AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def check_ranges(args: NCTrainingArguments) -> None:
    """Refuse numbers that no run can have, with ValueError."""
    for name in NOT_NEGATIVE:
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"`{name}` must be at least 0, got {value}. Use 0 to switch it off.")
    for name in AT_LEAST_ONE:
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(args, name)}. Set it to 1 or more.")
    if not (math.isfinite(args.learning_rate) and args.learning_rate >= 0):
        raise ValueError(
            f"`learning_rate` must be at least 0, got {args.learning_rate}. Set a positive one, or 0 to leave the "
            "weights as they are."
        )
    if args.max_steps <= 0 and not (math.isfinite(args.num_train_epochs) and args.num_train_epochs > 0):
        raise ValueError(
            f"`num_train_epochs` must be above 0, got {args.num_train_epochs}. Set the epochs to train for, or count "
            "updates by max_steps; to measure a model alone, keep the default and do not call train."
        )
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"`neftune_noise_alpha` is {args.neftune_noise_alpha}, and adds noise to the token embeddings of language "
            "models, which image classifiers do not have. Leave it out."
        )


def check_schedule(args: NCTrainingArguments) -> None:
    """Refuse schedules that exclude each other or would do nothing, with ValueError."""
    if args.drw_epoch is not None and not args.drw_epoch >= 0:
        raise ValueError(
            f"`drw_epoch` must be at least 0, got {args.drw_epoch}. Leave it out to weigh from the start."
        )
    if args.drw_epoch is not None and args.class_weighting == "none":
        raise ValueError(
            f"`drw_epoch` is {args.drw_epoch} but `class_weighting` is none: nothing would be deferred. "
            "Set class_weighting: effective_number, or leave drw_epoch out."
        )
    if not (math.isfinite(args.lr_decay) and args.lr_decay >= 0) or any(not m >= 0 for m in args.lr_milestones or []):
        raise ValueError(
            f"`lr_decay` and `lr_milestones` must be at least 0, got {args.lr_decay} and {args.lr_milestones}. The "
            "learning rate is multiplied by the first at each epoch of the second."
        )
    if args.lr_milestones and args.lr_cosine:
        raise ValueError("`lr_milestones` and `lr_cosine` are two schedules; set one of them.")
    if args.warmup_epochs and not (args.lr_milestones or args.lr_cosine):
        raise ValueError(
            "`warmup_epochs` goes with `lr_milestones` or `lr_cosine`. "
            "For the schedules of `lr_scheduler_type` use `warmup_steps`."
        )


def check_centers(args: NCTrainingArguments) -> None:
    """Refuse settings of the collapse terms that their centers cannot follow, with ValueError."""
    if args.replicate_leak and args.centers != "learned":
        raise ValueError(
            f"`replicate_leak` holds learned centers where they were drawn, and `centers` is {args.centers}. "
            "Set centers: learned, or leave replicate_leak out."
        )
    if args.within_reduction == "images" and args.within_counts == "train":
        raise ValueError(
            "`within_reduction: images` is a mean over the images of an update, which `within_counts: train` "
            "would divide by those of the training set. Leave within_counts at batch."
        )
    if args.centers == "learned" and args.collapse_enabled:
        if args.within_weight == 0:
            raise ValueError(
                "`centers: learned` needs within_weight > 0, since L_B reaches the features only through L_W. "
                "Use `centers: ema` or `batch` for L_B alone."
            )
        if args.feature_scale != "none":
            raise ValueError(
                "`centers: learned` follow the features in their own units: set feature_scale: none, and "
                f"within_weight as in the paper (0.01 for CIFAR; it is {args.within_weight}). "
                "Or use `centers: ema`."
            )
        if args.optim != "sgd":
            raise ValueError(
                f"`centers: learned` are trained by plain SGD and `optim` is {str(args.optim)!r}. "
                "Set optim: sgd, or use `centers: ema`, which needs no optimizer."
            )
