"""Cosine and ETF heads on stock networks: saved, opened through timm and transformers, re-trained, changed in size."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from small_images import SmallImages

from nc_hf.doors import check_doors, needs_nc_hf
from nc_hf.hub import load_pretrained, save_pretrained
from nc_hf.models.classifier import find_head, load_classifier
from nc_hf.models.headed import replace_head
from nc_hf.models.normalized_heads import CosineHead, ETFHead
from nc_hf.retraining import retrain_classifier
from nc_hf.retraining_args import RetrainingArguments, check_stages
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments

HEADS = {"cosine": ({"scale": 16.0}, CosineHead), "etf": ({"seed": 3}, ETFHead)}


def headed(kind: str, name: str = "resnet20_cifar", num_labels: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    model, _ = load_classifier(name, num_labels)
    replace_head(model, kind, **HEADS[kind][0])
    return model


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", ["resnet20_cifar", "mobilenetv3_small_050"])
def test_a_saved_network_opens_through_every_door(tmp_path, kind, name):
    model = headed(kind, name)
    model.train()(torch.randn(8, 3, 64, 64))  # statistics of the ETF head's norm
    save_pretrained(model, tmp_path / "saved", heads={"base": find_head(model)[1].state_dict()})
    assert check_doors(tmp_path / "saved") == ["timm", "transformers", "pipeline", "nc_hf"]
    assert needs_nc_hf(tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert isinstance(find_head(again)[1], HEADS[kind][1])
    named = find_head(load_pretrained(tmp_path / "saved", head="base")[0])[1].state_dict()
    assert all(torch.equal(named[key], value) for key, value in find_head(model)[1].state_dict().items())
    assert getattr(find_head(again)[1], next(iter(HEADS[kind][0]))) == next(iter(HEADS[kind][0].values()))
    # and what was opened is saved as it was
    save_pretrained(again, tmp_path / "again")
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("saved", "again")]
    assert configs[0]["model_args"] == configs[1]["model_args"]
    assert configs[0]["architecture"] == configs[1]["architecture"] == "normalized_head"


@pytest.mark.parametrize("kind", HEADS)
def test_another_number_of_classes_keeps_the_kind_of_head(tmp_path, kind):
    save_pretrained(headed(kind), tmp_path)
    model, _ = load_classifier(str(tmp_path), 3)
    assert isinstance(find_head(model)[1], HEADS[kind][1]) and find_head(model)[1].weight.shape == (3, 64)
    save_pretrained(model, tmp_path / "three")
    check_doors(tmp_path / "three")


@pytest.mark.parametrize(("kind", "loss"), [("cosine", "ldam"), ("etf", "dot_regression")])
@pytest.mark.parametrize("terms", [0.0, 0.1])
def test_both_stages_train(tmp_path, kind, loss, terms):
    images = SmallImages()
    model = headed(kind)
    settings = {"output_dir": str(tmp_path), "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    settings |= {"num_train_epochs": 1, "per_device_train_batch_size": 36, "precision": "fp32"}
    args = NCTrainingArguments(
        **settings,
        loss=loss,
        loss_settings={"scale": 16.0} if loss == "ldam" else {},
        optim="sgd",
        within_weight=terms,
        between_weight=terms,
    )
    before = find_head(model)[1].weight.detach().clone()
    NCTrainer(model, args, train_dataset=images).train()
    assert torch.equal(find_head(model)[1].weight, before) == (kind == "etf")
    retrain_classifier(model, images, RetrainingArguments(**settings, heads=["crt", "ncm"]))
    assert isinstance(model.fc, torch.nn.Linear)
    save_pretrained(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architecture"] == "resnet20_cifar"
    check_doors(tmp_path / "saved")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": ["crt", "lws"]}, "`heads: lws` goes on from a linear head, and stage one's is CosineHead"),
        ({"head_init": "keep"}, "`head_init: keep` goes on from a linear head"),
        ({"match_base_norm": True}, "`match_base_norm` goes on from a linear head"),
    ],
)
def test_heads_that_go_on_from_a_linear_one_are_refused(tmp_path, settings, message):
    args = RetrainingArguments(output_dir=str(tmp_path), report_to="none", **settings)
    with pytest.raises(ValueError, match=message):
        retrain_classifier(headed("cosine"), SmallImages(), args)


def test_a_foreign_config_cannot_name_another_source_as_backbone(tmp_path):
    save_pretrained(headed("cosine"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["backbone"] = "hf-hub:somebody/else"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`backbone` must be an architecture of timm, got 'hf-hub:somebody/else'"):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "logit_adjustment", "class_weighting": "inverse"}, "would correct twice"),
        ({"loss": "balanced_softmax", "sampler": "class_balanced"}, "has levelled already. Set sampler: instance"),
        ({"loss": "dot_regression", "class_weighting": "inverse"}, "would correct twice"),
        ({"loss": "lade", "class_weighting": "inverse"}, "would correct twice"),
        ({"sampler": "class_balanced", "class_weighting": "inverse"}, "prior would be corrected twice"),
        ({"sampler": "progressive", "class_weighting": "inverse"}, "prior would be corrected twice"),
    ],
)
def test_two_corrections_of_the_prior_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        NCTrainingArguments(output_dir=str(tmp_path), **settings)


def test_a_whole_prior_is_not_taken_off_twice(tmp_path):
    stage2 = RetrainingArguments(output_dir=str(tmp_path), heads=["crt", "logit_adjusted"])
    plain, weighted = (
        NCTrainingArguments(output_dir=str(tmp_path), class_weighting=w) for w in ("none", "effective_number")
    )
    check_stages(plain, stage2, has_validation=False)
    check_stages(weighted, stage2, has_validation=True)
    with pytest.raises(ValueError, match="which `stage1.class_weighting: effective_number` has"):
        check_stages(weighted, stage2, has_validation=False)
    bilateral = NCTrainingArguments(output_dir=str(tmp_path), objective="bilateral", sampler="bilateral")
    with pytest.raises(ValueError, match="which `stage1.sampler: bilateral` has"):
        check_stages(bilateral, stage2, has_validation=False)
    stage2.tau = 0.5
    check_stages(weighted, stage2, has_validation=False)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"heads": ["crt", "lws"]}, "heads: lws"),
        ({"heads": ["tau_norm"], "tau": 1.0}, "heads: tau_norm"),
        ({"heads": ["logit_adjusted"], "tau": 1.0}, "heads: logit_adjusted"),
        ({"head_init": "keep"}, "head_init: keep"),
        ({"match_base_norm": True}, "match_base_norm"),
    ],
)
def test_a_head_that_contrastive_training_leaves_untrained_is_not_gone_on_from(tmp_path, settings, name):
    own = {"objective": "contrastive", "sampler": "two_views", "objective_settings": {"method": "fcl"}}
    stage1 = NCTrainingArguments(output_dir=str(tmp_path), **own)
    check_stages(stage1, RetrainingArguments(output_dir=str(tmp_path), heads=["crt", "ncm"]), has_validation=False)
    with pytest.raises(ValueError, match=f"`{name}` goes on from stage one's head, which"):
        check_stages(stage1, RetrainingArguments(output_dir=str(tmp_path), **settings), has_validation=False)


def test_softmax_losses_on_an_etf_head_are_refused(tmp_path):
    args = NCTrainingArguments(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match="too narrow for `loss: ce`"):
        NCTrainer(headed("etf"), args, train_dataset=SmallImages())


def test_a_transformers_network_keeps_its_linear_head():
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="a cosine head can be saved with networks of timm alone"):
        replace_head(model, "cosine")
