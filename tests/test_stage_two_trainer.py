"""What the trainer that stage two returns says, pushes and goes on from; and stages of two precisions."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from small_images import SmallImages

from nc_hf import saving_trainer
from nc_hf.evaluation import evaluate_classifier
from nc_hf.metrics import compute_metrics_for
from nc_hf.models.classifier import load_classifier
from nc_hf.retraining import retrain_classifier
from nc_hf.retraining_args import RetrainingArguments
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments

SETTINGS = {"num_train_epochs": 2, "per_device_train_batch_size": 36, "report_to": "none", "disable_tqdm": True}
SETTINGS |= {"save_strategy": "no", "precision": "fp32"}


def arguments(folder: Path, **settings) -> RetrainingArguments:
    return RetrainingArguments(str(folder), **SETTINGS | settings)


@pytest.fixture(scope="module")
def trained():
    """A network with running statistics of the images, and its image processor."""
    torch.manual_seed(0)
    model, processor = load_classifier("resnet20_cifar", 4)
    for _ in range(20):
        model.train()(SmallImages().images)
    return model, processor


def retrained_with_card(folder: Path, trained, **settings):
    """A trainer that measured its head on the way, and what the card that it writes is made of."""
    model, images = copy.deepcopy(trained[0]), SmallImages()
    given = {"eval_dataset": SmallImages(seed=1), "processing_class": trained[1]}
    given["compute_metrics"] = compute_metrics_for(images.class_counts, few_below=10, many_above=25)
    args = arguments(folder, eval_strategy="epoch", **settings)
    trainer = retrain_classifier(model, images, args, **given)
    trainer.create_model_card()
    return trainer, json.loads((folder / "hub/results.json").read_text())


@pytest.mark.parametrize("features", ["images", "cached"])
def test_a_card_has_the_accuracy_epoch_and_bounds_of_the_head(tmp_path, trained, features):
    trainer, told = retrained_with_card(tmp_path, trained, features=features)
    bounds = {"few_below": 10, "many_above": 25}
    measured = evaluate_classifier(trainer, SmallImages(seed=1), SmallImages().class_counts, **bounds)
    assert told["heads"]["crt"]["accuracy"] == pytest.approx(measured["accuracy"])
    assert told["epoch"] == 2
    assert bounds.items() <= told["dataset"].items()
    assert "more than 25 training images" in (tmp_path / "hub/README.md").read_text()


@pytest.mark.parametrize(
    "settings", [{"heads": ["crt", "lws"]}, {"heads": ["ncm", "crt"]}, {"match_base_norm": True}], ids=str
)
def test_a_card_has_no_accuracy_of_another_head(tmp_path, trained, settings):
    trainer, told = retrained_with_card(tmp_path, trained, **settings)
    assert "heads" not in told
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.create_model_card()
    told = json.loads((tmp_path / "hub/results.json").read_text())
    assert told["heads"] == {trainer.active_head: told["heads"][trainer.active_head]}
    assert told["heads"][trainer.active_head]["accuracy"] == accuracy


def test_several_heads_are_pushed_as_one_model(tmp_path, trained, monkeypatch):
    asked = []
    monkeypatch.setattr(saving_trainer, "check_access", lambda name, token: asked.append(name) or f"me/{name}")
    args = arguments(tmp_path / "photos", heads=["crt", "lws"], push_to_hub=True, num_train_epochs=1)
    trainer = retrain_classifier(copy.deepcopy(trained[0]), SmallImages(), args)
    assert set(asked) == {"photos"} and trainer.hub_model_id == "me/photos"
    assert trainer.args.output_dir == str(tmp_path / "photos")
    assert trainer.args.hub_strategy == args.hub_strategy


def test_class_counts_that_were_given_count_on_cached_features_too(tmp_path, trained):
    args = {"features": "cached", "loss": "logit_adjustment", "sampler": "instance"}
    heads = []
    for counts in (None, [1000, 100, 10, 1]):
        given = {} if counts is None else {"class_counts": counts}
        retrainer = retrain_classifier(copy.deepcopy(trained[0]), SmallImages(), arguments(tmp_path, **args), **given)
        heads.append(retrainer.heads["crt"]["bias"])
    assert not torch.allclose(*heads)


def test_a_compiled_model_is_retrained_as_the_plain_one(tmp_path, trained):
    model = copy.deepcopy(trained[0])
    trainer = retrain_classifier(torch.compile(model), SmallImages(), arguments(tmp_path, heads=["ncm"]))
    assert trainer.classifier is model


def test_lws_decays_what_the_optimizer_decays(tmp_path, trained):
    args = arguments(tmp_path, heads=["lws"], lws_weight_factor=0.5, weight_decay=0.5, decay_all_parameters=False)
    trainer = retrain_classifier(copy.deepcopy(trained[0]), SmallImages(), args)
    weight, bias, groups = trainer.task.head.weight, trainer.task.head.bias, trainer.optimizer.param_groups
    decays = [[g["weight_decay"] for g in groups if any(p is one for p in g["params"])] for one in (weight, bias)]
    assert decays == [[0.5], [0]]


def test_a_head_that_was_trained_by_itself_is_stage_ones(tmp_path, trained):
    model, images = copy.deepcopy(trained[0]), SmallImages()
    retrain_classifier(model, images, arguments(tmp_path))
    args = NCTrainingArguments(str(tmp_path), within_weight=0, between_weight=0, learning_rate=0.1, **SETTINGS)
    NCTrainer(model, args, train_dataset=images, freeze_backbone=True).train()
    trained_last = model.fc.weight.detach().clone()
    trainer = retrain_classifier(model, images, arguments(tmp_path, heads=["tau_norm"], tau=0.0))
    torch.testing.assert_close(trainer.heads["tau_norm"]["weight"], trained_last)


@pytest.mark.parametrize(("first", "second"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_stages_of_two_precisions_whose_arguments_are_made_first(tmp_path, trained, first, second):
    model, images, seen = copy.deepcopy(trained[0]), SmallImages(), set()
    model.conv1.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    one = NCTrainingArguments(str(tmp_path / "1"), **SETTINGS | {"precision": first, "max_steps": 1})
    two = arguments(tmp_path / "2", precision=second, max_steps=1)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    NCTrainer(model, one, train_dataset=images).train()
    assert dtypes[first] in seen
    seen.clear()
    retrain_classifier(model, images, two)
    assert dtypes[second] in seen


def test_metrics_of_all_predictions_are_not_asked_for_batches(tmp_path, trained):
    metrics = compute_metrics_for(SmallImages().class_counts)
    with pytest.raises(ValueError, match="`batch_eval_metrics` calls compute_metrics for each batch"):
        NCTrainer(trained[0], arguments(tmp_path, batch_eval_metrics=True), compute_metrics=metrics)
