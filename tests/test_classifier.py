"""Loading classifiers of timm and transformers, finding their heads, tapping their features."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from nc_hf.models.classifier import (
    FeatureTap,
    check_tap,
    feature_dim,
    find_head,
    freeze_backbone,
    logits_of,
    reset_head,
)

TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}


def tiny_vit(num_labels: int = 5) -> nn.Module:
    return ViTForImageClassification(ViTConfig(**TINY_VIT, num_labels=num_labels))


def tiny_resnet(num_labels: int = 5) -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=num_labels)
    )


def tiny_dinov2() -> nn.Module:
    return Dinov2ForImageClassification(Dinov2Config(**{**TINY_VIT, "mlp_ratio": 2}, num_labels=5))


def wrapped() -> nn.Module:
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet20_cifar", num_labels=5))


MODELS = {  # name: (how to make it, path of its head, width of its features, side of its images)
    "one linear layer": (lambda: timm.create_model("test_resnet", num_classes=5), "fc", 96, 32),
    "a linear layer of its own width": (
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
        "classifier",
        1024,
        32,
    ),
    "a 1x1 convolution": (lambda: timm.create_model("dla46_c", num_classes=5), "fc", 256, 32),
    "the last of two layers": (lambda: timm.create_model("caformer_s18", num_classes=5), "head.fc.fc2", 2048, 32),
    "our own": (lambda: timm.create_model("resnet20_cifar", num_classes=5), "fc", 64, 32),
    "timm in transformers": (wrapped, "timm_model.fc", 64, 32),
    "transformers ViT": (tiny_vit, "classifier", 16, 32),
    "transformers DINOv2": (tiny_dinov2, "classifier", 32, 32),
    "transformers ResNet": (tiny_resnet, "classifier.1", 16, 32),
}


# ---- Heads and taps ----


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_the_head_of_the_tapped_features(kind):
    make, head_name, width, side = MODELS[kind]
    model, x = make().eval(), torch.randn(2, 3, side, side)
    name, head = find_head(model)
    assert name == head_name and feature_dim(head) == width
    tap = FeatureTap(model, name)
    logits = logits_of(model(x))
    features = tap.read()
    assert features.shape == (2, width) and features.requires_grad
    torch.testing.assert_close(F.linear(features, head.weight.flatten(1), head.bias), logits, rtol=1e-4, atol=1e-4)
    if hasattr(model, "forward_head") and kind != "the last of two layers":  # timm's are then those before both
        expected = model.forward_head(model.forward_features(x), pre_logits=True).flatten(1)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    model.train()
    check_tap(model, name, x)
    assert model.training and len(head._forward_pre_hooks) == 1  # as it was before, and its own tap taken off
    tap.remove()
    assert not head._forward_pre_hooks


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5),
            "VisionTransformerDistilled has 2",
        ),
        (lambda: timm.create_model("resnet20_cifar", num_classes=0), "number of classes is 0"),
        (
            lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**TINY_VIT, num_labels=5)),
            "candidates: cls_classifier, distillation_classifier",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 5)), "does not tell its number of classes"),
    ],
)
def test_no_single_head_is_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        find_head(make())


def test_head_by_name():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5))
    with pytest.raises(ValueError, match="candidates: 0, 2"):
        find_head(model, num_labels=5)
    assert find_head(model, head="2") == ("2", model[2])
    with pytest.raises(ValueError, match="`head: 1`.* found ReLU"):
        find_head(model, head="1")
    with pytest.raises(ValueError, match="found nothing"):
        find_head(model, head="3")


def test_head_is_found_when_layers_of_the_backbone_have_as_many_outputs():
    for make in (tiny_vit, tiny_resnet):
        assert find_head(make(16))[0].startswith("classifier")


def test_wrong_head_does_not_pass_the_check():
    with pytest.raises(ValueError, match="not one vector per image"):
        check_tap(tiny_vit(), "vit.layers.0.mlp.fc1", torch.randn(2, 3, 32, 32))

    class Softmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.flatten(1)).softmax(1)

    with pytest.raises(ValueError, match="'fc' is not the model's logits"):
        check_tap(Softmax(), "fc", torch.randn(3, 3, 2, 2))


def test_backbone_without_gradient_does_not_pass_the_check():
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.fc = nn.Linear(12, 4), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.backbone(x.flatten(1)).detach())

    model = Detached()
    with pytest.raises(ValueError, match="no gradient"):
        check_tap(model, "fc", torch.randn(3, 3, 2, 2))
    freeze_backbone(model, "fc")
    check_tap(model, "fc", torch.randn(3, 3, 2, 2))


def feature_gradients(model: nn.Module, tap: FeatureTap, forward: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of something of features and logits, for all parameters that have one."""
    model.zero_grad()
    logits = logits_of(forward(x))
    (tap.read().square().mean() + logits.square().mean()).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", ["our own", "one linear layer", "timm in transformers", "transformers ViT"])
def test_gradients_through_the_tap_under_checkpointing(kind):
    model = MODELS[kind][0]().train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    tap, x = FeatureTap(model, find_head(model)[0]), torch.randn(2, 3, 32, 32)
    plain = feature_gradients(model, tap, model, x)
    (getattr(model, "activation_checkpointing_enable", None) or model.set_grad_checkpointing)()
    again = feature_gradients(model, tap, model, x)
    assert len(plain) == len(again) > 2
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["our own", "transformers ViT"])
def test_gradients_through_the_tap_when_compiled(kind):
    model = MODELS[kind][0]().eval()
    tap, x = FeatureTap(model, find_head(model)[0]), torch.randn(2, 3, 32, 32)
    plain = feature_gradients(model, tap, model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(plain, feature_gradients(model, tap, compiled, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    x = torch.randn(2, 3, 32, 32)
    for a, b in zip(feature_gradients(model, tap, compiled, x), feature_gradients(model, tap, model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # nothing of the first batch is kept


def test_gradients_through_the_tap_under_distributed_data_parallel(tmp_path):
    class WithFeatures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = timm.create_model("resnet20_cifar", num_classes=5).eval()
            self.tap = FeatureTap(self.model, "fc")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.model(x)
            return self.tap.read().square().mean() + logits.square().mean()

    module, x = WithFeatures(), torch.randn(2, 3, 32, 32)
    module(x).backward()
    plain = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(module)(x).backward()
    finally:
        dist.destroy_process_group()
    for a, parameter in zip(plain, module.parameters(), strict=True):
        torch.testing.assert_close(a, parameter.grad)


def test_tap_under_autocast_copied_and_read_once():
    model = timm.create_model("resnet20_cifar", num_classes=5)
    tap = FeatureTap(model, "fc")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(2, 3, 32, 32))
    assert tap.read().dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="head did not run"):
        tap.read()
    copied = copy.deepcopy(model)  # as for a moving average of weights
    copied(torch.randn(2, 3, 32, 32))
    with pytest.raises(RuntimeError, match="head did not run"):
        tap.read()
    model(torch.randn(2, 3, 32, 32))  # with a graph, and nobody reads
    assert torch.equal(copy.deepcopy(model).fc.weight, model.fc.weight)


def test_reset_and_freeze():
    torch.manual_seed(0)
    model = timm.create_model("resnet20_cifar", num_classes=1000)
    reset_head(model, "fc")
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.02) and model.fc.bias.abs().sum() == 0
    freeze_backbone(model, "fc")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]


def test_logits_of_what_models_return():
    logits = torch.randn(2, 3)
    assert (
        logits_of(logits) is logits_of({"logits": logits}) is logits_of(ImageClassifierOutput(logits=logits)) is logits
    )
    for output in ((logits, logits), {"last_hidden_state": logits}, BaseModelOutput(last_hidden_state=logits)):
        with pytest.raises(ValueError, match=f"returns {type(output).__name__} without `logits`"):
            logits_of(output)
