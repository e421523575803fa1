"""Expert assignment of RIDE: gates by hand, image by image, and by the steps of SGD."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from small_images import COUNTS, SmallImages

from nc_hf.losses.precision import unit_rows
from nc_hf.models.experts import ExpertsNetwork
from nc_hf.models.routing import evaluate_routing, routed, routing_loss, routing_targets, train_routing
from nc_hf.sampling import EpochSampler


def network(num_experts: int = 3, *, routing: bool = True) -> ExpertsNetwork:
    torch.manual_seed(2)
    return ExpertsNetwork((1, 1, 1), (4, 6, 8), num_experts=num_experts, num_classes=4, routing=routing)


def test_routing_targets_by_hand():
    generator = torch.Generator().manual_seed(0)
    running, labels = torch.randn(50, 4, 3, generator=generator), torch.randint(0, 3, (50,), generator=generator)
    targets = routing_targets(running, labels)
    assert targets.shape == (50, 3) and 0 < targets.mean() < 1
    for i, e in np.ndindex(50, 3):
        right = [running[i, j].argmax() == labels[i] for j in range(4)]
        assert targets[i, e] == float(not right[e] and any(right[e + 1 :]))


def test_routing_loss_by_hand():
    model = network()
    generator = torch.Generator().manual_seed(0)
    features = unit_rows(torch.randn(9, 3, 8, generator=generator))
    logits, labels = torch.randn(9, 3, 4, generator=generator), torch.randint(0, 4, (9,), generator=generator)
    gates, total = model.routing, 0.0
    for i, e in np.ndindex(9, 2):
        running = [logits[i, : j + 1].mean(dim=0) for j in range(3)]
        hidden = gates.hidden[e](features[i, e]).clamp(min=0)
        score = gates.last(torch.cat([hidden, running[e].sort(descending=True).values])).item()
        right = [z.argmax() == labels[i] for z in running]
        target = not right[e] and any(right[e + 1 :])
        total += 100 * math.log1p(math.exp(-score)) if target else math.log1p(math.exp(score))
    assert routing_loss(gates, features, logits, labels).item() == pytest.approx(total / 18, rel=1e-5)


def disagreeing_network(num_experts: int = 3) -> ExpertsNetwork:
    """A network some of whose images another expert would help."""
    model, images = network(num_experts), SmallImages()
    with torch.no_grad():
        model.fc.directions -= model.fc.directions.mean(dim=1, keepdim=True)
        for _ in range(30):
            model(images.images)  # statistics of the batch norms
        features = unit_rows(model.eval().expert_features(images.images))
        logits = model.fc.expert_logits(features)
        scores = model.routing(0, features[:, 0], logits[:, 0])
        # Half of the images stop at once, none of them on the very edge.
        model.routing.last.bias -= scores.flatten().quantile(0.5)
    running = logits.cumsum(dim=1) / torch.arange(1, num_experts + 1)[:, None]
    assert 0.05 < routing_targets(running, torch.from_numpy(images.labels)).mean() < 0.5
    return model


def test_routing_is_one_image_at_a_time():
    model, images = disagreeing_network(4), SmallImages().images
    logits, used = routed(model, images)
    assert len(used.unique()) > 1
    for i, image in enumerate(images):
        shared, outputs = model.shared_features(image[None]), []
        for e in range(4):
            features, z = model.expert_outputs(e, shared)
            outputs.append(z)
            running = torch.stack(outputs).mean(dim=0)
            if e == 3 or torch.sigmoid(model.routing(e, features, running)).item() <= 0.5:
                break
        assert used[i] == len(outputs)
        torch.testing.assert_close(logits[i], running[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bias", "number"), [(-1e4, 1), (1e4, 3)])
def test_routing_stops_at_once_or_never(bias, number):
    model, images = disagreeing_network(), SmallImages().images[:7]
    model.routing.last.bias.data.fill_(bias)
    logits, used = routed(model, images)
    assert used.tolist() == [number] * 7
    first = model.expert_outputs(0, model.shared_features(images))[1]
    torch.testing.assert_close(logits, first if number == 1 else model(images), rtol=1e-4, atol=1e-4)


def test_gates_are_trained_and_nothing_else():
    model = disagreeing_network().train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    losses = train_routing(model, SmallImages(), epochs=8, batch_size=32)
    assert losses[-1] < 0.9 * losses[0] and len(losses) == 8
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"routing.{name}" for name, _ in model.routing.named_parameters()}
    assert model.training and not any(p.requires_grad for p in model.routing.parameters())
    again = disagreeing_network()
    again.load_state_dict(before)
    torch.manual_seed(2)  # draws follow from the seed given
    assert train_routing(again, SmallImages(), epochs=8, batch_size=32) == losses
    assert not again.training


def test_gates_take_the_steps_of_sgd_on_balanced_draws():
    model, images = disagreeing_network(), SmallImages()
    again = copy.deepcopy(model)
    train_routing(model, images, epochs=2, batch_size=40, learning_rate=0.02, seed=3)
    gates = again.routing.requires_grad_(True)
    speed, drawn = [torch.zeros_like(p) for p in gates.parameters()], np.zeros(4)
    sampler = EpochSampler(images.labels, "class_balanced", seed=3, with_draws=True)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        for start in (0, 40, 80):
            batch = images.__getitems__(keys[start : start + 40])
            drawn += np.bincount(batch["labels"], minlength=4)
            features = unit_rows(again.expert_features(batch["pixel_values"])).detach()
            loss = routing_loss(gates, features, again.fc.expert_logits(features).detach(), batch["labels"])
            gradients = torch.autograd.grad(loss, list(gates.parameters()))
            for p, v, g in zip(gates.parameters(), speed, gradients, strict=True):
                g = g + 5e-4 * p.data
                v.mul_(0.9).add_(g)
                p.data -= 0.02 * (1 + math.cos(math.pi * epoch / 2)) / 2 * (g + 0.9 * v)
    for (name, one), other in zip(gates.named_parameters(), model.routing.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5, msg=name)
    assert drawn.sum() == 2 * sum(COUNTS) and drawn.max() < 2 * drawn.min()  # the counts themselves are 10 to 1


def test_routing_is_evaluated_by_its_own_predictions():
    model, images = disagreeing_network(), SmallImages()
    batches = [images.collate(images.__getitems__(range(start, min(start + 50, 108)))) for start in (0, 50, 100)]
    metrics = evaluate_routing(model.train(), batches, COUNTS, few_below=10, many_above=20)
    logits, used = routed(model.eval(), images.images)
    right = logits.argmax(dim=1).numpy() == images.labels
    assert metrics["accuracy"] == pytest.approx(right.mean())
    assert metrics["accuracy_few"] == pytest.approx(right[images.labels == 3].mean())
    assert metrics["experts_used"] == pytest.approx(used.double().mean().item())


def test_a_network_without_gates_cannot_route():
    with pytest.raises(ValueError, match="has no gates .* Create the model with routing=True"):
        routed(network(routing=False), torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="has no gates"):
        train_routing(network(routing=False), SmallImages())


def test_data_without_labels_cannot_be_drawn_alike():
    with pytest.raises(ValueError, match="balanced draws need the labels of list"):
        train_routing(network(), [1, 2])
