"""Checkpoints: whether they fit on the disk, one of them always complete, and of the run that goes on from them."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_images import SmallImages, SmallStream
from small_runs import arguments, network
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from nc_hf import saving_trainer
from nc_hf.checkpoints import check_disk_space, is_complete
from nc_hf.trainer import NCTrainer

SAVED = {"save_strategy": "epoch", "num_train_epochs": 2}


def trainer(folder: Path, images: SmallImages | None = None, *callbacks: TrainerCallback, **settings) -> NCTrainer:
    images = SmallImages() if images is None else images
    return NCTrainer(network(), arguments(folder, **SAVED | settings), train_dataset=images, callbacks=list(callbacks))


def complete(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*") if is_complete(path))


# ---- Room on the disk ----


def test_a_full_disk_is_refused_before_training(tmp_path, monkeypatch):
    model = nn.Linear(1000, 1000, bias=False)  # 4 MB; three numbers a weight, two checkpoints and one being written
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=36_000_000))
    check_disk_space(tmp_path, model, kept=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=35_999_999))
    with pytest.raises(OSError, match="may take 0.0 GB and 0.0 GB are free. Make room"):
        check_disk_space(tmp_path, model, kept=2)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"1")
    check_disk_space(tmp_path, model, kept=2)  # what is there already needs no room
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=12_000_000))
    check_disk_space(tmp_path, model, kept=2, weights_only=True)  # nor does an optimizer that is not saved
    check_disk_space(tmp_path, model.requires_grad_(False), kept=2)  # or has nothing to train


def test_the_trainer_looks_for_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    trainer(tmp_path, save_strategy="no", max_steps=1).train()
    with pytest.raises(OSError, match="Make room"):
        trainer(tmp_path).train()


def test_a_checkpoint_that_cannot_be_written_is_removed_and_the_one_before_kept(tmp_path, monkeypatch):
    write = Trainer._save_optimizer_and_scheduler

    def full(self, folder):
        if self.state.global_step == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match="No space left") as error:
        trainer(tmp_path, save_total_limit=1).train()
    assert "checkpoint-6 could not be written and is removed" in error.value.__notes__[0]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == complete(tmp_path) == ["checkpoint-3"]


# ---- Never fewer than one ----


def test_the_last_complete_checkpoint_stays_until_the_next_one_is(tmp_path, monkeypatch):
    mark, seen = saving_trainer.mark_complete, []

    def watched(folder, run):
        seen.append(complete(tmp_path))
        mark(folder, run)

    monkeypatch.setattr(saving_trainer, "mark_complete", watched)
    trainer(tmp_path, save_total_limit=1, num_train_epochs=3).train()
    assert seen == [[], ["checkpoint-3"], ["checkpoint-6"]]
    assert complete(tmp_path) == ["checkpoint-9"]


def test_the_mark_of_an_earlier_run_does_not_vouch_for_a_later_one(tmp_path, monkeypatch):
    trainer(tmp_path).train()
    monkeypatch.setattr(saving_trainer, "mark_complete", lambda folder, run: pytest.fail("the power went off"))
    with pytest.raises(pytest.fail.Exception):
        trainer(tmp_path).train()
    assert complete(tmp_path) == ["checkpoint-6"]


def test_the_checkpoint_of_trainer_upon_sigterm_is_complete(tmp_path):
    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                jit = next(c for c in stopped.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
                jit.jit_manager.is_checkpoint_requested = True

    stopped = trainer(tmp_path, None, Terminate(), enable_jit_checkpoint=True)
    stopped.train()
    assert stopped.state.global_step < stopped.state.max_steps
    assert "checkpoint-2" in complete(tmp_path)


# ---- Of the same run ----


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    trainer(tmp_path).train()
    with pytest.raises(ValueError, match=r"class counts \[60, 30, 12, 6\], and these are \[60, 30, 12, 7\]"):
        trainer(tmp_path, SmallImages((60, 30, 12, 7)), num_train_epochs=3).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_batch_is_refused(tmp_path):
    trainer(tmp_path).train()
    other = trainer(tmp_path, per_device_train_batch_size=18, num_train_epochs=3)
    with pytest.raises(ValueError, match=r"3 updates an epoch on 1 process\(es\), and now there are 6 on 1"):
        other.train(resume_from_checkpoint=True)
    halved = trainer(tmp_path, per_device_train_batch_size=18, gradient_accumulation_steps=2, num_train_epochs=3)
    halved.train(resume_from_checkpoint=True)
    assert halved.state.global_step == 9


def test_what_else_differs_is_named(tmp_path, caplog):
    trainer(tmp_path).train()
    trainer(tmp_path, num_train_epochs=3, logging_steps=2).train(resume_from_checkpoint=True)
    assert caplog.text.count("saved with other settings: num_train_epochs 2 (now 3). What follows") == 1
    caplog.clear()
    branch = trainer(tmp_path / "branch", seed=1, resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    branch.train(resume_from_checkpoint=True)
    assert "other settings" not in caplog.text  # a branch differs on purpose


def test_another_number_of_processes_is_named(tmp_path, caplog):
    trainer(tmp_path).train()
    marker = tmp_path / "checkpoint-6" / "complete.json"
    content = json.loads(marker.read_text())
    content["run"]["processes"] = 4
    marker.write_text(json.dumps(content))
    trainer(tmp_path).train(resume_from_checkpoint=True)
    assert "saved with other settings: processes 4 (now 1)" in caplog.text


@pytest.mark.parametrize("marker", [None, "of files alone"])
def test_a_checkpoint_that_says_nothing_of_its_run_is_not_compared(tmp_path, marker):
    saved = trainer(tmp_path)
    saved.train()
    path = tmp_path / "checkpoint-6" / "complete.json"
    if marker is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text())["files"]))
        assert "checkpoint-6" in complete(tmp_path)
    again = trainer(tmp_path, SmallImages((61, 31, 13, 7)))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.state.global_step == 8


def test_a_stream_can_be_followed_for_longer(tmp_path):
    """It has no epochs to miscount; and counts that one of the two runs did not know are no other counts."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    NCTrainer(network(), arguments(tmp_path, **options), train_dataset=SmallStream()).train()
    longer = arguments(tmp_path, **options | {"max_steps": 4})
    again = NCTrainer(network(), longer, train_dataset=SmallStream(), class_counts=[60, 30, 12, 6])
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_what_a_checkpoint_says_of_the_arguments_is_what_was_asked_for(tmp_path):
    trainer(tmp_path, save_total_limit=1, resume_from_checkpoint=tmp_path / "nothing").train()
    said = json.loads((tmp_path / "checkpoint-6" / "complete.json").read_text())["run"]["arguments"]
    assert said["save_total_limit"] == 1 and said["resume_from_checkpoint"] == str(tmp_path / "nothing")
    stored = torch.load(tmp_path / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert stored.save_total_limit == 1
