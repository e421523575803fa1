"""What depends on the epoch: learning rate, the start of the collapse terms, the start of class weighting."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.optimizer import Optimizer

from nc_hf.training_args import NCTrainingArguments, resolve_epoch


def learning_rate_factor(args: NCTrainingArguments, num_epochs: float) -> Callable[[int], float]:
    """Factor on the learning rate during 0-based epoch e, constant within it.

    Warm-up is (e + 1) / warmup_epochs, as in LDAM-DRW and the authors' code; milestones are the paper's (the authors'
    code steps its scheduler five epochs late); the cosine goes to 0 over all epochs.

    Args:
        args: with `lr_milestones` or `lr_cosine`.
        num_epochs: of the run.
    """
    warmup = resolve_epoch(args.warmup_epochs, num_epochs)
    milestones = [resolve_epoch(value, num_epochs) for value in args.lr_milestones or []]

    def factor(epoch: int) -> float:
        if epoch < warmup:
            return (epoch + 1) / warmup
        if args.lr_cosine:
            return 0.5 * (1 + math.cos(math.pi * epoch / num_epochs))
        return args.lr_decay ** sum(epoch >= milestone for milestone in milestones)

    return factor


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
