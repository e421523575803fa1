"""A signal between two updates: the run is saved, ends with that exit code, and goes on as if nothing were."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_images import SmallImages
from small_runs import arguments, network
from test_train_recipe import ACCELERATE, ROOT, command, finish, start
from transformers import TrainerCallback, TrainerControl

from nc_hf import interruption
from nc_hf.checkpoints import is_complete
from nc_hf.interruption import SaveOnSignal
from nc_hf.trainer import NCTrainer


class Raise(TrainerCallback):
    """Signals to this process while an update runs."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for number in self.numbers:
                signal.raise_signal(number)


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C is heard even where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def trainer(folder: Path, *callbacks: TrainerCallback) -> NCTrainer:
    return NCTrainer(network(), arguments(folder), train_dataset=SmallImages(), callbacks=list(callbacks))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_weights(tmp_path, number):
    straight = trainer(tmp_path / "straight")
    straight.train()
    before = signal.getsignal(number)
    stopped = trainer(tmp_path / "stopped", Raise(5, number, number), SaveOnSignal())  # as launchers pass it on
    with pytest.raises(SystemExit) as ended:
        stopped.train()
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert is_complete(tmp_path / "stopped" / "checkpoint-5")
    resumed = trainer(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    for (name, a), b in zip(straight.task.state_dict().items(), resumed.task.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_later_second_signal_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "AGAIN", -1.0)
    stopped = trainer(tmp_path, Raise(5, signal.SIGINT, signal.SIGINT), SaveOnSignal())
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_was_ignored_stays_so(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    done = trainer(tmp_path, Raise(5, signal.SIGINT), SaveOnSignal())
    done.train()
    assert done.state.global_step == 12 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


class Count(TrainerCallback):
    """What is done, by step."""

    def __init__(self) -> None:
        self.saved, self.evaluated = [], []

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(state.global_step)


@pytest.mark.parametrize(
    ("step", "saved", "evaluated"), [(5, [3, 5], [3]), (6, [3, 6], [3, 6]), (12, [3, 6, 9, 12], [3, 6, 9, 12])]
)
def test_what_an_epoch_ends_with_is_done_at_its_end_alone(tmp_path, step, saved, evaluated):
    """Three updates an epoch, four epochs; one checkpoint is kept, and the best one is asked for."""
    options = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
    }
    args, images, count = arguments(tmp_path, **options), SmallImages(), Count()
    callbacks = [Raise(step, signal.SIGTERM), count, SaveOnSignal()]
    stopped = NCTrainer(network(), args, train_dataset=images, eval_dataset=images, callbacks=callbacks)
    with pytest.raises(SystemExit) as ended:
        stopped.train()
    assert ended.value.code == 128 + signal.SIGTERM
    assert (count.saved, count.evaluated) == (saved, evaluated)
    assert is_complete(tmp_path / f"checkpoint-{step}")


def test_signals_are_given_back_after_a_training_that_failed(tmp_path, monkeypatch):
    stopped = trainer(tmp_path, SaveOnSignal())
    monkeypatch.setattr(stopped, "training_step", lambda *arguments: pytest.fail("out of memory"))
    with pytest.raises(pytest.fail.Exception):
        stopped.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_between_two_agreements_waits_for_the_next_one(monkeypatch):
    """Whatever one process alone did upon it, the others would wait for, or miss."""
    callback, control = SaveOnSignal(), TrainerControl()
    now = (
        SimpleNamespace(world_size=2, device="cpu", load_best_model_at_end=False),
        SimpleNamespace(epoch=0.5, global_step=1, max_steps=4),
        control,
    )

    def slow_gather(tensor):
        callback._receive(signal.SIGTERM, None)
        return tensor

    monkeypatch.setattr(interruption, "gather", slow_gather)
    callback.on_step_end(*now)
    callback.on_epoch_end(*now)
    callback.on_save(*now)  # does not exit
    assert not control.should_save
    monkeypatch.setattr(interruption, "gather", lambda tensor: tensor)
    callback.on_step_end(*now)
    assert control.should_save
    with pytest.raises(SystemExit) as ended:
        callback.on_save(*now)
    assert ended.value.code == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process can handle")
def test_two_processes_of_a_recipe_stop_together_and_the_same_command_goes_on(tmp_path):
    launcher = (ACCELERATE, "launch", "--config_file", str(ROOT / "recipes/accelerate/cpu_2.yaml"))
    asked = ["--name", "stopped", "--stage1.expected_processes", "2", "--stage2.num_train_epochs", "1"]
    arguments = command(*asked, "--stage1.num_train_epochs", "6", launcher=launcher)
    process = start(tmp_path, arguments)
    checkpoints = tmp_path / "out/stopped/checkpoints/stage1"
    while not list(checkpoints.glob("checkpoint-*/complete.json")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # to the launcher, which passes it on
    output = finish(process, check=False).stdout
    assert process.returncode
    assert "2 process(es) on cpu" in output and "global batch 64 = 32 x 2 process(es)" in output
    steps = sorted(int(path.name.split("-")[1]) for path in checkpoints.iterdir() if is_complete(path))
    assert f"stopped and saved after {steps[-1]} of" in output
    assert not (tmp_path / "out/stopped/results.json").exists()
    assert f"checkpoint-{steps[-1]}" in finish(start(tmp_path, arguments)).stdout
    results = json.loads((tmp_path / "out/stopped/results.json").read_text())
    assert results["heads"]["crt"]["images"] == 500


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its launcher has ended")
def test_one_process_stops_with_its_launcher(tmp_path):
    process = start(tmp_path, command("--name", "stopped", "--stage1.num_train_epochs", "20", "--stage2", "null"))
    checkpoints = tmp_path / "out/stopped/checkpoints/stage1"
    while not list(checkpoints.glob("checkpoint-*/complete.json")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # to the launcher alone, which ends at once
    output = finish(process, check=False).stdout  # until nobody writes to it
    steps = sorted(int(path.name.split("-")[1]) for path in checkpoints.iterdir() if is_complete(path))
    assert process.returncode == -signal.SIGTERM
    assert f"stopped and saved after {steps[-1]} of" in output


@pytest.mark.parametrize("best", [True, False])
def test_a_measurement_that_is_due_is_left_out_only_where_none_is_the_best(tmp_path, best):
    options = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    args, images, count = arguments(tmp_path, **options, load_best_model_at_end=best), SmallImages(), Count()
    callbacks = [Raise(4, signal.SIGTERM), count, SaveOnSignal()]
    stopped = NCTrainer(network(), args, train_dataset=images, eval_dataset=images, callbacks=callbacks)
    with pytest.raises(SystemExit):
        stopped.train()
    assert count.evaluated == ([2, 4] if best else [2]) and is_complete(tmp_path / "checkpoint-4")
