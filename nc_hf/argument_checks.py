"""What `NCTrainingArguments` refuses: values out of range, and settings that contradict or cannot act together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from transformers.trainer_utils import HubStrategy, SchedulerType

from nc_hf.losses.classification import SUPERVISED_LOSSES

if TYPE_CHECKING:
    from nc_hf.training_args import NCTrainingArguments

NOT_NEGATIVE = (
    *("within_weight", "between_weight", "start_epoch"),
    *("mixup_alpha", "cutmix_alpha", "warmup_epochs", "momentum", "centers_learning_rate"),
)
PAIRED = {"contrastive": "two_views", "bilateral": "bilateral"}  # objectives on pairs, and the sampler that makes them
# What allows for the class counts by itself, and samplers that level them.
PRIOR_LOSSES = ("balanced_softmax", "arb", "logit_adjustment", "lade")
LEVELLING_SAMPLERS = ("class_balanced", "effective_number", "class_aware", "progressive", "reversed")
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
    if args.ghost_batch_size is not None and args.ghost_batch_size < 2:
        raise ValueError(
            f"`ghost_batch_size` must be at least 2, got {args.ghost_batch_size}. Leave it out to normalize whole "
            "batches."
        )
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
    if not 0 <= args.effective_number_beta < 1:
        raise ValueError(
            f"`effective_number_beta` must lie in [0, 1), got {args.effective_number_beta}. LDAM-DRW and the authors "
            "take 0.9999."
        )
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"`neftune_noise_alpha` is {args.neftune_noise_alpha}, and adds noise to the token embeddings of language "
            "models, which image classifiers do not have. Leave it out."
        )


def check_objective(args: NCTrainingArguments) -> None:
    """Refuse settings that an objective goes without, with ValueError."""
    for objective, sampler in PAIRED.items():
        if (args.objective == objective) != (args.sampler == sampler):
            raise ValueError(
                f"`objective: {objective}` and `sampler: {sampler}` go together, since its batches are pairs; got "
                f"`objective: {args.objective}` with `sampler: {args.sampler}`."
            )
    if args.objective in PAIRED:
        if args.auto_find_batch_size:
            raise ValueError(
                f"`objective: {args.objective}` needs batches of an even number of images, and `auto_find_batch_size` "
                "tries odd ones as well. Set per_device_train_batch_size, with gradient_accumulation_steps for more."
            )
        if args.per_device_train_batch_size % 2:
            raise ValueError(
                f"`objective: {args.objective}` needs an even per_device_train_batch_size, which counts both "
                f"images of a pair, got {args.per_device_train_batch_size}."
            )
        off = {"mixup_alpha": 0, "cutmix_alpha": 0, "class_weighting": "none"}
        if args.objective == "contrastive":  # nothing is classified
            off |= {"loss": "ce", "loss_settings": {}, "label_smoothing_factor": 0, "within_counts": "batch"}
            off |= {"load_best_model_at_end": False}  # by an untrained head
        for name, value in off.items():
            if getattr(args, name) != value:
                raise ValueError(f"`objective: {args.objective}` goes without `{name}`: set it to {value}.")
    if args.objective in ("classification", "bilateral") and args.objective_settings:
        raise ValueError(f"`objective: {args.objective}` has no settings, got {args.objective_settings}.")


def check_corrections(args: NCTrainingArguments) -> None:
    """Refuse to correct the prior of the classes twice, with ValueError."""
    if args.class_weighting != "none" and args.sampler in LEVELLING_SAMPLERS:
        raise ValueError(
            f"`sampler: {args.sampler}` draws rare classes more often, and `class_weighting: "
            f"{args.class_weighting}` weighs them more: the prior would be corrected twice. Set sampler: "
            "instance, or class_weighting: none."
        )
    counts = args.loss_counts or SUPERVISED_LOSSES[args.loss].counts[0]
    if args.loss in (*PRIOR_LOSSES, "dot_regression") and counts != "none":
        if args.class_weighting != "none":
            raise ValueError(
                f"`loss: {args.loss}` allows for the class counts itself; class_weighting: {args.class_weighting} "
                "would correct twice. Set it to none."
            )
        if counts == "batch" and args.objective == "bilateral":
            raise ValueError(
                f"`loss: {args.loss}` would count the uniform half of each batch alone. Set loss: ce, as BBN."
            )
        if counts == "train" and args.sampler != "instance":
            raise ValueError(
                f"`loss: {args.loss}` allows for the class counts of the training set, which sampler: "
                f"{args.sampler} has levelled already. Set sampler: instance."
            )


def check_schedule(args: NCTrainingArguments) -> None:
    """Refuse schedules that exclude each other or would do nothing, with ValueError."""
    if args.sampler == "progressive" and args.max_steps > 0:
        raise ValueError(
            "`sampler: progressive` needs the length of the run: set num_train_epochs, not max_steps "
            f"({args.max_steps})."
        )
    if args.drw_epoch is not None and not args.drw_epoch >= 0:
        raise ValueError(
            f"`drw_epoch` must be at least 0, got {args.drw_epoch}. Leave it out to weigh from the start."
        )
    if args.drw_epoch is not None and args.class_weighting == "none":
        raise ValueError(
            f"`drw_epoch` is {args.drw_epoch} but `class_weighting` is none: nothing would be deferred. "
            "Set class_weighting: effective_number, or leave drw_epoch out."
        )
    if not isinstance(args.lr_milestones, list | tuple | None):
        raise ValueError(f"`lr_milestones` must be a list of epochs, such as [0.8, 0.9], got {args.lr_milestones!r}.")
    if not (math.isfinite(args.lr_decay) and args.lr_decay >= 0) or any(not m >= 0 for m in args.lr_milestones or []):
        raise ValueError(
            f"`lr_decay` and `lr_milestones` must be at least 0, got {args.lr_decay} and {args.lr_milestones}. The "
            "learning rate is multiplied by the first at each epoch of the second."
        )
    if args.lr_milestones and args.lr_cosine:
        raise ValueError("`lr_milestones` and `lr_cosine` are two schedules; set one of them.")
    by_epochs = "lr_milestones" if args.lr_milestones else "lr_cosine" if args.lr_cosine else None
    defaults = {"lr_scheduler_type": SchedulerType.LINEAR, "lr_scheduler_kwargs": None, "warmup_steps": 0}
    stock = [name for name, value in defaults.items() if (getattr(args, name) or value) != value]
    if by_epochs and stock:
        raise ValueError(
            f"`{stock[0]}` would be ignored beside `{by_epochs}`, which is the schedule. Switch {by_epochs} off, or "
            f"leave {stock[0]} out (warm-up is `warmup_epochs` here)."
        )
    if args.warmup_epochs and not by_epochs:
        raise ValueError(
            "`warmup_epochs` goes with `lr_milestones` or `lr_cosine`. "
            "For the schedules of `lr_scheduler_type` use `warmup_steps`."
        )


def check_centers(args: NCTrainingArguments) -> None:
    """Refuse settings of the collapse terms that their centers cannot follow, with ValueError."""
    if not 0 <= args.centers_momentum < 1:
        raise ValueError(f"`centers_momentum` must lie in [0, 1), got {args.centers_momentum}.")
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


def check_hub_strategy(args: NCTrainingArguments) -> None:
    """Refuse uploads that need pickle to load, with ValueError."""
    uploads_checkpoints = HubStrategy(args.hub_strategy) in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
    if args.push_to_hub and uploads_checkpoints:
        raise ValueError(
            f"`hub_strategy: {args.hub_strategy}` would upload checkpoints, which need pickle to load. "
            "Use every_save or end; checkpoints stay in the output folder."
        )
