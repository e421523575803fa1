"""Class weights and samplers: the authors' numbers, and streams that no process or resume can change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nc_hf.rebalancing import EpochSampler, class_weights

LABELS = np.repeat(np.arange(4), [60, 25, 10, 5])


def test_effective_number_weights_equal_the_authors(golden):
    for case in golden("class_weights_effective_number"):
        weights = class_weights(case["inputs"]["counts"], "effective_number", beta=case["settings"]["beta"])
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


@pytest.mark.parametrize("name", ["instance", "class_balanced", "square_root", "effective_number"])
def test_a_stream_is_a_function_of_seed_and_epoch_alone(name):
    first, second = (EpochSampler(LABELS, name, seed=7) for _ in range(2))
    torch.rand(13)  # another state of the global generator on "another process"
    assert list(first) == list(second)
    epoch0 = list(first)
    first.set_epoch(1)
    assert list(first) != epoch0
    first.set_epoch(0)
    assert list(first) == epoch0
    assert list(EpochSampler(LABELS, name, seed=8)) != epoch0


def test_reading_a_stream_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    list(EpochSampler(LABELS, "class_balanced", seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_instance_visits_every_image_once():
    assert sorted(EpochSampler(LABELS, "instance", seed=0)) == list(range(100))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("class_balanced", [0.25] * 4), ("square_root", np.sqrt([60, 25, 10, 5]) / np.sqrt([60, 25, 10, 5]).sum())],
)
def test_classes_are_drawn_in_their_proportion(name, expected):
    labels = np.tile(LABELS, 200)
    drawn = labels[list(EpochSampler(labels, name, seed=3))]
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), expected, atol=0.015)


def test_draw_numbers_never_repeat():
    sampler = EpochSampler(LABELS, "class_balanced", seed=0, with_draws=True)
    pairs = list(sampler)
    sampler.set_epoch(1)
    pairs += list(sampler)
    assert [draw for _, draw in pairs] == list(range(200))
    sampler.with_draws = False
    assert list(sampler) == [index for index, _ in pairs[100:]]


def test_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="got 'balanced'"):
        EpochSampler(LABELS, "balanced", seed=0)
