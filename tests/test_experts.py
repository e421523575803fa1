"""RIDE: the authors' numbers, slow oracles, timm's interface, and two processes against one."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
from experts_run import cross_entropy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nc_hf.doors import check_doors
from nc_hf.experts_task import ExpertsTask
from nc_hf.hub import save_pretrained
from nc_hf.losses.collapse import NeuralCollapseLoss
from nc_hf.losses.experts import class_temperatures, diversity
from nc_hf.losses.precision import unit_rows
from nc_hf.models.cifar_resnet import CifarResNet
from nc_hf.models.experts import ExpertsHead, ExpertsNetwork
from nc_hf.models.routing import routed


def small_network(num_experts: int = 3, num_classes: int = 4, **kwargs) -> ExpertsNetwork:
    torch.manual_seed(0)
    return ExpertsNetwork((1, 1, 1), (4, 6, 8), num_experts=num_experts, num_classes=num_classes, **kwargs)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ldam(margins: torch.Tensor, scale: float):
    """LDAM on logits that are already scaled."""

    def loss(logits, labels, update_counts=None):
        shifted = logits - scale * margins.to(logits) * nn.functional.one_hot(labels, logits.shape[1])
        return nn.functional.cross_entropy(shifted, labels, reduction="none")

    return loss


# ---- The loss ----


def test_loss_and_gradient_are_the_authors(golden):
    for case in golden("ride_loss"):
        inputs, outputs, given_ = case["inputs"], case["outputs"], case["settings"]
        logits = tensor(inputs["expert_logits"]).transpose(0, 1).requires_grad_()
        labels, temperature = torch.tensor(inputs["y"]), given_["base_diversity_temperature"]
        supervised = ldam(tensor(outputs["margins"]), given_["s"]) if outputs["margins"] else cross_entropy
        weights = torch.ones(logits.shape[2], dtype=torch.float64)
        if outputs["base_weights"] is not None:
            weights = tensor(outputs["base_weights"])
            temperature = class_temperatures(inputs["counts"], given_["reweight_factor"])
            torch.testing.assert_close(temperature, tensor(outputs["T"]), rtol=1e-12, atol=0)
        base = sum((weights[labels] * supervised(z, labels)).sum() / weights[labels].sum() for z in logits.unbind(1))
        loss = base + given_["additional_diversity_factor"] * diversity(logits, temperature).mean()
        assert loss.item() == pytest.approx(outputs["loss"], rel=1e-9)
        (gradient,) = torch.autograd.grad(loss, logits)
        expected = tensor(case["grads"]["expert_logits"]).transpose(0, 1)
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-10)


def test_task_gives_the_authors_loss(golden):
    for case in golden("ride_loss"):
        inputs, outputs, given_ = case["inputs"], case["outputs"], case["settings"]
        logits = torch.tensor(inputs["expert_logits"]).transpose(0, 1)
        supervised = ldam(tensor(outputs["margins"]), given_["s"]) if outputs["margins"] else None
        weights = outputs["base_weights"]
        _, num_experts, num_classes = logits.shape
        task = ExpertsTask(
            small_network(num_experts, num_classes),
            "fc",
            num_classes,
            supervised=supervised,
            class_weights=None if weights is None else torch.tensor(weights),
            class_counts=inputs["counts"],
            diversity_factor=given_["additional_diversity_factor"],
            reweight_factor=given_["reweight_factor"],
        )
        task.weighting_active = weights is not None
        task.head.expert_logits = lambda features, logits=logits: logits
        output = task(torch.randn(len(logits), 3, 8, 8), torch.tensor(inputs["y"]))
        assert output["loss"].item() == pytest.approx(outputs["loss"], rel=1e-5)
        assert output["loss_diversity"] < 0 < output["loss_supervised"]


def slow_diversity(logits: torch.Tensor, temperatures: list[float]) -> list[float]:
    def softmax(values):
        values = [math.exp(v / t) for v, t in zip(values, temperatures, strict=True)]
        return [v / sum(values) for v in values]

    square = (sum(temperatures) / len(temperatures)) ** 2
    answers = []
    for experts in logits.tolist():
        mean = softmax([sum(column) / len(experts) for column in zip(*experts, strict=True)])
        others = [softmax(expert) for expert in experts]
        answers.append(square * sum(p * math.log(p / q) for o in others for p, q in zip(mean, o, strict=True)))
    return answers


@given(experts=st.integers(2, 4), classes=st.integers(2, 6), seed=st.integers(0, 99), per_class=st.booleans())
@settings(max_examples=25, deadline=None)
def test_diversity_is_the_formula(experts, classes, seed, per_class):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, experts, classes, generator=generator, dtype=torch.float64)
    values = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.5
    temperature = values if per_class else 1.5
    expected = slow_diversity(logits, values.tolist() if per_class else [1.5] * classes)
    ours = diversity(logits, temperature)
    torch.testing.assert_close(ours, tensor(expected), rtol=1e-9, atol=1e-10)
    assert (ours >= 0).all()
    alike = logits[:, :1].expand(-1, experts, -1)
    torch.testing.assert_close(diversity(alike, temperature), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_diversity_of_bfloat16_logits_is_finite_float32():
    logits = (30 * torch.randn(4, 3, 5)).bfloat16().requires_grad_()
    value = diversity(logits).sum()
    value.backward()
    assert value.dtype == torch.float32 and torch.isfinite(value) and torch.isfinite(logits.grad).all()


def test_temperatures_refuse_a_factor_of_one():
    with pytest.raises(ValueError, match=r"`reweight_factor` must lie in \[0, 1\), got 1"):
        class_temperatures([3, 1], 1)
    assert (class_temperatures([9, 3, 0], 0.05) > 0).all()


# ---- Collapse terms ----


@pytest.mark.parametrize(
    ("mode", "scale"), [("learned", "none"), ("ema", "none"), ("ema", "rms"), ("batch", "none"), ("batch", "rms")]
)
def test_collapse_terms_are_the_mean_over_experts_alone(mode, scale):
    torch.manual_seed(0)
    together = NeuralCollapseLoss(4, 15, 0.05, 0.5, mode, feature_scale=scale, num_experts=3).double()
    alone = [NeuralCollapseLoss(4, 5, 0.05, 0.5, mode, feature_scale=scale).double() for _ in range(3)]
    if mode != "batch":
        together.set_centers(torch.randn(4, 15), torch.ones(4))
        for loss, centers in zip(alone, together.centers.detach().chunk(3, dim=1), strict=True):
            loss.set_centers(centers, torch.ones(4))
    labels, partners = torch.randint(0, 4, (2, 20))
    features = torch.randn(20, 15, dtype=torch.float64, requires_grad=True)
    blocks = [block.detach().clone().requires_grad_() for block in features.chunk(3, dim=1)]
    mixed = {"partner_labels": partners, "mixing": 0.3, "class_counts": torch.tensor([9.0, 8.0, 7.0, 6.0])}
    terms = together(features, labels, **mixed)
    parts = [loss(block, labels, **mixed) for loss, block in zip(alone, blocks, strict=True)]
    for name in ("within", "between"):
        torch.testing.assert_close(terms[name], sum(part[name] for part in parts) / 3)
    sum(terms.values()).backward()
    sum(sum(part.values()) for part in parts).backward()
    torch.testing.assert_close(3 * features.grad, torch.cat([block.grad for block in blocks], dim=1))
    if mode == "learned":  # each expert's centers step as if it were alone
        torch.testing.assert_close(together.centers.grad, torch.cat([loss.centers.grad for loss in alone], dim=1))
    if mode == "ema":
        torch.testing.assert_close(together.centers, torch.cat([loss.centers for loss in alone], dim=1))


def test_frozen_centers_get_no_gradient():
    loss = NeuralCollapseLoss(4, 6, 0.05, 0.5, "learned", num_experts=2)
    loss.frozen = True
    features = torch.randn(8, 6, requires_grad=True)
    sum(loss(features, torch.arange(8) % 4).values()).backward()
    assert loss.centers.grad is None and features.grad.abs().sum() > 0


def test_features_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match="feature_dim=10 cannot be split among num_experts=3"):
        NeuralCollapseLoss(4, 10, num_experts=3)


# ---- The network ----


def test_head_is_the_mean_of_cosine_heads_and_linear_in_unit_features():
    torch.manual_seed(0)
    head, features = ExpertsHead(3, 5, 4).double(), unit_rows(torch.randn(6, 3, 5, dtype=torch.float64))
    head.directions.data *= torch.rand(3, 4, 1, dtype=torch.float64) + 0.5  # lengths do not matter
    logits = head.expert_logits(features)
    for i, e, k in np.ndindex(6, 3, 4):
        cosine = torch.cosine_similarity(features[i, e], head.directions[e, k], dim=0)
        assert logits[i, e, k].item() == pytest.approx(30 * cosine.item(), rel=1e-9)
    flat = features.flatten(1)
    torch.testing.assert_close(head(flat), logits.mean(dim=1))
    torch.testing.assert_close(flat @ head.weight.T, head(flat))
    assert head.bias is None and head.weight.shape == (4, 15)


def test_autocast_leaves_cosines_in_float32():
    model = small_network().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.expert_features(torch.randn(2, 3, 16, 16))
        assert model.head_hidden_size == 24 and model.fc.expert_logits(unit_rows(features)).dtype == torch.float32
        assert model(torch.randn(2, 3, 16, 16)).dtype == torch.float32
        assert model.expert_outputs(0, model.shared_features(torch.randn(2, 3, 16, 16)))[1].dtype == torch.float32


def test_interface_of_timm():
    model, x = small_network(num_classes=7, in_chans=1).eval(), torch.randn(2, 1, 16, 16)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert model.num_features == features.shape[1] == 24 and model.num_classes == 7
    assert model.get_classifier() is model.fc
    torch.testing.assert_close(features @ model.fc.weight.T, model(x))
    torch.testing.assert_close(features, unit_rows(model.expert_features(x)).flatten(1))
    shared = model.shared_features(x)
    outputs = [model.expert_outputs(e, shared) for e in range(3)]
    torch.testing.assert_close(torch.stack([f for f, _ in outputs], dim=1).flatten(1), features)
    torch.testing.assert_close(torch.stack([z for _, z in outputs]).mean(dim=0), model(x))
    model.double().reset_classifier(0)
    torch.testing.assert_close(model(x.double()), features.double(), rtol=1e-4, atol=1e-5)
    model.reset_classifier(3)
    assert model(x.double()).shape == (2, 3) and model.fc.directions.dtype == torch.float64


def test_the_first_stage_is_shared_and_the_others_are_not():
    model = timm.create_model("resnet32_ride_cifar", num_experts=4, num_classes=100)
    shared = CifarResNet((5,), (16,), num_classes=0)
    expected = sum(p.numel() for p in shared.parameters())
    for width_in, width in ((16, 24), (24, 48)):  # five blocks of two convolutions with batch norm
        expected += 4 * (9 * (width_in + 9 * width) * width + 2 * 10 * width)
    assert sum(p.numel() for p in model.parameters()) == expected + 4 * 100 * 48
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"conv1", "bn1", "layer1", "experts", "fc"}
    assert [timm.create_model("resnet32_ride_cifar", num_experts=e).num_features for e in (2, 3)] == [96, 144]


def test_weights_start_as_in_the_cifar_resnets():
    model = timm.create_model("resnet32_ride_cifar")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / module.weight[0].numel())
            spread = 5 * expected / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(expected, abs=spread), name
    torch.testing.assert_close(model.fc.directions.norm(dim=2), torch.ones(3, 10))


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = small_network().double(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    calls = []
    again.experts[1][0].conv1.register_forward_hook(lambda *_: calls.append(1))
    for network in (model, again):
        network(x).square().sum().backward()
    assert len(calls) == 2
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_compiles_without_a_graph_break():
    model, x = small_network().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_opens_through_every_door(tmp_path):
    model = timm.create_model("resnet32_ride_cifar", num_experts=2, num_classes=5, routing=True).eval()
    save_pretrained(model, tmp_path / "ride", heads={"base": model.fc.state_dict()})
    assert check_doors(tmp_path / "ride") == ["timm", "transformers", "pipeline", "nc_hf"]
    again = timm.create_model(f"local-dir:{tmp_path / 'ride'}", pretrained=True).eval()
    assert len(again.experts) == 2 and again.routing is not None
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(routed(again, x), routed(model, x), rtol=0, atol=0)


def test_one_expert_is_refused():
    with pytest.raises(ValueError, match="`num_experts` must be at least 2, got 1"):
        timm.create_model("resnet32_ride_cifar", num_experts=1)
