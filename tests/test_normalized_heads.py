"""Cosine and simplex heads: the authors' numbers, the simplex, classifiers that carry them, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from nc_hf.heads import simplex_directions
from nc_hf.losses.classification import SupervisedLoss
from nc_hf.models.cifar_resnet import CifarResNet
from nc_hf.models.classifier import FeatureTap, check_tap, find_head, logits_of
from nc_hf.models.experts import ExpertsHead
from nc_hf.models.normalized_heads import (
    CosineHead,
    ETFHead,
    check_head_for,
    equivalent_linear,
    set_head,
    unit_or_zero,
)

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small_resnet(num_classes: int = 4) -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet((1, 1, 1), (4, 6, 8), num_classes=num_classes)


def small_vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=4, **sizes))


def used(head: nn.Module, width: int = 8) -> nn.Module:
    """A head whose batch norm has seen features and has weights of its own, in eval mode."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(head, ETFHead) and head.norm is not None:
        nn.init.uniform_(head.norm.weight, 0.5, 2, generator=generator)
        nn.init.normal_(head.norm.bias, generator=generator)
        for _ in range(20):
            head(3 * torch.randn(32, width, generator=generator) + torch.arange(width))
    return head.eval()


# ---- Cosine ----


def test_cosine_logits_are_scaled_cosines_of_raw_features():
    torch.manual_seed(0)
    head, features = CosineHead(5, 3, scale=7.0), torch.randn(4, 5)
    head.weight.data *= torch.tensor([[1.0], [5.0], [0.1]])  # the length of a row plays no part
    expected = [[7 * F.cosine_similarity(h, w, dim=0).item() for w in head.weight] for h in features]
    torch.testing.assert_close(head(features), torch.tensor(expected))
    torch.testing.assert_close(head(100 * features), head(features))
    assert head.bias is None and [name for name, _ in head.named_parameters()] == ["weight"]


def test_cosine_directions_start_with_length_1_on_all_sides():
    torch.manual_seed(0)
    head = CosineHead(64, 500)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(500))
    # a coordinate uniform in [-1, 1] has variance 1/3 and kurtosis 1.8; one of a Gaussian would have 3
    centered = head.weight.detach().flatten() * math.sqrt(64)
    assert abs(centered.mean()) < 0.02 and abs((centered**4).mean() - 1.8) < 0.1
    before = head.weight.clone()
    head.reset_parameters()
    assert not torch.equal(head.weight, before)


@pytest.mark.parametrize("head", [CosineHead(6, 3), ETFHead(6, 3), ETFHead(6, 3, norm="none")])
def test_zero_features_get_no_gradient_and_bfloat16_stays_finite(head):
    features = torch.zeros(4, 6, dtype=torch.bfloat16)
    features[1:] = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).bfloat16() * 1e3
    features.requires_grad_()
    head.eval()  # batch norm would give the zeros a direction
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features)
    assert logits.dtype == torch.float32 and logits.isfinite().all() and logits[0].abs().max() < 1e-6
    logits.square().sum().backward()
    assert features.grad.isfinite().all() and features.grad[0].abs().max() == 0 and features.grad[1].abs().max() > 0


def test_a_last_batch_of_one_image_has_the_statistics_so_far():
    head = ETFHead(6, 3).train()
    for features in torch.randn(5, 8, 6, generator=torch.Generator().manual_seed(0)):
        head(3 + 2 * features)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    one = torch.randn(1, 6)
    logits = head(one)
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
    assert torch.equal(logits, head.eval()(one))


def test_heads_take_the_types_of_the_model_around_them():
    for head in (CosineHead(6, 3), ETFHead(6, 3)):
        assert head.double()(torch.randn(4, 6).double()).dtype == torch.float64
        assert head.bfloat16()(torch.randn(4, 6).bfloat16()).dtype == torch.float32


def test_ldam_trains_a_cosine_head():
    """The rare class is right by the larger cosine, as its margin asks."""
    torch.manual_seed(0)
    counts = [40, 10]
    labels = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
    features = torch.randn(50, 6) + 2 * F.one_hot(labels, 6)
    head, loss = CosineHead(6, 2), SupervisedLoss("ldam", counts)
    check_head_for(loss, head)
    optimizer, values = torch.optim.SGD(head.parameters(), lr=0.05), []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(head(features), labels).mean()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] / 2
    assert (head(features).argmax(dim=1) == labels)[40:].float().mean() >= 0.9


# ---- Simplex ----


@settings(max_examples=40, deadline=None)
@given(num_classes=st.integers(2, 20), extra=st.integers(-1, 12), seed=st.integers(0, 5))
def test_the_directions_are_a_simplex_wherever_there_is_one(num_classes, extra, seed):
    directions = simplex_directions(num_classes, num_classes + extra, seed)
    size = num_classes / (num_classes - 1)
    expected = size * (torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes)
    torch.testing.assert_close(directions @ directions.T, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(directions.sum(dim=0), torch.zeros_like(directions[0]), rtol=0, atol=1e-12)
    assert torch.equal(directions, simplex_directions(num_classes, num_classes + extra, seed))


def test_another_seed_gives_another_rotation():
    first, second = (ETFHead(8, 4, seed=seed).weight for seed in (0, 1))
    assert (first - second).abs().max() > 0.1
    torch.testing.assert_close(first @ first.T, second @ second.T)


def test_the_etf_head_is_the_authors(golden):
    for case in golden("etf_classifier"):
        directions = torch.tensor(case["outputs"]["M"], dtype=torch.float64)
        width, num_classes = directions.shape
        ours = simplex_directions(num_classes, width)
        torch.testing.assert_close(ours @ ours.T, directions.T @ directions, rtol=1e-9, atol=1e-12)
        head = ETFHead(width, num_classes).double()
        head.weight.copy_(directions.T)
        assert head.norm.eps == case["settings"]["bn_eps"]
        features = torch.tensor(case["inputs"]["feats"], dtype=torch.float64)
        expected = torch.tensor(case["outputs"]["out_train"], dtype=torch.float64)
        torch.testing.assert_close(head.unit_features(features), expected, rtol=1e-9, atol=1e-12)
        expected = torch.tensor(case["outputs"]["logits"], dtype=torch.float64)
        torch.testing.assert_close(head(features), expected, rtol=1e-9, atol=1e-12)


def test_the_simplex_is_saved_and_never_trained():
    head, other = ETFHead(8, 4, seed=3), ETFHead(8, 4)
    assert [name for name, _ in head.named_parameters()] == ["norm.weight", "norm.bias"]
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.weight, head.weight)
    assert not list(ETFHead(8, 4, norm="none").parameters())


def test_dot_regression_brings_features_onto_the_simplex():
    """With counts far from equal, every class ends on its own direction."""
    torch.manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([30, 9, 3, 1]))
    features = nn.Parameter(torch.randn(43, 8))
    head, loss = ETFHead(8, 4, norm="none"), SupervisedLoss("dot_regression")
    check_head_for(loss, head)
    optimizer = torch.optim.Adam([features], lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        loss(head(features), labels).sum().backward()
        optimizer.step()
    cosines = (unit_or_zero(features.detach()) * head.weight[labels]).sum(dim=1)
    torch.testing.assert_close(cosines, torch.ones(43), rtol=0, atol=0.02)  # the pull fades with the cube of the angle


# ---- The linear head that predicts alike ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_equivalent_linear_head_predicts_alike(dtype):
    torch.manual_seed(0)
    features = (3 * torch.randn(300, 8) + torch.arange(8)).to(dtype)
    heads = [CosineHead(8, 5), ETFHead(8, 5), ETFHead(8, 5, norm="none"), nn.Linear(8, 5), nn.Linear(8, 5, bias=False)]
    for head in heads:
        head = used(head).to(dtype)
        linear, logits = equivalent_linear(head), head(features)
        assert linear.weight.shape == (5, 8) and linear.bias.shape == (5,)
        assert not linear.weight.requires_grad and not linear.bias.requires_grad
        assert len(logits.argmax(dim=1).unique()) > 1
        assert torch.equal(linear.logits(features).argmax(dim=1), logits.argmax(dim=1))
        factor = linear.logits(features) / logits  # the same for all classes, and above 0
        torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=2e-3, atol=1e-4)
        assert factor.min() > 0
    experts = ExpertsHead(2, 4, 5)
    torch.testing.assert_close(equivalent_linear(experts).logits(features.float()), experts(features.float()))
    convolution = nn.Conv2d(8, 5, 1)
    expected = convolution(features.float()[..., None, None]).flatten(1)
    torch.testing.assert_close(equivalent_linear(convolution).logits(features.float()), expected)


# ---- In classifiers ----


@pytest.mark.parametrize("kind", ["linear", "cosine", "etf"])
@pytest.mark.parametrize(("make", "path"), [(small_resnet, "fc"), (small_vit, "classifier")])
def test_a_classifier_takes_a_new_head(make, path, kind):
    model = make().eval()
    assert find_head(model)[0] == path
    head = set_head(model, path, kind)
    assert model.get_submodule(path) is head and head.weight.shape[0] == 4 and not head.training
    check_tap(model, path, IMAGES)
    tap = FeatureTap(model.train(), path)
    logits = logits_of(model(IMAGES))
    features = tap.read()
    torch.testing.assert_close(head(features), logits)  # the tap sees features before they are normalized
    assert (features.norm(dim=1) - 1).abs().max() > 0.1
    bound = {"linear": math.inf, "cosine": 30, "etf": 1}[kind]
    assert logits.shape == (6, 4) and logits.abs().max() <= bound + 1e-4
    F.cross_entropy(logits, torch.arange(6) % 4).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


def test_the_new_head_lives_where_the_old_one_did_and_can_be_replaced_again():
    model = small_resnet().to(torch.bfloat16)
    assert set_head(model, "fc", "cosine", scale=10.0).weight.dtype == torch.bfloat16
    assert set_head(model, "fc", "etf", seed=2, norm="none").weight.dtype == torch.bfloat16
    assert isinstance(set_head(model, "fc", "linear"), nn.Linear)
    assert set_head(small_resnet().to("meta"), "fc", "etf").weight.is_meta


def test_a_classifier_with_an_etf_head_is_restored_from_its_weights():
    model, other = small_resnet(), small_resnet()
    for network, seed in ((model, 5), (other, 0)):
        set_head(network, "fc", "etf", seed=seed)
    model.train()(IMAGES)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(IMAGES), model.eval()(IMAGES))


# ---- Refusals ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ETFHead(64, 100), "no simplex of 100 directions in 64 dimensions: .* at least 99 wide. Take a wider"),
        (lambda: ETFHead(64, 1), "no simplex of 1 directions"),
        (lambda: ETFHead(8, 4, norm="layer"), "`norm` of an ETF head must be batch or none, got 'layer'"),
        (lambda: CosineHead(8, 4, scale=0), "`scale` of a cosine head must be above 0, got 0"),
        (lambda: set_head(small_resnet(), "fc", "arc"), "must be one of linear, cosine, etf, got 'arc'"),
        (lambda: set_head(small_resnet(), "fc", "cosine", seed=1), "no setting seed. Its settings: scale"),
        (lambda: set_head(small_resnet(), "fc", "linear", scale=1), "no setting scale. Its settings: none"),
        (lambda: set_head(small_resnet(), "conv1", "cosine"), "'conv1' of CifarResNet is Conv2d; only a linear"),
        (lambda: set_head(small_resnet(20), "fc", "etf"), "no simplex of 20 directions in 8 dimensions"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_losses_refuse_heads_that_they_diverge_on():
    ldam, regression = SupervisedLoss("ldam", [5, 2]), SupervisedLoss("dot_regression")
    with pytest.raises(ValueError, match="needs a cosine head of its scale, 30.0.* the head is Linear. Take"):
        check_head_for(ldam, nn.Linear(4, 2))
    with pytest.raises(ValueError, match="the head is CosineHead of scale 10.0"):
        check_head_for(ldam, CosineHead(4, 2, scale=10.0))
    with pytest.raises(ValueError, match="needs an ETF head; the head is CosineHead"):
        check_head_for(regression, CosineHead(4, 2))
    check_head_for(ldam, ExpertsHead(2, 4, 2))
    check_head_for(SupervisedLoss("ce"), nn.Linear(4, 2))


def test_rows_of_zeros_have_no_direction():
    rows = torch.zeros(2, 3, requires_grad=True)
    unit_or_zero(rows).sum().backward()
    assert rows.grad.abs().max() == 0
    assert unit_or_zero(torch.tensor([[3.0, 4.0]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]
