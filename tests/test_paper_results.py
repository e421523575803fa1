"""The paper's number stands beside a run of the paper's data alone."""

from __future__ import annotations

import pytest

from nc_hf.paper_results import paper_accuracy

DATA = {"name": "cifar10", "imbalance_ratio": 100.0, "profile": "exponential"}


@pytest.mark.parametrize(
    ("change", "printed"),
    [
        ({}, 81.9),
        ({"test_split": None, "validation_fraction": 0.0}, 81.9),
        ({"test_split": "left_out"}, None),
        ({"validation_fraction": 0.1}, None),
        ({"profile": "step"}, None),
    ],
)
def test_other_images_are_not_compared(change, printed):
    results = {"model": "resnet32_cifar", "split": "test", "methods": {"base": "NC-DRW"}, "dataset": DATA | change}
    assert paper_accuracy(results, "base") == printed
