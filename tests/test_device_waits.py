"""Nothing in a step's losses makes the host wait for the device, and the terms start few kernels there.

No value is read, no shape depends on values.

Fake tensors have shapes and no values, so whatever would have to wait for a value on a GPU raises an error here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import arguments
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nc_hf.losses.classification import SUPERVISED_LOSSES, SupervisedLoss
from nc_hf.losses.collapse import NeuralCollapseLoss
from nc_hf.losses.contrastive import supervised_contrastive_loss, update_centroids
from nc_hf.models.classifier import load_classifier
from nc_hf.objectives import build_task

B, K, P = 12, 4, 16
COUNTS = [8, 4, 2, 1]


@pytest.fixture
def values_are_unknown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors, without the look at the labels that is for CPUs alone."""
    monkeypatch.setattr("nc_hf.losses.collapse.check_labels", lambda labels, num_classes: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, K, (2, B))
    return torch.randn(B, P, requires_grad=True), labels[0], labels[1]


@pytest.mark.parametrize(
    "read", [lambda labels: torch.bincount(labels, minlength=K), lambda labels: labels.sum().item()]
)
def test_a_wait_would_be_seen(values_are_unknown: None, read: Callable[[torch.Tensor], Any]) -> None:
    """The way to look for waits finds the two usual ones."""
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        read(batch()[1])


@pytest.mark.parametrize("centers", ["ema", "batch", "learned"])
@pytest.mark.parametrize("objective", ["mean", "min", "gram"])
@pytest.mark.parametrize("reduction", ["mean", "images"])
def test_collapse_terms(values_are_unknown: None, centers: str, objective: str, reduction: str) -> None:
    """Both terms forward and backward, of plain and of mixed images."""
    scale = "none" if centers == "learned" else "rms"
    settings = {"between_objective": objective, "within_reduction": reduction, "feature_scale": scale}
    collapse = NeuralCollapseLoss(K, P, centers=centers, **settings)
    features, labels, partners = batch()
    sum(collapse(features, labels).values()).backward()
    sum(collapse(features, labels, partner_labels=partners, mixing=0.3).values()).backward()
    assert features.grad.shape == (B, P)


@pytest.mark.parametrize(
    "name, counts", [(name, one) for name, loss in SUPERVISED_LOSSES.items() for one in loss.counts]
)
def test_supervised_losses(name: str, counts: str) -> None:
    """Settings are checked when a loss is made; its forward and backward pass read nothing."""
    loss = SupervisedLoss(name, COUNTS if counts == "train" else None, counts=counts)
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits, labels = torch.randn(B, K, requires_grad=True), torch.randint(0, K, (B,))
        loss(logits, labels).mean().backward()
    assert logits.grad.shape == (B, K)


def test_contrastive_losses(values_are_unknown: None) -> None:
    """The loss of all views, and the running centroids of TSC."""
    vectors, labels, _ = batch()
    supervised_contrastive_loss(vectors, labels, 0.1, anchors=slice(0, B)).backward()
    assert update_centroids(torch.randn(K, P), vectors.detach(), labels).shape == (K, P)


@pytest.mark.parametrize("objective", ["classification", "experts", "bilateral"])
def test_tasks(request: pytest.FixtureRequest, tmp_path: Path, objective: str) -> None:
    """A whole step of each kind of network with both terms, and class weights where it takes some."""
    name = {"experts": "resnet32_ride_cifar", "bilateral": "resnet32_bbn_cifar"}.get(objective, "resnet20_cifar")
    own = {"sampler": "bilateral"} if objective == "bilateral" else {"class_weighting": "effective_number"}
    args = arguments(tmp_path, objective=objective, **own)
    task = build_task(load_classifier(name, K)[0], args, np.array(COUNTS)).train()
    task.collapse_active = task.weighting_active = True
    request.getfixturevalue("values_are_unknown")
    found = task(torch.randn(B, 3, 32, 32), torch.randint(0, K, (B,)))
    found["loss"].backward()
    assert {"loss_within", "loss_between", "loss_supervised"} <= set(found)


class KernelCount(TorchDispatchMode):
    """Number of operations that are more than another view of the same memory."""

    kernels = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view:
            self.kernels += 1
        return result


@pytest.mark.parametrize(("mixed", "most"), [(False, 125), (True, 150)])
def test_the_terms_start_few_kernels(monkeypatch: pytest.MonkeyPatch, mixed: bool, most: int) -> None:
    """On a GPU a small network costs the time to start its kernels, of which a ResNet-32 has about five hundred."""
    monkeypatch.setattr("nc_hf.losses.collapse.check_labels", lambda labels, num_classes: None)
    collapse, (features, labels, partners) = NeuralCollapseLoss(K, P), batch()
    counts = torch.ones(K)
    partner = {"partner_labels": partners, "mixing": torch.tensor(0.7)} if mixed else {}
    with KernelCount() as count:
        sum(collapse(features, labels, class_counts=counts, **partner).values()).backward()
    assert 20 < count.kernels <= most
