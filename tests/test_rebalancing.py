"""Class weights: the authors' numbers, and what no counts can break."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nc_hf.rebalancing import class_weights
from nc_hf.training_args import resolve_epoch


def test_effective_number_weights_equal_the_authors(golden):
    for case in golden("class_weights_effective_number"):
        weights = class_weights(case["inputs"]["counts"], "effective_number", beta=case["settings"]["beta"])
        np.testing.assert_allclose(weights, case["outputs"]["weights"], rtol=1e-9)


def test_deferred_weights_are_the_authors(golden):
    for case in golden("drw_schedule"):
        counts, epoch = case["inputs"]["counts"], case["inputs"]["epoch"]
        assert case["settings"]["scheme"] == "ldam_drw_200"
        starts = resolve_epoch(0.8, 200)
        weights = class_weights(counts, "effective_number" if epoch >= starts else "none")
        np.testing.assert_allclose(weights, case["outputs"]["weights"], rtol=1e-9)


def test_draw_probabilities_equal_the_authors(golden):
    schemes = {"effective_number": "effective_number", "balanced": "inverse"}
    for case in golden("resample_weights"):
        targets = np.array(case["inputs"]["targets"])
        ours = class_weights(np.bincount(targets), schemes[case["settings"]["kind"]])[targets]
        theirs = np.array(case["outputs"]["sample_weights"])
        np.testing.assert_allclose(ours / ours.sum(), theirs / theirs.sum(), rtol=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5000), min_size=1, max_size=20).filter(any),
    scheme=st.sampled_from(["none", "inverse", "effective_number"]),
)
def test_weights_are_finite_with_mean_one_and_favour_the_rare(counts, scheme):
    weights, counts = class_weights(counts, scheme), np.array(counts)
    assert np.isfinite(weights).all()
    assert (weights[counts == 0] == 0).all()
    assert weights[counts > 0].mean() == pytest.approx(1)
    present = np.argsort(counts[counts > 0])
    assert (np.diff(weights[counts > 0][present]) <= 1e-12).all()


def test_the_call_in_the_docstring_weights_a_loss():
    call = "cross_entropy(logits, labels, weight=torch.tensor(weights, dtype=logits.dtype))"
    assert f"`{call}`" in class_weights.__doc__
    weights, logits, labels = class_weights([4, 1], "inverse"), torch.zeros(2, 2), torch.tensor([0, 1])
    loss = eval(call, {"cross_entropy": F.cross_entropy, "torch": torch}, locals())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(np.log(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5, 3], "sqrt"), "one of none, inverse, effective_number, got 'sqrt'"),
        (([0, 0], "inverse"), "no class has a training image"),
    ],
)
def test_bad_weights_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        class_weights(*arguments)
