"""mixup and CutMix: the authors' numbers, exact areas, and one stream for any number of processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from nc_hf.mixing import Mixing, draw_cutmix, draw_mixup, mix, mix_batch


def test_mixup_draws_follow_beta():
    shares = np.array([draw_mixup(4, 0.2, seed).share for seed in range(4000)])
    assert abs(shares.mean() - 0.5) < 0.03
    assert abs(shares.var() - 1 / (4 * (2 * 0.2 + 1))) < 0.01  # variance of Beta(a, a)


@pytest.mark.parametrize("draw", [draw_mixup, lambda *args: draw_cutmix(*args, (32, 32))])
def test_draws_are_functions_of_the_seed(draw):
    before = torch.get_rng_state()
    first, again, other = (draw(64, 1.0, seed) for seed in (5, 5, 6))
    assert first.share == again.share != other.share and torch.equal(first.partners, again.partners)
    assert sorted(first.partners.tolist()) == list(range(64)) and first.partners.dtype == torch.int64
    assert torch.equal(torch.get_rng_state(), before)


def test_mixup_equals_the_authors(golden):
    for case in golden("mixup_criterion"):
        inputs, share = case["inputs"], case["settings"]["lam"]
        images, partners = torch.tensor(inputs["x"], dtype=torch.float64), torch.tensor(inputs["perm"])
        mixed = mix(images, images[partners], Mixing(share, partners))
        torch.testing.assert_close(mixed, torch.tensor(case["outputs"]["x_mixed"], dtype=torch.float64))


def test_mix_is_the_weighted_sum():
    a, b = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    partners = torch.arange(4)
    torch.testing.assert_close(mix(a, b, Mixing(0.3, partners)), 0.3 * a + 0.7 * b)
    assert torch.equal(mix(a, b, Mixing(1.0, partners)), a) and torch.equal(mix(a, b, Mixing(0.0, partners)), b)


def test_a_cutmix_share_is_the_area_that_is_left():
    ones, zeros = torch.ones(2, 3, 24, 40), torch.zeros(2, 3, 24, 40)
    shares = []
    for seed in range(300):
        mixing = draw_cutmix(2, 1.0, seed, (24, 40))
        mixed = mix(ones, zeros, mixing)
        assert mixed.mean().item() == pytest.approx(mixing.share)
        shares.append(mixing.share)
    assert min(shares) < 0.3 and max(shares) > 0.95 and ones.min() == 1  # the images given stay as they are


@pytest.mark.parametrize(("mixup", "cutmix", "expected"), [(9, 0, {False}), (0, 1, {True}), (9, 1, {True, False})])
def test_a_batch_is_mixed_by_what_is_switched_on(mixup, cutmix, expected):
    images, labels = torch.rand(12, 3, 8, 8), torch.arange(12) % 3
    cut = set()
    for seed in range(30):
        batch = {"pixel_values": images, "labels": labels}
        mix_batch(Accelerator(cpu=True), batch, mixup_alpha=mixup, cutmix_alpha=cutmix, seed=seed)
        assert torch.equal(batch["labels"], labels) and 0 <= batch["mixing"] <= 1
        pasted = (batch["pixel_values"][..., None] == images.permute(1, 2, 3, 0)[None]).any(dim=-1).float().mean()
        cut.add(bool(pasted == 1))
    assert cut == expected
