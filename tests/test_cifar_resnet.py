"""CIFAR ResNets: the authors' numbers, published sizes, and timm's interface."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nc_hf.models.cifar_resnet as cifar_resnet

NAMES = ["resnet20_cifar", "resnet32_cifar", "resnet44_cifar", "resnet56_cifar", "resnet18_cifar"]


def fill_by_formula(model: nn.Module, phase: float) -> None:
    """The weights that the golden file describes."""
    with torch.no_grad():
        for p, (name, parameter) in enumerate(model.named_parameters()):
            i = torch.arange(parameter.numel(), dtype=torch.float64)
            if parameter.ndim > 1:
                value = math.sqrt(2 / parameter[0].numel()) * torch.sin(1.7 * i + 0.3 * p + phase)
            elif "bn" in name:
                value = 1 + 0.1 * torch.sin(i + p) if name.endswith("weight") else 0.1 * torch.cos(i + p)
            else:
                value = 0.01 * i
            parameter.copy_(value.view_as(parameter))


def test_equals_the_authors_resnet32(golden):
    for case in golden("resnet32_forward"):
        model = timm.create_model("resnet32_cifar", num_classes=case["settings"]["K"]).double().eval()
        names = [name.replace("linear.", "fc.") for name in case["inputs"]["parameter_names"]]
        assert [name for name, _ in model.named_parameters()] == names
        fill_by_formula(model, case["settings"]["phase"])
        expected = {name: torch.tensor(value, dtype=torch.float64) for name, value in case["outputs"].items()}
        n, c, h, w = (torch.arange(size, dtype=torch.float64) for size in (2, 3, 32, 32))
        x = torch.sin(
            0.1 * (n + 1)[:, None, None, None] * h[:, None] + 0.05 * w + c[:, None, None]
        )  # broadcasts to (2, 3, 32, 32)
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(features, expected["feature"], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(model(x), expected["logits"], rtol=1e-9, atol=1e-10)
        model.train()
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(features, expected["feature_train"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "count"),
    # The first four as in the published option-A implementations (0.27M, 0.46M, 0.66M, 0.85M in He et al., Table 6).
    list(zip(NAMES, [269_722, 464_154, 658_586, 853_018, 11_173_962], strict=True)),
)
def test_number_of_parameters(name, count):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_registered_with_the_settings_of_cifar():
    for name in NAMES:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.architecture == name and cfg.input_size == (3, 32, 32) and cfg.crop_pct == 1.0
        assert cfg.mean == (0.4914, 0.4822, 0.4465) and cfg.std == (0.2023, 0.1994, 0.2010)
        assert cfg.interpolation == "bilinear" and not timm.is_model_pretrained(name)
        with torch.device("meta"):
            model = timm.create_model(name)
        assert isinstance(model.get_submodule(cfg.first_conv), nn.Conv2d)
        assert model.get_submodule(cfg.classifier) is model.get_classifier()


def test_weights_start_kaiming_normal_with_fan_in():
    torch.manual_seed(0)
    model = timm.create_model("resnet32_cifar", num_classes=1000)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            expected = math.sqrt(2 / fan_in)
            spread = 5 * expected / math.sqrt(2 * module.weight.numel())  # five standard errors
            assert module.weight.std().item() == pytest.approx(expected, abs=spread), name


@given(side=st.integers(8, 40), stride=st.sampled_from([1, 2]), channels=st.sampled_from([(2, 4), (3, 7)]))
@settings(max_examples=20, deadline=None)
def test_shortcut_pads_channels_on_both_sides(side, stride, channels):
    width_in, width = channels
    x = torch.randn(2, width_in, side, side)
    out = cifar_resnet.PaddingShortcut((width - width_in) // 2)(x)
    before = (width - width_in) // 2
    for c in range(width):
        expected = x[:, c - before, ::2, ::2] if 0 <= c - before < width_in else torch.zeros_like(x[:, 0, ::2, ::2])
        assert torch.equal(out[:, c], expected)


@pytest.mark.parametrize("size", [(8, 8), (9, 17), (31, 33), (64, 64)])
@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet18_cifar"])
def test_takes_images_of_any_size_from_8(name, size):
    model = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(1, 3, *size)
    feature_map = model.forward_features(x)
    reduction = 4 if name == "resnet20_cifar" else 8
    assert feature_map.shape == (1, model.num_features, *(math.ceil(side / reduction) for side in size))
    assert model(x).shape == (1, 5)


def test_interface_of_timm():
    model = timm.create_model("resnet20_cifar", num_classes=7, in_chans=1).eval()
    x = torch.randn(2, 1, 32, 32)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(F.linear(features, model.fc.weight, model.fc.bias), model(x))
    assert model.num_features == model.head_hidden_size == features.shape[1] == 64 and model.num_classes == 7
    model.double().reset_classifier(0)
    torch.testing.assert_close(model(x.double()), features.double(), rtol=1e-4, atol=1e-5)
    model.reset_classifier(3)
    assert model.num_classes == 3 and model(x.double()).shape == (2, 3)
    assert timm.create_model("resnet20_cifar", num_classes=0).get_classifier().__class__ is nn.Identity


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = timm.create_model("resnet20_cifar").double(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    plain = gradients(model, x)
    model.set_grad_checkpointing()
    calls = []
    model.layer2[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    again = gradients(model, x)
    assert len(calls) == 2  # run once more in the backward pass
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


def test_channels_last_gives_the_same_logits_and_stays_channels_last():
    model, x = timm.create_model("resnet20_cifar").eval(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert model.forward_features(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_compiles_without_a_graph_break():
    model, x = timm.create_model("resnet20_cifar").double(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_dropout_before_the_head():
    model = timm.create_model("resnet20_cifar", drop_rate=0.5).train()
    features = model.forward_head(torch.ones(8, 64, 8, 8), pre_logits=True)
    assert set(features.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(model.eval().forward_head(torch.ones(8, 64, 8, 8), pre_logits=True), torch.ones(8, 64))
