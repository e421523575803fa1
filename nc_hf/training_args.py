"""Arguments of stage one: `NCTrainingArguments`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from nc_hf.argument_checks import (
    check_centers,
    check_corrections,
    check_hub_strategy,
    check_objective,
    check_ranges,
    check_schedule,
)
from nc_hf.choices import check_choices
from nc_hf.losses.classification import SUPERVISED_LOSSES, SupervisedLoss
from nc_hf.losses.collapse import BetweenObjective, CenterMode, FeatureScale, Reduction
from nc_hf.mixing import MixupRule
from nc_hf.precision import Precision, check_precision, choose_precision
from nc_hf.rebalancing import ClassWeighting
from nc_hf.sampling import NAMES as SAMPLERS
from nc_hf.sampling import SamplerName

logger = logging.getLogger(__name__)

Objective = Literal["classification", "contrastive", "experts", "bilateral"]
FLAG = {"nargs": "?", "const": True}  # for HfArgumentParser: `--bf16` alone is true


def resolve_epoch(value: float, num_epochs: float) -> float:
    """Epochs from a setting: a number below 1 is a fraction of the run, anything else counts epochs (0 is the start).

    Fractions are cut to whole epochs, at least one, so a recipe keeps its shape when its run is shortened.

    Args:
        value: >= 0.
        num_epochs: of the run.
    """
    return float(max(1, math.floor(value * num_epochs + 1e-6))) if 0 < value < 1 else float(value)


@dataclass
class NCTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the paper's terms, re-balancing and schedules.

    Where these differ from the defaults of `TrainingArguments`: `precision` is auto, so a run is in bf16 or fp16 where
    the device is fast at it, and `channels_last` is on there and on a CPU; `bf16` and `fp16` are None until then, to
    leave the choice open, while False rules one out; `remove_unused_columns` is False (image transforms need the image
    column) and `logging_nan_inf_filter` is False (a loss that is not finite stops the run).
    `start_epoch`, `drw_epoch`, `lr_milestones` and `warmup_epochs` count epochs when they are 1 or more and are
    fractions of the run when they are less than 1.

    The defaults are for fine-tuning: running class means as centers, and L_W relative to the squared norm of the
    features, with the weight that the paper's 0.01 comes to on CIFAR-10 (where that norm is about 9). The recipes of
    the paper set `feature_scale: none` and the weights of its Table 1; `nc_learned.yaml` also `centers: learned`, as
    the authors' code.

    Raises:
        ValueError: for a value out of its range, and for settings that contradict or cannot act beside each other.
    """

    # Parameters that control the collapse terms
    within_weight: float = field(default=0.1, metadata={"help": "lambda_1, the weight of L_W; 0 switches it off."})
    between_weight: float = field(
        default=0.1,
        metadata={
            "help": "lambda_2, the weight of L_B, a mean over classes; 0 switches it off. The paper takes 0.1 for 10 "
            "classes, 0.5 for 100 and 1.0 for 1000 (Table 1)."
        },
    )
    start_epoch: float = field(default=0.0, metadata={"help": "Epoch from which the two terms are part of the loss."})
    centers: CenterMode = field(
        default="ema", metadata={"help": "Class centers: ema (running means), learned (as the authors' code), batch."}
    )
    centers_learning_rate: float = field(
        default=0.5, metadata={"help": "Constant learning rate of learned centers, the authors' value."}
    )
    centers_momentum: float = field(default=0.9, metadata={"help": "Momentum of the running means (centers: ema)."})
    center_init: Literal["auto", "normal", "data"] = field(
        default="auto",
        metadata={
            "help": "Start of the centers: class means of one pass over the training images (data), or without it "
            "(normal): learned ones are then drawn, running means begin with the first batches. auto: normal when "
            "start_epoch is 0, as the authors; else data."
        },
    )
    between_objective: BetweenObjective = field(
        default="mean", metadata={"help": "L_B: mean (Eq. 15), min (Eq. 14, worst pair) or gram."}
    )
    within_reduction: Reduction = field(
        default="mean",
        metadata={
            "help": "L_W: mean over classes (the authors' code), sum (Eq. 13 as printed), images (center loss)."
        },
    )
    feature_scale: FeatureScale = field(
        default="rms",
        metadata={"help": "L_W relative to the mean squared norm of the features: rms, or none as in the paper."},
    )
    within_counts: Literal["batch", "train"] = field(
        default="batch",
        metadata={"help": "n_k of L_W: images in the update (the authors' code) or in the training set."},
    )
    replicate_leak: bool = field(
        default=False,
        metadata={
            "help": "Before start_epoch keep both terms against random frozen centers, as the authors' code did "
            "(centers: learned)."
        },
    )

    # Parameters that control the supervised loss and re-balancing
    objective: Objective = field(
        default="classification",
        metadata={
            "help": "classification; contrastive (FCL, KCL, TSC); experts (RIDE) and bilateral (BBN), each with its "
            "network."
        },
    )
    objective_settings: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Of the objective: see ContrastiveSettings and ExpertsTask."}
    )
    loss: str = field(default="ce", metadata={"help": f"Supervised loss: {', '.join(SUPERVISED_LOSSES)}."})
    loss_settings: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Of the loss, by name, such as gamma of focal."}
    )
    loss_counts: Literal["batch", "train", "none"] | None = field(
        default=None, metadata={"help": "Class counts of some losses: batch (the update), train, none (dot products)."}
    )
    class_weighting: ClassWeighting = field(
        default="none", metadata={"help": "Class weights in the supervised loss: none, inverse, effective_number."}
    )
    effective_number_beta: float = field(default=0.9999, metadata={"help": "beta of the effective number."})
    drw_epoch: float | None = field(
        default=None, metadata={"help": "Epoch from which class_weighting applies (deferred re-weighting)."}
    )
    sampler: SamplerName = field(
        default="instance", metadata={"help": f"Draw of training images: {', '.join(SAMPLERS)}."}
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "mixup with lambda ~ Beta(alpha, alpha); 0 is off."})
    cutmix_alpha: float = field(
        default=0.0,
        metadata={"help": "CutMix with lambda ~ Beta(alpha, alpha); 0 is off. With mixup: either, by chance."},
    )
    mixup_rule: MixupRule = field(
        default="weighted",
        metadata={
            "help": "Labels of a mixed feature in the collapse terms: both, weighted by lambda; the one of the larger "
            "share; or the first alone, as the authors' code."
        },
    )

    # Parameters that control the optimization
    ghost_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Images that batch norms see at a time in training; None: all of a batch on a device. The paper's "
            "four GPUs come to 32."
        },
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of SGD (`optim: sgd` has none by itself)."})
    decay_all_parameters: bool = field(
        default=False, metadata={"help": "Weight decay on biases and norms too, as the authors' code."}
    )
    lr_milestones: list[float] | None = field(
        default=None, metadata={"help": "Epochs at which the learning rate is multiplied by lr_decay."}
    )
    lr_decay: float = field(default=0.1, metadata={"help": "Factor at each milestone."})
    lr_cosine: bool = field(
        default=False, metadata={"help": "Learning rate by half a cosine over the epochs, constant within each."}
    )
    warmup_epochs: float = field(
        default=0.0,
        metadata={"help": "Epochs e of linear warm-up, (e + 1) / warmup_epochs (with milestones or cosine)."},
    )

    # Parameters that control speed
    precision: Precision = field(
        default="auto",
        metadata={"help": "auto: bf16 where the CPU or GPU has instructions for it, else fp16 on a GPU, else fp32."},
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "True is `precision: bf16`; False takes bf16 out of what `precision: auto` chooses from.",
            **FLAG,
        },
    )
    fp16: bool | None = field(
        default=None,
        metadata={
            "help": "True is `precision: fp16`; False takes fp16 out of what `precision: auto` chooses from.",
            **FLAG,
        },
    )
    channels_last: bool | None = field(
        default=None,
        metadata={"help": "Memory format of convolutions; None chooses: on with bf16 or fp16, and on a CPU.", **FLAG},
    )
    expected_processes: int | None = field(
        default=None, metadata={"help": "Refuse to start with another number of processes."}
    )

    # Defaults of TrainingArguments that do not suit images
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the model does not take."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})

    def __post_init__(self) -> None:
        """Check the new settings before any device is touched."""
        self._read_settings()
        self._check()
        # Launched on a machine without an accelerator, each process would else think that it is alone.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        self._resolve_precision()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is no faster copy to prepare for
        if self.max_steps <= 0:
            self.warn_about_late_epochs(self.num_train_epochs)

    def _read_settings(self) -> None:
        """Settings by name are JSON on a command line of HfArgumentParser."""
        for name in ("objective_settings", "loss_settings"):
            given = getattr(self, name) or {}
            try:
                setattr(self, name, dict(json.loads(given) if isinstance(given, str) else given))
            except (TypeError, ValueError) as error:
                message = f'`{name}` must be settings by name, such as {{"gamma": 2}}, got {given!r}.'
                raise ValueError(message) from error

    def _check(self) -> None:
        check_choices(self, NCTrainingArguments)
        check_ranges(self)
        check_precision(self)
        self.supervised_loss(class_counts=[1, 1])  # a setting out of range is refused before any data are read
        check_objective(self)
        check_corrections(self)
        check_schedule(self)
        check_centers(self)
        check_hub_strategy(self)

    def _resolve_precision(self) -> None:
        self.precision = choose_precision(self, launched=self.mixed_precision)
        self.mixed_precision = "no" if self.precision == "fp32" else self.precision
        self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
        if self.channels_last is None:
            self.channels_last = self.precision != "fp32" or self.device.type == "cpu"

    def warn_about_late_epochs(self, num_epochs: float) -> None:
        """Warn of what would start after the last of `num_epochs` epochs, and of a cosine over one."""
        late = [(name, getattr(self, name)) for name in ("start_epoch", "drw_epoch")]
        late += [("lr_milestones", milestone) for milestone in self.lr_milestones or []]
        for name, value in late:
            if value is None or resolve_epoch(value, num_epochs) < num_epochs or num_epochs <= 0:
                continue
            if 0 < value < 1:
                logger.warning(
                    "`%s` is %s, a share of the run cut to whole epochs, at least one: it would start after epoch %g, "
                    "and the run ends after %g, so it is never switched on. Train longer, or set it to 0.",
                    *(name, value, resolve_epoch(value, num_epochs), num_epochs),
                )
            else:
                logger.warning(
                    "`%s` is %s but the run has %s epochs: it is never switched on. From 1 on, the number counts "
                    "epochs; below 1 it is a share of the run.",
                    *(name, value, num_epochs),
                )
        if self.lr_cosine and 0 < num_epochs <= 1:
            logger.warning(
                "`lr_cosine` changes the learning rate between epochs, and the run has %g: it stays constant. For a "
                "cosine over the updates set `lr_scheduler_type: cosine` in its place.",
                num_epochs,
            )

    def supervised_loss(self, class_counts: Sequence[int] | None) -> SupervisedLoss:
        """The loss of the classification, from the settings.

        Args:
            class_counts: (K,) training images per class, where known; only for a loss that uses them.

        Raises:
            ValueError: as `SupervisedLoss`, and for labels that would be smoothed twice.
        """
        settings = dict(self.loss_settings)
        if self.label_smoothing_factor:
            entry = SUPERVISED_LOSSES.get(self.loss)
            if entry is not None and "label_smoothing" not in entry.settings:
                raise ValueError(
                    f"`label_smoothing_factor` is {self.label_smoothing_factor}, and `loss: {self.loss}` does not "
                    "smooth labels. Set it to 0."
                )
            if "label_smoothing" in settings:
                raise ValueError(
                    f"`label_smoothing_factor` is {self.label_smoothing_factor}, and `label_smoothing` of "
                    f"loss_settings {settings['label_smoothing']}: labels would be smoothed twice. Set one of them."
                )
            settings["label_smoothing"] = self.label_smoothing_factor
        return SupervisedLoss(self.loss, class_counts, counts=self.loss_counts, **settings)

    @property
    def mixes_images(self) -> bool:
        """Whether training images are mixed with partners."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def collapse_enabled(self) -> bool:
        """Whether either collapse term has a weight."""
        return self.within_weight > 0 or self.between_weight > 0
