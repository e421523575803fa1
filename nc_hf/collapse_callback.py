"""`CollapseCallback`: the course of NC1-NC4 over training, in whatever tracker the run reports to."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nc_hf.evaluation import geometry_of
from nc_hf.random_state import unmoved_random_state
from nc_hf.trainer import NCTrainer


class CollapseCallback(TrainerCallback):
    """Measures the geometry of the training features every few epochs, and after the last one.

    Where training stops early, the last measurement is of the classifier as it ends: with `load_best_model_at_end`,
    of the best one.

        trainer = NCTrainer(model, args, train_dataset=train)
        trainer.add_callback(CollapseCallback(trainer, every=10))

    The keys of `nc_hf.metrics.measure_geometry` are logged as they are, so they reach `report_to`. A measurement
    changes no weight, no statistic and no random number of the run.

    Training waits for each measurement: a pass over the data set, forward only, which takes around a third of the time
    of an epoch where reading images is cheap. Features go to every process, which keeps up to 2 GiB of them for the
    second reading that the geometry takes (a larger set is passed over twice) and sums them in float64 on its CPU. Our
    image sets give their images without augmentation here; any other data set gives them as it does to the trainer, so
    one that augments at random has to be replaced by `dataset`.

    Args:
        trainer: whose classifier is measured; all its processes take part.
        every: number of epochs between measurements.
        dataset: the trainer's training set when None.

    Raises:
        TypeError: for a trainer of another kind.
        ValueError: for `every` below 1.
    """

    def __init__(self, trainer: NCTrainer, every: int = 10, dataset: Dataset | None = None) -> None:
        if not isinstance(trainer, NCTrainer):
            raise TypeError(
                f"`CollapseCallback` measures an NCTrainer, got a {type(trainer).__name__}. NCTrainer with "
                "within_weight=0 and between_weight=0 adds no terms."
            )
        if every < 1:
            raise ValueError(f"`every` must be at least 1 epoch, got {every}. Leave the callback out to skip it.")
        self.trainer, self.every, self.dataset = trainer, every, dataset
        self._is_due = False  # an epoch has ended that was not measured

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure and log, where the epoch is one of those."""
        self._is_due = bool(round(state.epoch) % self.every) and state.global_step < state.max_steps
        if not self._is_due:
            self._measure(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure and log, where training stopped before its last epoch."""
        if self._is_due:
            self._is_due = False
            self._measure(control)

    def _measure(self, control: TrainerControl) -> None:
        dataset = self.trainer.train_dataset if self.dataset is None else self.dataset
        # A data loader draws a seed, which would shift every later draw of the run, and images may draw more.
        with unmoved_random_state(), self.trainer.keeping_features():
            means = self.trainer.class_means(dataset)
            geometry = geometry_of(self.trainer, dataset, means)
        should_log = control.should_log
        self.trainer.log(geometry)
        control.should_log = should_log  # a log clears this, and with it the loss of the epoch
