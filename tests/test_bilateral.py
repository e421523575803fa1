"""BBN: the authors' schedule, the formula, and timm's interface."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from experts_run import ROWS, all_rows, counts_of, cross_entropy, freeze_batch_statistics, small_task, train
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nc_hf.bilateral_task import BilateralTask, uniform_share
from nc_hf.doors import check_doors
from nc_hf.hub import save_pretrained
from nc_hf.models.bilateral import BilateralNetwork
from nc_hf.models.cifar_resnet import CifarResNet
from nc_hf.models.classifier import check_tap, find_head


def small_network(**kwargs) -> BilateralNetwork:
    torch.manual_seed(0)
    return BilateralNetwork((1, 1, 2), (4, 6, 8), **kwargs)


# ---- The schedule ----


def test_schedule_is_the_authors(golden):
    (case,) = golden("bbn_schedule")
    total = case["settings"]["total"]
    ours = [uniform_share((epoch - 1) / total) for epoch in case["inputs"]["epochs"]]
    np.testing.assert_allclose(ours, case["outputs"]["alpha"], rtol=1e-12)


@given(first=st.floats(0, 1), second=st.floats(0, 1))
def test_attention_only_moves_to_the_reversed_branch(first, second):
    first, second = sorted((first, second))
    assert 0 <= uniform_share(second) <= uniform_share(first) <= 1
    assert uniform_share(0) == 1 and uniform_share(1) == 0


# ---- The network ----


def test_interface_of_timm():
    model, x = small_network(num_classes=7, in_chans=1).eval(), torch.randn(2, 1, 16, 16)
    feature_map = model.forward_features(x)
    features = model.forward_head(feature_map, pre_logits=True)
    assert model.num_features == model.head_hidden_size == features.shape[1] == 16 and model.num_classes == 7
    assert feature_map.shape == (2, 16, 4, 4) and model.get_classifier() is model.fc
    torch.testing.assert_close(model.fc(features), model(x))
    branches = [model.branch_features(x, branch) for branch in ("uniform", "reversed")]
    torch.testing.assert_close(torch.cat(branches, dim=1), features)
    assert not torch.allclose(*branches)
    model.double().reset_classifier(0)
    torch.testing.assert_close(model(x.double()), features.double(), rtol=1e-4, atol=1e-5)
    model.reset_classifier(3)
    assert model(x.double()).shape == (2, 3)


def test_one_branch_is_a_cifar_resnet():
    """With the uniform block in the place of its last one, an ordinary ResNet-32 gives the same features."""
    model, plain = timm.create_model("resnet32_bbn_cifar").eval(), timm.create_model("resnet32_cifar").eval()
    state = {name.replace("uniform.", "layer3.4."): tensor for name, tensor in model.state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(("reversed.", "fc."))}
    missing = plain.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    x = torch.randn(2, 3, 32, 32)
    expected = plain.forward_head(plain.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.branch_features(x, "uniform"), expected, rtol=0, atol=0)
    block = 2 * 9 * 64 * 64 + 4 * 64
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == sum(p.numel() for p in plain.parameters()) + block + 64 * 10


def test_head_is_found_and_tapped():
    model = small_network(num_classes=4)
    assert find_head(model) == ("fc", model.fc)
    check_tap(model, "fc", torch.randn(2, 3, 16, 16))


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = small_network().double(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    calls = []
    again.layer2[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    for network in (model, again):
        network.branch_features(x, "reversed").square().sum().backward()
    assert len(calls) == 2
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_opens_through_every_door(tmp_path):
    model = timm.create_model("resnet32_bbn_cifar", num_classes=5).eval()
    save_pretrained(model, tmp_path / "bbn", heads={"base": model.fc.state_dict()})
    assert check_doors(tmp_path / "bbn") == ["timm", "transformers", "pipeline", "nc_hf"]
    again = timm.create_model(f"local-dir:{tmp_path / 'bbn'}", pretrained=True).eval()
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


# ---- The task ----


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.995])
def test_terms_against_the_formula(progress):
    task = freeze_batch_statistics(small_task("bbn"))
    task.progress.fill_(progress)
    images, labels = all_rows()
    output = task(images, labels)
    model, alpha = task.classifier, 1 - progress**2
    logits, supervised = [], 0.0
    for i in range(0, ROWS, 2):
        uniform = model.branch_features(images[i : i + 1], "uniform")
        other = model.branch_features(images[i + 1 : i + 2], "reversed")
        z = model.fc(torch.cat([2 * alpha * uniform, 2 * (1 - alpha) * other], dim=1))
        supervised += (alpha * cross_entropy(z, labels[i : i + 1])).item()
        supervised += ((1 - alpha) * cross_entropy(z, labels[i + 1 : i + 2])).item()
        logits.append(z)
    torch.testing.assert_close(output["logits"], torch.cat(logits), rtol=1e-4, atol=1e-5)
    assert output["loss_supervised"].item() == pytest.approx(supervised / (ROWS / 2), rel=1e-4)
    again = small_task("bbn")  # with running means as they were
    terms = again.collapse(model.branch_features(images[0::2], "uniform"), labels[0::2])
    torch.testing.assert_close(output["loss_within"], terms["within"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output["loss_between"], terms["between"], rtol=1e-4, atol=1e-6)
    assert output["loss"].item() == pytest.approx(sum(v.item() for k, v in output.items() if k.startswith("loss_")))


def test_at_the_start_the_reversed_draws_do_not_count():
    task = freeze_batch_statistics(small_task("bbn"))
    task.progress.fill_(0.0)
    images, labels = all_rows()
    loss = task(images, labels)["loss"]
    loss.backward()
    assert all(p.grad.abs().sum() == 0 for p in task.classifier.reversed.parameters())
    assert all(p.grad.abs().sum() > 0 for p in task.classifier.uniform.parameters())
    others = labels.clone()
    others[1::2] = 0
    again = freeze_batch_statistics(small_task("bbn"))
    again.progress.fill_(0.0)
    torch.testing.assert_close(again(images, others)["loss"], loss)


def test_each_half_has_batch_statistics_of_its_own():
    task = BilateralTask(small_network(num_classes=4), "fc", 4)
    images, labels = all_rows()
    expected = copy.deepcopy(task.classifier)
    task(images, labels)
    expected.branch_features(images[0::2], "uniform")
    expected.branch_features(images[1::2], "reversed")
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(task.classifier.get_buffer(name), buffer, msg=name)


def test_eval_gives_the_logits_of_both_branches():
    task = small_task("bbn").eval()
    images, labels = all_rows()
    output = task(images, labels)
    torch.testing.assert_close(output["logits"], task.classifier(images))
    torch.testing.assert_close(output["loss"], cross_entropy(output["logits"], labels).mean())
    features, logits = task.collapse_features_and_logits(images)
    torch.testing.assert_close(features, task.classifier.branch_features(images, "uniform"))
    torch.testing.assert_close(logits, output["logits"])


def test_accumulated_batches_give_the_gradient_of_one():
    whole, parts = (freeze_batch_statistics(small_task("bbn")) for _ in range(2))
    for task in (whole, parts):
        task.collapse.between_weight = 0.0  # the means of a batch are not those of its parts
        task.collapse.momentum = 0.0
        task.collapse.set_centers(torch.ones(4, 8), torch.ones(4))
        task.collapse.eval()
    images, labels = all_rows()
    counts = counts_of(whole, labels)
    assert counts.sum() == ROWS / 2
    whole(images, labels, update_counts=counts)["loss"].backward()
    for rows in (slice(0, 10), slice(10, ROWS)):
        parts(images[rows], labels[rows], update_counts=counts, update_batches=2)["loss"].backward()
    for (name, one), other in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other[1].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_steps_lower_the_loss():
    losses = train("bbn")["losses"]
    assert losses[-1] < losses[0] - 0.02


def test_mixed_images_are_refused():
    images, labels = all_rows()
    with pytest.raises(ValueError, match="set mixup_alpha .* to 0"):
        small_task("bbn")(images, labels, partners=labels.roll(1), mixing=0.5)


def test_rows_without_a_pair_are_refused():
    images, labels = all_rows()
    with pytest.raises(ValueError, match="5 rows are not pairs .* Set `sampler: bilateral`"):
        small_task("bbn")(images[:5], labels[:5])


def test_class_weights_are_refused():
    with pytest.raises(ValueError, match="set class_weighting to none"):
        BilateralTask(small_network(), "fc", 10, class_weights=torch.ones(10))


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="two branches such as resnet32_bbn_cifar, got CifarResNet"):
        BilateralTask(CifarResNet((1,), (4,)), "fc", 10)


def test_weights_of_both_blocks_start_kaiming_normal():
    model = timm.create_model("resnet32_bbn_cifar")
    for block in (model.uniform, model.reversed):
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)


def test_the_mixture_leaves_no_graph_behind():
    task, (images, labels) = small_task("bbn"), all_rows()[:2]
    task(pixel_values=images, labels=labels)["loss"].backward()
    with pytest.raises(RuntimeError, match="the head did not run"):
        task.tap.read()
    again = copy.deepcopy(task)  # which a tensor that is part of a graph does not allow
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), task.parameters(), strict=True))
