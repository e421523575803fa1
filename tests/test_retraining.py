"""cRT: a new head that classes share alike, on a backbone that does not move by one bit."""

from __future__ import annotations

import copy

import pytest
import torch
from small_images import SmallImages
from torch import nn
from transformers import TrainerCallback

from nc_hf.head_trainer import HeadTrainer, max_norm_radius, project_rows
from nc_hf.hub import load_heads, load_pretrained
from nc_hf.models.classifier import load_classifier
from nc_hf.models.headed import replace_head
from nc_hf.models.saved_heads import stage_one_state
from nc_hf.retraining import TAUS, retrain_classifier
from nc_hf.retraining_args import RetrainingArguments
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments


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


def training_arguments(folder, **settings) -> NCTrainingArguments:
    return NCTrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, save_strategy="no", precision="fp32", **settings
    )


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


@pytest.mark.parametrize("heads", [["crt"], ["lws"], ["ncm"]])
def test_what_was_trained_before_can_be_trained_afterwards(trained, images, tmp_path, heads):
    model = copy.deepcopy(trained)
    model.conv1.weight.requires_grad_(False)
    retrain_classifier(model, images, arguments(tmp_path, num_train_epochs=1, heads=heads))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    NCTrainer(model, training_arguments(tmp_path, max_steps=1, learning_rate=0.1), train_dataset=images).train()
    assert not torch.equal(model.bn1.weight, trained.bn1.weight)
    assert torch.equal(model.conv1.weight, trained.conv1.weight)


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


@pytest.mark.parametrize("features", ["images", "cached"])
def test_lws_learns_a_factor_of_each_class_alone(trained, images, tmp_path, features):
    model = copy.deepcopy(trained)
    trainer = retrain_classifier(model, images, arguments(tmp_path, heads=["lws"], features=features))
    factors = model.fc.weight / trained.fc.weight
    assert not torch.allclose(factors[:, 0], torch.ones(4), atol=1e-3)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.fc.bias, trained.fc.bias * factors[:, 0], rtol=1e-4, atol=1e-6)
    assert set(model.fc.state_dict()) == {"weight", "bias"} == set(trainer.heads["lws"])


def test_a_factor_scales_the_logit_with_its_bias_as_the_authors(golden, tmp_path):
    for case in golden("lws"):
        logits, factors, wanted = map(torch.tensor, (*case["inputs"].values(), case["outputs"]["scaled"]))
        model, _ = load_classifier("resnet20_cifar", logits.shape[1])
        model.fc = nn.Linear(64, logits.shape[1])
        with torch.no_grad():  # features whose logits are the case's
            model.fc.weight.copy_(torch.eye(*model.fc.weight.shape))
            model.fc.bias.fill_(3.0)
        features = torch.nn.functional.pad(logits - 3.0, (0, 64 - logits.shape[1]))
        trainer = HeadTrainer(model, arguments(tmp_path), learns_scales=True)
        model.fc.scale.data.copy_(factors[0])
        torch.testing.assert_close(model.fc(features), wanted)
        trainer.finish_head()
        torch.testing.assert_close(model.fc(features), wanted)


def test_with_a_share_of_the_learning_rate_lws_moves_the_weights_too(trained, images, tmp_path):
    model = copy.deepcopy(trained)
    settings = {"heads": ["lws"], "lws_weight_factor": 0.5, "learning_rate": 0.1}
    trainer = retrain_classifier(model, images, arguments(tmp_path, **settings))
    factors = model.fc.weight / trained.fc.weight
    assert not torch.allclose(factors, factors[:, :1].expand_as(factors), rtol=1e-3)
    initial = [group["initial_lr"] for group in trainer.optimizer.param_groups if group["params"]]
    assert sorted(initial) == [0.05, 0.05, 0.1]


def test_a_head_of_the_old_norm_predicts_as_before(trained, images, tmp_path):
    """A strong weight decay shortens the head; with the norm of stage one's it has the same logits times a factor."""
    heads = []
    for match in (False, True):
        model = copy.deepcopy(trained)
        args = arguments(tmp_path / str(match), weight_decay=0.2, match_base_norm=match)
        heads.append(retrain_classifier(model, images, args).heads["crt"])
    short, full = heads
    factor = trained.fc.weight.norm() / short["weight"].norm()
    assert factor > 1.5
    for name in ("weight", "bias"):
        torch.testing.assert_close(full[name], factor * short[name])


def test_max_norm_equals_the_authors(golden):
    for case in golden("maxnorm_pgd"):
        before, after = (
            torch.tensor(case["inputs"][f"W_{name}"], dtype=torch.float64) for name in ("at_setup", "after_step")
        )
        radius = max_norm_radius(before, case["settings"]["thresh"])
        assert radius == pytest.approx(case["outputs"]["radius"], rel=1e-9)
        project_rows(after, radius)
        torch.testing.assert_close(after, torch.tensor(case["outputs"]["W_projected"], dtype=torch.float64))


def test_max_norm_holds_after_training(trained, images, tmp_path):
    model = copy.deepcopy(trained)
    settings = {"head_init": "keep", "max_norm_threshold": 0.1, "learning_rate": 1.0}
    retrain_classifier(model, images, arguments(tmp_path, **settings))
    assert model.fc.weight.norm(dim=1).max() <= max_norm_radius(trained.fc.weight.detach(), 0.1) * (1 + 1e-5)


def test_several_heads_from_one_backbone(trained, images, tmp_path):
    model, names = copy.deepcopy(trained), ["ncm", "lws", "crt", "tau_norm", "least_squares", "logit_adjusted"]
    trainer = retrain_classifier(model, images, arguments(tmp_path, heads=names, tau=0.5))
    assert list(trainer.heads) == names
    assert torch.equal(model.fc.weight, trainer.heads["ncm"]["weight"])
    alone = copy.deepcopy(trained)
    retrain_classifier(alone, images, arguments(tmp_path / "alone", heads=["crt"]))
    assert torch.equal(alone.fc.weight, trainer.heads["crt"]["weight"])  # whatever was trained before it
    means, counts = trainer.class_means(images)
    torch.testing.assert_close(trainer.heads["ncm"]["weight"], means.float())
    norms = trained.fc.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(trainer.heads["tau_norm"]["weight"], trained.fc.weight.detach() / norms.detach() ** 0.5)
    shift = trainer.heads["logit_adjusted"]["bias"] - trained.fc.bias.detach()
    torch.testing.assert_close(shift, -0.5 * (counts / counts.sum()).log().float())


def test_a_saved_folder_has_every_head_that_fits(trained, images, tmp_path):
    model = copy.deepcopy(trained)
    trainer = retrain_classifier(model, images, arguments(tmp_path, heads=["ncm", "crt"]))
    trainer.save_model(str(tmp_path / "model"))
    heads, _ = load_heads(tmp_path / "model")
    assert heads.keys() == {"base", "ncm", "crt"}
    assert torch.equal(heads["base"]["weight"], trained.fc.weight)
    assert torch.equal(load_pretrained(tmp_path / "model")[0].fc.weight, trainer.heads["ncm"]["weight"])
    assert torch.equal(load_pretrained(tmp_path / "model", head="base")[0].fc.weight, trained.fc.weight)
    moved = retrain_classifier(model, images, arguments(tmp_path / "shifted", backbone_statistics="shifted"))
    fixed, _ = load_classifier("resnet20_cifar", 4)
    replace_head(fixed, "etf")
    replaced = retrain_classifier(fixed, images, arguments(tmp_path / "etf"))
    for number, other in enumerate([moved, replaced]):
        other.save_model(str(tmp_path / str(number)))
        assert load_heads(tmp_path / str(number))[0].keys() == {"crt"}


def test_new_heads_are_made_from_stage_ones_head_however_often(trained, images, tmp_path):
    model = copy.deepcopy(trained)
    args = arguments(tmp_path / "run", heads=["logit_adjusted"], tau=1.0)
    first = retrain_classifier(model, images, args).heads["logit_adjusted"]
    second = retrain_classifier(model, images, args)
    assert torch.equal(second.heads["logit_adjusted"]["bias"], first["bias"])
    second.save_model(str(tmp_path / "model"))
    for loaded in (load_classifier(str(tmp_path / "model"))[0], load_pretrained(tmp_path / "model")[0]):
        third = retrain_classifier(loaded, images, args)
        assert torch.equal(third.heads["logit_adjusted"]["bias"], first["bias"])
        assert torch.equal(third.other_heads["base"]["bias"], trained.fc.bias)
    whole = NCTrainer(model, training_arguments(tmp_path / "whole", max_steps=1), train_dataset=images)
    whole.train()
    trained_on = model.fc.bias.detach().clone()  # with the whole network, so it is stage one's now
    again = retrain_classifier(model, images, args)
    assert torch.equal(again.other_heads["base"]["bias"], trained_on)


def test_a_head_that_is_not_there_any_more_is_not_gone_on_from(images, tmp_path):
    model, _ = load_classifier("resnet20_cifar", 4)
    replace_head(model, "etf")
    retrain_classifier(model, images, arguments(tmp_path / "first")).save_model(str(tmp_path / "model"))
    for one in (model, load_pretrained(tmp_path / "model")[0]):
        retrain_classifier(one, images, arguments(tmp_path / "again"))
        with pytest.raises(ValueError, match="`heads: tau_norm` goes on from stage one's head, in whose place"):
            retrain_classifier(one, images, arguments(tmp_path / "second", heads=["tau_norm"]))
    other, _ = load_classifier(str(tmp_path / "model"), 3)  # its new head is stage one's
    assert stage_one_state(other.fc)["weight"].shape == (3, 64)


class Interrupt(TrainerCallback):
    """What Ctrl-C does in the middle of a training."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("kind", "heads"), [("linear", ["crt"]), ("linear", ["lws"]), ("cosine", ["crt"])])
def test_an_interrupted_stage_two_leaves_the_model_as_it_was(trained, images, tmp_path, kind, heads):
    model = copy.deepcopy(trained)
    if kind == "cosine":
        replace_head(model, "cosine")
    before, expected = copy.deepcopy(model.state_dict()), model.eval()(images.images)
    told = dict(model._model_args), dict(model.pretrained_cfg)
    with pytest.raises(KeyboardInterrupt):
        retrain_classifier(model, images, arguments(tmp_path, heads=heads), callbacks=[Interrupt()])
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(model.eval()(images.images), expected)  # another memory format, so not to the bit
    assert (model._model_args, model.pretrained_cfg) == told
    assert all(parameter.requires_grad for parameter in model.parameters())
    trainer = retrain_classifier(model, images, arguments(tmp_path, heads=heads))
    assert ("base" in trainer.other_heads) == (kind == "linear")
    if kind == "linear":
        assert torch.equal(trainer.other_heads["base"]["weight"], before["fc.weight"])


def test_tau_is_chosen_on_the_validation_split(trained, images, tmp_path):
    model, validation = copy.deepcopy(trained), SmallImages(counts=(30, 30, 30, 30), seed=1)
    trainer = retrain_classifier(model, images, arguments(tmp_path, heads=["logit_adjusted"]), eval_dataset=validation)

    def class_mean_accuracy() -> float:
        right = torch.cat([(z.argmax(1) == y).float() for _, z, y in trainer.iterate_features(validation)])
        return right.view(4, 30).mean().item()

    best = class_mean_accuracy()
    assert trainer.taus.keys() == {"logit_adjusted"} and trainer.taus["logit_adjusted"] in TAUS
    prior = torch.tensor(images.class_counts / images.class_counts.sum())
    for tau in (0.0, 0.5, 1.0, 2.0):
        model.fc.bias.data = (trained.fc.bias.detach() - tau * prior.log()).float()
        assert class_mean_accuracy() <= best


def test_shifted_statistics_follow_the_draws_and_nothing_else_moves(trained, images, tmp_path):
    model = copy.deepcopy(trained)
    retrain_classifier(model, images, arguments(tmp_path, backbone_statistics="shifted"))
    moved = {
        name for name, tensor in trained.state_dict().items() if not torch.equal(model.state_dict()[name], tensor)
    }
    assert "bn1.running_mean" in moved
    assert all(name.startswith("fc.") or ".running_" in name or name.endswith("num_batches_tracked") for name in moved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"within_weight": 0.1}, "the collapse terms have no gradient"),
        ({"cached_views": 0}, "`cached_views` must be at least 1, got 0"),
        ({"features": "cached", "mixup_alpha": 0.2}, "cannot mix images"),
        ({"features": "cached", "backbone_statistics": "shifted"}, "set features: images"),
        ({"heads": ["crt", "knn"]}, r"`heads` must be some of crt, lws, .* got \['crt', 'knn'\]"),
        ({"heads": []}, "`heads` must be some of"),
        ({"loss": "ldam"}, "trains a linear head, and `loss: ldam` needs one of unit weights"),
        ({"lr_scheduler_type": "cosine"}, "would be ignored beside `lr_cosine`.*Switch lr_cosine off"),
        ({"max_norm_threshold": -1.0}, "`max_norm_threshold` must be at least 0, got -1.0"),
    ],
)
def test_settings_that_cannot_act_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)
