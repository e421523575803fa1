"""cRT: a new head that classes share alike, on a backbone that does not move by one bit."""

from __future__ import annotations

import copy

import pytest
import torch
from small_images import SmallImages
from transformers import TrainerCallback

from nc_hf.models.classifier import load_classifier
from nc_hf.retraining import retrain_classifier
from nc_hf.training_args import RetrainingArguments


@pytest.fixture(scope="module")
def images() -> SmallImages:
    return SmallImages()


@pytest.fixture(scope="module")
def trained(images):
    """A network with batch statistics of the images, so that eval mode and train mode differ."""
    torch.manual_seed(0)
    model, _ = load_classifier("resnet20_cifar", 4, drop_rate=0.2)
    model.train()
    for _ in range(40):
        model(images.images)
    return model


def arguments(folder, **settings) -> RetrainingArguments:
    defaults = {"output_dir": str(folder), "num_train_epochs": 3, "per_device_train_batch_size": 36}
    defaults |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "precision": "fp32"}
    return RetrainingArguments(**defaults | settings)


@pytest.mark.parametrize("features", ["images", "cached"])
def test_only_the_head_moves(trained, images, tmp_path, features):
    model = copy.deepcopy(trained)
    modes = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            modes.append({module.training for module in model.modules()})

    args = arguments(tmp_path, features=features, weight_decay=0.1)
    trainer = retrain_classifier(model, images, args, callbacks=[Watch()])
    for name, tensor in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor) != name.startswith("fc."), name
    if features == "images":
        assert modes[0] == {False, True}  # the head alone is in train mode
    assert trainer.classifier is model


def test_a_step_that_moves_the_backbone_is_noticed(trained, images, tmp_path):
    model = copy.deepcopy(trained)

    class Meddle(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            model.bn1.running_mean += 1

    with pytest.raises(RuntimeError, match="backbone changed in stage two: bn1.running_mean"):
        retrain_classifier(model, images, arguments(tmp_path), callbacks=[Meddle()])


def test_the_new_head_serves_rare_classes_better_than_one_trained_as_they_come(trained, images, tmp_path):
    balanced = SmallImages(counts=(30, 30, 30, 30), seed=1)

    def class_accuracies(**settings) -> torch.Tensor:
        args = arguments(tmp_path, num_train_epochs=15, **settings)
        trainer = retrain_classifier(copy.deepcopy(trained), images, args)
        right = [(z.argmax(1) == y).float() for _, z, y in trainer.iterate_features(balanced)]
        return torch.cat(right).view(4, 30).mean(dim=1)

    assert class_accuracies()[3] > class_accuracies(sampler="instance")[3]


def test_keep_starts_from_the_head_of_stage_one(trained, images, tmp_path):
    for head_init in ("keep", "new"):
        model = copy.deepcopy(trained)
        retrain_classifier(model, images, arguments(tmp_path, learning_rate=0.0, head_init=head_init))
        assert torch.equal(model.fc.weight, trained.fc.weight) == (head_init == "keep")
    assert model.fc.weight.detach().std().item() == pytest.approx(0.01, rel=0.3)
    assert torch.equal(model.fc.bias, torch.zeros(4))


def test_cached_features_of_unaugmented_images_train_the_same_head(trained, images, tmp_path):
    class Plain(SmallImages):
        def __getitems__(self, keys: list) -> dict:
            return super().__getitems__([key[0] if isinstance(key, tuple) else key for key in keys])

    heads = []
    for features in ("images", "cached"):
        model = copy.deepcopy(trained)
        model.drop_rate = 0.0
        retrain_classifier(model, Plain(), arguments(tmp_path / features, features=features))
        heads.append(model.fc.weight.detach())
    torch.testing.assert_close(*heads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("features", ["images", "cached"])
def test_a_validation_split_is_evaluated_whatever_the_features(trained, images, tmp_path, features):
    args = arguments(tmp_path, features=features, eval_strategy="epoch")
    trainer = retrain_classifier(copy.deepcopy(trained), images, args, eval_dataset=SmallImages(seed=1))
    assert "eval_loss" in trainer.state.log_history[-1] or "eval_loss" in trainer.state.log_history[-2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"within_weight": 0.1}, "the collapse terms have no gradient"),
        ({"cached_views": 0}, "`cached_views` must be at least 1, got 0"),
        ({"features": "cached", "mixup_alpha": 0.2}, "cannot mix images"),
    ],
)
def test_settings_that_cannot_act_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)
