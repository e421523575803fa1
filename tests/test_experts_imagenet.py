"""RIDE on a ResNeXt: timm's own network as the oracle of every expert, its interface, the task, and saving."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from small_images import SmallImages
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from nc_hf.doors import check_doors
from nc_hf.experts_task import ExpertsTask
from nc_hf.hub import save_pretrained
from nc_hf.losses.collapse import NeuralCollapseLoss
from nc_hf.losses.precision import unit_rows
from nc_hf.models.classifier import check_tap, find_head, load_classifier
from nc_hf.models.experts_imagenet import ResNeXtExperts
from nc_hf.models.image_settings import image_settings
from nc_hf.models.routing import evaluate_routing, routed
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments

SMALL = {"depths": (1, 2, 2, 1), "widths": (8, 8, 12, 16), "cardinality": 2, "base_width": 32}  # P = 64
CLASSES = {"num_classes": 4}


def small_network(num_experts: int = 3, **settings) -> ResNeXtExperts:
    """In the middle of a training, when no residual branch is at zero any more and all have seen images."""
    torch.manual_seed(0)
    model = timm.create_model("resnext50_ride", num_experts=num_experts, **SMALL | CLASSES | settings)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model


def of_one_expert(model: ResNeXtExperts, number: int, **shape) -> ResNet:
    """timm's ResNeXt of four stages with the weights that one expert's images pass through."""
    shape = {"layers": shape["depths"], "channels": shape["widths"]} | {
        k: shape[k] for k in ("cardinality", "base_width")
    }
    alone, later = ResNet(Bottleneck, num_classes=0, **shape), list(model.experts[number])
    for name in ("conv1", "bn1", "layer1", "layer2"):
        getattr(alone, name).load_state_dict(getattr(model, name).state_dict())
    assert len(alone.layer3) + len(alone.layer4) == len(later)
    for block, ours in zip([*alone.layer3, *alone.layer4], later, strict=True):
        block.load_state_dict(ours.state_dict())
    return alone.to(model.conv1.weight)


# ---- The network ----


@pytest.mark.parametrize("side", [64, 50])
def test_each_expert_is_the_resnext_of_timm(side):
    model, x = small_network().double().eval(), torch.randn(3, 3, side, side, dtype=torch.float64)
    features = model.expert_features(x)
    assert features.shape == (3, 3, 64)
    for number in range(3):
        torch.testing.assert_close(features[:, number], of_one_expert(model, number, **SMALL).eval()(x))
    logits = [30 * torch.cosine_similarity(features[:, e, None], model.fc.directions[e], dim=2) for e in range(3)]
    torch.testing.assert_close(model(x), sum(logits) / 3)


@pytest.mark.parametrize("num_experts", [2, 3, 4])
def test_the_registered_network_has_two_shared_stages_and_experts_of_width_1536(num_experts):
    with torch.device("meta"):
        model = timm.create_model("resnext50_ride", num_experts=num_experts)
        shape = {"layers": (3, 4, 6, 3), "channels": (64, 128, 192, 384), "cardinality": 32, "base_width": 4}
        alone = ResNet(Bottleneck, num_classes=0, **shape)
        usual = timm.create_model("resnext50_32x4d")

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    shared = count(alone.conv1, alone.bn1, alone.layer1, alone.layer2)
    assert shared == count(usual.conv1, usual.bn1, usual.layer1, usual.layer2)
    later = count(alone.layer3, alone.layer4)
    assert later < 0.65 * count(usual.layer3, usual.layer4)
    assert count(model) == shared + num_experts * (later + 1000 * 1536)
    assert model.num_features == num_experts * 1536 and model.fc.weight.shape == (1000, num_experts * 1536)
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"conv1", "bn1", "layer1", "layer2", "experts", "fc"}


def test_images_are_those_of_the_other_rows():
    with torch.device("meta"):
        networks = [timm.create_model(name) for name in ("resnext50_ride", "resnext50_32x4d")]
    assert image_settings(networks[0]) == image_settings(networks[1])


def test_weights_start_as_in_timm_and_experts_apart():
    torch.manual_seed(0)
    model = timm.create_model("resnext50_ride", **SMALL)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            outputs = module.out_channels * math.prod(module.kernel_size)
            spread = 5 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() * math.sqrt(outputs / 2) == pytest.approx(1, abs=spread), name
        if isinstance(module, Bottleneck):
            assert not module.bn3.weight.any() and module.bn2.weight.eq(1).all()
    assert not torch.equal(model.experts[0][0].conv1.weight, model.experts[1][0].conv1.weight)
    torch.testing.assert_close(model.fc.directions.norm(dim=2), torch.ones(3, 1000))


def test_interface_of_timm():
    model, x = small_network(num_classes=7, in_chans=1).eval(), torch.randn(2, 1, 64, 64)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert model.forward_features(x).shape == (2, 192, 2, 2) and model.shared_features(x).shape == (2, 32, 8, 8)
    assert model.num_features == model.head_hidden_size == features.shape[1] == 192 and model.num_classes == 7
    assert find_head(model) == ("fc", model.fc) and model.get_classifier() is model.fc
    check_tap(model, "fc", x)
    torch.testing.assert_close(features @ model.fc.weight.T, model(x))
    torch.testing.assert_close(features, unit_rows(model.expert_features(x)).flatten(1))
    model.double().reset_classifier(0)
    torch.testing.assert_close(model(x.double()), features.double(), rtol=1e-4, atol=1e-5)
    model.reset_classifier(3)
    assert model(x.double()).shape == (2, 3) and model.fc.directions.dtype == torch.float64


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = small_network().double(), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    again, calls = copy.deepcopy(model), []
    again.set_grad_checkpointing()
    for block in (again.layer2[1], again.experts[1][2]):
        block.conv2.register_forward_hook(lambda *_: calls.append(1))
    for network in (model, again):
        network(x).square().sum().backward()
    assert len(calls) == 4
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_routing_stops_early_or_never():
    model, images = small_network(routing=True).eval(), SmallImages((6, 4, 3, 3), size=64)
    gates, shared = model.routing, model.shared_features(images.images)
    features, first = model.expert_outputs(0, shared)
    gates.last.bias.data -= gates(0, features, first).median()
    logits, used = routed(model, images.images)
    stopped = used == 1
    assert 0 < stopped.sum() < len(used)
    torch.testing.assert_close(logits[stopped], first[stopped], rtol=1e-4, atol=1e-4)
    gates.last.bias.data.fill_(1e4)
    torch.testing.assert_close(routed(model, images.images)[0], model(images.images), rtol=1e-4, atol=1e-4)
    metrics = evaluate_routing(model, [images.collate(images.__getitems__(range(16)))], images.class_counts)
    assert metrics["experts_used"] == 3


def test_one_expert_is_refused():
    with pytest.raises(ValueError, match="`num_experts` must be at least 2, got 1. RIDE has 2, 3 or 4"):
        small_network(1)


# ---- Training and saving ----


@pytest.mark.parametrize("centers", ["learned", "ema"])
def test_a_step_with_the_collapse_terms_lowers_the_loss(centers):
    images, model = SmallImages((8, 6, 5, 5), size=64), small_network()
    collapse = NeuralCollapseLoss(4, 192, 0.05, 0.5, centers, num_experts=3)
    task = ExpertsTask(model, "fc", 4, collapse=collapse).train()
    task.collapse_active = True
    rows, labels = images.images, torch.from_numpy(images.labels)
    optimizer, losses = torch.optim.SGD(task.parameters(), lr=0.01), []
    for _ in range(4):
        output = task(rows, labels)
        optimizer.zero_grad()
        output["loss"].backward()
        missing = [name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()]
        assert not missing
        optimizer.step()
        losses.append(output["loss"].item())
    assert output["loss_within"] > 0 and output["loss_diversity"] < 0 and losses[-1] < losses[0] - 0.1


def test_trainer_takes_the_network_with_the_terms_and_saves_it(tmp_path):
    model, _ = load_classifier("resnext50_ride", 4, num_experts=2, **SMALL)
    args = NCTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=12,
        learning_rate=0.02,
        optim="sgd",
        max_grad_norm=0,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        objective="experts",
        objective_settings={"reweight_factor": 0.02},
        loss="ldam",
        class_weighting="effective_number",
        centers="learned",
        feature_scale="none",
        within_weight=0.05,
        between_weight=1.0,
    )
    images = SmallImages((10, 6, 4, 4), size=64)
    trainer = NCTrainer(model, args, train_dataset=images)
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    moved = {n.split(".")[0] for n, p in trainer.classifier.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {"conv1", "bn1", "layer1", "layer2", "experts", "fc"}
    trainer.save_model(str(tmp_path / "saved"))
    again, _ = load_classifier(str(tmp_path / "saved"))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images.images), trainer.classifier.eval()(images.images))


def test_opens_through_every_door(tmp_path):
    model = small_network(2, routing=True).eval()
    save_pretrained(model, tmp_path / "ride", heads={"base": model.fc.state_dict()})
    assert check_doors(tmp_path / "ride") == ["timm", "transformers", "pipeline", "nc_hf"]
    again = timm.create_model(f"local-dir:{tmp_path / 'ride'}", pretrained=True).eval()
    assert len(again.experts) == 2 and again.routing is not None
    x = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(routed(again, x), routed(model, x), rtol=0, atol=0)
