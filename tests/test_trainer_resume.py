"""NCTrainer: what it refuses, and that a resumed run is the same run."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from small_images import SmallImages
from small_runs import arguments, logged, network
from transformers import TrainerCallback

from nc_hf.trainer import NCTrainer


@pytest.fixture(scope="module")
def images() -> SmallImages:
    return SmallImages()


# ---- refusals ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"within_weight": -1}, "`within_weight` must be at least 0, got -1"),
        ({"start_epoch": -3}, "`start_epoch` must be at least 0"),
        ({"loss": "hinge"}, "`loss` must be one of ce, mse, .*, got 'hinge'"),
        ({"drw_epoch": 0.9}, "`class_weighting` is none"),
        ({"drw_epoch": -5, "class_weighting": "inverse"}, "`drw_epoch` must be at least 0, got -5"),
        ({"within_reduction": "images", "within_counts": "train"}, "Leave within_counts at batch"),
        ({"centers": "learned", "optim": "adamw_torch"}, "trained by plain SGD.*use `centers: ema`"),
        ({"centers": "learned", "feature_scale": "rms"}, "set feature_scale: none, and within_weight as in the paper"),
        ({"centers": "learned", "within_weight": 0}, "needs within_weight > 0"),
        ({"start_epoch": 0.5, "replicate_leak": True}, "`centers` is ema. Set centers: learned"),
        ({"lr_milestones": [1], "lr_cosine": True}, "two schedules"),
        ({"warmup_epochs": 2}, "use `warmup_steps`"),
        (
            {"lr_cosine": True, "lr_scheduler_type": "cosine"},
            "`lr_scheduler_type` would be ignored beside",
        ),
        (
            {"lr_milestones": [1], "warmup_steps": 5},
            "would be ignored beside `lr_milestones`.*`warmup_epochs` here",
        ),
        (
            {"loss": "logit_adjustment", "label_smoothing_factor": 0.1},
            "`label_smoothing_factor` is 0.1, and `loss: logit_adjustment` does not smooth labels. Set it to 0",
        ),
        ({"effective_number_beta": 1.5}, r"`effective_number_beta` must lie in \[0, 1\), got 1.5"),
        ({"loss": "focal", "loss_settings": {"gamma": -1}}, "`gamma` of a focal loss must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_a_term_that_never_starts_is_warned_of(tmp_path, caplog):
    arguments(tmp_path, start_epoch=9)
    assert "`start_epoch` is 9 but the run has 4 epochs: it is never switched on" in caplog.text


def test_a_milestone_after_the_run_is_warned_of(tmp_path, caplog):
    arguments(tmp_path, lr_milestones=[0.9, 3])
    assert not caplog.text
    arguments(tmp_path, lr_milestones=[2, 160])
    assert "`lr_milestones` is 160 but the run has 4 epochs" in caplog.text


def test_a_head_of_another_size_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="has 7 outputs but the training data have 4 classes.*num_labels=4"):
        NCTrainer(network(7), arguments(tmp_path), train_dataset=images)


def test_missing_counts_and_labels_are_asked_for(images, tmp_path):
    rows = [{"pixel_values": images.images[0], "labels": 0}]
    with pytest.raises(ValueError, match="Pass class_counts"):
        NCTrainer(network(), arguments(tmp_path, class_weighting="inverse"), train_dataset=rows)
    trainer = NCTrainer(network(), arguments(tmp_path, sampler="class_balanced"), train_dataset=rows)
    with pytest.raises(ValueError, match="needs the labels of list"):
        trainer.train()


def test_soft_labels_are_refused(images, tmp_path):
    rows = [{"pixel_values": image, "labels": torch.full((4,), 0.25)} for image in images.images[:40]]
    trainer = NCTrainer(network(), arguments(tmp_path), train_dataset=rows)
    with pytest.raises(ValueError, match=r"one integer an image, got \(36, 4\) of torch.float32.*set mixup_alpha"):
        trainer.train()


def test_a_foreign_loss_function_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="would replace the loss of NCTrainer"):
        NCTrainer(network(), arguments(tmp_path), train_dataset=images, compute_loss_func=lambda *a: 0)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(tmp_path):
    images = SmallImages()
    trainer = NCTrainer(network(), arguments(tmp_path, max_steps=3), train_dataset=images)
    order = [index for index, _ in trainer._get_train_sampler()]
    images.images[order[40]] = float("nan")  # in the second batch
    with pytest.raises(FloatingPointError, match=r"not finite at step 2 \(in .*loss_supervised.*learning rate"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert all(parameter.isfinite().all() for parameter in trainer.classifier.parameters())
    assert json.loads((tmp_path / "nonfinite_rank0.json").read_text())["step"] == 2


# ---- resume ----


RESUMED = {
    "learned": {"centers": "learned", "start_epoch": 0.5, "mixup_alpha": 0.2, "lr_milestones": [0.5, 0.75]},
    "ema": {"centers": "ema", "sampler": "square_root", "class_weighting": "effective_number", "drw_epoch": 0.75},
    "accumulated": {"centers": "learned", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 18},
}


@pytest.fixture(scope="module")
def straight_runs() -> dict[str, NCTrainer]:
    """By name of the settings; each is trained once."""
    return {}


@pytest.mark.parametrize("stop_at", [4, 6, 8])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_in_the_same_bits(images, straight_runs, tmp_path, name, stop_at):
    """Stopped mid-epoch and at an epoch's end, before and after the collapse terms start."""

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop_at:
                control.should_save = control.should_training_stop = True

    def trainer(folder: str, *callbacks: TrainerCallback) -> NCTrainer:
        args = arguments(tmp_path / folder, **RESUMED[name])
        return NCTrainer(network(), args, train_dataset=images, callbacks=list(callbacks))

    if name not in straight_runs:
        straight_runs[name] = trainer("straight")
        straight_runs[name].train()
    straight = straight_runs[name]
    killed = trainer("killed", Kill())
    killed.train()
    assert killed.state.global_step == stop_at
    assert any(
        not torch.equal(a, b) for a, b in zip(killed.task.parameters(), straight.task.parameters(), strict=True)
    )
    resumed = trainer("killed")
    torch.rand(7)
    resumed.train(resume_from_checkpoint=True)
    for (key, a), b in zip(straight.task.state_dict().items(), resumed.task.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert logged(resumed, "loss")[stop_at:] == logged(straight, "loss")[stop_at:]


def test_resume_takes_the_newest_complete_checkpoint(images, tmp_path, caplog):
    args = arguments(tmp_path, save_strategy="epoch", num_train_epochs=3)
    NCTrainer(network(), args, train_dataset=images).train()
    broken = tmp_path / "checkpoint-9" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    trainer = NCTrainer(network(), args, train_dataset=images)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-9 was not written to its end and is skipped" in caplog.text
    assert [record["step"] for record in trainer.state.log_history if "loss" in record] == list(range(1, 10))


def test_resume_with_nothing_saved_starts_afresh(images, tmp_path):
    trainer = NCTrainer(network(), arguments(tmp_path, max_steps=1), train_dataset=images)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1


def test_a_checkpoint_without_centers_is_refused(images, tmp_path):
    args = arguments(tmp_path, save_strategy="epoch", num_train_epochs=1, within_weight=0, between_weight=0)
    NCTrainer(network(), args, train_dataset=images).train()
    with_centers = NCTrainer(network(), arguments(tmp_path, centers="learned"), train_dataset=images)
    with pytest.raises(ValueError, match="has no collapse.centers.*use centers: batch"):
        with_centers.train(resume_from_checkpoint=True)


def test_saved_folder_opens_in_timm(images, tmp_path):
    trainer = NCTrainer(network(), arguments(tmp_path, max_steps=2), train_dataset=images)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    with torch.no_grad():
        expected = trainer.classifier.eval().to(memory_format=torch.contiguous_format)(images.images[:5])
        torch.testing.assert_close(again(images.images[:5]), expected, rtol=0, atol=1e-6)
