"""FCL, KCL and TSC: against loops over the formulas, the authors' numbers, and one process against two."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from contrastive_run import METHODS, summary, train
from hypothesis import given, settings
from hypothesis import strategies as st
from small_images import SmallImages, network_without_batch_statistics
from torch import Tensor, nn

from nc_hf.contrastive_task import ClassTargets, ContrastiveSettings, ContrastiveTask, KeyQueue
from nc_hf.losses.collapse import NeuralCollapseLoss
from nc_hf.losses.contrastive import (
    assign_targets,
    queue_contrastive_loss,
    sample_positives,
    supervised_contrastive_loss,
    uniform_targets,
    uniformity_loss,
    unit_rows,
    update_centroids,
)
from nc_hf.retraining import retrain_classifier
from nc_hf.retraining_args import RetrainingArguments

HERE = Path(__file__).parent


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(rows: int, dimension: int, seed: int = 0) -> Tensor:
    return unit_rows(torch.randn(rows, dimension, generator=seeded(seed), dtype=torch.float64))


# ---- The losses ----


def loop_over_pairs(vectors: Tensor, labels: list[int], temperature: float) -> float:
    """L_out of Khosla et al., one anchor and one positive at a time; an anchor alone with its label adds 0."""
    losses = []
    for i, anchor in enumerate(vectors):
        others = [j for j in range(len(vectors)) if j != i]
        normalizer = sum(math.exp(anchor @ vectors[j] / temperature) for j in others)
        positives = [j for j in others if labels[j] == labels[i]]
        shares = [math.log(math.exp(anchor @ vectors[j] / temperature) / normalizer) for j in positives]
        losses.append(-sum(shares) / max(len(positives), 1))
    return sum(losses) / len(losses)


def loop_over_queue(queries, keys, queue, positives, temperature, targets=None, assigned=None) -> tuple[float, float]:
    """The class and the target part of KCL and TSC, one query at a time."""
    class_part = target_part = 0.0
    for i, query in enumerate(queries):
        scores = [math.exp(query @ other / temperature) for other in [keys[i], *queue, *(targets or [])]]
        shares = [math.log(score / sum(scores)) for score in scores]
        chosen = [0] + [1 + j for j in range(len(queue)) if positives[i][j]]
        own = [] if targets is None else [1 + len(queue) + int(assigned[i])]
        class_part -= sum(shares[j] for j in chosen) / len(chosen + own) / len(queries)
        target_part -= sum(shares[j] for j in own) / len(chosen + own) / len(queries)
    return class_part, target_part


def test_the_supervised_contrastive_loss_is_the_authors(golden):
    for case in golden("supcon"):  # with k above the number of positives, all are chosen there
        features = tensor(case["inputs"]["features"]).requires_grad_()
        labels = torch.tensor(case["inputs"]["y"]).repeat_interleave(features.shape[1])
        temperature = case["settings"]["temperature"]
        scale = temperature / case["settings"]["base_temperature"]
        loss = scale * supervised_contrastive_loss(features.flatten(0, 1), labels, temperature)
        torch.testing.assert_close(loss, tensor(case["outputs"]["loss"]), rtol=1e-9, atol=0)
        loss.backward()
        torch.testing.assert_close(features.grad, tensor(case["grads"]["features"]), rtol=1e-7, atol=1e-12)
        single = scale * supervised_contrastive_loss(features.detach().float().flatten(0, 1), labels, temperature)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), loss.detach(), rtol=1e-4, atol=0)


def test_the_loss_with_a_queue_is_the_authors(golden):
    """Values and gradients, with the centroids and the assignment that lead to them."""
    for case in golden("kcl_tsc_queue"):
        given_, outputs, setting = case["inputs"], case["outputs"], case["settings"]
        raw, keys, queue = tensor(given_["q"]).requires_grad_(), tensor(given_["k"]), tensor(given_["queue"]).T
        queries, labels = nn.functional.normalize(raw, dim=1), torch.tensor(given_["y"])
        positives = sample_positives(labels, torch.tensor(given_["queue_labels"]), 0, seeded(0))
        targets = assigned = None
        if setting["targeted"]:
            targets, before = tensor(given_["targets"]), tensor(given_["class_centroid_before"])
            centroids = update_centroids(before, queries.detach(), labels)
            torch.testing.assert_close(centroids, tensor(outputs["class_centroid_after"]), rtol=1e-9, atol=1e-12)
            assigned = assign_targets(centroids, targets)[labels]
        arguments = (positives, setting["T"])
        terms = queue_contrastive_loss(queries, keys, queue, *arguments, targets=targets, assigned=assigned)
        torch.testing.assert_close(terms["contrastive"], tensor(outputs["loss_class"]), rtol=1e-9, atol=0)
        loss = terms["contrastive"]
        if targets is not None:
            weighted = setting["tw"] * terms["targets"]
            torch.testing.assert_close(weighted, tensor(outputs["loss_target"]), rtol=1e-9, atol=0)
            loss = loss + weighted
        torch.testing.assert_close(loss, tensor(outputs["loss"]), rtol=1e-9, atol=0)
        loss.backward()
        torch.testing.assert_close(raw.grad, tensor(case["grads"]["q_through_normalize"]), rtol=1e-7, atol=1e-12)
        vectors = [vectors.detach().float() for vectors in (queries, keys, queue)]
        options = {} if targets is None else {"targets": targets.float(), "assigned": assigned}
        for name, term in queue_contrastive_loss(*vectors, *arguments, **options).items():
            assert term.dtype == torch.float32
            torch.testing.assert_close(term.double(), terms[name].detach(), rtol=1e-4, atol=0)


def test_the_uniformity_loss_is_the_authors(golden):
    for case in golden("tsc_uniformity"):
        targets = tensor(case["inputs"]["targets"]).requires_grad_()
        loss = uniformity_loss(targets, case["settings"]["t"])
        loss.backward()
        torch.testing.assert_close(loss, tensor(case["outputs"]["loss"]), rtol=1e-9, atol=0)
        torch.testing.assert_close(targets.grad, tensor(case["grads"]["targets"]), rtol=1e-7, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=8), st.floats(0.05, 2), st.integers(0, 99))
def test_the_supervised_contrastive_loss_is_its_formula(labels, temperature, seed):
    """For any labels; the rows of two processes give halves of the mean, whatever the order of the rows."""
    vectors, y = unit(len(labels), 3, seed), torch.tensor(labels)
    loss = supervised_contrastive_loss(vectors, y, temperature)
    expected = loop_over_pairs(vectors, labels, temperature)
    torch.testing.assert_close(loss.item(), expected, rtol=1e-9, atol=1e-9)
    cut = len(labels) // 2
    parts = [(cut, slice(0, cut)), (len(labels) - cut, slice(cut, len(labels)))]
    whole = sum(n * supervised_contrastive_loss(vectors, y, temperature, anchors=rows) for n, rows in parts)
    torch.testing.assert_close(whole / len(labels), loss)
    order = torch.randperm(len(labels), generator=seeded(seed))
    torch.testing.assert_close(supervised_contrastive_loss(vectors[order], y[order], temperature), loss)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.booleans(), st.floats(0.05, 2), st.integers(0, 99))
def test_the_loss_with_a_queue_is_its_formula(batch, length, targeted, temperature, seed):
    queries, keys, queue, targets = (unit(rows, 3, seed + i) for i, rows in enumerate([batch, batch, length, 4]))
    positives = torch.rand(batch, length, generator=seeded(seed)) < 0.5
    assigned = torch.randint(4, (batch,), generator=seeded(seed))
    options = {"targets": targets, "assigned": assigned} if targeted else {}
    terms = queue_contrastive_loss(queries, keys, queue, positives, temperature, **options)
    slow = {"targets": list(targets), "assigned": assigned} if targeted else {}
    class_part, target_part = loop_over_queue(queries, keys, queue, positives, temperature, **slow)
    torch.testing.assert_close(terms["contrastive"].item(), class_part, rtol=1e-9, atol=1e-12)
    assert set(terms) == ({"contrastive", "targets"} if targeted else {"contrastive"})
    if targeted:
        torch.testing.assert_close(terms["targets"].item(), target_part, rtol=1e-9, atol=1e-12)


def test_half_precision_and_autocast_compute_in_float32():
    vectors, labels = unit(8, 16).to(torch.bfloat16), torch.arange(8) // 2
    exact = supervised_contrastive_loss(vectors.double(), labels)
    leaf = vectors.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [supervised_contrastive_loss(leaf, labels)]
        losses += queue_contrastive_loss(
            leaf, vectors, vectors, labels[:, None] == labels, targets=vectors, assigned=labels
        ).values()
    torch.testing.assert_close(losses[0].double(), exact, rtol=1e-5, atol=0)
    sum(losses).backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses)
    assert leaf.grad.isfinite().all()


# ---- Positives, targets, queue ----


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1, 2), min_size=1, max_size=12), st.integers(0, 5), st.integers(0, 99))
def test_positives_are_k_of_the_class_or_all(queue_labels, count, seed):
    labels = torch.tensor([0, 1, 2, 1])
    before = torch.get_rng_state()
    chosen = sample_positives(labels, torch.tensor(queue_labels), count, seeded(seed))
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    assert torch.equal(chosen, sample_positives(labels, torch.tensor(queue_labels), count, seeded(seed)))
    for label, row in zip(labels.tolist(), chosen, strict=True):
        assert {queue_labels[j] for j in row.nonzero().flatten()} <= {label}
        available = queue_labels.count(label)
        assert row.sum() == (min(count, available) if count else available)


def test_positives_are_drawn_alike():
    queue_labels = torch.tensor([0, 1, 0, -1, 0, 0])
    chosen = sample_positives(torch.zeros(4000, dtype=torch.long), queue_labels, 2, seeded(0))
    frequency = chosen.double().mean(dim=0)
    torch.testing.assert_close(frequency, tensor([0.5, 0, 0.5, 0, 0.5, 0.5]), rtol=0, atol=0.03)


@pytest.mark.parametrize(("num_classes", "dimension"), [(2, 1), (5, 4), (5, 9), (10, 128)])
def test_few_targets_are_a_simplex(num_classes, dimension):
    targets = uniform_targets(num_classes, dimension, seed=3)
    assert targets.shape == (num_classes, dimension) and targets.dtype == torch.float32
    expected = (num_classes * torch.eye(num_classes) - 1) / (num_classes - 1)
    torch.testing.assert_close(targets @ targets.T, expected, rtol=0, atol=1e-5)


def test_many_targets_are_spread_evenly():
    """Six directions in three dimensions come close to an octahedron, the best there is."""
    before = torch.get_rng_state()
    targets = uniform_targets(6, 3, seed=1, steps=4000)
    assert torch.equal(torch.get_rng_state(), before)
    octahedron = torch.cat([torch.eye(3), -torch.eye(3)])
    best = uniformity_loss(octahedron.double()).item()  # 14.286; the random directions have 14.32
    assert uniformity_loss(targets.double()).item() == pytest.approx(best, abs=1e-4)
    assert (targets @ targets.T - 2 * torch.eye(6)).max() < 0.4
    torch.testing.assert_close(targets.norm(dim=1), torch.ones(6))
    assert torch.equal(uniform_targets(6, 3, 1, steps=10), uniform_targets(6, 3, 1, steps=10))


def test_the_assignment_is_the_best_permutation():
    for seed in range(5):
        centroids, targets = unit(5, 3, seed), unit(5, 3, seed + 50)
        best = max(
            itertools.permutations(range(5)), key=lambda order: sum(centroids[k] @ targets[order[k]] for k in range(5))
        )
        assert assign_targets(centroids, targets).tolist() == list(best)


def test_centroids_of_absent_classes_stay():
    centroids, vectors = unit(3, 4), unit(4, 4, seed=1)
    moved = update_centroids(centroids, vectors, torch.tensor([2, 0, 2, 2]))
    assert torch.equal(moved[1], centroids[1])
    mean = vectors[[0, 2, 3]].mean(dim=0)
    expected = 0.9 * centroids[2] + 0.1 * mean / mean.norm()
    torch.testing.assert_close(moved[2], expected / expected.norm())


def test_the_queue_replaces_its_oldest_keys():
    queue = KeyQueue(5, 2, seeded(0))
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(5))
    first = queue.keys.clone()
    queue.push(torch.tensor([[1.0, 1], [2, 2], [3, 3]]), torch.tensor([1, 2, 3]))
    assert queue.labels.tolist() == [1, 2, 3, -1, -1] and torch.equal(queue.keys[3:], first[3:])
    queue.push(torch.tensor([[4.0, 4], [5, 5], [6, 6]]), torch.tensor([4, 5, 6]))
    assert queue.labels.tolist() == [6, 2, 3, 4, 5]
    assert queue.keys[:, 0].tolist() == [6, 2, 3, 4, 5] and queue.position == 1
    with pytest.raises(ValueError, match="5 slots but a batch of all processes has 6 keys: set `queue` to at least 6"):
        queue.push(torch.ones(6, 2), torch.ones(6, dtype=torch.long))


def test_targets_are_assigned_only_when_asked():
    targets = ClassTargets(3, 4, 0, seeded(0))
    queries, labels = targets.vectors[[1, 2, 0]], torch.arange(3)
    for _ in range(60):
        targets.update(queries, labels, assign=False)
    assert targets.assigned.tolist() == [0, 1, 2]
    targets.update(queries, labels, assign=True)
    assert targets.assigned.tolist() == [1, 2, 0]  # the classes have gone to these targets


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


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[dict, dict, dict]:
    """Answers of one process, here, and of both of two, through the real launcher and gloo."""
    folder = tmp_path_factory.mktemp("contrastive")
    alone = {method: summary(train(folder / "one", 1, method)) for method in METHODS}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(HERE / "contrastive_run.py"), str(folder), "2"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command + script, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return alone, *(json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2))


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(runs, method):
    alone, first, second = (answers[method] for answers in runs)
    assert len(alone["logs"]) == 12
    for log, log_alone in zip(first["logs"], alone["logs"], strict=True):
        assert log.keys() == log_alone.keys() >= {"loss", "loss_contrastive", "loss_within", "loss_between"}
        assert ("loss_targets" in log) == (method == "tsc")
        for name, value in log_alone.items():
            np.testing.assert_allclose(log[name], value, rtol=1e-4, err_msg=name)
    for key, values in alone["state"].items():
        np.testing.assert_allclose(first["state"][key], values, rtol=1e-4, atol=1e-5, err_msg=key)
        np.testing.assert_array_equal(first["state"][key], second["state"][key], err_msg=key)
    assert len({log["loss"] for log in alone["logs"]}) == 12  # something was trained
