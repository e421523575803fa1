"""Expected and maximum calibration error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_hf.metrics.calibration import expected_calibration_error, reliability_bins


def slow_calibration(probabilities: np.ndarray, labels: np.ndarray, num_bins: int) -> dict[str, float]:
    """The definition, image by image."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probabilities, labels, strict=True):
        number = next(b for b in range(num_bins) if row.max() <= np.linspace(0, 1, num_bins + 1)[b + 1])
        bins.setdefault(number, []).append((row.max(), row.argmax() == label))
    gaps = {b: abs(np.mean([hit for _, hit in rows]) - np.mean([c for c, _ in rows])) for b, rows in bins.items()}
    ece = sum(gaps[b] * len(bins[b]) for b in bins) / len(labels)
    return {"ece": ece, "mce": max(gaps.values())}


def test_golden_bins(golden: Callable) -> None:
    (case,) = golden("ece")
    inputs, outputs = ({k: np.array(v) for k, v in case[part].items()} for part in ("inputs", "outputs"))
    correct = inputs["pred"] == inputs["y"]
    counts, accuracies, confidences = reliability_bins(inputs["conf"], correct, case["settings"]["bins"])
    np.testing.assert_array_equal(counts, outputs["counts"])
    np.testing.assert_allclose(accuracies, outputs["accuracies"], rtol=1e-9)
    np.testing.assert_allclose(confidences, outputs["confidences"], rtol=1e-9)


def test_golden_errors(golden: Callable) -> None:
    (case,) = golden("ece")
    inputs, outputs = case["inputs"], case["outputs"]
    # Rows with the recorded top-1 class and confidence; the rest is spread over classes that are never predicted.
    num_classes = 1000
    confidences = np.array(inputs["conf"])
    probabilities = np.tile((1 - confidences[:, None]) / (num_classes - 1), num_classes)
    probabilities[np.arange(len(confidences)), inputs["pred"]] = confidences
    result = expected_calibration_error(probabilities, inputs["y"])
    assert result["ece"] == pytest.approx(outputs["expected_calibration_error"], rel=1e-9)
    assert result["mce"] == pytest.approx(outputs["max_calibration_error"], rel=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(2, 6), st.integers(1, 30))
def test_equals_the_definition(seed: int, num_bins: int, num_classes: int, num_images: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(num_images, num_classes)) - 9  # below 0, so that no rows happen to sum to 1
    labels = generator.integers(0, num_classes, num_images)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = pytest.approx(slow_calibration(probabilities, labels, num_bins), abs=1e-12)
    assert expected_calibration_error(logits, labels, num_bins) == expected
    assert expected_calibration_error(probabilities, labels, num_bins) == expected


def test_half_precision_probabilities_are_not_taken_for_logits() -> None:
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7]], dtype=np.float16)
    assert expected_calibration_error(probabilities, np.array([0, 0]))["mce"] == pytest.approx(0.7, abs=1e-3)


def test_probabilities_rounded_to_bfloat16_are_not_taken_for_logits() -> None:
    exact = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).mul(2).softmax(dim=1)
    labels, rounded = exact.argmax(dim=1).numpy(), exact.bfloat16().float().numpy()
    expected = expected_calibration_error(exact.numpy(), labels)["ece"]
    assert expected_calibration_error(rounded, labels)["ece"] == pytest.approx(expected, abs=1e-3)


def test_certain_and_right_is_calibrated() -> None:
    logits = np.array([[1e4, 0.0], [0.0, 1e4]])
    assert expected_calibration_error(logits, np.array([0, 1])) == {"ece": 0.0, "mce": 0.0}
    assert expected_calibration_error(logits, np.array([1, 0])) == {"ece": 1.0, "mce": 1.0}


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([[0.0, np.nan]], [0], "row 0 of the scores is not finite"),
        ([0.5, 0.5], [0, 1], r"\(2,\)"),
        ([[0.0, 1.0]], [2], "row 0 has 2"),
        (np.zeros((0, 2)), np.zeros(0, int), "empty"),
    ],
)
def test_bad_input(scores: object, labels: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(scores, labels)


def test_no_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="`num_bins` must be at least 1, got 0"):
        expected_calibration_error([[0.0, 1.0]], [1], num_bins=0)
