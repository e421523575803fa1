"""Supervised losses: slow oracles, what must hold, absent classes, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nc_hf.losses.classification import SUPERVISED_LOSSES, SupervisedLoss, cross_entropy, focal, focal_sigmoid
from nc_hf.losses.long_tail import (
    arb,
    balanced_softmax,
    cdt,
    dot_regression,
    label_aware_smoothing,
    ldam,
    ldam_margins,
    logit_adjustment,
    smoothing_by_count,
)

COUNTS = [90, 25, 4, 1]
LOGITS = torch.tensor([[0.3, -1.2, 2.0, 0.1], [1.5, 0.2, -0.7, 0.9], [-2.0, 1.1, 0.4, 0.4]], dtype=torch.float64)
LABELS = torch.tensor([2, 0, 3])


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- Slow oracles, from the formulas in Python floats ----


def softmax(z: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in z)
    return [math.exp(value) / total for value in z]


def slow(name: str, z: list[float], y: int, n: list[int]) -> float:
    """One image's loss with default settings and the counts n."""
    classes, rarest = range(len(z)), min(count for count in n if count)
    n_safe = [count or rarest for count in n]
    if name == "ce":
        return -math.log(softmax(z)[y])
    if name == "mse":
        return sum((z[k] - (k == y)) ** 2 for k in classes) / len(z)
    if name == "focal":
        return -(1 - softmax(z)[y]) * math.log(softmax(z)[y])
    if name == "focal_sigmoid":
        right = [1 / (1 + math.exp(-z[k] if k == y else z[k])) for k in classes]
        return sum(-((1 - q) ** 2) * math.log(q) for q in right)
    if name in ("balanced_softmax", "logit_adjustment", "arb"):
        return -math.log(n[y] * math.exp(z[y]) / sum(n[k] * math.exp(z[k]) for k in classes))
    if name == "ldam":
        margin = 0.5 * (rarest / n_safe[y]) ** 0.25
        return -math.log(softmax([z[k] - 30 * margin * (k == y) for k in classes])[y])
    if name == "label_aware_smoothing":
        spread = max(n) - rarest
        t = (n_safe[y] - rarest) / spread if spread else 1
        eps, p = 0.3 * math.sin(math.pi * t / 2), softmax(z)
        return sum(-((1 - eps) * (k == y) + eps / len(z)) * math.log(p[k]) for k in classes)
    if name == "dot_regression":
        return sum(n) / sum(count > 0 for count in n) / n[y] * (z[y] - 1) ** 2 / 2
    if name == "cdt":
        return -math.log(softmax([z[k] / (max(n) / n_safe[k]) ** 0.3 for k in classes])[y])
    raise KeyError(name)


@st.composite
def problems(draw):
    num_classes = draw(st.integers(2, 5))
    counts = draw(st.lists(st.integers(0, 1000), min_size=num_classes, max_size=num_classes).filter(any))
    present = [k for k, count in enumerate(counts) if count]
    labels = draw(st.lists(st.sampled_from(present), min_size=1, max_size=4))
    row = st.lists(st.floats(-9, 9, allow_subnormal=False), min_size=num_classes, max_size=num_classes)
    return counts, labels, draw(st.lists(row, min_size=len(labels), max_size=len(labels)))


def counts_option(name: str) -> dict[str, str]:
    return {"counts": "train"} if "train" in SUPERVISED_LOSSES[name].counts else {}


@pytest.mark.parametrize("name", [name for name in SUPERVISED_LOSSES if name != "lade"])
@settings(max_examples=25, deadline=None)
@given(problem=problems())
def test_each_loss_is_its_formula(name, problem):
    counts, labels, logits = problem
    found = SupervisedLoss(name, counts, **counts_option(name))(double(logits), torch.tensor(labels))
    expected = [slow(name, z, y, counts) for z, y in zip(logits, labels, strict=True)]
    torch.testing.assert_close(found, double(expected), rtol=1e-6, atol=1e-9)


def test_lade_is_its_formula():
    """With a class that the training set lacks, and one that the batch lacks."""
    counts = [90, 0, 9, 1]
    prior = [count / 100 for count in counts]
    bound = 0.0
    for k in (0, 2, 3):
        own = [float(z[k]) for z, y in zip(LOGITS, LABELS, strict=True) if y == k] if k != 0 else [float(LOGITS[1, 0])]
        ratio = math.log(sum(math.exp(z[k]) / (4 * prior[k]) for z in LOGITS.tolist()) / 3)
        bound += prior[k] * (sum(own) / len(own) - ratio - 0.1 * ratio**2)
    expected = [slow("arb", z, int(y), counts) - 0.1 * bound for z, y in zip(LOGITS.tolist(), LABELS, strict=True)]
    torch.testing.assert_close(SupervisedLoss("lade", counts)(LOGITS, LABELS), double(expected))


# ---- What must hold ----


@pytest.mark.parametrize("name", SUPERVISED_LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_extreme_logits_and_absent_classes_stay_finite(name, dtype):
    """Of the training set, of the batch, and of both; also for a label that the training set lacks."""
    logits = torch.tensor([[200.0, -200, 0, 1], [-200, 200, 0, 0], [0, 0, 0, 0], [1, 0, 300, 0]], dtype=dtype)
    logits.requires_grad_()
    for labels in ([0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 3, 2]):
        for counts in ([50, 7, 0, 0], [50, 7, 3, 0], [5, 5, 5, 5]):
            loss = SupervisedLoss(name, counts, **counts_option(name))
            values = loss(logits, torch.tensor(labels))
            assert values.shape == (4,) and values.dtype == torch.float32 and values.isfinite().all()
            (gradient,) = torch.autograd.grad(values.sum(), logits)
            assert gradient.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_focal_has_a_finite_gradient_where_the_probability_rounds_to_1(gamma):
    for function in (focal, focal_sigmoid):
        logits = torch.tensor([[60.0, -60.0, -60.0], [300.0, -300.0, -300.0]], requires_grad=True)
        values = function(logits, torch.tensor([0, 0]), gamma=gamma)
        values.sum().backward()
        assert (values >= 0).all() and values.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("function", [balanced_softmax, logit_adjustment, arb])
def test_classes_without_images_leave_the_denominator(function):
    counts = torch.tensor([90, 0, 9, 1])
    logits = LOGITS.clone().requires_grad_()
    kept = [0, 2, 3]
    values = function(logits, LABELS, counts)
    torch.testing.assert_close(values, function(LOGITS[:, kept], torch.tensor([1, 0, 2]), counts[kept]))
    values.sum().backward()
    assert logits.grad[:, 1].tolist() == [0, 0, 0]
    assert logits.grad[:, kept].abs().min() > 0
    off = logit_adjustment(logits, LABELS, counts, tau=0.0)
    torch.testing.assert_close(off, cross_entropy(LOGITS[:, kept], torch.tensor([1, 0, 2])))


def test_arb_is_balanced_softmax_until_it_clamps():
    counts = torch.tensor(COUNTS)
    assert torch.equal(arb(LOGITS, LABELS, counts), balanced_softmax(LOGITS, LABELS, counts))
    logits = (40 * LOGITS).requires_grad_()
    torch.testing.assert_close(
        arb(logits, LABELS, counts), balanced_softmax(logits.detach().clamp(-30, 30), LABELS, counts)
    )
    arb(logits, LABELS, counts).sum().backward()
    assert logits.grad[0, 2] == 0 and logits.detach()[0, 2] == 80


@pytest.mark.parametrize("name", ["balanced_softmax", "arb", "logit_adjustment", "cdt"])
def test_equal_counts_give_cross_entropy(name):
    found = SupervisedLoss(name, [7, 7, 7, 7], **counts_option(name))(LOGITS, LABELS)
    torch.testing.assert_close(found, cross_entropy(LOGITS, LABELS))


def test_rare_classes_get_the_larger_margin_and_the_lower_smoothing():
    counts = torch.tensor([*COUNTS, 0])
    margins, smoothing = ldam_margins(counts), smoothing_by_count(counts)
    assert margins.diff()[:3].min() > 0 and margins[-2:].tolist() == [0.5, 0.5]  # absent: like the rarest
    assert smoothing.diff()[:3].max() < 0 and smoothing[-2:].tolist() == [0, 0]
    assert smoothing_by_count(torch.tensor([5, 5])).tolist() == pytest.approx([0.3, 0.3])
    assert (ldam(LOGITS, LABELS, counts[:4]) > cross_entropy(LOGITS, LABELS)).all()


def test_targets_of_the_squared_error_can_be_larger():
    found = SupervisedLoss("mse", target_scale=3, label_smoothing=0.2)(LOGITS, LABELS)
    targets = [[3 * (0.8 * (k == y) + 0.05) for k in range(4)] for y in LABELS.tolist()]
    torch.testing.assert_close(found, (LOGITS - double(targets)).square().mean(dim=1))


def test_label_aware_smoothing_without_smoothing_is_cross_entropy():
    found = label_aware_smoothing(LOGITS, LABELS, torch.tensor(COUNTS), head=0.0)
    torch.testing.assert_close(found, cross_entropy(LOGITS, LABELS))


def test_counts_of_the_batch_are_those_of_the_update_in_training_alone():
    loss, update = SupervisedLoss("arb"), torch.tensor([50, 1, 10, 5])
    torch.testing.assert_close(loss(LOGITS, LABELS, update), balanced_softmax(LOGITS, LABELS, update))
    own = torch.bincount(LABELS, minlength=4)
    torch.testing.assert_close(loss(LOGITS, LABELS), balanced_softmax(LOGITS, LABELS, own))
    loss.eval()  # an ordered test set has batches of one class
    torch.testing.assert_close(loss(LOGITS, LABELS, update), cross_entropy(LOGITS, LABELS))
    train = SupervisedLoss("balanced_softmax", COUNTS).eval()
    torch.testing.assert_close(train(LOGITS, LABELS, update), balanced_softmax(LOGITS, LABELS, torch.tensor(COUNTS)))


def test_counts_move_with_the_module_stay_exact_and_are_not_saved():
    loss = SupervisedLoss("balanced_softmax", [4999, 301, 7, 0])
    assert loss.to(torch.bfloat16).class_counts.tolist() == [4999, 301, 7, 0]
    assert loss.state_dict() == {}
    assert loss.to("meta").class_counts.is_meta
    assert SupervisedLoss("ce", COUNTS).class_counts is None
    assert "tau=0.5" in repr(SupervisedLoss("logit_adjustment", COUNTS, tau=0.5))


@settings(max_examples=25, deadline=None)
@given(problem=problems(), shift=st.floats(-5, 5))
def test_a_shift_of_all_logits_changes_no_softmax_loss(problem, shift):
    counts, labels, logits = problem
    z, y, n = double(logits), torch.tensor(labels), torch.tensor(counts)
    for function in (balanced_softmax, ldam, label_aware_smoothing):
        torch.testing.assert_close(function(z + shift, y, n), function(z, y, n), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(focal(z + shift, y), focal(z, y), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(cdt(z, y, 3 * n), cdt(z, y, n), rtol=1e-6, atol=1e-9)


# ---- Refusals ----


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cee", {}, "`loss` must be one of ce, mse, focal, .*lade, got 'cee'"),
        ("focal", {"gama": 2}, "`loss: focal` has no setting gama. Its settings: gamma"),
        ("balanced_softmax", {"tau": 2}, "has no setting tau. Its settings: none"),
        ("balanced_softmax", {}, "needs the number of training images per class.*Pass class_counts"),
        ("arb", {"counts": "train"}, "`loss: arb` needs the number of training images"),
        ("ldam", {"counts": "batch"}, "`loss_counts` of `loss: ldam` must be one of train, got 'batch'"),
        ("ce", {"counts": "train"}, "must be one of none, got 'train'"),
        ("cdt", {"class_counts": [3, -1]}, r"whole numbers, not all 0, got \[3, -1\]"),
        ("cdt", {"class_counts": [0, 0]}, r"not all 0, got \[0, 0\]"),
        ("cdt", {"class_counts": [1.5, 2]}, r"whole numbers, not all 0, got \[1.5, 2.0\]"),
        ("cdt", {"class_counts": [[1, 2]]}, r"must be \(K,\)"),
        ("ce", {"label_smoothing": 1.5}, r"`label_smoothing` must lie in \[0, 1\], got 1.5"),
        ("mse", {"label_smoothing": -0.1}, r"`label_smoothing` must lie in \[0, 1\], got -0.1"),
        ("mse", {"target_scale": 0}, "`target_scale` must be above 0, got 0"),
        ("focal", {"gamma": -1}, "`gamma` of a focal loss must be at least 0, got -1"),
        ("focal_sigmoid", {"gamma": math.nan}, "`gamma` of a focal loss must be at least 0, got nan"),
        ("arb", {"clamp": 0}, "`clamp` must be above 0, got 0"),
        ("ldam", {"class_counts": COUNTS, "max_margin": -1}, "`max_margin` must be at least 0, got -1"),
        ("ldam", {"class_counts": COUNTS, "scale": 0}, "`scale` must be above 0, got 0"),
        ("logit_adjustment", {"class_counts": COUNTS, "tau": -1}, "`tau` must be at least 0, got -1"),
        ("cdt", {"class_counts": COUNTS, "gamma": -1}, "`gamma` must be at least 0, got -1"),
        ("lade", {"class_counts": COUNTS, "weight": -1}, "`weight` must be at least 0, got -1"),
        ("lade", {"class_counts": COUNTS, "remine_lambda": -1}, "`remine_lambda` must be at least 0, got -1"),
        ("label_aware_smoothing", {"class_counts": COUNTS, "head": 2}, r"`head` .* must lie in \[0, 1\], got 2"),
        (
            "label_aware_smoothing",
            {"class_counts": COUNTS, "form": "round"},
            "concave, linear, convex, exp, got 'round'",
        ),
        (
            "label_aware_smoothing",
            {"class_counts": COUNTS, "form": "exp"},
            "`form: exp` needs a `power` above 0, got None",
        ),
    ],
)
def test_bad_settings_are_refused_before_training(name, options, message):
    with pytest.raises(ValueError, match=message):
        SupervisedLoss(name, **options)


def test_a_norm_penalty_below_0_is_refused():
    with pytest.raises(ValueError, match="`norm_penalty` must be at least 0, got -1"):
        dot_regression(LOGITS, LABELS, norm_penalty=-1)
