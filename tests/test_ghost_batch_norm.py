"""Ghost batch normalization: each part of a batch by its own statistics, in training alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_images import SmallImages, network_without_batch_statistics
from torch import nn

from nc_hf.models.classifier import load_classifier
from nc_hf.models.ghost_batch_norm import set_ghost_batches
from nc_hf.retraining import retrain_classifier
from nc_hf.retraining_args import RetrainingArguments
from nc_hf.schedule import describe_schedule
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments


def normalized(part: torch.Tensor) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) over images and places, channel by channel."""
    channels = [part[:, k] for k in range(part.shape[1])]
    return torch.stack([(x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-5).sqrt() for x in channels], dim=1)


@settings(max_examples=30, deadline=None)
@given(images=st.integers(2, 13), size=st.integers(2, 14), seed=st.integers(0, 99))
def test_every_image_is_normalized_by_its_part(images, size, seed):
    x = torch.randn(images, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    x = x * torch.arange(1, images + 1).view(-1, 1, 1, 1)
    norm = nn.BatchNorm2d(2)
    set_ghost_batches(norm, size)
    parts = x.tensor_split(-(-images // size))
    assert all(len(part) <= size for part in parts)
    torch.testing.assert_close(norm(x), torch.cat([normalized(part) for part in parts]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.1, 0.4, None])
def test_running_statistics_move_once_a_batch_to_the_mean_of_the_parts(momentum):
    norm, batches = nn.BatchNorm2d(3, momentum=momentum), torch.randn(4, 10, 3, 5, 5).cumsum(0)
    set_ghost_batches(norm, 4)
    mean, variance = torch.zeros(3), torch.ones(3)
    for number, batch in enumerate(batches, start=1):
        norm(batch)
        share = 1 / number if momentum is None else momentum
        parts = [part.transpose(0, 1).flatten(1) for part in batch.tensor_split(3)]
        mean = (1 - share) * mean + share * torch.stack([part.mean(1) for part in parts]).mean(0)
        variance = (1 - share) * variance + share * torch.stack([part.var(1) for part in parts]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert (norm.num_batches_tracked, norm.momentum) == (4, momentum)


def test_in_eval_mode_and_taken_off_it_is_the_network_itself():
    plain = timm.create_model("efficientnet_b0", num_classes=4).train()  # norms with an activation of their own
    ghost, x = copy.deepcopy(plain), torch.randn(6, 3, 64, 64)
    set_ghost_batches(ghost, 3)
    assert ghost.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(ghost.eval()(x), plain.eval()(x))
    again = copy.deepcopy(ghost)
    set_ghost_batches(again, None)
    for one, other in zip(again.modules(), plain.modules(), strict=True):
        assert type(one) is type(other) and vars(one).keys() == vars(other).keys()
    names = {type(module).__name__ for module in ghost.modules()}
    assert "GhostBatchNormAct2d" in names and "BatchNormAct2d" not in names


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))])
def test_a_copy_has_ghost_batches_too(copied):
    norm, x = nn.BatchNorm1d(3), torch.randn(6, 3)
    set_ghost_batches(norm, 2)
    again = copied(norm)
    assert type(again) is type(norm) and again.weight is not norm.weight
    assert torch.equal(again(x), norm(x)) and torch.equal(again.running_mean, norm.running_mean)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_parts(compiled):
    torch.manual_seed(0)
    norm, x, direction = nn.BatchNorm1d(5), torch.randn(8, 5), torch.randn(8, 5)
    set_ghost_batches(norm, 4)
    run = torch.compile(norm, backend="eager") if compiled else norm
    images = x.clone().requires_grad_()
    (run(images) * direction).sum().backward()
    for start in (0, 4):
        part = x[start : start + 4].clone().requires_grad_()
        (nn.BatchNorm1d(5)(part) * direction[start : start + 4]).sum().backward()
        torch.testing.assert_close(images.grad[start : start + 4], part.grad)


def test_the_trainer_uses_it_in_stage_one_alone(tmp_path):
    shared = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "num_train_epochs": 1}
    model, images = load_classifier("resnet20_cifar", 4)[0], SmallImages()
    args = NCTrainingArguments(output_dir=str(tmp_path / "one"), ghost_batch_size=4, **shared)
    NCTrainer(model, args, train_dataset=images).train()
    assert "; batch norms see 4 images at a time; " in describe_schedule(args, 1, 14, 8)
    assert type(model.bn1).__name__ == "GhostBatchNorm2d"
    args = RetrainingArguments(output_dir=str(tmp_path / "two"), **shared)
    retrain_classifier(model, images, args).save_model(str(tmp_path / "saved"))
    assert type(model.bn1) is nn.BatchNorm2d
    again = load_classifier(str(tmp_path / "saved"))[0].eval()
    torch.testing.assert_close(again(images.images[:3]), model.eval()(images.images[:3]))


def test_sizes_and_networks_that_it_cannot_serve_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`ghost_batch_size` must be at least 2, got 1"):
        NCTrainingArguments(output_dir=str(tmp_path), ghost_batch_size=1)
    args = NCTrainingArguments(output_dir=str(tmp_path), ghost_batch_size=2, report_to="none")
    with pytest.raises(ValueError, match="`ghost_batch_size` is 2, and NoBatchStatistics has no batch norms"):
        NCTrainer(network_without_batch_statistics(), args, train_dataset=SmallImages())
    with pytest.raises(ValueError, match="has no batch norms"):
        set_ghost_batches(nn.SyncBatchNorm(3), 2)


def test_norms_that_keep_no_statistics_are_ghosts_too():
    norm = nn.BatchNorm2d(2, momentum=None, track_running_stats=False)
    set_ghost_batches(norm, 3)
    x = torch.randn(6, 2, 3, 3)
    torch.testing.assert_close(norm(x), torch.cat([normalized(part) for part in x.split(3)]), rtol=1e-4, atol=1e-4)
