"""Supervised losses: the authors' numbers, slow oracles, absent classes, refusals, and the task's mean."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nc_hf.losses.classification import SUPERVISED_LOSSES, SupervisedLoss, cross_entropy, focal, focal_sigmoid
from nc_hf.losses.long_tail import (
    arb,
    balanced_softmax,
    cdt,
    class_lengths,
    dot_regression,
    label_aware_smoothing,
    ldam,
    ldam_margins,
    logit_adjustment,
    smoothing_by_count,
)
from nc_hf.mixing import Mixing, mix
from nc_hf.rebalancing import class_weights
from nc_hf.task import ClassificationTask

COUNTS = [90, 25, 4, 1]
LOGITS = torch.tensor([[0.3, -1.2, 2.0, 0.1], [1.5, 0.2, -0.7, 0.9], [-2.0, 1.1, 0.4, 0.4]], dtype=torch.float64)
LABELS = torch.tensor([2, 0, 3])


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def agrees(loss: SupervisedLoss, case: dict, *, rtol: float = 1e-9) -> None:
    """The mean over images and its gradient are those of a golden case, in float64 and nearly so in float32."""
    for dtype, loss_rtol, grad_rtol in ((torch.float64, rtol, 100 * rtol), (torch.float32, 1e-4, 1e-3)):
        logits = double(case["inputs"]["logits"]).to(dtype).requires_grad_()
        value = loss(logits, torch.tensor(case["inputs"]["y"])).mean()
        value.backward()
        torch.testing.assert_close(value, double(case["outputs"]["loss"]).to(dtype), rtol=loss_rtol, atol=0)
        atol = 1e-10 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(logits.grad, double(case["grads"]["logits"]).to(dtype), rtol=grad_rtol, atol=atol)


# ---- The authors' numbers ----

PLAIN = {
    "mse_onehot": lambda case: SupervisedLoss("mse"),
    "label_smoothing": lambda case: SupervisedLoss("ce", label_smoothing=case["settings"]["epsilon"]),
    "focal_sigmoid": lambda case: SupervisedLoss("focal_sigmoid", gamma=case["settings"]["gamma"]),
}
COUNTED = {
    "balanced_softmax": lambda s: {"name": "balanced_softmax"},
    "ldam_scaled_logits": lambda s: {"name": "ldam", "max_margin": s["max_m"], "scale": s["s"]},
    "logit_adjust_train_plain": lambda s: {"name": "logit_adjustment", "tau": s["tau"]},
    "cdt": lambda s: {"name": "cdt", "gamma": s["gamma"]},
}


@pytest.mark.parametrize("name", PLAIN)
def test_losses_without_counts_are_the_authors(golden, name):
    for case in golden(name):
        agrees(PLAIN[name](case), case)


@pytest.mark.parametrize("name", COUNTED)
def test_losses_with_counts_are_the_authors(golden, name):
    for case in golden(name):
        agrees(SupervisedLoss(class_counts=case["inputs"]["counts"], **COUNTED[name](case.get("settings", {}))), case)


def test_logit_adjustment_differs_by_1e_12_from_the_paper_authors(golden):
    for case in golden("logit_adjust_train"):
        # they add 1e-12 to pi^tau, which is 4e-5 and more here
        agrees(
            SupervisedLoss("logit_adjustment", case["inputs"]["counts"], tau=case["settings"]["tau"]), case, rtol=1e-7
        )


def test_lade_is_the_authors(golden):
    for case in golden("lade"):
        options = {"remine_lambda": case["settings"]["remine_lambda"], "weight": case["settings"]["estim_loss_weight"]}
        # they add 1e-8 to the counts of the batch and 1e-9 to the prior
        agrees(SupervisedLoss("lade", case["inputs"]["counts"], **options), case, rtol=1e-8)


def test_arb_is_the_authors_with_counts_of_the_batch_or_of_the_training_set(golden):
    cases = golden("arb_loss")
    assert {case["settings"]["kind"] for case in cases} == {"train_counts", "batch_counts"}
    for case in cases:
        given_counts = double(case["inputs"]["class_counts"])
        if case["settings"]["kind"] == "train_counts":
            agrees(SupervisedLoss("arb", given_counts.tolist(), counts="train"), case)
        else:
            agrees(SupervisedLoss("arb"), case)  # the default, counted from the labels
            logits, labels = double(case["inputs"]["logits"]), torch.tensor(case["inputs"]["y"])
            shared = SupervisedLoss("arb")(
                logits, labels, given_counts / 2
            )  # a share of the update's, as of two processes
            torch.testing.assert_close(shared.mean(), double(case["outputs"]["loss"]), rtol=1e-9, atol=0)


def test_ldam_on_cosines_is_the_authors_on_scaled_logits(golden):
    for case in golden("ldam"):
        scale, counts = case["settings"]["s"], double(case["inputs"]["counts"])
        margins = ldam_margins(counts, case["settings"]["max_m"])
        torch.testing.assert_close(margins, double(case["outputs"]["margins"]), rtol=1e-12, atol=0)
        cosines, labels = double(case["inputs"]["logits"]).requires_grad_(), torch.tensor(case["inputs"]["y"])
        loss = SupervisedLoss("ldam", counts.tolist(), max_margin=case["settings"]["max_m"], scale=scale)
        weights = torch.ones_like(counts) if (given := case["settings"]["weight"]) is None else double(given)
        value = (weights[labels] * loss(scale * cosines, labels)).sum() / weights[labels].sum()
        value.backward()
        torch.testing.assert_close(value, double(case["outputs"]["loss"]), rtol=1e-9, atol=0)
        torch.testing.assert_close(cosines.grad, double(case["grads"]["logits"]), rtol=1e-7, atol=1e-10)


def test_label_aware_smoothing_is_the_authors(golden):
    cases = golden("label_aware_smoothing")
    assert {case["settings"]["shape"] for case in cases} == {"concave", "linear", "convex", "exp"}
    for case in cases:
        s = case["settings"]
        options = {"head": s["smooth_head"], "tail": s["smooth_tail"], "form": s["shape"], "power": s["power"]}
        found = smoothing_by_count(double(case["inputs"]["counts"]), **options)
        torch.testing.assert_close(found, double(case["outputs"]["smooth"]), rtol=1e-9, atol=1e-12)
        agrees(SupervisedLoss("label_aware_smoothing", case["inputs"]["counts"], **options), case)


def test_dot_regression_is_the_authors(golden):
    for case in golden("dot_regression"):
        features, directions = double(case["inputs"]["feats"]).requires_grad_(), double(case["inputs"]["M"])
        labels, kind = torch.tensor(case["inputs"]["y"]), case["settings"]["kind"]
        counts = torch.bincount(labels, minlength=directions.shape[1]) if kind == "given_Ew" else None
        logits = features @ (directions / directions.norm(dim=0))
        penalty = case["settings"]["reg_lam"]
        norms = features.norm(dim=1) if kind == "raw" or penalty else None
        loss = dot_regression(logits, labels, counts, norms, penalty).mean()
        loss.backward()
        torch.testing.assert_close(loss, double(case["outputs"]["loss"]), rtol=1e-9, atol=0)
        torch.testing.assert_close(features.grad, double(case["grads"]["feats"]), rtol=1e-7, atol=1e-10)
        if kind == "given_Ew":  # what the task runs: lengths from the counts of the update
            torch.testing.assert_close(
                SupervisedLoss("dot_regression")(logits, labels).mean(), loss, rtol=1e-12, atol=0
            )


def test_class_lengths_are_the_authors(golden):
    for case in golden("dr_class_lengths"):
        inputs = case["inputs"]
        counts = (
            torch.bincount(torch.tensor(inputs["y"]), minlength=inputs["K"])
            if "y" in inputs
            else torch.tensor(inputs["counts"])
        )
        torch.testing.assert_close(class_lengths(counts.double()), double(case["outputs"]["E"])[0], rtol=1e-9, atol=0)
    assert class_lengths(torch.tensor([3, 0, 1])).tolist() == pytest.approx([math.sqrt(2 / 3), 1, math.sqrt(2)])


# ---- Released code that we do not follow ----


def test_focal_is_the_authors_without_weights_and_weighs_the_loss_otherwise(golden):
    """With weights their p is exp(-w l), no probability; ours is w times the focal loss of the probability."""
    seen = {True: 0, False: 0}
    for case in golden("focal_softmax"):
        gamma, weight = case["settings"]["gamma"], case["settings"]["weight"]
        seen[weight is None] += 1
        if weight is None:
            agrees(SupervisedLoss("focal", gamma=gamma), case)
            continue
        logits, labels = double(case["inputs"]["logits"]), torch.tensor(case["inputs"]["y"])
        weighted = double(weight)[labels] * cross_entropy(logits, labels)
        theirs = ((1 - (-weighted).exp()) ** gamma * weighted).mean()
        torch.testing.assert_close(theirs, double(case["outputs"]["loss"]), rtol=1e-9, atol=0)
        ours = (double(weight)[labels] * focal(logits, labels, gamma=gamma)).mean()
        assert math.isclose(ours, theirs, rel_tol=1e-9) == (gamma == 0)  # alike only where p plays no part
    assert min(seen.values()) > 0


def test_arb_of_the_paper_authors_lacks_the_exponential(golden):
    """Their denominator sums the logits themselves, so it is no loss of probabilities."""
    for case in golden("arb_loss_ncfeature"):
        outputs, labels = double(case["inputs"]["outputs_positive"]), torch.tensor(case["inputs"]["y"])
        counts = torch.bincount(labels, minlength=outputs.shape[1]).double()
        own = outputs.gather(1, labels[:, None])[:, 0]
        theirs = -(own * counts[labels] / (len(labels) * outputs.sum(dim=1))).log().mean()
        torch.testing.assert_close(theirs.item(), case["outputs"]["loss"], rtol=1e-6, atol=0)
        assert not math.isclose(SupervisedLoss("arb")(outputs, labels).mean().item(), theirs.item(), rel_tol=0.05)


def test_the_class_balanced_losses_of_weight_balancing(golden):
    """Their "softmax" asks K yes-or-no questions about probabilities, and is no cross entropy; their focal is ours.

    Both are means over the batch, which the task's mean replaces by one over the weights.
    """
    for case in golden("cb_loss_softmax_bce"):
        logits, labels = double(case["inputs"]["logits"]), torch.tensor(case["inputs"]["y"])
        counts = double(case["inputs"]["counts"])
        raw = (1 - 0.9999) / (1 - 0.9999**counts)
        weights = (len(raw) * raw / raw.sum())[labels]
        targets = F.one_hot(labels, len(raw)).double()
        if case["settings"]["loss_type"] == "focal":
            ours = (weights * focal_sigmoid(logits, labels, gamma=case["settings"]["gamma"])).mean()
            torch.testing.assert_close(ours.item(), case["outputs"]["loss"], rtol=1e-9, atol=0)
            continue
        theirs = (weights[:, None] * F.binary_cross_entropy(logits.softmax(dim=1), targets, reduction="none")).mean()
        torch.testing.assert_close(theirs.item(), case["outputs"]["loss"], rtol=1e-6, atol=0)
        ours = (weights * cross_entropy(logits, labels)).sum() / weights.sum()
        assert not math.isclose(ours.item(), theirs.item(), rel_tol=0.05)


# ---- Means over an update, taken by the task ----


class Given(nn.Module):
    """A classifier whose logits are its input."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(num_classes, num_classes, bias=False).double()
        nn.init.eye_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def task_loss(logits: Tensor, labels: Tensor, *, weights: Tensor | None = None, **inputs) -> Tensor:
    task = ClassificationTask(Given(logits.shape[1]), "fc", logits.shape[1], class_weights=weights)
    task.weighting_active = True
    return task(logits, labels, **inputs)["loss"]


def test_weighted_cross_entropy_is_a_weighted_mean(golden):
    for case in golden("weighted_ce"):
        counts = case["inputs"]["counts"]
        if case["settings"]["kind"] == "class_balanced":
            weights = class_weights(counts, "effective_number", beta=case["settings"]["beta"])
        elif case["settings"]["exp_scale"] == 1:
            weights = class_weights(counts, "inverse")
        else:
            weights = double(counts) ** -case["settings"]["exp_scale"]
        logits = double(case["inputs"]["logits"]).requires_grad_()
        loss = task_loss(logits, torch.tensor(case["inputs"]["y"]), weights=torch.as_tensor(weights))
        loss.backward()
        # the task keeps its weights in float32
        torch.testing.assert_close(loss.item(), case["outputs"]["loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(logits.grad, double(case["grads"]["logits"]), rtol=1e-5, atol=1e-8)


def test_mixup_weighs_the_losses_of_both_labels(golden):
    for case in golden("mixup_criterion"):
        inputs, share = case["inputs"], case["settings"]["lam"]
        images, order, labels = double(inputs["x"]), torch.tensor(inputs["perm"]), torch.tensor(inputs["y"])
        mixed = mix(images, images[order], Mixing(share, order))
        torch.testing.assert_close(mixed, double(case["outputs"]["x_mixed"]), rtol=1e-9, atol=1e-12)
        logits = double(inputs["logits"]).requires_grad_()
        loss = task_loss(logits, labels, partners=labels[order], mixing=share)
        loss.backward()
        torch.testing.assert_close(loss, double(case["outputs"]["loss"]), rtol=1e-9, atol=0)
        torch.testing.assert_close(logits.grad, double(case["grads"]["logits"]), rtol=1e-7, atol=1e-10)


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
