"""Samplers: streams that no process or resume can change, with the proportions that their papers give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from nc_hf.sampling import NAMES, EpochSampler, class_aware_order

LABELS = np.repeat(np.arange(4), [60, 25, 10, 5])


def sampler(labels=LABELS, name="instance", seed=0, **kwargs):
    return EpochSampler(labels, name, seed=seed, num_epochs=10, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_is_a_function_of_seed_and_epoch_alone(name):
    first, second = sampler(name=name, seed=7), sampler(name=name, seed=7)
    torch.rand(13)  # another state of the global generator on "another process"
    epoch0 = list(first)
    assert epoch0 == list(second)
    assert len(epoch0) == len(first)
    first.set_epoch(1)
    assert list(first) != epoch0
    first.set_epoch(0)
    assert list(first) == epoch0
    assert list(sampler(name=name, seed=8)) != epoch0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [10, None])
def test_each_pass_of_a_data_loader_takes_the_next_epoch(batch_size, workers):
    expected = sampler(seed=7)
    epochs = []
    for epoch in range(7):
        expected.set_epoch(epoch)
        epochs.append(list(expected))
    settings = {"num_workers": workers, "persistent_workers": workers > 0}
    stream = sampler(seed=7)
    loader = DataLoader(torch.arange(100), batch_size, sampler=stream, **settings)

    def drawn():
        return torch.cat([batch.flatten() for batch in loader]).tolist()

    assert [drawn(), drawn()] == epochs[:2]
    for epoch in (1, 5, 0):
        stream.set_epoch(epoch)
        assert [drawn(), drawn()] == epochs[epoch : epoch + 2]


@pytest.mark.parametrize("name", NAMES)
def test_reading_a_stream_leaves_the_global_generator_alone(name):
    before = torch.get_rng_state()
    list(sampler(name=name))
    assert torch.equal(torch.get_rng_state(), before)


def test_instance_visits_every_image_once():
    assert sorted(sampler()) == list(range(100))


COUNTS = np.array([60, 25, 10, 5])
SHARES = {
    "class_balanced": np.full(4, 0.25),
    "square_root": np.sqrt(COUNTS) / np.sqrt(COUNTS).sum(),
    "reversed": (1 / COUNTS) / (1 / COUNTS).sum(),
    "class_aware": np.full(4, 0.25),
}


@pytest.mark.parametrize("name", SHARES)
def test_classes_are_drawn_in_their_proportion(name):
    labels = np.tile(LABELS, 200)
    drawn = labels[list(sampler(labels, name, seed=3))]
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), SHARES[name], atol=0.015)


def test_progressive_goes_from_the_data_to_balance():
    labels = np.tile(LABELS, 200)
    stream = sampler(labels, "progressive", seed=3)
    for epoch in (0, 4, 10):
        stream.set_epoch(epoch)
        expected = (1 - epoch / 10) * COUNTS / COUNTS.sum() + epoch / 10 / 4
        np.testing.assert_allclose(np.bincount(labels[list(stream)]) / len(labels), expected, atol=0.015)


def test_progressive_counts_no_class_that_never_occurs():
    stream = sampler([0] * 6000 + [3] * 2000, "progressive", seed=3)
    stream.set_epoch(5)
    assert np.mean(np.array(list(stream)) < 6000) == pytest.approx(0.625, abs=0.015)


def test_bilateral_alternates_between_a_shuffle_and_the_reversed_draw():
    labels = np.tile(LABELS, 50)
    indices = np.array(list(sampler(labels, "bilateral")))
    assert sorted(indices[0::2]) == list(range(len(labels)))
    np.testing.assert_allclose(np.bincount(labels[indices[1::2]]) / len(labels), SHARES["reversed"], atol=0.025)


def test_two_views_draws_each_image_twice_with_two_augmentations():
    pairs = list(sampler(name="two_views", with_draws=True))
    assert sorted(index for index, _ in pairs[0::2]) == list(range(100))
    assert [index for index, _ in pairs[0::2]] == [index for index, _ in pairs[1::2]]
    assert len({draw for _, draw in pairs}) == 200


def test_a_whole_class_aware_epoch_has_the_totals_of_the_reference(golden):
    for case in golden("class_aware_sampler_shape"):
        labels = torch.repeat_interleave(torch.arange(4), torch.tensor(case["inputs"]["counts"]))
        order = class_aware_order(
            labels, case["settings"]["num_samples_cls"], case["outputs"]["length"], torch.Generator().manual_seed(0)
        )
        assert torch.bincount(labels[order]).tolist() == case["outputs"]["per_class_draws_one_epoch"]


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), count=st.integers(0, 60))
def test_class_aware_takes_runs_of_one_class_and_cycles_through_its_images(counts, count):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = class_aware_order(labels, 4, count, torch.Generator().manual_seed(1))
    assert len(order) == count
    for start in range(0, count, 4):
        assert len(labels[order[start : start + 4]].unique()) == 1
    for label in labels[order].unique():
        drawn = order[labels[order] == label]
        size = counts[label]
        for start in range(0, len(drawn), size):  # every image once before any comes again
            assert len(drawn[start : start + size].unique()) == len(drawn[start : start + size])


def test_draw_numbers_never_repeat():
    stream = sampler(name="class_balanced", with_draws=True)
    pairs = list(stream)
    stream.set_epoch(1)
    pairs += list(stream)
    assert [draw for _, draw in pairs] == list(range(200))
    stream.set_epoch(1)
    stream.with_draws = False
    assert list(stream) == [index for index, _ in pairs[100:]]


@pytest.mark.parametrize(
    ("name", "message"), [("balanced", "got 'balanced'"), ("progressive", "set num_train_epochs, not max_steps")]
)
def test_what_cannot_be_drawn_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(LABELS, name, seed=0)


@pytest.mark.parametrize("labels", [["a", "b"], [], [[0, 1]], [0.0, 1.0]])
def test_labels_that_are_no_integers_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels must be \(N,\) integers of at least one image"):
        EpochSampler(labels, "class_balanced", seed=0)
