"""Contrastive stages one: momentum encoder, queue and targets while training, alone and in the Trainer."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from contrastive_oracles import loop_over_pairs, loop_over_queue
from contrastive_run import METHODS, train
from small_images import SmallImages, network_without_batch_statistics
from torch import Tensor, nn

from nc_hf.contrastive_task import ContrastiveSettings, ContrastiveTask
from nc_hf.losses.collapse import NeuralCollapseLoss
from nc_hf.retraining import retrain_classifier
from nc_hf.retraining_args import RetrainingArguments


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- The task ----


def new_task(method: str = "kcl", collapse: NeuralCollapseLoss | None = None, **options) -> ContrastiveTask:
    options = {"dimension": 6, "positives": 2, "queue": 20, "momentum": 0.9, **options}
    model = network_without_batch_statistics()  # which seeds the global generator
    chosen = ContrastiveSettings(method, **options)
    return ContrastiveTask(model, "head", 4, settings=chosen, feature_dim=8, collapse=collapse)


def two_views(images: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    chosen = torch.randperm(108, generator=seeded(seed))[:images].tolist()
    batch = SmallImages().__getitems__([(index, view) for index in chosen for view in (0, 1)])
    return batch["pixel_values"], batch["labels"]


def follow(task: ContrastiveTask, steps: int, learning_rate: float = 0.1) -> list[dict[str, Tensor]]:
    """Losses of a few steps of SGD."""
    task.train()
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=learning_rate)
    answers = []
    for step in range(steps):
        optimizer.zero_grad()
        answers.append(task(*two_views(seed=step)))
        answers[-1]["loss"].backward()
        optimizer.step()
    return answers


def encode(classifier: nn.Module, projector: nn.Module, images: Tensor) -> Tensor:
    vectors = projector(classifier.body(images))
    return vectors / vectors.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("method", ["kcl", "tsc"])
def test_three_steps_are_those_of_a_loop(method):
    """The queue, the momentum encoder, centroids and targets, kept by hand; all positives, so nothing is drawn."""
    task = new_task(method, positives=0, target_weight=0.2, queue=20).double()
    slow = copy.deepcopy(task)
    kept, slow_labels = slow.queue.keys.clone(), [-1] * 20
    centroids, fixed = (slow.targets.centroids, slow.targets.vectors) if method == "tsc" else (None, None)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        images, labels = two_views(seed=step)
        images, current = images.double(), labels[0::2].tolist()
        for name in ("classifier", "projector"):
            averages, weights = getattr(slow, f"key_{name}").parameters(), getattr(task, name).parameters()
            for average, weight in zip(averages, weights, strict=True):
                average.data = 0.9 * average.data + 0.1 * weight.data
        with torch.no_grad():
            queries = encode(task.classifier, task.projector, images[0::2])
            keys = encode(slow.key_classifier, slow.key_projector, images[1::2])
        positives = [[label == other for other in slow_labels] for label in current]
        options = {}
        if method == "tsc":
            for label in set(current):
                mean = queries[torch.tensor(current) == label].mean(dim=0)
                blended = 0.9 * centroids[label] + 0.1 * mean / mean.norm()
                centroids[label] = blended / blended.norm()
            orders = itertools.permutations(range(4))
            best = max(orders, key=lambda order: sum(centroids[k] @ fixed[order[k]] for k in range(4)))
            options = {"targets": list(fixed), "assigned": [best[label] for label in current]}
        class_part, target_part = loop_over_queue(queries, keys, list(kept), positives, 0.07, **options)
        answer = task(images, labels)
        torch.testing.assert_close(answer["loss_contrastive"].item(), class_part, rtol=1e-9, atol=0)
        torch.testing.assert_close(answer["loss"].item(), class_part + 0.2 * target_part, rtol=1e-9, atol=0)
        assert ("loss_targets" in answer) == (method == "tsc")
        for i, label in enumerate(current):
            kept[(8 * step + i) % 20], slow_labels[(8 * step + i) % 20] = keys[i], label
        assert task.queue.labels.tolist() == slow_labels
        torch.testing.assert_close(task.queue.keys, kept)
        optimizer.zero_grad()
        answer["loss"].backward()
        optimizer.step()


def test_fcl_contrasts_all_rows():
    task = new_task("fcl").double().train()
    images, labels = two_views()
    with torch.no_grad():
        vectors = encode(task.classifier, task.projector, images.double())
    expected = loop_over_pairs(vectors, labels.tolist(), 0.07)
    torch.testing.assert_close(task(images.double(), labels)["loss"].item(), expected, rtol=1e-9, atol=0)
    assert not any(name.startswith(("key_", "queue", "targets")) for name in task.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_backbone_and_the_projection_alone(method):
    task = new_task(method).train()
    answer = task(*two_views())
    answer["loss"].backward()
    trained = {name for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert trained == {n for n, _ in task.named_parameters() if n.startswith(("classifier.body.", "projector."))}
    assert not answer["logits"].requires_grad
    assert all(task.get_parameter(name).grad.abs().sum() > 0 for name in trained)


def test_accumulated_batches_share_one_update():
    """Two batches of one update add up to the mean of their losses, and move the momentum encoder by one step."""
    whole, parts = new_task("kcl", positives=0).train(), new_task("kcl", positives=0).train()
    with torch.no_grad():
        for task in (whole, parts):
            task.classifier.body[1].weight += 1.0
    batches = [two_views(seed=0), two_views(seed=1)]
    counts = sum(torch.bincount(labels, minlength=4) for _, labels in batches)
    before = whole.key_classifier.body[1].weight.clone()
    first = parts(*batches[0], update_counts=counts, update_batches=2)
    alone = whole(*batches[0])
    parts(*batches[1], update_counts=counts, update_batches=2)
    moved = whole.key_classifier.body[1].weight
    torch.testing.assert_close(moved, before + 0.1)
    torch.testing.assert_close(parts.key_classifier.body[1].weight, moved)
    # The keys of the first batch come from half the step, so these agree only roughly.
    torch.testing.assert_close(first["loss"], alone["loss"] / 2, rtol=0.2, atol=0)
    fcl = new_task("fcl").train()
    shared = [fcl(*batch, update_counts=counts, update_batches=2)["loss"] for batch in batches]
    torch.testing.assert_close(sum(shared), sum(fcl(*batch)["loss"] for batch in batches) / 2)


@pytest.mark.parametrize("method", ["fcl", "kcl"])
def test_collapse_terms_are_those_of_the_views_contrasted(method):
    task = new_task(method, NeuralCollapseLoss(4, 8, 0.5, 0.3, centers="batch")).train()
    images, labels = two_views(16)
    assert "loss_within" not in task(images, labels)  # they have not started
    task.collapse_active = True
    answer = task(images, labels)
    rows = slice(None) if method == "fcl" else slice(0, None, 2)
    features = task.classifier.body(images[rows])
    expected = task.collapse(features, labels[rows], class_counts=torch.bincount(labels[rows], minlength=4))
    for name, term in expected.items():
        torch.testing.assert_close(answer[f"loss_{name}"], term)
    total = answer["loss_contrastive"] + sum(expected.values())
    torch.testing.assert_close(answer["loss"], total)


@pytest.mark.parametrize("method", METHODS)
def test_a_restored_task_goes_on_as_if_never_stopped(method):
    options = {"assignment_interval": 2}
    task = new_task(method, **options)
    follow(task, 3)
    restored = new_task(method, seed=5, **options)  # other directions in the queue, other targets
    restored.load_state_dict(task.state_dict())
    restored.settings = task.settings
    expected, found = follow(task, 3), follow(restored, 3)
    assert [answer["loss"].item() for answer in found] == [answer["loss"].item() for answer in expected]
    for name, value in task.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name]), name


def test_draws_follow_the_seed_and_the_batch_alone():
    task = new_task("kcl", positives=1, queue=64).train()
    for i in range(8):
        task(*two_views(seed=i))
    assert task.batches_seen == 8

    def next_loss(**changes) -> float:
        again = copy.deepcopy(task)
        again.settings = ContrastiveSettings("kcl", positives=1, seed=changes.get("seed", 0))
        again.batches_seen.fill_(changes.get("batch", 8))
        torch.rand(changes.get("drawn_elsewhere", 1))
        return again(*two_views(seed=9))["loss"].item()

    assert next_loss() == next_loss(drawn_elsewhere=2)
    assert len({next_loss(), next_loss(seed=1), next_loss(batch=9)}) == 3


def test_evaluation_is_that_of_the_classifier():
    task = new_task("tsc").eval()
    images, labels = two_views()
    state = {name: value.clone() for name, value in task.state_dict().items()}
    answer = task(images, labels)
    torch.testing.assert_close(answer["logits"], task.classifier(images))
    torch.testing.assert_close(answer["loss"], nn.functional.cross_entropy(answer["logits"], labels))
    assert set(task.train()(images)) == {"logits"}
    assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())


def test_the_momentum_encoder_keeps_batch_statistics_of_its_own():
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    chosen = ContrastiveSettings("kcl", queue=16, momentum=0.9)
    task = ContrastiveTask(model, "3", 4, settings=chosen, feature_dim=8).train()
    images, labels = two_views()
    task(images, labels)
    for norm, view in ((task.classifier[2], images[0::2]), (task.key_classifier[2], images[1::2])):
        torch.testing.assert_close(norm.running_mean, 0.1 * model[1](view.flatten(1)).mean(dim=0))


@pytest.mark.parametrize("method", METHODS)
def test_training_draws_classes_together(method):
    """The loss falls, and cosines within classes rise above those between them."""
    task = new_task(method, NeuralCollapseLoss(4, 8), queue=32)
    losses = [answer["loss"].item() for answer in follow(task, 72, 0.05)]
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
    images, labels = two_views(60, seed=7)
    with torch.no_grad():
        vectors = encode(task.classifier, task.projector, images)
    cosines, same = vectors @ vectors.T, labels[:, None] == labels
    assert cosines[same].mean() > cosines[~same].mean() + 0.3


def test_batches_that_are_no_pairs_are_refused():
    task = new_task("fcl").train()
    images, labels = two_views(4)
    with pytest.raises(ValueError, match="not two views of each image in neighboring rows.*`sampler: two_views`"):
        task(images, labels + torch.arange(8) % 2)
    with pytest.raises(ValueError, match="the 7 rows of the batch"):
        task(images[:7], labels[:7])
    with pytest.raises(ValueError, match="no one class to contrast them by: set mixup_alpha: 0"):
        task(images, labels, partners=labels, mixing=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "simclr"}, "`method` must be one of fcl, kcl, tsc, got 'simclr'"),
        ({"temperature": 0}, "`temperature` must be above 0, got 0"),
        ({"momentum": 1.0}, r"`momentum` must lie in \[0, 1\), got 1.0"),
        ({"dimension": 0}, "`dimension` must be at least 1, got 0"),
        ({"positives": -1}, "`positives` must be at least 0, got -1"),
        ({"queue": 0}, "`queue` must be at least 1, got 0"),
        ({"target_weight": -0.1}, "`target_weight` must be at least 0, got -0.1"),
        ({"assignment_interval": 0}, "`assignment_interval` must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveSettings(**{"method": "tsc", **options})


# ---- Runs of the Trainer ----


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    whole = train(tmp_path / "whole", 1, "tsc", save_strategy="steps", save_steps=8)
    resumed = train(tmp_path / "again", 1, "tsc", resume=str(tmp_path / "whole" / "checkpoint-8"))
    assert resumed.state.global_step == whole.state.global_step == 12
    for name, value in whole.task.state_dict().items():
        assert torch.equal(value, resumed.task.state_dict()[name]), name


def test_stage_two_puts_a_linear_head_on_the_features(tmp_path):
    stage_one = train(tmp_path / "one", 1, "kcl")
    untrained = stage_one.evaluate(SmallImages(seed=1))["eval_loss"]
    args = RetrainingArguments(
        output_dir=str(tmp_path / "two"),
        use_cpu=True,
        num_train_epochs=20,
        per_device_train_batch_size=36,
        learning_rate=0.2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    stage_two = retrain_classifier(stage_one.classifier, SmallImages(), args)
    assert stage_two.evaluate(SmallImages(seed=1))["eval_loss"] < 0.7 * untrained
