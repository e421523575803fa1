"""The log of a run: one line an epoch for people, one JSON object a record for programs."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from nc_hf.argument_checks import PAIRED

logger = logging.getLogger(__name__)


class RunLog(TrainerCallback):
    """Appends every record of a `Trainer` to a JSON-lines file and logs one line an epoch.

    The line shows the terms of the training loss, the learning rate, images per second of training (evaluation and
    saving not counted) and, where there is a validation split, its accuracies. It never shows the test split.

    Args:
        path: of the JSON-lines file; records are appended.
        stage: name in front of each line, such as `"stage1"`.
    """

    def __init__(self, path: str | Path, stage: str) -> None:
        self.path, self.stage = Path(path), stage
        self.record: dict[str, Any] = {}
        self.train_seconds, self.train_images, self._epoch_started = 0.0, 0, 0.0
        self._stopped: float | None = None  # when, for an evaluation or a save within the epoch

    def speed(self) -> dict[str, float]:
        """Seconds spent in training steps by this process, and images per second of all processes in them."""
        if not self.train_seconds:
            return {}
        return {"train_seconds": self.train_seconds, "images_per_second": self.train_images / self.train_seconds}

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the line of the epoch before and start the clock."""
        self._write_line(state)
        self._epoch_started, self._first_step, self._stopped = time.perf_counter(), state.global_step, None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock where the training stops to evaluate or to save."""
        if control.should_evaluate or control.should_save:
            self._stopped = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start it again."""
        if self._stopped is not None:
            self._epoch_started += time.perf_counter() - self._stopped
            self._stopped = None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        self.on_step_begin(args, state, control)
        seconds = time.perf_counter() - self._epoch_started
        images = (state.global_step - self._first_step) * (
            state.train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        if has_length(loader := kwargs.get("train_dataloader")):
            pairs = getattr(args, "sampler", None) in PAIRED.values()  # an epoch draws two images for each
            images = min(images, (2 if pairs else 1) * len(loader.dataset))
        self.train_seconds, self.train_images = self.train_seconds + seconds, self.train_images + images
        self.record["images_per_second"] = images / seconds

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one JSON object."""
        self.record |= logs or {}
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"stage": self.stage, "step": state.global_step, **(logs or {})}) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the last line."""
        self._write_line(state)

    def _write_line(self, state: TrainerState) -> None:
        if "loss" in self.record and state.is_world_process_zero:
            shown = ["loss", *sorted(name for name in self.record if name.startswith("loss_")), "learning_rate"]
            parts = [f"{name.removeprefix('loss_')} {self.record[name]:.4g}" for name in shown if name in self.record]
            parts += [
                f"validation {name.removeprefix('eval_')} {value:.3f}"
                for name, value in self.record.items()
                if name.startswith(("eval_accuracy", "eval_class_mean_accuracy"))
            ]
            if "images_per_second" in self.record:
                parts.append(f"{self.record['images_per_second']:.0f} images/s")
            logger.info("%s epoch %g/%g  %s", self.stage, state.epoch, state.num_train_epochs, "  ".join(parts))
        self.record = {}


def nonfinite_error(
    path: Path, *, step: int, learning_rate: float, terms: dict[str, float], images: Tensor
) -> FloatingPointError:
    """Write what is known about a loss that is not finite, and return the error to stop with.

    Args:
        path: of the JSON report.
        step: the update that was about to be made, from 1.
        learning_rate: of the network.
        terms: of the loss on this process, summed since the last log.
        images: (B, 3, H, W) of the batch, on this process.
    """
    rows = (~images.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    bad = [name for name, value in sorted(terms.items()) if not math.isfinite(value)]
    report = {"step": step, "learning_rate": learning_rate, "images_not_finite": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | {"terms": {name: repr(value) for name, value in terms.items()}}, indent=1))
    cause = "Lower the learning rate, or set precision: fp32."
    if rows:
        cause = f"Images of the batch have values that are not finite (rows {rows}): check them and their transform."
    return FloatingPointError(
        f"the loss is not finite at step {step} (in {', '.join(bad) or 'another process'}), learning rate "
        f"{learning_rate:g}. {cause} The weights are still those of the step before, but running statistics of norms "
        f"may have seen such values: go on from a checkpoint. {path.name} in the output folder has the terms."
    )
