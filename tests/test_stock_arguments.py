"""Arguments and habits of `Trainer` that reach `NCTrainer`: what is taken over, and what is refused by name."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from small_images import SmallImages, network_without_batch_statistics
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments

from nc_hf.collapse_callback import CollapseCallback
from nc_hf.models.classifier import load_classifier
from nc_hf.retraining import retrain_classifier
from nc_hf.retraining_args import RetrainingArguments
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments

QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "precision": "fp32"}


def trainer(folder, given: dict[str, Any] | None = None, dataset: Any = None, **settings) -> NCTrainer:
    args = NCTrainingArguments(str(folder), **QUIET | {"per_device_train_batch_size": 36, "max_steps": 2} | settings)
    images = SmallImages() if dataset is None else dataset
    return NCTrainer(network_without_batch_statistics(), args, head="head", train_dataset=images, **given or {})


def test_plain_training_arguments_are_named(tmp_path):
    with pytest.raises(TypeError, match="takes NCTrainingArguments, got TrainingArguments"):
        NCTrainer(network_without_batch_statistics(), TrainingArguments(str(tmp_path)), head="head")


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_in_half_precision_throughout_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"evaluation runs at `precision` \(fp32\) already"):
        trainer(tmp_path, **{name: True})


@pytest.mark.parametrize("settings", [{"lr_cosine": True}, {"lr_milestones": [1.0]}])
def test_a_schedule_beside_that_of_the_user_is_refused(tmp_path, settings):
    optimizer = torch.optim.SGD(network_without_batch_statistics().parameters(), lr=0.1)
    given = {"optimizers": (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))}
    trainer(tmp_path, given)
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` would be ignored beside the scheduler"):
        trainer(tmp_path, given, **settings)


def test_a_tracker_that_would_upload_the_task_is_refused(tmp_path, monkeypatch):
    args = NCTrainingArguments(str(tmp_path))
    args.report_to = ["wandb"]
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    with pytest.raises(ValueError, match="WANDB_LOG_MODEL is 'end'"):
        NCTrainer(network_without_batch_statistics(), args, head="head")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"centers_learning_rate": -0.5}, "centers_learning_rate"),
        ({"lr_milestones": [-1.0]}, "lr_milestones"),
        ({"lr_milestones": [1.0], "lr_decay": -3.0}, "lr_decay"),
    ],
)
def test_numbers_below_0_are_refused(tmp_path, settings, name):
    with pytest.raises(ValueError, match=f"`{name}`.* must be at least 0"):
        NCTrainingArguments(str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (["--loss", "focal", "--loss_settings", '{"gamma": 2}'], "loss_settings", {"gamma": 2}),
        (["--loss_settings", "{}"], "loss_settings", {}),
        (["--channels_last"], "channels_last", True),
        (["--lr_milestones", "0.5", "0.8"], "lr_milestones", [0.5, 0.8]),
        (["--heads", "crt", "lws"], "heads", ["crt", "lws"]),
    ],
)
def test_settings_of_every_kind_can_be_given_on_a_command_line(tmp_path, options, name, value):
    parser = HfArgumentParser(RetrainingArguments if name == "heads" else NCTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--report_to", "none", *options])
    assert getattr(args, name) == value


def test_settings_that_are_no_mapping_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`loss_settings` must be settings by name.*got 'gamma'"):
        NCTrainingArguments(str(tmp_path), loss_settings="gamma")


def test_a_checkpoint_of_weights_alone_is_not_gone_on_from(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trainer(tmp_path, **settings).train()
    with pytest.raises(ValueError, match="saved with save_only_model, without optimizer and schedule"):
        trainer(tmp_path, **settings | {"max_steps": 4}).train(resume_from_checkpoint=True)


def test_terms_of_a_training_before_are_not_logged_with_the_next(tmp_path):
    one = trainer(tmp_path, max_steps=3, logging_steps=2)  # the terms of the third update are never logged
    for _ in range(2):
        one.train()
        first = next(log for log in one.state.log_history if "loss_supervised" in log)
        terms = sum(first[f"loss_{name}"] for name in ("supervised", "within", "between"))
        assert first["loss"] == pytest.approx(terms, rel=1e-5)


def test_a_batch_that_was_lowered_to_fit_is_the_one_that_is_told(tmp_path, monkeypatch, caplog):
    step = NCTrainer.training_step

    def too_large(self, model, inputs, *rest):
        if len(inputs["labels"]) > 30:
            raise RuntimeError("CUDA out of memory.")
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(NCTrainer, "training_step", too_large)
    one = trainer(tmp_path, auto_find_batch_size=True)
    with caplog.at_level("INFO", logger="nc_hf"):
        one.train()
    lowered = one.state.train_batch_size
    assert lowered < 30 and f"global batch {lowered} = {lowered} x 1 process(es)" in caplog.text


class DrawnByNumpy(SmallImages):
    """Images that are augmented by the global generators of Python and numpy."""

    accepts_draws = False

    def __getitems__(self, indices: list) -> dict:
        batch = super().__getitems__(indices)
        return batch | {"pixel_values": batch["pixel_values"] * (1 + 0.1 * np.random.rand() + 0.1 * random.random())}


def test_measuring_moves_no_generator_of_the_images(tmp_path):
    weights = []
    for measured in (False, True):
        one = trainer(tmp_path, dataset=DrawnByNumpy(), max_steps=-1, num_train_epochs=2)
        if measured:
            one.add_callback(CollapseCallback(one, every=1))
        one.train()
        weights.append(one.classifier.head.weight.detach().clone())
    assert torch.equal(*weights)


def test_the_optimizer_of_the_user_trains_cached_features_too(tmp_path):
    kinds = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            kinds.append(type(getattr(optimizer, "optimizer", optimizer)))

    for features in ("images", "cached"):
        settings = QUIET | {"num_train_epochs": 1, "features": features, "learning_rate": 0.001}
        args = RetrainingArguments(str(tmp_path), **settings)
        given = {"head": "head", "callbacks": [Look()]}
        own = (torch.optim.AdamW, {"lr": 0.001})
        model = network_without_batch_statistics()
        retrain_classifier(model, SmallImages(), args, optimizer_cls_and_kwargs=own, **given)
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
        if features == "cached":
            with pytest.raises(ValueError, match="`optimizers` cannot train on `features: cached`"):
                retrain_classifier(model, SmallImages(), args, optimizers=(optimizer, None), **given)
    assert set(kinds) == {torch.optim.AdamW}


def test_a_card_is_written_without_a_push_as_scripts_of_transformers_end(tmp_path):
    model, _ = load_classifier("resnet20_cifar", 4)
    args = NCTrainingArguments(str(tmp_path), **QUIET, max_steps=1)
    one = NCTrainer(model, args, train_dataset=SmallImages(size=32))
    one.train()
    one.create_model_card(
        finetuned_from="timm/resnet20", tasks="image-classification", dataset="cifar10", tags=["image-classification"]
    )
    card = (tmp_path / "hub" / "README.md").read_text()
    header = card.split("---")[1]
    assert "base_model: timm/resnet20" in header and "cifar10" in header and "finetuned_from" not in header
    assert "tasks" not in header and (tmp_path / "hub" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "hub" / "results.json").read_text())["seed"] == args.seed
