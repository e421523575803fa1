"""Stage two after an interruption, without counts or a bias, and with cached features; names, draws and protocols."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from small_images import SmallImages, network_without_batch_statistics
from torch import nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback, ViTConfig, ViTForImageClassification

from nc_hf import saving_trainer
from nc_hf.inspect import check_classes
from nc_hf.models.classifier import load_classifier
from nc_hf.recipe import load_recipe
from nc_hf.reproduction_report import protocol
from nc_hf.retraining import check_heads, retrain_classifier
from nc_hf.retraining_args import RetrainingArguments
from nc_hf.sampling import EpochSampler


def arguments(folder, **settings) -> RetrainingArguments:
    defaults = {"output_dir": str(folder), "num_train_epochs": 3, "per_device_train_batch_size": 36}
    defaults |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "precision": "fp32"}
    return RetrainingArguments(**defaults | settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tau": 0.5}, r"`tau` is 0.5 and acts on tau_norm and logit_adjusted alone, got heads: \['crt'\]"),
        ({"lws_weight_factor": 0.2}, "`lws_weight_factor` is 0.2 and acts on lws alone"),
    ],
)
def test_a_setting_of_heads_that_are_not_made_is_refused(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, **settings)


def test_early_stopping_on_cached_features_is_refused_before_they_are_computed(tmp_path):
    args, stop = arguments(tmp_path, features="cached"), EarlyStoppingCallback()
    with pytest.raises(ValueError, match="EarlyStoppingCallback stops by evaluations on the way"):
        retrain_classifier(network_without_batch_statistics(), SmallImages(), args, head="head", callbacks=[stop])


class Interrupted(Exception):
    pass


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise Interrupted


def test_max_norm_resumes_with_the_radius_it_began_with(tmp_path):
    settings = {"head_init": "keep", "max_norm_threshold": 0.5, "learning_rate": 0.02, "save_strategy": "epoch"}
    images, whole = SmallImages(), network_without_batch_statistics()
    retrain_classifier(whole, images, arguments(tmp_path / "whole", **settings), head="head")
    args = arguments(tmp_path / "parts", **settings)
    with pytest.raises(Interrupted):
        retrain_classifier(network_without_batch_statistics(), images, args, head="head", callbacks=[Interrupt()])
    resumed = network_without_batch_statistics()
    retrain_classifier(resumed, images, args, head="head", resume_from_checkpoint=True)
    torch.testing.assert_close(resumed.head.weight, whole.head.weight)


class Unlabelled(Dataset):
    """Images one at a time, which tell their classes only when they are read."""

    def __init__(self) -> None:
        self.images = SmallImages()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {name: values[0] for name, values in self.images.__getitems__([index]).items()}


def test_logit_adjustment_counts_images_that_do_not_tell_their_classes(tmp_path):
    told, untold = network_without_batch_statistics(), network_without_batch_statistics()
    for model, images in ((told, SmallImages()), (untold, Unlabelled())):
        retrain_classifier(model, images, arguments(tmp_path, heads=["logit_adjusted"]), head="head")
    assert torch.equal(told.head.bias, untold.head.bias)
    assert not torch.equal(told.head.bias, network_without_batch_statistics().head.bias)


@pytest.mark.parametrize("name", ["ncm", "least_squares", "logit_adjusted"])
def test_heads_that_need_a_bias_are_refused_before_any_is_trained(tmp_path, name):
    model, steps = network_without_batch_statistics(), []
    model.head = nn.Linear(8, 4, bias=False)

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    args = arguments(tmp_path, heads=["crt", name])
    with pytest.raises(ValueError, match=rf"`heads: \['{name}'\]` need a bias, which the model's last layer"):
        retrain_classifier(model, SmallImages(), args, head="head", callbacks=[Count()])
    assert not steps


@pytest.mark.parametrize("name", ["tau_norm", "logit_adjusted"])
def test_several_evaluation_sets_cannot_choose_one_tau(tmp_path, name):
    model, sets = network_without_batch_statistics(), {"near": SmallImages(seed=1), "far": SmallImages(seed=2)}
    before = model.head.weight.clone()
    with pytest.raises(ValueError, match="chosen on one evaluation set, got near, far"):
        args = arguments(tmp_path, heads=["crt", name])
        retrain_classifier(model, SmallImages(), args, head="head", eval_dataset=sets)
    assert torch.equal(model.head.weight, before)
    args = arguments(tmp_path, heads=["crt", name], tau=1.0)
    assert name in retrain_classifier(model, SmallImages(), args, head="head", eval_dataset=sets).heads


def test_experts_have_no_stage_two(tmp_path):
    model = timm.create_model("resnet32_ride_cifar", num_classes=4)
    with pytest.raises(ValueError, match=r"cannot replace ExpertsHead by a linear head.*\(stage2: null\)"):
        check_heads(model.fc, arguments(tmp_path))


def test_cached_features_leave_the_hub_and_the_first_evaluation_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(saving_trainer, "check_access", lambda name, **_: name)
    monkeypatch.setattr(saving_trainer, "push_folder", lambda *_, **__: pytest.fail("pushed a head alone"))
    model = timm.create_model("resnet20_cifar", num_classes=4)
    before = copy.deepcopy(model.fc.weight)
    settings = {"features": "cached", "save_strategy": "epoch", "push_to_hub": True, "num_train_epochs": 1}
    args = arguments(tmp_path, eval_strategy="epoch", eval_on_start=True, **settings)
    trainer = retrain_classifier(model, SmallImages(size=32), args, eval_dataset=SmallImages(size=32, seed=1))
    assert not torch.equal(model.fc.weight, before)
    assert trainer.args.push_to_hub  # the whole classifier still can be
    assert "neither a timm model nor" not in caplog.text


def test_classes_are_compared_by_their_number_whatever_the_order_of_the_config(tmp_path):
    names = [f"class {k}" for k in range(12)]
    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    shape = ViTConfig(**settings, image_size=8, patch_size=8, num_labels=12)
    ViTForImageClassification(shape).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {str(k): names[k] for k in sorted(range(12), key=str)}  # 0, 1, 10, 11, 2, as on the Hub
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = load_classifier(str(tmp_path))
    check_classes(model, names, "it")
    with pytest.raises(ValueError, match="its class 2 is 'class 2', and that of the data is 'class 3'"):
        check_classes(model, [*names[:2], names[3], names[2], *names[4:]], "it")


def test_the_beta_of_the_effective_number_reaches_the_draws():
    weights = EpochSampler([0] * 60 + [1] * 6, "effective_number", seed=0, effective_number_beta=0.5)._image_weights()
    expected = (1 - 0.5**6) / (1 - 0.5**60)  # Cui et al. 2019: (1 - beta) / (1 - beta^n)
    assert weights[0] / weights[1] == pytest.approx(expected)


@pytest.mark.parametrize(("epoch", "words"), [(0.8, "from 0.8 of the run"), (160, "from epoch 160")])
def test_a_protocol_says_when_weights_begin_and_that_images_were_cut(epoch, words):
    overrides = ["--stage1.class_weighting", "inverse", "--stage1.drw_epoch", str(epoch), "--stage1.cutmix_alpha", "1"]
    parts = protocol(load_recipe(None, overrides))
    assert parts["weighting"] == f"inverse weights {words}"
    assert parts["cutmix"] == "CutMix 1"


@pytest.mark.parametrize("heads", [["crt", "lws"], ["crt", "ncm"], ["tau_norm"]])
def test_moving_statistics_go_with_one_trained_head(tmp_path, heads):
    with pytest.raises(ValueError, match="Give crt or lws alone"):
        arguments(tmp_path, heads=heads, backbone_statistics="shifted")


def test_progressive_draws_need_the_length_of_stage_two_before_stage_one(tmp_path):
    with pytest.raises(ValueError, match="set num_train_epochs, not max_steps"):
        arguments(tmp_path, sampler="progressive", max_steps=3)


@pytest.mark.parametrize("settings", [{"heads": ["lws"]}, {"head_init": "keep", "max_norm_threshold": 0.1}])
def test_an_optimizer_that_knows_not_what_is_trained_is_refused(tmp_path, settings):
    model = network_without_batch_statistics()
    own = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="which would not act. Give optimizer_cls_and_kwargs"):
        args = arguments(tmp_path, **settings)
        retrain_classifier(model, SmallImages(), args, head="head", optimizers=(own, None))


def test_the_weights_of_lws_have_a_share_of_the_users_learning_rate(tmp_path):
    rates = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            rates.append(sorted(group["lr"] for group in optimizer.param_groups if group["params"]))

    args = arguments(tmp_path, heads=["lws"], lws_weight_factor=0.5, num_train_epochs=1, lr_cosine=False)
    own = (torch.optim.SGD, {"lr": 0.001})
    model = network_without_batch_statistics()
    retrain_classifier(model, SmallImages(), args, head="head", callbacks=[Look()], optimizer_cls_and_kwargs=own)
    assert 0 < rates[0][-1] <= 0.001 and rates[0][0] == pytest.approx(rates[0][-1] / 2)
