"""Objectives through `NCTrainer`: each trains with and without the terms, and what cannot go together is refused."""

from __future__ import annotations

import math

import pytest
import torch
from small_images import SmallImages, network_without_batch_statistics

from nc_hf.models.classifier import load_classifier
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments

NC = {
    "none": {"within_weight": 0.0, "between_weight": 0.0},
    "ema": {"within_weight": 0.1, "between_weight": 0.1},
    "learned": {"within_weight": 0.01, "between_weight": 0.1, "centers": "learned", "feature_scale": "none"},
    "learned, from data": {
        "within_weight": 0.01,
        "between_weight": 0.1,
        "centers": "learned",
        "feature_scale": "none",
        "start_epoch": 1,
    },
}
RIDE = {"objective": "experts", "loss": "ldam", "class_weighting": "effective_number", "drw_epoch": 1}
BBN = {"objective": "bilateral", "sampler": "bilateral"}
KCL = {"objective": "contrastive", "sampler": "two_views", "objective_settings": {"method": "kcl", "queue": 72}}


@pytest.fixture(scope="module")
def images() -> SmallImages:
    return SmallImages()


def arguments(folder, **settings) -> NCTrainingArguments:
    defaults = {"output_dir": str(folder), "num_train_epochs": 2, "per_device_train_batch_size": 36, "optim": "sgd"}
    defaults |= {"learning_rate": 0.02, "max_grad_norm": 0, "logging_strategy": "epoch", "save_strategy": "no"}
    return NCTrainingArguments(
        **defaults | {"report_to": "none", "disable_tqdm": True, "precision": "fp32"} | settings
    )


def network(name: str, **model_args) -> torch.nn.Module:
    torch.manual_seed(0)
    return load_classifier(name, 4, **model_args)[0]


@pytest.mark.parametrize("terms", NC)
@pytest.mark.parametrize(
    ("model", "settings"),
    [("resnet32_ride_cifar", RIDE), ("resnet32_bbn_cifar", BBN), ("resnet32_cifar", KCL)],
    ids=["ride", "bbn", "kcl"],
)
def test_every_objective_trains_with_and_without_the_terms(images, tmp_path, model, settings, terms):
    trainer = NCTrainer(network(model), arguments(tmp_path, **settings | NC[terms]), train_dataset=images)
    before = {name: value.clone() for name, value in trainer.classifier.state_dict().items()}
    trainer.train()
    last = [record for record in trainer.state.log_history if "loss" in record][-1]
    assert all(math.isfinite(value) for value in last.values())
    assert ("loss_within" in last and "loss_between" in last) == (terms != "none")
    moved = [name for name, value in trainer.classifier.state_dict().items() if not torch.equal(before[name], value)]
    assert any(name.endswith("conv1.weight") for name in moved)
    features, logits, labels = (torch.cat(parts) for parts in zip(*trainer.iterate_features(images), strict=True))
    assert logits.shape == (len(images), 4) and len(features) == len(labels) == len(images)
    trainer.save_model(str(tmp_path / "saved"))
    again, _ = load_classifier(str(tmp_path / "saved"))
    with torch.no_grad():  # in another memory format the convolutions round otherwise
        logits = trainer.classifier.eval()(images.images)
        torch.testing.assert_close(again.eval()(images.images), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "contrastive"}, "`objective: contrastive` and `sampler: two_views` go together"),
        ({"sampler": "bilateral"}, "`objective: bilateral` and `sampler: bilateral` go together"),
        (KCL | {"per_device_train_batch_size": 35}, "needs an even per_device_train_batch_size.* got 35"),
        (KCL | {"mixup_alpha": 0.2}, "`objective: contrastive` goes without `mixup_alpha`: set it to 0"),
        (KCL | {"loss": "mse"}, "`objective: contrastive` goes without `loss`: set it to ce"),
        (KCL | {"loss_settings": {"label_smoothing": 0.1}}, "goes without `loss_settings`: set it to {}"),
        (KCL | {"auto_find_batch_size": True}, "`auto_find_batch_size` tries odd ones as well. Set per_device_train"),
        (BBN | {"class_weighting": "inverse"}, "goes without `class_weighting`: set it to none"),
        (BBN | {"loss": "arb"}, "would count the uniform half of each batch alone"),
        (BBN | {"objective_settings": {"alpha": 1}}, "`objective: bilateral` has no settings"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("resnet32_ride_cifar", {}, "ExpertsNetwork learns by `objective: experts`, got 'classification'"),
        ("resnet32_cifar", RIDE, "`objective: experts` needs a network such as resnet32_ride_cifar, got CifarResNet"),
        ("resnet32_cifar", BBN, "`objective: bilateral` needs a network such as resnet32_bbn_cifar"),
        (
            "resnet32_cifar",
            {"label_smoothing_factor": 0.1, "loss_settings": {"label_smoothing": 0.2}},
            "is 0.1, and `label_smoothing` of loss_settings 0.2: labels would be smoothed twice",
        ),
        (
            "resnet32_cifar",
            KCL | {"objective_settings": {"queue": 72}},
            "set objective_settings: {method: fcl, kcl or",
        ),
        (
            "resnet32_cifar",
            KCL | {"objective_settings": {"method": "fcl", "queue": 72}},
            "`objective_settings` of fcl are method, temperature, dimension; it has no queue",
        ),
        (
            "resnet32_ride_cifar",
            RIDE | {"objective_settings": {"diversity": -1}},
            "`objective_settings` of experts are diversity_factor, .*; it has no diversity",
        ),
    ],
)
def test_networks_and_settings_of_another_objective_are_refused(images, tmp_path, model, settings, message):
    with pytest.raises(ValueError, match=message):
        NCTrainer(network(model), arguments(tmp_path, **settings), train_dataset=images)


def test_stage_two_classifies_whatever_stage_one_did(images, tmp_path):
    from nc_hf.retraining import retrain_classifier
    from nc_hf.retraining_args import RetrainingArguments

    args = RetrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    model = network("resnet32_bbn_cifar")
    before = model.fc.weight.detach().clone()
    retrain_classifier(model, images, args)
    assert not torch.equal(model.fc.weight, before)


def test_small_network_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="got NoBatchStatistics"):
        NCTrainer(
            network_without_batch_statistics(), arguments(tmp_path, **RIDE), train_dataset=SmallImages(), head="head"
        )
