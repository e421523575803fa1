"""`CollapseCallback`: measured at the right epochs, logged like the rest, and without a trace in the weights."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from small_images import SmallImages
from small_runs import network
from transformers import Trainer, TrainerCallback, TrainingArguments

from nc_hf import CollapseCallback, NCTrainer, NCTrainingArguments
from nc_hf.evaluation import geometry_of


def train(folder, *, measured: bool, callbacks: Sequence[TrainerCallback] = ()) -> NCTrainer:
    args = NCTrainingArguments(
        str(folder), num_train_epochs=5, per_device_train_batch_size=36, mixup_alpha=0.2, precision="fp32",
        logging_strategy="epoch", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = NCTrainer(network(), args, train_dataset=SmallImages())  # whose batch statistics must not move either
    if measured:
        trainer.add_callback(CollapseCallback(trainer, every=2))
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> NCTrainer:
    return train(tmp_path_factory.mktemp("measured"), measured=True)


def test_geometry_is_logged_every_so_many_epochs_and_at_the_end(measured):
    records = [record for record in measured.state.log_history if "nc1_variability" in record]
    assert [record["epoch"] for record in records] == [2, 4, 5]
    images = SmallImages()
    last = geometry_of(measured, images, measured.class_means(images))
    assert {name: records[-1][name] for name in last} == last


class Stop(TrainerCallback):
    """Ends training after the third epoch, later than callbacks before it are asked."""

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = round(state.epoch) == 3


def test_training_that_stops_early_is_measured_at_its_end_too(tmp_path):
    trainer = train(tmp_path, measured=True, callbacks=[Stop()])
    assert [record["epoch"] for record in trainer.state.log_history if "nc1_variability" in record] == [2, 3]


def test_the_losses_of_measured_epochs_are_logged_too(measured):
    assert [record["epoch"] for record in measured.state.log_history if "loss" in record] == [1, 2, 3, 4, 5]


def test_measuring_changes_nothing(measured, tmp_path):
    plain = train(tmp_path, measured=False)
    for name, tensor in plain.task.state_dict().items():
        assert torch.equal(tensor, measured.task.state_dict()[name]), name


def test_an_interval_of_no_epochs_is_refused(measured):
    with pytest.raises(ValueError, match="`every` must be at least 1 epoch, got 0"):
        CollapseCallback(measured, every=0)


def test_a_stock_trainer_is_refused_at_once(tmp_path):
    trainer = Trainer(torch.nn.Linear(2, 2), TrainingArguments(str(tmp_path), report_to="none"))
    with pytest.raises(TypeError, match="measures an NCTrainer, got a Trainer"):
        CollapseCallback(trainer)
