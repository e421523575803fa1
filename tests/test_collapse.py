"""L_W, L_B and their centers: an independent slow oracle, the authors' numbers, and what must hold for any input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nc_hf.losses.collapse import (
    NeuralCollapseLoss,
    between_class_loss,
    center_loss,
    class_means,
    within_class_loss,
)

OBJECTIVES = {"nc2_lb_v0": "mean", "nc2_lb_v1": "min", "nc2_lb_v2": "gram"}


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slow_within(features: Tensor, labels: Tensor, centers: Tensor, counts: list[int] | None = None) -> float:
    """Eq. 13 by its two sums."""
    total = 0.0
    for k in range(len(centers)):
        rows = [i for i in range(len(labels)) if int(labels[i]) == k]
        for i in rows:
            distance = sum((float(features[i, p]) - float(centers[k, p])) ** 2 for p in range(features.shape[1]))
            total += distance / (counts[k] if counts else len(rows))
    return total


def slow_angles(centers: Tensor) -> list[list[float]]:
    """Angles between rows minus their mean, by scalar products in Python floats."""
    rows = centers.tolist()
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    rows = [[value - m for value, m in zip(row, mean, strict=True)] for row in rows]

    def angle(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return math.acos(max(-1.0, min(1.0, dot / (math.hypot(*a) * math.hypot(*b)))))

    return [[angle(a, b) for b in rows] for a in rows]


def simplex(num_classes: int, width: int) -> Tensor:
    eye = torch.eye(num_classes, width, dtype=torch.float64)
    return eye - eye.mean(dim=0)


# ---- the authors' numbers ----


def test_within_equals_the_authors(golden):
    for case in golden("nc1_lw"):
        features, centers = (double(case["inputs"][name]).requires_grad_() for name in ("x", "means"))
        loss = within_class_loss(features, torch.tensor(case["inputs"]["y"]), centers)
        loss.backward()
        assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-9)
        torch.testing.assert_close(features.grad, double(case["grads"]["x"]), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(centers.grad, double(case["grads"]["means"]), rtol=1e-7, atol=1e-9)


def test_float32_within_equals_the_authors(golden):
    for case in golden("nc1_lw"):
        features, centers = (double(case["inputs"][name]).float() for name in ("x", "means"))
        loss = within_class_loss(features, torch.tensor(case["inputs"]["y"]), centers)
        assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-5)


@pytest.mark.parametrize(("name", "objective"), OBJECTIVES.items())
def test_between_equals_the_authors_where_their_clamp_is_idle(golden, name, objective):
    compared = 0
    for case in golden(name):
        centers = double(next(iter(case["inputs"].values()))).requires_grad_()
        loss = between_class_loss(centers, objective=objective)
        loss.backward()
        assert centers.grad.isfinite().all()
        clamped = objective != "gram" and any(word in case["note"] for word in ("K=2", "coincident"))
        if not clamped:
            # the authors normalise with a floor of 1e-12, which shows in the ninth digit of the gram variant
            assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=3e-9), case["note"]
        if not clamped and not any(word in case["note"] for word in ("ETF: loss", "EXACTLY")):
            expected = double(next(iter(case["grads"].values())))
            torch.testing.assert_close(centers.grad, expected, rtol=1e-7, atol=1e-9, msg=case["note"])
            compared += 1
    assert compared >= 4


def test_a_center_at_the_mean_of_all_has_a_sane_gradient_where_the_authors_has_not(golden):
    case = next(case for case in golden("nc2_lb_v0") if "EXACTLY" in case["note"])
    centers = double(next(iter(case["inputs"].values()))).requires_grad_()
    between_class_loss(centers).backward()
    assert double(next(iter(case["grads"].values()))).abs().max() > 1e10
    assert centers.grad.abs().max() < 10


def test_within_squared_counts_of_the_authors_are_not_ours(golden):
    """`NC1Loss_1` divides by n_k squared, which no equation of the paper has."""
    for case in golden("nc1_lw_sq"):
        features, centers = (double(case["inputs"][name]) for name in ("x", "means"))
        labels = torch.tensor(case["inputs"]["y"])
        counts = torch.bincount(labels, minlength=len(centers)).double()
        squared = within_class_loss(features, labels, centers, class_counts=(counts + 1e-5).square())
        assert squared.item() == pytest.approx(case["outputs"]["loss"], rel=1e-6)
        if counts.max() > 1:
            assert within_class_loss(features, labels, centers).item() > 1.1 * case["outputs"]["loss"]


def test_center_loss_equals_the_authors(golden):
    for case in golden("center_loss"):
        inputs = list(case["inputs"].values())
        features, labels, centers = double(case["inputs"]["x"]), torch.tensor(case["inputs"]["y"]), double(inputs[-1])
        assert center_loss(features, labels, centers).item() == pytest.approx(case["outputs"]["loss"], rel=1e-9)


def test_learned_centers_move_as_the_authors(golden):
    """One loss and plain SGD give the trajectory that the authors get by rescaling gradients after `backward`."""
    followed = 0
    for case in golden("nc_center_steps"):
        set_up = case["settings"]
        if set_up["lam1"] == 0:
            continue  # refused: the authors' L_B alone never reaches the features
        loss = NeuralCollapseLoss(set_up["K"], set_up["P"], set_up["lam1"], set_up["lam2"], centers="learned").double()
        with torch.no_grad():
            loss.centers.copy_(double(case["inputs"]["means0"]))
        optimizer = torch.optim.SGD([loss.centers], lr=set_up["alpha"])
        for number, (step, expected) in enumerate(zip(case["inputs"]["steps"], case["outputs"], strict=True)):
            features = double(step["x"]).requires_grad_()
            loss.frozen = number < set_up["start_ft_steps"]
            terms = loss(features, torch.tensor(step["y"]))
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            assert sum(terms.values()).item() == pytest.approx(expected["loss"], rel=1e-8)
            torch.testing.assert_close(features.grad, double(expected["grad_x"]), rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(loss.centers.detach(), double(expected["means_after"]), rtol=1e-7, atol=1e-8)
            followed += 1
    assert followed >= 10


def test_batch_centers_equal_the_paper(golden):
    for case in golden("derived_nc_batch_centers"):
        features = double(case["inputs"]["x"]).requires_grad_()
        labels = torch.tensor(case["inputs"]["y"])
        num_classes = case["settings"]["K"]
        loss = NeuralCollapseLoss(num_classes, features.shape[1], 1.0, 1.0, centers="batch", within_reduction="sum")
        terms = loss(features, labels)
        assert terms["within"].item() == pytest.approx(case["outputs"]["L_W_sum"], rel=1e-9)
        assert terms["between"].item() == pytest.approx(case["outputs"]["L_B"], rel=1e-9)
        means, _ = class_means(features, [(labels, 1.0)], num_classes)
        counts = torch.tensor(case["inputs"]["train_counts"])
        by_training_set = within_class_loss(features, labels, means, reduction="sum", class_counts=counts)
        assert by_training_set.item() == pytest.approx(case["outputs"]["L_W_trainw"], rel=1e-9)


# ---- an independent oracle, and properties ----


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 12), classes=st.integers(2, 7), width=st.integers(1, 5))
def test_within_equals_the_slow_sum(seed, batch, classes, width):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    centers = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    expected = slow_within(features, labels, centers)
    assert within_class_loss(features, labels, centers, reduction="sum").item() == pytest.approx(expected)
    assert within_class_loss(features, labels, centers).item() == pytest.approx(expected / classes)
    order = torch.randperm(batch, generator=generator)
    assert within_class_loss(features[order], labels[order], centers).item() == pytest.approx(expected / classes)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(3, 9), width=st.integers(2, 6))
def test_between_equals_the_slow_angles_and_ignores_rotation_scale_and_shift(seed, classes, width):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    nearest = [min(a for j, a in enumerate(row) if j != k) for k, row in enumerate(slow_angles(centers))]
    loss = between_class_loss(centers).item()
    assert loss == pytest.approx(-sum(nearest) / classes, abs=1e-6)
    assert between_class_loss(centers, objective="min").item() == pytest.approx(-min(nearest), abs=1e-6)
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    assert between_class_loss(3.7 * centers @ rotation + 11.0).item() == pytest.approx(loss, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-6, -1))
def test_nearly_coincident_centers_are_pushed_apart(seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    centers[1] = centers[0] + 10.0**exponent * torch.randn(8, generator=generator, dtype=torch.float64)
    centers.requires_grad_()
    between_class_loss(centers).backward()
    direction = (centers[0] - centers[1]).detach()
    separating = -((centers.grad[0] - centers.grad[1]) * direction).sum() / direction.norm()
    assert centers.grad.isfinite().all()
    assert separating > 1e-2  # a descent step moves the two apart, however close they are


def test_exact_coincidence_and_zero_centers_give_finite_gradients():
    for centers in (torch.ones(4, 3), torch.zeros(4, 3), torch.tensor([[1.0, 0], [1, 0], [0, 1]])):
        centers = centers.clone().requires_grad_()
        loss = between_class_loss(centers)
        loss.backward()
        assert loss.isfinite()
        assert centers.grad.isfinite().all()


@pytest.mark.parametrize("objective", ["mean", "min", "gram"])
def test_gradients_agree_with_finite_differences(objective):
    centers = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    present = torch.tensor([True, True, False, True, True])
    assert torch.autograd.gradcheck(lambda c: between_class_loss(c, objective=objective), centers)
    assert torch.autograd.gradcheck(lambda c: between_class_loss(c, objective=objective, present=present), centers)


@pytest.mark.parametrize(("classes", "width"), [(3, 2), (10, 64), (65, 64)])
def test_the_simplex_is_the_minimum(classes, width):
    best = -math.acos(-1 / (classes - 1))
    centers = simplex(classes, max(classes, width))
    assert between_class_loss(centers).item() == pytest.approx(best, abs=1e-9)
    shaken = centers + 0.01 * torch.randn(centers.shape, generator=torch.Generator().manual_seed(0))
    assert between_class_loss(shaken).item() > best


def test_more_classes_than_a_simplex_can_hold_still_spread():
    """K > P + 1: descent on L_B reaches the bound of 90 degrees for P + 2 <= K <= 2 P."""
    centers = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    optimizer = torch.optim.Adam([centers], lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        loss = between_class_loss(centers)
        loss.backward()
        optimizer.step()
    assert 85 < math.degrees(-loss.item()) <= 90.5


def test_two_classes_give_a_constant_without_gradient():
    centers = torch.randn(2, 5, requires_grad=True)
    loss = between_class_loss(centers)
    loss.backward()
    assert loss.item() == pytest.approx(-math.pi, abs=1e-5)
    assert torch.equal(centers.grad, torch.zeros(2, 5))


@pytest.mark.parametrize("objective", ["mean", "min", "gram"])
def test_centers_far_from_zero_keep_their_angles_under_autocast(objective):
    centers = 1 + 0.01 * torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    gradients, values = [], []
    for enabled in (False, True):
        leaf = centers.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = between_class_loss(leaf, objective=objective)
        value.backward()
        values.append(value.detach())
        gradients.append(leaf.grad)
    assert torch.equal(*values) and torch.equal(*gradients)


def test_absent_classes_take_no_part():
    centers = torch.randn(6, 4, dtype=torch.float64)
    present = torch.tensor([True, False, True, True, False, True])
    for objective in ("mean", "min", "gram"):
        alone = between_class_loss(centers[present], objective=objective)
        assert between_class_loss(centers, objective=objective, present=present).item() == pytest.approx(alone.item())
