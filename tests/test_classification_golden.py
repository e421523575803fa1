"""Supervised losses against the numbers of their authors' code, in float64 and in float32."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nc_hf.losses.classification import SupervisedLoss, cross_entropy, focal, focal_sigmoid
from nc_hf.losses.long_tail import class_lengths, dot_regression, ldam_margins, smoothing_by_count
from nc_hf.mixing import Mixing, mix
from nc_hf.rebalancing import class_weights
from nc_hf.task import ClassificationTask

PRECISIONS = ((torch.float64, 1e-9, 1e-7, 1e-10), (torch.float32, 1e-4, 1e-3, 1e-5))


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_golden(function, case: dict, name: str, *, slack: float = 1) -> None:
    """A function of one input has a golden case's loss and gradient; `slack` widens the bounds of float64."""
    for dtype, rtol, grad_rtol, atol in PRECISIONS:
        wider = slack if dtype == torch.float64 else 1
        given = double(case["inputs"][name]).to(dtype).requires_grad_()
        value = function(given)
        value.backward()
        expected, gradient = double(case["outputs"]["loss"]).to(value.dtype), double(case["grads"][name]).to(dtype)
        torch.testing.assert_close(value, expected, rtol=wider * rtol, atol=0)
        torch.testing.assert_close(given.grad, gradient, rtol=wider * grad_rtol, atol=wider * atol)


def assert_agrees(loss: SupervisedLoss, case: dict, *, slack: float = 1) -> None:
    """The mean of a loss over images is that of a golden case."""
    assert_golden(lambda logits: loss(logits, torch.tensor(case["inputs"]["y"])).mean(), case, "logits", slack=slack)


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
        assert_agrees(PLAIN[name](case), case)


@pytest.mark.parametrize("name", COUNTED)
def test_losses_with_counts_are_the_authors(golden, name):
    for case in golden(name):
        assert_agrees(
            SupervisedLoss(class_counts=case["inputs"]["counts"], **COUNTED[name](case.get("settings", {}))), case
        )


def test_logit_adjustment_differs_by_1e_12_from_the_paper_authors(golden):
    for case in golden("logit_adjust_train"):
        # they add 1e-12 to pi^tau, which is 4e-5 and more here
        assert_agrees(
            SupervisedLoss("logit_adjustment", case["inputs"]["counts"], tau=case["settings"]["tau"]), case, slack=100
        )


def test_lade_is_the_authors(golden):
    for case in golden("lade"):
        options = {"remine_lambda": case["settings"]["remine_lambda"], "weight": case["settings"]["estim_loss_weight"]}
        # they add 1e-8 to the counts of the batch and 1e-9 to the prior
        assert_agrees(SupervisedLoss("lade", case["inputs"]["counts"], **options), case, slack=10)


def test_arb_is_the_authors_with_counts_of_the_batch_or_of_the_training_set(golden):
    cases = golden("arb_loss")
    assert {case["settings"]["kind"] for case in cases} == {"train_counts", "batch_counts"}
    for case in cases:
        given_counts = double(case["inputs"]["class_counts"])
        if case["settings"]["kind"] == "train_counts":
            assert_agrees(SupervisedLoss("arb", given_counts.tolist(), counts="train"), case)
        else:
            assert_agrees(SupervisedLoss("arb"), case)  # the default, counted from the labels
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
        labels = torch.tensor(case["inputs"]["y"])
        loss = SupervisedLoss("ldam", counts.tolist(), max_margin=case["settings"]["max_m"], scale=scale)
        weights = torch.ones_like(counts) if (given := case["settings"]["weight"]) is None else double(given)

        def mean(cosines, weights=weights[labels], loss=loss, scale=scale, labels=labels):
            return (weights * loss(scale * cosines, labels)).sum() / weights.sum()

        assert_golden(mean, case, "logits")


def test_label_aware_smoothing_is_the_authors(golden):
    cases = golden("label_aware_smoothing")
    assert {case["settings"]["shape"] for case in cases} == {"concave", "linear", "convex", "exp"}
    for case in cases:
        s = case["settings"]
        options = {"head": s["smooth_head"], "tail": s["smooth_tail"], "form": s["shape"], "power": s["power"]}
        found = smoothing_by_count(double(case["inputs"]["counts"]), **options)
        torch.testing.assert_close(found, double(case["outputs"]["smooth"]), rtol=1e-9, atol=1e-12)
        assert_agrees(SupervisedLoss("label_aware_smoothing", case["inputs"]["counts"], **options), case)


def test_dot_regression_is_the_authors(golden):
    for case in golden("dot_regression"):
        directions = double(case["inputs"]["M"])
        directions = directions / directions.norm(dim=0)
        labels, kind = torch.tensor(case["inputs"]["y"]), case["settings"]["kind"]
        counts = torch.bincount(labels, minlength=directions.shape[1]) if kind == "given_Ew" else None
        penalty = case["settings"]["reg_lam"]

        def mean(features, directions=directions, labels=labels, counts=counts, penalty=penalty, kind=kind):
            norms = features.norm(dim=1) if kind == "raw" or penalty else None
            return dot_regression(features @ directions.to(features), labels, counts, norms, penalty).mean()

        assert_golden(mean, case, "feats")
        if kind == "given_Ew":  # what the task runs: lengths from the counts of the update
            features = double(case["inputs"]["feats"])
            by_task = SupervisedLoss("dot_regression")(features @ directions, labels).mean()
            torch.testing.assert_close(by_task, mean(features), rtol=1e-12, atol=0)


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
            assert_agrees(SupervisedLoss("focal", gamma=gamma), case)
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
        self.fc = nn.Linear(num_classes, num_classes, bias=False)
        nn.init.eye_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.to(x.dtype).fc(x)


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
        labels, weights = torch.tensor(case["inputs"]["y"]), torch.as_tensor(weights)

        def loss(logits, labels=labels, weights=weights):
            return task_loss(logits, labels, weights=weights)

        assert_golden(loss, case, "logits", slack=1000)  # the task keeps its weights in float32


def test_mixup_weighs_the_losses_of_both_labels(golden):
    for case in golden("mixup_criterion"):
        inputs, share = case["inputs"], case["settings"]["lam"]
        images, order, labels = double(inputs["x"]), torch.tensor(inputs["perm"]), torch.tensor(inputs["y"])
        mixed = mix(images, images[order], Mixing(share, order))
        torch.testing.assert_close(mixed, double(case["outputs"]["x_mixed"]), rtol=1e-9, atol=1e-12)

        def loss(logits, labels=labels, order=order, share=share):
            return task_loss(logits, labels, partners=labels[order], mixing=share)

        assert_golden(loss, case, "logits")
