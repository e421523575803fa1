"""FCL, KCL and TSC: against loops over the formulas, the authors' numbers, and one process against two."""

from __future__ import annotations

import itertools

import pytest
import torch
from contrastive_oracles import loop_over_pairs, loop_over_queue
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nc_hf.contrastive_task import ClassTargets, KeyQueue
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


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(rows: int, dimension: int, seed: int = 0) -> Tensor:
    return unit_rows(torch.randn(rows, dimension, generator=seeded(seed), dtype=torch.float64))


# ---- The losses ----


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
