"""Heads in closed form: against the formulas, the authors' numbers, and Proposition 4."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nc_hf.heads import (
    LinearHead,
    choose,
    least_squares,
    logit_adjusted,
    nearest_class_mean,
    tau_normalized,
)
from nc_hf.metrics import class_means


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def features_of(counts: list[int], feature_dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    centers = 2 * torch.randn(len(counts), feature_dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), feature_dim, generator=generator, dtype=torch.float64)
    return centers[labels] + noise, labels


def simplex(num_classes: int, feature_dim: int) -> torch.Tensor:
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(feature_dim, num_classes, dtype=torch.float64))
    return (basis @ (torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes)).T


def test_tau_normalisation_is_the_authors(golden):
    for case in golden("tau_norm"):
        head = tau_normalized(tensor(case["inputs"]["W"]), case["settings"]["tau"])
        torch.testing.assert_close(head.weight, tensor(case["outputs"]["W_tau"]))
        torch.testing.assert_close(head.logits(tensor(case["inputs"]["h"])), tensor(case["outputs"]["logits"]))


def test_nearest_class_mean_is_the_authors(golden):
    cases = [case for case in golden("ncm") if case["settings"] == {"feat_type": "un", "dist": "l2"}]
    assert cases
    for case in cases:
        train, labels = tensor(case["inputs"]["train_feats"]), torch.tensor(case["inputs"]["train_y"])
        means, counts = class_means([(train, labels)], int(labels.max()) + 1, train.shape[1])
        torch.testing.assert_close(means, tensor(case["outputs"]["centroids"]))
        features = tensor(case["inputs"]["feats"])
        logits = nearest_class_mean(means, counts).logits(features)
        assert logits.argmax(dim=1).tolist() == case["outputs"]["pred"]
        # Twice our logits and minus the squared distance differ by ||h||^2, the same for all classes.
        distances = 2 * logits - features.square().sum(dim=1, keepdim=True)
        torch.testing.assert_close(distances, tensor(case["outputs"]["logits"]))


def test_adjustment_after_training_is_the_authors(golden):
    for case in golden("logit_adjust_posthoc"):
        counts, logits = case["inputs"]["counts"], tensor(case["inputs"]["logits"])
        head = LinearHead(torch.eye(len(counts), dtype=torch.float64), torch.zeros(len(counts), dtype=torch.float64))
        adjusted = logit_adjusted(head, counts, case["settings"]["tau"])
        torch.testing.assert_close(adjusted.logits(logits), tensor(case["outputs"]["adjusted"]), rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=5), st.integers(1, 7), st.booleans())
def test_least_squares_is_that_of_a_solver(counts, feature_dim, balanced):
    """With a bias column, and each image weighed by one over its class's size when balanced."""
    features, labels = features_of(counts, feature_dim)
    means, sizes = class_means([(features, labels)], len(counts), feature_dim)
    halves = [(features[::2], labels[::2]), (features[1::2], labels[1::2])]
    head = least_squares(halves, means, sizes, balanced=balanced)
    root = (1 / sizes.double()[labels] if balanced else torch.ones(len(labels)).double()).sqrt()[:, None]
    design = torch.cat([features, torch.ones(len(labels), 1).double()], dim=1)
    targets = nn.functional.one_hot(labels, len(counts)).double()
    expected = design @ (torch.linalg.pinv(root * design) @ (root * targets))
    torch.testing.assert_close(head.logits(features), expected, rtol=1e-6, atol=1e-7)


def test_the_unbalanced_head_is_equations_8_and_9():
    features, labels = features_of([30, 8, 3], 5)
    means, counts = class_means([(features, labels)], 3, 5)
    grand = features.mean(dim=0)
    total = (features - grand).T @ (features - grand)
    weight = torch.linalg.pinv(total) @ (means - grand).T @ torch.diag(counts.double())
    bias = counts / len(labels) - grand @ weight
    head = least_squares([(features, labels)], means, counts, balanced=False)
    torch.testing.assert_close(head.weight, weight.T)
    torch.testing.assert_close(head.bias, bias)
    assert head.weight.norm(dim=1).argmax() == 0  # frequent classes get larger weights


def test_proposition_4_for_least_squares():
    """Collapsed features on a simplex, classes of very different sizes: the balanced head is the class means."""
    means, counts = simplex(5, 8), torch.tensor([200, 50, 20, 5, 1])
    labels = torch.repeat_interleave(torch.arange(5), counts)
    features = 3 * means[labels] + 7
    found, sizes = class_means([(features, labels)], 5, 8)
    centered = found - found.mean(dim=0)
    head = least_squares([(features, labels)], found, sizes)
    torch.testing.assert_close(head.weight / head.weight.norm(), centered / centered.norm())


def test_the_balance_matters_where_features_have_not_collapsed():
    means, counts = simplex(5, 8), [200, 50, 20, 10, 5]
    labels = torch.repeat_interleave(torch.arange(5), torch.tensor(counts))
    features = 2 * means[labels] + torch.randn(len(labels), 8).double()
    found, sizes = class_means([(features, labels)], 5, 8)
    gaps = []
    for balanced in (True, False):
        weight = least_squares([(features, labels)], found, sizes, balanced=balanced).weight
        norms = weight.norm(dim=1)
        gaps.append((norms.max() / norms.min()).item())
    assert gaps[0] < gaps[1] / 2


def test_proposition_4_for_a_retrained_head():
    """Gradient descent on balanced batches of collapsed features, with a little weight decay, ends there too."""
    centered = simplex(4, 6).float()
    head = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0, weight_decay=1e-3)
    labels = torch.arange(4).repeat(8)
    for _ in range(12000):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(2 * centered[labels]), labels).backward()
        optimizer.step()
    weight = head.weight.detach()
    torch.testing.assert_close(weight / weight.norm(), centered / centered.norm(), rtol=0, atol=1e-3)


def test_absent_classes_are_never_predicted():
    features, labels = features_of([20, 0, 10], 4)
    means, counts = class_means([(features, labels)], 3, 4)
    heads = [
        nearest_class_mean(means, counts),
        least_squares([(features, labels)], means, counts),
        logit_adjusted(LinearHead(torch.zeros(3, 4).double(), torch.zeros(3).double()), [20, 0, 10]),
    ]
    for head in heads:
        assert head.weight.isfinite().all() and head.bias.isfinite().all()
        assert 1 not in head.logits(100 * features).argmax(dim=1)
    assert heads[2].logits(features).argmax(dim=1).unique().tolist() == [2]  # the rarer one gains


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_features_beside_long_means_are_not_of_an_absent_class(dtype):
    """A constant bias would win: h mu - |mu|^2 / 2 falls below any constant for long means."""
    means = 800 * nn.functional.normalize(torch.randn(20, 64, generator=torch.Generator().manual_seed(0)))
    counts = torch.tensor([0, *[5] * 18, 0])
    weight, bias = (tensor.to(dtype) for tensor in nearest_class_mean(means, counts))
    predicted = nn.functional.linear((0.2 * means).to(dtype), weight, bias).argmax(dim=1)
    assert not {0, 19} & set(predicted.tolist())
    if dtype == torch.float32:
        expected = 1 + torch.cdist(0.2 * means, means[1:-1]).argmin(dim=1)
        assert (predicted == expected).all()


def test_a_setting_is_chosen_by_the_mean_over_classes():
    """tau = 0 gets every frequent image right, tau = 2 one in ten fewer but all rare ones."""
    features, labels = torch.tensor([[0.6]] * 10 + [[0.4]]), torch.tensor([0] * 10 + [1])
    heads = {0.0: LinearHead(torch.tensor([[1.0], [0.0]]), torch.zeros(2))}
    heads[2.0] = LinearHead(torch.tensor([[1.0], [-1.0]]), torch.tensor([-0.5, 0.5]))
    value, head = choose([0.0, 2.0], heads.__getitem__, features, labels, 2)
    assert value == 2.0 and head is heads[2.0]
    assert choose([0.0, 2.0], heads.__getitem__, features[:10], labels[:10], 2)[0] == 0.0  # the first of equals
    with pytest.raises(ValueError, match="no image to choose on"):
        choose([0.0], heads.__getitem__, features[:0], labels[:0], 2)
