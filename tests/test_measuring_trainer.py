"""Features from memory: the same as from the images, for any head, and only while they hold."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from small_images import SmallImages, network_without_batch_statistics
from small_runs import arguments

from nc_hf import NCTrainer, RetrainingArguments, measuring_trainer, retrain_classifier
from nc_hf.evaluation import evaluate_classifier, geometry_of


@pytest.fixture
def trainer(tmp_path) -> NCTrainer:
    trainer = NCTrainer(network_without_batch_statistics(), arguments(tmp_path), train_dataset=SmallImages())
    trainer.seen = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        trainer.seen += len(output)

    trainer.classifier.body.register_forward_hook(count)
    return trainer


def all_of(trainer: NCTrainer, images: SmallImages) -> list[torch.Tensor]:
    return [torch.cat(parts) for parts in zip(*trainer.iterate_features(images), strict=True)]


def equal(these: list[torch.Tensor], those: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(these, those, strict=True))


def test_one_pass_over_the_images_serves_every_measurement_of_every_head(trainer):
    images = SmallImages(seed=1)
    heads = [{name: torch.randn_like(w) for name, w in trainer.task.head.state_dict().items()} for _ in "abc"]

    def measurements() -> list:
        found = []
        for head in heads:
            trainer.task.head.load_state_dict(head)
            found.append(evaluate_classifier(trainer, images, images.class_counts))
            found.append(geometry_of(trainer, images, trainer.class_means(images)))
        return found

    expected, trainer.seen = measurements(), 0
    with trainer.keeping_features():
        found = measurements()
    assert trainer.seen == len(images)
    assert found == expected


def test_logits_are_those_of_the_head_at_the_time(trainer):
    images, head = SmallImages(), trainer.task.head
    with trainer.keeping_features():
        first = all_of(trainer, images)
        assert equal(all_of(trainer, images), first)
        with torch.no_grad():
            head.weight.mul_(-2)
        found = all_of(trainer, images)
    assert trainer.seen == len(images)
    assert not torch.allclose(found[1], first[1])
    assert equal(found, all_of(trainer, images))


def test_logits_are_not_rounded_to_the_precision_of_the_backbone(tmp_path):
    """Rounded, those that are nearly equal would tie, and the first class, the more frequent one, would win."""
    images, args = SmallImages(), arguments(tmp_path, precision="bf16")
    trainer = NCTrainer(network_without_batch_statistics(), args, train_dataset=images)
    features, logits, _ = all_of(trainer, images)
    assert torch.equal(features, features.bfloat16().float())
    assert not torch.equal(logits, logits.bfloat16().float())
    assert torch.equal(logits, trainer.task.head(features).detach())
    assert torch.equal(torch.as_tensor(trainer.predict(images).predictions), logits)


def test_what_has_no_room_was_not_read_to_its_end_or_is_of_other_images_is_not_from_memory(trainer, monkeypatch):
    images = SmallImages()
    with trainer.keeping_features():
        next(trainer.iterate_features(images))
        expected, trainer.seen = all_of(trainer, images), 0
        all_of(trainer, SmallImages(seed=1))
        assert trainer.seen == len(images)
    with torch.no_grad():  # outside, a backbone may change
        trainer.classifier.body[1].weight.mul_(2)
    changed, trainer.seen = all_of(trainer, images), 0
    assert not torch.allclose(changed[0], expected[0])
    monkeypatch.setattr(measuring_trainer, "KEPT_BYTES", 8 * len(images))
    with trainer.keeping_features():
        assert all(equal(all_of(trainer, images), changed) for _ in range(3))
    assert trainer.seen == 3 * len(images)


def test_all_data_sets_share_the_room(trainer, monkeypatch):
    first, second = SmallImages(), SmallImages(seed=1)
    with trainer.keeping_features() as kept:
        all_of(trainer, first)
    monkeypatch.setattr(measuring_trainer, "KEPT_BYTES", sum(found.nbytes for found in kept.values()) * 3 // 2)
    trainer.seen = 0
    with trainer.keeping_features():
        for images in (first, second, first, second):
            all_of(trainer, images)
    assert trainer.seen == len(first) + 2 * len(second)


def test_computed_heads_look_at_the_images_once(trainer, tmp_path):
    images = SmallImages()
    args = RetrainingArguments(output_dir=str(tmp_path / "two"), heads=["ncm", "least_squares"], report_to="none")
    retrain_classifier(trainer.classifier, images, args)
    assert trainer.seen == len(images)


def test_a_trainer_of_the_same_backbone_reads_what_another_one_kept(trainer, tmp_path):
    images, network = SmallImages(), copy.deepcopy(trainer.classifier)
    another = NCTrainer(network, arguments(tmp_path), train_dataset=images)
    with torch.no_grad():
        another.task.head.weight.mul_(-2)
    expected, trainer.seen = all_of(another, images), 0
    with trainer.keeping_features() as kept:
        features, logits, _ = all_of(trainer, images)
    with another.keeping_features(kept):
        found = all_of(another, images)
    assert torch.equal(found[0], features) and not torch.allclose(found[1], logits)
    assert all(torch.allclose(*pair) for pair in zip(found, expected, strict=True))


def test_measuring_in_between_changes_no_weight(tmp_path):
    """A data loader draws a seed from the generator that dropout draws from."""
    images = SmallImages()

    def trained(**settings) -> NCTrainer:
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=4, drop_rate=0.5)
        trainer = NCTrainer(model, arguments(tmp_path, **settings), train_dataset=images, eval_dataset=images)
        trainer.train()
        return trainer

    plain, measured = trained(), trained(eval_strategy="epoch")
    for (name, a), b in zip(plain.task.state_dict().items(), measured.task.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
