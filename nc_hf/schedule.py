"""What depends on the epoch, and the parameter groups that do not follow it."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.optimizer import Optimizer

from nc_hf.training_args import NCTrainingArguments, resolve_epoch


def learning_rate_factor(args: NCTrainingArguments, num_epochs: float) -> Callable[[int], float]:
    """Factor on the learning rate during 0-based epoch e, constant within it.

    Warm-up is (e + 1) / warmup_epochs, as in LDAM-DRW and the authors' code, so one epoch of it changes nothing;
    milestones are the paper's (the authors' code steps its scheduler five epochs late); the cosine goes to 0 over all
    epochs.

    Args:
        args: with `lr_milestones` or `lr_cosine`.
        num_epochs: of the run.
    """
    warmup = resolve_epoch(args.warmup_epochs, num_epochs)
    milestones = [resolve_epoch(value, num_epochs) for value in args.lr_milestones or []]

    def factor(epoch: int) -> float:
        if epoch < warmup:
            return min(1.0, (epoch + 1) / warmup)
        if args.lr_cosine:
            return 0.5 * (1 + math.cos(math.pi * epoch / num_epochs))
        return args.lr_decay ** sum(epoch >= milestone for milestone in milestones)

    return factor


def describe_schedule(args: NCTrainingArguments, num_epochs: float, updates_per_epoch: int, batch_size: int) -> str:
    """One line on batch, precision, and the epochs at which something changes.

    Args:
        args: of the run.
        num_epochs: of the run.
        updates_per_epoch: optimizer steps an epoch.
        batch_size: images a batch on each process, which `auto_find_batch_size` may have lowered.
    """
    batch = batch_size * args.world_size * args.gradient_accumulation_steps
    parts = [
        f"learning rate {args.learning_rate:g}",
        f"global batch {batch} = {batch_size} x {args.world_size} process(es) x "
        f"{args.gradient_accumulation_steps} accumulated",
        f"{args.max_steps} updates" if args.max_steps > 0 else f"{num_epochs:g} epochs of {updates_per_epoch} updates",
        f"precision {args.precision}{', channels last' if args.channels_last else ''}",
    ]
    if args.ghost_batch_size is not None:
        parts.append(f"batch norms see {min(args.ghost_batch_size, batch_size)} images at a time")
    if args.collapse_enabled:
        before = ", against random centers before" if args.replicate_leak else ""
        start = resolve_epoch(args.start_epoch, num_epochs)
        parts.append(f"collapse terms ({args.centers}) from epoch {start:g}{before}")
    if args.class_weighting != "none":
        parts.append(f"{args.class_weighting} weights from epoch {resolve_epoch(args.drw_epoch or 0, num_epochs):g}")
    if args.lr_milestones:
        parts.append(
            "learning rate falls at " + ", ".join(f"{resolve_epoch(m, num_epochs):g}" for m in args.lr_milestones)
        )
    if args.warmup_epochs:
        warmup = resolve_epoch(args.warmup_epochs, num_epochs)
        parts.append(f"{warmup:g} epochs of warm-up" if warmup > 1 else "no warm-up: it takes two epochs or more")
    return "; ".join(parts)


def epoch_scheduler(
    optimizer: Optimizer, args: NCTrainingArguments, num_epochs: float, updates_per_epoch: int
) -> LambdaLR:
    """Scheduler of `learning_rate_factor`, stepped once an update.

    Args:
        optimizer: all its groups follow the schedule.
        args: see `learning_rate_factor`.
        num_epochs: of the run.
        updates_per_epoch: optimizer steps an epoch.
    """
    factor = learning_rate_factor(args, num_epochs)
    return LambdaLR(optimizer, lambda step: factor(step // updates_per_epoch))


def move_to_own_group(optimizer: Optimizer, parameter: Tensor, **settings: float) -> None:
    """Give one parameter of an optimizer a group of its own, the last one, with these settings."""
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not parameter]
    optimizer.add_param_group({"params": [parameter], **settings})


def hold_constant(scheduler: LRScheduler, group: int) -> None:
    """Take one parameter group out of a schedule: its learning rate stays the initial one.

    Args:
        scheduler: a `LambdaLR`, which most schedules of transformers are.
        group: index of the parameter group, from the end if negative.

    Raises:
        ValueError: for another kind of scheduler.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"learned centers keep a constant learning rate, which {type(scheduler).__name__} cannot give to one "
            "group. Choose another `lr_scheduler_type`, `lr_milestones` or `lr_cosine`, or `centers: ema`."
        )
    scheduler.lr_lambdas[group] = lambda step: 1.0
    parameters = scheduler.optimizer.param_groups[group]
    parameters["lr"] = scheduler.base_lrs[group]
    scheduler._last_lr[group] = scheduler.base_lrs[group]
