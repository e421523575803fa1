"""`NeuralCollapseLoss`: three kinds of centers, what it does with absent classes, and its memory."""

from __future__ import annotations

import copy
import textwrap

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from nc_hf.losses.collapse import NeuralCollapseLoss, between_class_loss, within_class_loss


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- NeuralCollapseLoss ----


@pytest.mark.parametrize(
    ("mode", "scale"), [("learned", "none"), ("batch", "none"), ("ema", "none"), ("batch", "rms"), ("ema", "rms")]
)
def test_degenerate_batches_are_defined(mode, scale):
    loss = NeuralCollapseLoss(4, 3, centers=mode, feature_scale=scale)
    batches = [
        (torch.randn(5, 3), torch.full((5,), 2)),
        (torch.randn(1, 3), torch.tensor([0])),
        (torch.randn(0, 3), torch.zeros(0, dtype=torch.long)),
    ]
    for features, labels in batches:
        features.requires_grad_()
        terms = loss(features, labels)
        sum(terms.values()).backward()
        assert all(value.isfinite() for value in terms.values())
        assert features.grad.isfinite().all()


@pytest.mark.parametrize("mode", ["learned", "batch", "ema"])
@pytest.mark.parametrize("of_module", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_features", [torch.float32, torch.float64, torch.bfloat16])
def test_module_and_features_of_any_types(mode, of_module, of_features):
    torch.manual_seed(0)
    loss, labels = NeuralCollapseLoss(4, 3, centers=mode), torch.tensor([0, 0, 1, 2, 3, 3])
    same = copy.deepcopy(loss).double()
    loss = loss.to(of_module)
    for _ in range(2):
        features = torch.randn(6, 3).to(of_features).requires_grad_()
        terms, expected = loss(features, labels), same(features.detach().double(), labels)
        sum(terms.values()).backward()
        assert features.grad.isfinite().all() and features.grad.dtype == of_features
        tolerance = {"rtol": 0.05, "atol": 0.01} if of_module in (torch.bfloat16, torch.float16) else {"rtol": 1e-4}
        for name, value in terms.items():
            np.testing.assert_allclose(value.item(), expected[name].item(), **tolerance)


def test_batch_centers_with_one_class_say_nothing_between_classes():
    features = torch.randn(5, 3, requires_grad=True)
    term = NeuralCollapseLoss(4, 3, centers="batch")(features, torch.full((5,), 2))["between"]
    term.backward()
    assert term.item() == 0
    assert torch.equal(features.grad, torch.zeros(5, 3))


@pytest.mark.parametrize("mode", ["learned", "batch", "ema"])
def test_geometry_is_float32_inside_autocast(mode):
    torch.manual_seed(0)
    loss = NeuralCollapseLoss(4, 16, 1.0, 1.0, centers=mode)
    features, labels = torch.randn(12, 16).bfloat16(), torch.arange(12) % 4
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(features, labels)
    loss.load_state_dict(state)
    outside = loss(features.float(), labels)
    for name in outside:
        assert inside[name].dtype == torch.float32
        assert torch.equal(inside[name], outside[name])


def test_running_means_follow_their_formula_and_push_the_batch():
    loss = NeuralCollapseLoss(3, 2, 1.0, 1.0, centers="ema", momentum=0.75)
    first = torch.tensor([[1.0, 0], [3, 0], [0, 2]])
    loss(first, torch.tensor([0, 0, 1]))
    assert torch.equal(loss.centers, torch.tensor([[2.0, 0], [0, 2], [0, 0]]))
    assert loss.seen.tolist() == [True, True, False]
    second = torch.tensor([[4.0, 0], [0, -1]], requires_grad=True)
    terms = loss(second, torch.tensor([0, 2]))
    assert torch.equal(loss.centers, torch.tensor([[0.75 * 2 + 0.25 * 4, 0], [0, 2], [0, -1]]))
    terms["between"].backward()
    assert second.grad.abs().sum() > 0
    loss.eval()
    before = loss.centers.clone()
    loss(second.detach(), torch.tensor([0, 2]))
    assert torch.equal(loss.centers, before)


def test_running_means_take_one_step_an_update_however_many_batches_it_has():
    features, labels = torch.randn(6, 2), torch.tensor([0, 0, 1, 1, 2, 2])
    whole, parts = (NeuralCollapseLoss(3, 2, momentum=0.9) for _ in "ab")
    for loss in (whole, parts):
        loss(torch.ones(6, 2), labels)
    whole(features, labels)
    for _ in range(4):
        parts(features, labels, batches=4)
    torch.testing.assert_close(parts.centers, whole.centers)


def test_mixed_images_belong_to_both_classes_in_their_proportion():
    torch.manual_seed(0)
    loss = NeuralCollapseLoss(3, 4, 0.5, 0.0, centers="learned")
    features, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    partners = labels[torch.tensor([3, 2, 0, 1, 5, 4])]
    mixed = loss(features, labels, partner_labels=partners, mixing=0.3)["within"]
    apart = 0.3 * loss(features, labels)["within"] + 0.7 * loss(features, partners)["within"]
    torch.testing.assert_close(mixed, apart)


def test_counts_of_a_whole_update_make_parts_add_up():
    torch.manual_seed(0)
    features, labels = torch.randn(9, 4), torch.arange(9) % 3
    loss = NeuralCollapseLoss(3, 4, 0.5, 0.0, centers="learned")
    counts = torch.bincount(labels)
    parts = [loss(features[i : i + 3], labels[i : i + 3], class_counts=counts)["within"] for i in (0, 3, 6)]
    torch.testing.assert_close(sum(parts), loss(features, labels)["within"])


def test_weight_zero_removes_a_term():
    features, labels = torch.randn(4, 3), torch.arange(4) % 2
    assert set(NeuralCollapseLoss(3, 3, 0.0, 0.1, centers="ema")(features, labels)) == {"between"}
    assert set(NeuralCollapseLoss(3, 3, 0.1, 0.0, centers="ema")(features, labels)) == {"within"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"within_weight": -0.1}, "`within_weight` must be at least 0, got -0.1"),
        ({"between_weight": float("nan")}, "`between_weight` must be at least 0, got nan"),
        ({"num_classes": 1}, "at least 2 classes, got num_classes=1"),
        ({"centers": "mean"}, "one of learned, batch, ema, got 'mean'"),
        ({"centers": "learned", "within_weight": 0.0}, "needs within_weight > 0"),
        ({"momentum": 1.0}, "must lie in \\[0, 1\\), got 1.0"),
        ({"between_objective": "max"}, "one of mean, min, gram, got 'max'"),
        ({"class_counts": [5, 3]}, r"`class_counts` must be 3 numbers, one a class, got \(2,\)"),
    ],
)
def test_bad_settings_say_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeuralCollapseLoss(**{"num_classes": 3, "feature_dim": 4, **arguments})


def test_compiled_terms_equal_eager():
    torch.manual_seed(0)
    loss = NeuralCollapseLoss(5, 8, 0.1, 0.2, centers="learned")
    features, labels = torch.randn(10, 8), torch.arange(10) % 5
    eager = loss(features, labels)
    compiled = torch.compile(loss, backend="aot_eager")(features, labels)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name])


def dense_between(centers: Tensor) -> Tensor:
    """Eq. 15 over the whole K x K matrix of cosines, as one would first write it."""
    unit = torch.nn.functional.normalize(centers - centers.mean(dim=0))
    cosines = unit @ unit.T
    cosines = cosines - 2 * torch.diag(torch.diag(cosines))
    return -torch.acos(cosines.max(dim=1).values).mean()


def peak_allocation(function, centers: Tensor) -> int:
    """Most bytes that torch held beyond its inputs during forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(centers).backward()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_between_needs_a_fifth_of_the_memory_of_the_dense_matrix():
    torch.manual_seed(0)
    dense, ours = (torch.randn(2000, 400).requires_grad_() for _ in range(2))
    with torch.no_grad():
        ours.copy_(dense)
    assert peak_allocation(between_class_loss, ours) < peak_allocation(dense_between, dense) / 5
    torch.testing.assert_close(ours.grad, dense.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("centers", ["ema", "batch"])
def test_relative_to_the_features_l_w_does_not_change_with_their_scale(centers):
    features, labels = torch.randn(40, 6, dtype=torch.float64), torch.arange(40) % 5
    seen = {}
    for scale in (1.0, 30.0):
        for feature_scale in ("rms", "none"):
            torch.manual_seed(0)
            loss = NeuralCollapseLoss(5, 6, 0.3, 0.1, centers, feature_scale=feature_scale).double()
            given = (scale * features).requires_grad_()
            terms = loss(given, labels)
            gradient = torch.autograd.grad(terms["within"], given)[0]
            seen[scale, feature_scale] = terms["within"].item(), gradient.norm().item() * scale
    assert seen[30.0, "rms"] == pytest.approx(seen[1.0, "rms"])
    assert seen[30.0, "none"] == pytest.approx(tuple(900 * value for value in seen[1.0, "none"]))
    share = features.square().sum(dim=1).mean().item()
    assert seen[1.0, "rms"] == pytest.approx(tuple(value / share for value in seen[1.0, "none"]))


def test_features_that_are_all_zero_are_finite_relative_to_themselves():
    loss = NeuralCollapseLoss(3, 4, feature_scale="rms")
    features = torch.zeros(6, 4, requires_grad=True)
    terms = loss(features, torch.arange(6) % 3)
    (terms["within"] + terms["between"]).backward()
    assert terms["within"] == 0 and features.grad.isfinite().all()


def test_learned_centers_keep_the_units_of_the_features():
    with pytest.raises(ValueError, match='use feature_scale="none"'):
        NeuralCollapseLoss(3, 4, centers="learned", feature_scale="rms")


def test_one_overflow_does_not_stay_in_the_running_means():
    loss, labels = NeuralCollapseLoss(3, 4), torch.tensor([0, 0, 1, 2])
    loss(torch.randn(4, 4), labels)
    before = loss.centers.clone()
    features = torch.randn(4, 4)
    features[0, 1] = torch.inf
    loss(features, labels)
    assert torch.equal(loss.centers[0], before[0])
    torch.testing.assert_close(loss.centers[1], 0.9 * before[1] + 0.1 * features[2])
    assert all(term.isfinite() for term in loss(torch.randn(4, 4), labels).values())


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.zeros(2, 1), torch.tensor([0, 1]), r"must be \(B, 4\), the input of the head"),
        (torch.zeros(2, 4, 1, 1), torch.tensor([0, 1]), r"got \(2, 4, 1, 1\) and labels of \(2,\)"),
        (torch.zeros(2, 4), torch.tensor([0]), r"labels of \(1,\)"),
        (torch.zeros(2, 4), torch.eye(3)[:2], r"labels of \(2, 3\)"),
        (torch.zeros(2, 4), torch.zeros(2), "must be int64 or int32, got torch.float32"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.uint8), "Convert them by `labels.long"),
        (torch.zeros(2, 4), torch.tensor([0, -100]), "must lie in 0 to 2, the model's outputs, got -100"),
    ],
)
def test_a_batch_that_would_broadcast_or_wrap_around_is_refused(features, labels, message):
    with pytest.raises(ValueError, match=message):
        NeuralCollapseLoss(3, 4)(features, labels)
    with pytest.raises(ValueError, match=message):
        within_class_loss(features, labels, torch.zeros(3, 4))


def test_second_labels_are_checked_too():
    with pytest.raises(ValueError, match="got 3 in a batch"):
        NeuralCollapseLoss(3, 4)(torch.zeros(2, 4), torch.tensor([0, 1]), partner_labels=torch.tensor([0, 3]))


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050"])  # the latter widens its features
def test_the_example_of_an_own_loop_runs(name):
    code = NeuralCollapseLoss.__doc__.split("whose head is one linear layer:\n\n")[1].split("\n\n")[0]
    names = {"NeuralCollapseLoss": NeuralCollapseLoss, "F": torch.nn.functional}
    names |= {"images": torch.randn(4, 3, 64, 64), "labels": torch.arange(4)}
    names["model"] = timm.create_model(name, num_classes=10)
    exec(textwrap.dedent(code), names)
    names["loss"].backward()
    assert names["logits"].shape == (4, 10)
