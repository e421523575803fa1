"""Long-tailed subsets: published counts, the literature's draw, and what happens to classes that are too small."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from nc_hf.data import long_tail
from nc_hf.data.long_tail import (
    class_counts,
    long_tailed_counts,
    long_tailed_indices,
    make_long_tailed,
    train_validation_split,
)


def labelled(labels: list[int] | np.ndarray, num_classes: int) -> Dataset:
    """A data set whose images cannot be decoded."""
    features = Features({"image": Image(decode=False), "label": ClassLabel(num_classes=num_classes)})
    rows = {"image": [{"bytes": b"no image", "path": None}] * len(labels), "label": labels}
    return Dataset.from_dict(rows, features=features).cast_column("image", Image())


def rows_of(dataset: Dataset) -> list[int]:
    return dataset.with_format("numpy")["row"][:].tolist()


def with_rows(dataset: Dataset) -> Dataset:
    return dataset.add_column("row", list(range(len(dataset))))


def test_counts_equal_golden(golden) -> None:
    profiles = {"exp": "exponential", "step": "step"}
    cases = golden("cifar_lt_counts")
    for case in cases:
        given_, expected = case["inputs"], case["outputs"]
        profile = profiles[given_["imb_type"]]
        counts = long_tailed_counts([given_["n_max"]] * given_["K"], given_["ratio"], profile)
        assert counts.dtype == np.int64
        assert counts.tolist() == expected["counts"]
        assert counts.sum() == expected["total"]
    assert len(cases) > 5


@pytest.mark.parametrize(
    ("num_classes", "size", "ratio", "total"),
    [(10, 5000, 100, 12_406), (10, 5000, 50, 13_996), (10, 5000, 10, 20_431)]
    + [(100, 500, 100, 10_847), (100, 500, 50, 12_608), (100, 500, 10, 19_573)],
)
def test_published_totals(num_classes: int, size: int, ratio: float, total: int) -> None:
    assert long_tailed_counts([size] * num_classes, ratio).sum() == total


def test_ratio_one_keeps_a_balanced_set_whole() -> None:
    for profile in ("exponential", "step"):
        assert long_tailed_counts([7, 7, 7], 1, profile).tolist() == [7, 7, 7]


def test_pareto_follows_the_quantiles() -> None:
    num_classes, largest, ratio = 1000, 1280, 256.0
    counts = long_tailed_counts([largest] * num_classes, ratio, "pareto")
    # Survival of the Lomax distribution of power 6 at x is (1 + x)^-6; class k lies at survival (k + 1/2) / K.
    values = [(((k + 0.5) / num_classes) ** (-1 / 6)) - 1 for k in range(num_classes)]
    expected = [max(int(largest * value / values[0]), int(largest / ratio)) for value in values]
    assert np.abs(counts - expected).max() <= 1  # rounding of the last digit before truncation
    assert counts[0] == largest and counts[-1] == 5
    assert (np.diff(counts) <= 0).all()


@pytest.mark.parametrize("ratio", [0, 0.5, -3, float("nan"), float("inf"), None, "10"])
def test_ratio_that_is_no_number_of_at_least_one_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        long_tailed_counts([10, 10], ratio)


def test_unknown_profile_is_refused() -> None:
    with pytest.raises(ValueError, match="exponential, step, pareto.*'linear'"):
        long_tailed_counts([10, 10], 2, "linear")


def test_no_class_is_emptied(caplog: pytest.LogCaptureFixture) -> None:
    counts = long_tailed_counts([50, 50, 0, 50], 1000)
    assert counts.tolist() == [50, 5, 0, 1]
    assert "[3]" in caplog.text
    assert "keeps one" in caplog.text


def test_draw_equals_golden(golden, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = golden("cifar_lt_selection")
    monkeypatch.setattr(long_tail, "long_tailed_counts", lambda *settings: np.array(case["inputs"]["counts"]))
    labels = np.array(case["inputs"]["targets"])
    indices = long_tailed_indices(labels, 3, 1, seed=case["settings"]["rand_number"])
    assert indices.tolist() == sorted(case["outputs"]["kept_indices"])


def test_cifar10_draw_is_that_of_the_literature(shared: Path) -> None:
    labels = pq.read_table(shared / "data" / "cifar10-train.parquet", columns=["label"])["label"].to_numpy()
    state = np.random.get_state()
    np.random.seed(0)
    expected = []
    for k in range(10):
        rows = np.where(labels == k)[0]
        np.random.shuffle(rows)
        expected.extend(rows[: int(5000 * (1 / 100) ** (k / 9))])
    np.random.set_state(state)
    indices = long_tailed_indices(labels, 10, 100)
    assert len(indices) == 12_406
    assert indices.tolist() == sorted(expected)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any),
    ratios=st.tuples(st.floats(1, 50), st.floats(1, 50)).map(sorted),
    profile=st.sampled_from(["exponential", "step", "pareto"]),
    seed=st.integers(0, 5),
)
def test_subsets_are_nested_and_never_repeat(sizes: list[int], ratios: list[float], profile: str, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    wide, narrow = (long_tailed_indices(labels, len(sizes), ratio, profile, seed) for ratio in ratios)
    assert set(narrow) <= set(wide)
    assert (np.diff(wide) > 0).all()
    counts = np.bincount(labels[wide], minlength=len(sizes))
    assert (counts == long_tailed_counts(sizes, ratios[0], profile)).all()
    assert ((counts > 0) == (np.array(sizes) > 0)).all()


def test_seed_changes_the_draw_and_no_global_state() -> None:
    labels = np.repeat([0, 1], 50)
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    first, again, other = (long_tailed_indices(labels, 2, 5, seed=seed) for seed in (0, 0, 1))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
    assert (np.random.get_state()[1] == before).all()


def test_small_classes_give_what_they_have(caplog: pytest.LogCaptureFixture) -> None:
    dataset = with_rows(labelled(np.repeat([0, 1, 2], [4, 100, 60]), 3))
    with caplog.at_level(logging.INFO, "nc_hf"):
        subset = make_long_tailed(dataset, 10)
    assert class_counts(subset).tolist() == [4, 31, 10]
    assert "classes of 31 to 4, ratio 7.75 (10 asked for)" in caplog.text


def test_subset_keeps_columns_and_decodes_nothing() -> None:
    dataset = with_rows(labelled(np.repeat([0, 1], 20), 2))
    subset = make_long_tailed(dataset, 4, label_column="label")
    assert isinstance(subset, Dataset)
    assert subset.features == dataset.features
    assert class_counts(subset).tolist() == [20, 5]
    assert rows_of(subset) == sorted(set(rows_of(subset)))
    with pytest.raises(OSError):
        subset[0]  # the images really cannot be decoded


def test_the_official_size_without_decoding_an_image() -> None:
    assert len(make_long_tailed(labelled(np.tile(np.arange(10), 5000), 10), 100)) == 12_406  # images are no images


def test_absent_classes_count_zero() -> None:
    assert class_counts(labelled([4, 0, 0, 4, 4], 6)).tolist() == [2, 0, 0, 0, 3, 0]
    assert class_counts(labelled([4, 0, 0, 4, 4], 6)).dtype == np.int64


def test_integer_column_counts_up_to_its_largest_label() -> None:
    dataset = Dataset.from_dict({"label": [3, 1, 1]}, features=Features({"label": Value("int32")}))
    assert class_counts(dataset).tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_validation_split_holds_out_of_each_class(fraction: float) -> None:
    sizes = [100, 37, 5, 4, 1, 0]
    dataset = with_rows(labelled(np.repeat(np.arange(6), sizes), 6))
    train, validation = train_validation_split(dataset, fraction)
    held = [min(max(1, round(fraction * size)), size - 1) if size >= 5 else 0 for size in sizes]
    assert class_counts(validation).tolist() == held
    assert class_counts(train).tolist() == [size - out for size, out in zip(sizes, held, strict=True)]
    assert sorted(rows_of(train) + rows_of(validation)) == list(range(sum(sizes)))


def test_validation_split_is_a_function_of_the_seed() -> None:
    dataset = with_rows(labelled(np.repeat([0, 1], 60), 2))
    first, again, other = (rows_of(train_validation_split(dataset, seed=seed)[1]) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_validation_fraction_must_leave_both_parts(fraction: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        train_validation_split(labelled([0, 1], 2), fraction)


def test_streaming_data_are_refused() -> None:
    dataset = labelled([0, 1], 2).to_iterable_dataset()
    for use in (class_counts, lambda data: make_long_tailed(data, 2), train_validation_split):
        with pytest.raises(ValueError, match="IterableDataset.*without streaming"):
            use(dataset)
