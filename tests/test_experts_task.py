"""RIDE: the task that trains the experts."""

from __future__ import annotations

import pytest
import torch
from experts_run import ROWS, all_rows, counts_of, cross_entropy, freeze_batch_statistics, small_task, train

from nc_hf.experts_task import ExpertsTask
from nc_hf.losses.experts import class_temperatures, diversity
from nc_hf.losses.precision import unit_rows
from nc_hf.models.cifar_resnet import CifarResNet
from nc_hf.models.classifier import check_tap
from nc_hf.models.experts import ExpertsNetwork


def small_network(num_experts: int = 3, num_classes: int = 4, **kwargs) -> ExpertsNetwork:
    torch.manual_seed(0)
    return ExpertsNetwork((1, 1, 1), (4, 6, 8), num_experts=num_experts, num_classes=num_classes, **kwargs)


# ---- The task ----


def test_every_expert_learns_and_gates_do_not():
    task = ExpertsTask(small_network(routing=True), "fc", 4)
    task(*all_rows())["loss"].backward()
    for name, parameter in task.named_parameters():
        if ".routing." in name:
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad.abs().sum() > 0, name
    assert (task.head.directions.grad.abs().sum(dim=(1, 2)) > 0).all()


def test_tapped_features_are_what_the_logits_come_from():
    task = ExpertsTask(small_network(), "fc", 4).eval()
    images, labels = all_rows()
    check_tap(task.classifier, "fc", images[:2])
    features, logits = task.features_and_logits(images)
    torch.testing.assert_close(features @ task.head.weight.T, logits)
    raw, again = task.collapse_features_and_logits(images)
    torch.testing.assert_close(again, logits)
    torch.testing.assert_close(unit_rows(raw.unflatten(1, (3, -1))).flatten(1), features)
    output = task(images, labels)
    torch.testing.assert_close(output["loss"], cross_entropy(logits, labels).mean())
    assert set(task(images)) == {"logits"}


def test_terms_against_the_formula():
    task = freeze_batch_statistics(small_task("ride_learned"))
    images, labels = all_rows()
    output = task(images, labels)
    features = task.classifier.expert_features(images)
    logits, weights = task.head.expert_logits(unit_rows(features)), task.class_weights[labels]
    supervised = sum((weights * cross_entropy(z, labels)).sum() / weights.sum() for z in logits.unbind(1))
    torch.testing.assert_close(output["loss_supervised"], supervised)
    apart = diversity(logits, class_temperatures((12, 8, 6, 6))).mean()
    torch.testing.assert_close(output["loss_diversity"], -0.2 * apart)
    terms = task.collapse(features.flatten(1), labels)
    torch.testing.assert_close(output["loss_within"], terms["within"])
    torch.testing.assert_close(output["loss_between"], terms["between"])
    assert output["loss"].item() == pytest.approx(sum(v.item() for k, v in output.items() if k.startswith("loss_")))
    torch.testing.assert_close(output["logits"], logits.mean(dim=1))


def test_temperatures_are_one_before_classes_are_weighted():
    task = freeze_batch_statistics(small_task("ride_ema"))
    task.weighting_active = False
    images, labels = all_rows()
    logits = task.head.expert_logits(unit_rows(task.classifier.expert_features(images)))
    torch.testing.assert_close(task(images, labels)["loss_diversity"], -0.2 * diversity(logits).mean())


def test_no_factor_no_diversity_term():
    task = ExpertsTask(small_network(), "fc", 4, diversity_factor=0.0)
    assert "loss_diversity" not in task(*all_rows())


def test_accumulated_batches_give_the_gradient_of_one():
    whole, parts = (freeze_batch_statistics(small_task("ride_learned")) for _ in range(2))
    images, labels = all_rows()
    counts = counts_of(whole, labels)
    whole(images, labels, update_counts=counts)["loss"].backward()
    for rows in (slice(0, 10), slice(10, ROWS)):
        parts(images[rows], labels[rows], update_counts=counts, update_batches=2)["loss"].backward()
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_mixed_images_weigh_both_labels():
    task = freeze_batch_statistics(small_task("ride_learned"))
    images, labels = all_rows()
    partners = labels.roll(5)
    first, second = task(images, labels), task(images, partners)
    mixed = task(images, labels, partners=partners, mixing=0.3)
    for name in ("loss_supervised", "loss_within"):
        torch.testing.assert_close(mixed[name], 0.3 * first[name] + 0.7 * second[name])
    torch.testing.assert_close(mixed["loss_diversity"], first["loss_diversity"])


def test_steps_lower_the_loss():
    losses = train("ride_learned")["losses"]
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"diversity_factor": 0.2}, "`diversity_factor` must be at most 0, got 0.2"),
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
        ({"class_weights": torch.ones(4)}, "which need `class_counts`"),
        ({"class_weights": torch.ones(4), "class_counts": [3, 2, 2, 1], "reweight_factor": -1}, "`reweight_factor`"),
    ],
)
def test_settings_are_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        ExpertsTask(small_network(), "fc", 4, **settings_)


def test_another_network_is_refused():
    with pytest.raises(
        ValueError, match="RIDE needs a network of experts such as resnet32_ride_cifar, got CifarResNet"
    ):
        ExpertsTask(CifarResNet((1,), (4,)), "fc", 10)
