"""NC1-NC4: the definitions evaluated in memory, and what streaming must keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nc_hf.metrics import best_angle, class_means, measure_geometry, pairwise_angles
from nc_hf.metrics.angles import ROWS, pair_blocks


def stream(features: Tensor, labels: Tensor, batch_size: int = 7) -> Callable[[], Iterator]:
    return lambda: zip(features.split(batch_size), labels.split(batch_size), strict=True)


def off_diagonal(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def random_data(counts: list[int], width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (N, P) of shuffled classes, labels (N,), a head (K, P) and its bias (K,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centers = 2 * torch.randn(len(counts), width, generator=generator, dtype=torch.float64) + 1
    noise = torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    head = torch.randn(len(counts), width, generator=generator, dtype=torch.float64)
    return centers[labels] + noise, labels, head, torch.randn(len(counts), generator=generator, dtype=torch.float64)


# ---- The definitions, in memory ----


def naive_geometry(features: np.ndarray, labels: np.ndarray, head: np.ndarray, bias: np.ndarray) -> dict[str, float]:
    """Every quantity from its definition, with K x K and P x P matrices and loops, in NumPy."""
    counts = np.bincount(labels, minlength=len(head))
    (present,), (spread,) = np.nonzero(counts), np.nonzero(counts > 1)
    mu = {k: features[labels == k].mean(axis=0) for k in present}
    result = {"classes_absent": float(sum(counts == 0)), "classes_with_one_image": float(sum(counts == 1))}

    def centered(classes: np.ndarray) -> np.ndarray:
        means = np.stack([mu[k] for k in classes])
        return means - means.mean(axis=0)

    kept = np.isin(labels, spread)
    deviations = np.stack([h - mu[y] for h, y in zip(features, labels, strict=True)])
    within = deviations[kept].T @ deviations[kept] / kept.sum()
    of_class = {k: deviations[labels == k].T @ deviations[labels == k] / counts[k] for k in spread}
    between = centered(spread).T @ centered(spread) / len(spread)
    inverse = np.linalg.pinv(between, rcond=1e-6, hermitian=True)
    result["nc1_variability"] = np.trace(within @ inverse) / len(spread)
    balanced = np.mean(list(of_class.values()), axis=0)
    result["nc1_variability_balanced"] = np.trace(balanced @ inverse) / len(spread)
    result["nc1_quotient"] = np.trace(within) / np.trace(between)
    pairs = [(k, j) for k in spread for j in spread if k < j]
    spreads = [(np.trace(of_class[k]) + np.trace(of_class[j])) / 2 / np.sum((mu[k] - mu[j]) ** 2) for k, j in pairs]
    result["nc1_cdnv"] = np.mean(spreads)

    means, rows, classes = centered(present), head[present], len(present)
    norms, row_norms = np.linalg.norm(means, axis=1), np.linalg.norm(rows, axis=1)
    cosines = (means @ means.T / np.outer(norms, norms))[~np.eye(classes, dtype=bool)]
    angles = np.degrees(np.arccos(np.clip(cosines, -1, 1)))
    simplex = (np.eye(classes) - 1 / classes) / np.sqrt(classes - 1)
    result["nc2_norm_cov"], result["nc3_head_norm_cov"] = (np.std(n, ddof=1) / n.mean() for n in (norms, row_norms))
    result["nc2_equiangularity"], result["nc2_coherence"] = cosines.std(), np.abs(cosines + 1 / (classes - 1)).mean()
    result["nc2_min_angle"], result["nc2_mean_angle"] = angles.min(), angles.mean()
    for name, left in (("nc2_etf_error", means), ("nc3_etf_error", rows)):
        gram = left @ means.T
        result[name] = np.linalg.norm(gram / np.linalg.norm(gram) - simplex)
    result["nc3_duality_gap"] = np.linalg.norm(rows / np.linalg.norm(rows) - means / np.linalg.norm(means))
    nearest = [present[np.argmin([np.sum((h - mu[k]) ** 2) for k in present])] for h in features]
    result["nc4_agreement"] = np.mean(nearest == np.argmax(features @ head.T + bias, axis=1))
    return result


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(0, 9), min_size=2, max_size=9).filter(lambda c: sum(n > 1 for n in c) > 1),
    width=st.integers(1, 8),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 10_000),
)
def test_streaming_equals_the_definitions(counts: list[int], width: int, batch_size: int, seed: int) -> None:
    features, labels, head, bias = random_data(counts, width, seed)
    result = measure_geometry(stream(features, labels, batch_size), head, bias, len(counts))
    expected = naive_geometry(*(tensor.numpy() for tensor in (features, labels, head, bias)))
    best = result.pop("nc2_best_angle", None) or result.pop("nc2_best_angle_bound")
    assert result.pop("nc2_angle_gap") == pytest.approx(best - expected["nc2_min_angle"], abs=1e-5)
    assert result == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_more_classes_than_a_block_of_rows() -> None:
    features, labels, head, bias = random_data([2] * (ROWS + 3), 5)
    result = measure_geometry(stream(features, labels, 100), head, bias, len(head))
    means, _ = class_means(stream(features, labels)(), *head.shape)
    angles = off_diagonal(pairwise_angles(means))
    variances = torch.zeros(len(head), dtype=torch.float64)
    variances.index_add_(0, labels, (features - means[labels]).square().sum(dim=1) / 2)
    cdnv = off_diagonal((variances[:, None] + variances) / (2 * torch.cdist(means, means).square()))
    assert result["nc2_mean_angle"] == pytest.approx(angles.mean().item(), rel=1e-9)
    assert result["nc2_min_angle"] == pytest.approx(angles.min().item(), rel=1e-9)
    assert result["nc1_cdnv"] == pytest.approx(cdnv.mean().item(), rel=1e-6)


@pytest.mark.parametrize("num_classes", [2, 3, ROWS, ROWS + 1, 2 * ROWS + 5])
def test_blocks_hold_each_pair_once(num_classes: int) -> None:
    seen = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for rows, later in pair_blocks(num_classes, seen.device):
        assert later.any()
        seen[rows, rows.start :] += later
    assert torch.equal(seen, torch.ones_like(seen).triu(1))


# ---- What must hold ----


@pytest.mark.parametrize(("num_classes", "width"), [(2, 3), (5, 4), (10, 64)])
def test_a_collapsed_network_is_recognised(num_classes: int, width: int) -> None:
    """Simplex ETF of means, self-dual head, no spread: every number is at its ideal."""
    simplex = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    frame = torch.linalg.svd(simplex)[0][:, : num_classes - 1]  # the simplex in K - 1 dimensions
    basis = torch.linalg.qr(torch.randn(width, num_classes - 1, dtype=torch.float64, generator=torch.manual_seed(0)))[
        0
    ]
    means = 3 * frame @ basis.T
    labels = torch.arange(num_classes).repeat(4)
    offset = torch.linspace(-1, 1, width, dtype=torch.float64)
    head, bias = 2 * means, -2 * means @ offset
    result = measure_geometry(stream(means[labels] + offset, labels), head, bias, num_classes)
    best = math.degrees(math.acos(-1 / (num_classes - 1)))
    assert result.pop("nc4_agreement") == 1.0
    for name in ("nc2_best_angle", "nc2_min_angle", "nc2_mean_angle"):
        assert result.pop(name) == pytest.approx(best, abs=1e-5)
    assert result == pytest.approx(dict.fromkeys(result, 0.0), abs=1e-5)
    assert len(result) == 14


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10))
def test_rotation_shift_and_scale_change_nothing(seed: int, scale: float) -> None:
    features, labels, head, bias = random_data([9, 6, 3, 2], 6, seed)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    shift = torch.randn(6, generator=generator, dtype=torch.float64)
    moved = scale * features @ rotation.T + shift
    moved_head = head @ rotation.T / scale
    result = measure_geometry(stream(moved, labels), moved_head, bias - moved_head @ shift, 4)
    assert result == pytest.approx(measure_geometry(stream(features, labels), head, bias, 4), rel=1e-6)


def test_float32_features_lose_no_digits_after_collapse() -> None:
    """Spread a thousandth of the distance from the origin: one pass of E[h^2] - mu^2 in float32 would be noise."""
    features, labels, head, bias = random_data([50, 20, 5], 8)
    features = (1000 + features).float()
    result = measure_geometry(stream(features, labels), head, bias, 3)
    expected = naive_geometry(features.double().numpy(), labels.numpy(), head.numpy(), bias.numpy())
    assert {k: result[k] for k in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_two_processes_equal_one() -> None:
    """Two ranks in lock step: every tensor that `reduce` is given becomes the sum over both."""
    import threading

    features, labels, head, bias = random_data([13, 5, 2, 1, 0], 6)
    barrier, shared, results = threading.Barrier(2), {}, {}

    def run(rank: int) -> None:
        def reduce(tensor: Tensor) -> Tensor:
            shared[rank] = tensor.clone()
            barrier.wait(timeout=30)
            total = shared[0] + shared[1]
            barrier.wait(timeout=30)
            return total

        mine = stream(features[rank::2], labels[rank::2], 3)
        results[rank] = measure_geometry(mine, head, bias, 5, reduce=reduce)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results[0] == results[1]
    assert results[0] == pytest.approx(measure_geometry(stream(features, labels), head, bias, 5), rel=1e-9)


def test_given_means_save_a_pass() -> None:
    features, labels, head, bias = random_data([8, 4, 2], 5)
    calls = []

    def factory() -> Iterator:
        calls.append(1)
        return stream(features, labels)()

    whole = measure_geometry(factory, head, bias, 3)
    assert len(calls) == 2
    means = class_means(factory(), 3, 5)
    assert measure_geometry(factory, head, bias, 3, means_and_counts=means) == whole
    assert len(calls) == 4


def test_logits_of_the_batch_take_the_place_of_the_head() -> None:
    features, labels, head, bias = random_data([8, 4, 2], 5)
    means, _ = class_means(stream(features, labels)(), 3, 5)
    logits = -torch.cdist(features, means)
    batches = [(features, labels, logits)]
    assert measure_geometry(lambda: batches, head, bias, 3)["nc4_agreement"] == 1.0
    assert measure_geometry(stream(features, labels), head, bias, 3)["nc4_agreement"] < 1.0


# ---- The edges ----


def test_classes_that_cannot_be_measured_are_left_out_and_counted() -> None:
    features, labels, head, bias = random_data([0, 9, 6, 1], 4)
    result = measure_geometry(stream(features, labels), head, bias, 4)
    assert (result["classes_absent"], result["classes_with_one_image"]) == (1.0, 1.0)
    rest = labels < 3
    without = measure_geometry(stream(features[rest], labels[rest] - 1), head[1:3], bias[1:3], 2)
    nc1 = {name: value for name, value in without.items() if name.startswith("nc1")}
    assert len(nc1) == 4 and {name: result[name] for name in nc1} == pytest.approx(nc1)
    assert result["nc2_min_angle"] != pytest.approx(without["nc2_min_angle"])


def test_undefined_quantities_are_absent() -> None:
    one_class = random_data([5, 0], 3)
    result = measure_geometry(stream(*one_class[:2]), *one_class[2:], 2)
    assert set(result) == {"nc4_agreement", "classes_absent", "classes_with_one_image"}
    constant = torch.ones(6, 3), torch.arange(6) % 2
    result = measure_geometry(stream(*constant), *one_class[2:], 2)
    assert not [name for name in result if name.startswith(("nc1", "nc2_min", "nc2_mean", "nc2_angle_gap"))]
    assert all(math.isfinite(value) for value in result.values())


@pytest.mark.parametrize(
    ("num_classes", "width", "angle", "reachable"),
    [(2, 1, 180.0, True), (4, 3, 109.4712206, True), (100, 99, 90.5787, True), (100, 64, 90.0, True)]
    + [(10, 64, 96.3793702, True), (128, 64, 90.0, True), (129, 64, 90.0, False), (5, 1, 90.0, False)],
)
def test_best_angle(num_classes: int, width: int, angle: float, reachable: bool) -> None:
    assert best_angle(num_classes, width) == (pytest.approx(angle, rel=1e-6), reachable)


def test_best_angle_is_reached_by_a_cross_polytope_and_named_a_bound_beyond() -> None:
    axes = torch.eye(3, dtype=torch.float64)
    means = torch.cat([axes, -axes])
    labels = torch.arange(6).repeat(2)
    result = measure_geometry(stream(means[labels], labels), means, None, 6)
    assert result["nc2_best_angle"] == 90.0 and result["nc2_angle_gap"] == pytest.approx(0, abs=1e-9)
    features, labels, head, bias = random_data([2] * 7, 3)
    result = measure_geometry(stream(features, labels), head, bias, 7)
    assert "nc2_best_angle" not in result
    assert result["nc2_angle_gap"] == result["nc2_best_angle_bound"] - result["nc2_min_angle"] > 0


def test_a_mean_without_direction_has_no_angle() -> None:
    angles = pairwise_angles(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]))
    assert angles[0, 1].item() == pytest.approx(180)
    assert angles[2, :2].isnan().all() and angles.diagonal().tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, 3])}, r"\[0, 3\), got 0 to 3"),
        ({"labels": torch.tensor([0, -1, 2])}, "got -1 to 2"),
        ({"features": torch.zeros(3, 7)}, r"\(B, 5\).*got \(3, 7\)"),
        ({"head": torch.zeros(4, 5)}, r"\(3, P\), got shape \(4, 5\)"),
        ({"features": torch.zeros(0, 5), "labels": torch.zeros(0, dtype=torch.long)}, "no image"),
        ({"features": torch.eye(3, 5).index_fill(0, torch.tensor([1]), math.nan)}, "row 1 .* features is not finite"),
        ({"features": torch.eye(3, 5).index_fill(0, torch.tensor([2]), math.inf)}, "row 2 .* features is not finite"),
        ({"head": torch.full((3, 5), math.nan)}, "the head has parameters that are not finite"),
        ({"bias": torch.full((3,), math.inf)}, "the head has parameters that are not finite"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    given = {"features": torch.randn(3, 5), "labels": torch.arange(3), "head": torch.zeros(3, 5)} | change
    with pytest.raises(ValueError, match=message):
        measure_geometry(lambda: [(given["features"], given["labels"])], given["head"], given.get("bias"), 3)


def test_passes_over_different_images_are_refused() -> None:
    features, labels, head, bias = random_data([6, 4], 3)
    passes = iter([stream(features, labels), stream(features[:-1], labels[:-1])])
    with pytest.raises(ValueError, match="means are of 10 images, but the pass after them gave 9"):
        measure_geometry(lambda: next(passes)(), head, bias, 2)


def test_an_iterator_that_is_spent_after_one_pass_is_refused() -> None:
    features, labels, head, bias = random_data([6, 4], 3)
    spent = stream(features, labels)()
    with pytest.raises(ValueError, match="same images each time"):
        measure_geometry(lambda: spent, head, bias, 2)
