"""NCTrainer: what enters the loss when, and with which optimizer."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_images import COUNTS, SmallImages, network_without_batch_statistics
from small_runs import arguments, logged, network
from torch import nn
from transformers import TrainerCallback

from nc_hf.losses.collapse import NeuralCollapseLoss, between_class_loss, within_class_loss
from nc_hf.schedule import describe_schedule, learning_rate_factor
from nc_hf.task import ClassificationTask
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments


@pytest.fixture(scope="module")
def images() -> SmallImages:
    return SmallImages()


# ---- the loss ----


def test_terms_are_absent_before_their_epoch_and_logged_unrounded_after(images, tmp_path):
    args = arguments(tmp_path, centers="learned", start_epoch=0.5, class_weighting="inverse", drw_epoch=3)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append((model.collapse_active, model.weighting_active, model.collapse.centers.detach().clone()))

    trainer = NCTrainer(network(), args, train_dataset=images, callbacks=[Watch()])
    start = trainer.task.collapse.centers.detach().clone()
    trainer.train()
    steps_an_epoch = 3
    assert [active for active, _, _ in seen] == [False] * 2 * steps_an_epoch + [True] * 2 * steps_an_epoch
    assert [active for _, active, _ in seen] == [False] * 3 * steps_an_epoch + [True] * steps_an_epoch
    assert all(torch.equal(centers, start) for _, _, centers in seen[: 2 * steps_an_epoch])
    within = logged(trainer, "loss_within")
    assert within[: 2 * steps_an_epoch] == [None] * 2 * steps_an_epoch
    assert all(value > 0 and value != round(value, 5) for value in within[2 * steps_an_epoch :])
    for record in [record for record in trainer.state.log_history if "loss" in record]:
        terms = sum(value for name, value in record.items() if name.startswith("loss_"))
        assert record["loss"] == pytest.approx(terms, rel=1e-5)


def test_centers_start_as_class_means_of_the_data(images, tmp_path):
    args = arguments(tmp_path, centers="learned", start_epoch=0.5, centers_learning_rate=0.0)
    trainer = NCTrainer(network(), args, train_dataset=images)

    class StopAtStart(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = trainer.task.collapse_active

        def on_epoch_begin(self, args, state, control, **kwargs):
            if (state.epoch or 0) > 1:
                self.means = trainer.class_means(images)[0]

    watch = StopAtStart()
    trainer.add_callback(watch)
    trainer.train()
    torch.testing.assert_close(trainer.task.collapse.centers.detach(), watch.means.float())


def test_the_authors_leak_is_there_only_on_request(images, tmp_path):
    args = arguments(tmp_path, centers="learned", start_epoch=0.5, replicate_leak=True)
    trainer = NCTrainer(network(), args, train_dataset=images)
    start = trainer.task.collapse.centers.detach().clone()
    trainer.train()
    assert all(value > 0 for value in logged(trainer, "loss_within"))
    assert not torch.equal(trainer.task.collapse.centers, start)


def test_loss_of_a_step_equals_the_formula(images, tmp_path):
    """Weighted cross entropy, L_W and L_B of the first update, from the parts."""
    model = network_without_batch_statistics()
    before = copy.deepcopy(model)
    args = arguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=len(images),
        centers="learned",
        class_weighting="inverse",
        within_weight=0.3,
        between_weight=0.7,
        learning_rate=0.0,
        centers_learning_rate=0.0,
    )
    trainer = NCTrainer(model, args, train_dataset=images)
    centers = trainer.task.collapse.centers.detach().clone()
    trainer.train()
    order = list(trainer._get_train_sampler())
    batch = images.__getitems__(order)
    features = before.body(batch["pixel_values"])
    class_weights = torch.tensor([1 / count for count in COUNTS])
    expected = F.cross_entropy(before.head(features), batch["labels"], weight=class_weights)
    expected = expected + 0.3 * within_class_loss(features, batch["labels"], centers)
    expected = expected + 0.7 * between_class_loss(centers)
    assert logged(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"mixup_rule": "first"}, {"class_weighting": "effective_number"}])
def test_accumulation_equals_one_large_batch(images, tmp_path, settings):
    """Exact for learned centers: counts and weight sums are those of the whole update."""

    def run(batch_size: int, accumulation: int) -> tuple[NCTrainer, list[float]]:
        args = arguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            centers="learned",
            max_steps=5,
            **settings,
        )
        trainer = NCTrainer(network_without_batch_statistics(), args, train_dataset=images)
        trainer.train()
        return trainer, logged(trainer, "loss")

    (whole, whole_losses), (parts, part_losses) = run(36, 1), run(9, 4)
    np.testing.assert_allclose(part_losses, whole_losses, rtol=1e-5)
    for (name, a), b in zip(whole.task.state_dict().items(), parts.task.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_logged_terms_add_up_to_the_loss_where_a_part_of_an_update_says_nothing(images, tmp_path):
    """With centers of the batch, two images of two classes have no L_W."""
    args = arguments(
        tmp_path, centers="batch", within_weight=1.0, per_device_train_batch_size=2, gradient_accumulation_steps=6
    )
    trainer = NCTrainer(network_without_batch_statistics(), args, train_dataset=images)
    trainer.train()
    terms = zip(*(logged(trainer, f"loss_{name}") for name in ("supervised", "within", "between")), strict=True)
    np.testing.assert_allclose([sum(filter(None, values)) for values in terms], logged(trainer, "loss"), atol=1e-5)


def test_mixup_mixes_by_a_function_of_seed_and_step(images, tmp_path):
    def run(seed: int) -> list[float]:
        args = arguments(tmp_path, mixup_alpha=0.5, max_steps=4, seed=seed, data_seed=0)
        trainer = NCTrainer(network_without_batch_statistics(), args, train_dataset=images)
        torch.rand(seed + 5)
        trainer.train()
        return logged(trainer, "loss_supervised")

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_other_centers_train_without_an_optimizer_of_their_own(images, tmp_path, mode):
    trainer = NCTrainer(network(), arguments(tmp_path, centers=mode, optim="adamw_torch"), train_dataset=images)
    trainer.train()
    assert len(trainer.optimizer.param_groups) == 2
    assert all(math.isfinite(value) for value in logged(trainer, "loss_between"))


def test_mean_squared_error_and_label_smoothing(images, tmp_path):
    for settings in ({"loss": "mse"}, {"label_smoothing_factor": 0.1}):
        model = network_without_batch_statistics()
        args = arguments(
            tmp_path, max_steps=1, learning_rate=0.0, per_device_train_batch_size=200, within_weight=0,
            between_weight=0, **settings,
        )  # fmt: skip
        trainer = NCTrainer(model, args, train_dataset=images)
        trainer.train()
        batch = images.__getitems__(list(trainer._get_train_sampler()))
        logits, labels = model(batch["pixel_values"]), batch["labels"]
        if "loss" in settings:
            expected = nn.MSELoss()(logits, F.one_hot(labels, 4).float())
        else:
            expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
        assert logged(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-5)


# ---- optimizer and schedule ----


def test_groups_of_the_optimizer(images, tmp_path):
    args = arguments(tmp_path, centers="learned", weight_decay=5e-4, decay_all_parameters=True)
    trainer = NCTrainer(network(), args, train_dataset=images)
    trainer.create_optimizer()
    groups = {len(group["params"]): group for group in trainer.optimizer.param_groups if group["params"]}
    assert set(groups) == {1, len(list(trainer.classifier.parameters()))}
    centers, rest = groups.pop(1), groups.popitem()[1]
    assert (centers["lr"], centers["momentum"], centers["weight_decay"]) == (0.5, 0.0, 0.0)
    assert (rest["lr"], rest["momentum"], rest["weight_decay"]) == (0.05, 0.9, 5e-4)


@pytest.mark.parametrize(
    "settings",
    [{"lr_milestones": [0.5, 3]}, {"lr_cosine": True, "warmup_epochs": 2}, {"lr_scheduler_type": "cosine"}],
)
def test_centers_keep_their_learning_rate_under_any_schedule(images, tmp_path, settings):
    rates = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    args = arguments(tmp_path, centers="learned", **settings)
    NCTrainer(network(), args, train_dataset=images, callbacks=[Watch()]).train()
    assert {row[-1] for row in rates} == {0.5}
    assert len({row[0] for row in rates}) > 1


def test_learning_rates_by_epoch_are_the_papers(golden, tmp_path):
    """0.1, times 0.1 at 160 and 180 of 200, after five epochs of warm-up; fractions keep the shape of a short run."""
    args = arguments(tmp_path, lr_milestones=[0.8, 0.9], warmup_epochs=0.025, learning_rate=0.1)
    ours = [args.learning_rate * learning_rate_factor(args, 200)(epoch) for epoch in range(200)]
    schedules = {case["settings"]["scheme"]: case["outputs"]["lr"] for case in golden("lr_schedules")[:3]}
    np.testing.assert_allclose(ours, schedules["mislas_stage1_step"], rtol=1e-9)
    cosine = learning_rate_factor(arguments(tmp_path, lr_cosine=True), 90)
    np.testing.assert_allclose([0.1 * cosine(e) for e in range(90)], schedules["mislas_stage1_cosine"], rtol=1e-7)
    short = learning_rate_factor(args, 20)
    assert [round(short(epoch), 10) for epoch in (0, 1, 15, 16, 17, 18, 19)] == [1, 1, 1, 0.1, 0.1, 0.01, 0.01]


def test_a_warmup_of_broken_epochs_does_not_pass_the_learning_rate(tmp_path):
    factor = learning_rate_factor(arguments(tmp_path, lr_milestones=[8], warmup_epochs=2.5), 10)
    assert [factor(epoch) for epoch in range(4)] == [0.4, 0.8, 1, 1]


def test_clipping_leaves_the_centers_alone(images, tmp_path):
    def trained(max_grad_norm: float) -> tuple[torch.Tensor, float]:
        args = arguments(tmp_path, centers="learned", max_grad_norm=max_grad_norm, max_steps=1, weight_decay=0)
        trainer = NCTrainer(network_without_batch_statistics(), args, train_dataset=images)
        before = trainer.task.head.weight.detach().clone()
        trainer.train()
        return trainer.task.collapse.centers.detach(), (trainer.task.head.weight - before).abs().max().item()

    (centers, moved), (centers_of_clipped, moved_if_clipped) = trained(0), trained(1e-6)
    assert torch.equal(centers, centers_of_clipped)
    assert moved_if_clipped < 1e-6 < moved


# ---- drop-in ----


def test_a_hugging_face_model_and_a_plain_dataset_train_as_with_trainer(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        num_labels=4,
    )  # fmt: skip
    source = SmallImages()
    rows = [
        {"pixel_values": image, "labels": int(label)}
        for image, label in zip(source.images, source.labels, strict=True)
    ]
    args = arguments(tmp_path, optim="adamw_torch", learning_rate=1e-3, eval_strategy="epoch", num_train_epochs=2)
    trainer = NCTrainer(ViTForImageClassification(config), args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < math.log(4)
    assert isinstance(trainer.classifier, ViTForImageClassification)
    trainer.save_model(str(tmp_path / "saved"))
    again = ViTForImageClassification.from_pretrained(tmp_path / "saved")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, trainer.classifier.state_dict()[name])


def test_precision_and_memory_format_are_chosen_and_logged(tmp_path):
    fast = NCTrainingArguments(output_dir=str(tmp_path))
    assert (fast.precision == "fp32") != (fast.bf16 or fast.fp16)
    assert fast.channels_last == (fast.precision != "fp32" or fast.device.type == "cpu")
    assert NCTrainingArguments(output_dir=str(tmp_path), bf16=True).precision == "bf16"
    slow = NCTrainingArguments(output_dir=str(tmp_path), precision="fp32", channels_last=False)
    assert (slow.bf16, slow.fp16, slow.channels_last) == (False, False, False)
    assert "precision fp32;" in describe_schedule(slow, 1, 1, 8)
    assert ("channels last" in describe_schedule(fast, 1, 1, 8)) == fast.channels_last


@pytest.mark.parametrize(("instructions", "precision"), [({"avx512_bf16": True}, "bf16"), ({}, "fp32")])
def test_precision_is_bf16_where_the_cpu_has_instructions_for_it(tmp_path, monkeypatch, instructions, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)  # torch 2.9 has none
    assert NCTrainingArguments(output_dir=str(tmp_path), use_cpu=True).precision == precision


def test_settings_of_the_terms_reach_them(images, tmp_path):
    settings = {"between_objective": "gram", "within_reduction": "images", "feature_scale": "rms"}
    args = arguments(tmp_path, **settings, centers_momentum=0.3, within_weight=0.2, between_weight=0.4)
    collapse = NCTrainer(network_without_batch_statistics(), args, train_dataset=images).task.collapse
    assert {name: getattr(collapse, name) for name in settings} == settings
    assert (collapse.momentum, collapse.within_weight, collapse.between_weight) == (0.3, 0.2, 0.4)


@pytest.mark.parametrize(("start", "epoch"), [("data", 0.0), ("normal", 0.5)])
def test_centers_start_as_asked_for_whatever_the_epoch(images, tmp_path, start, epoch):
    settings = {"centers": "learned", "centers_learning_rate": 0.0, "center_init": start, "start_epoch": epoch}
    trainer = NCTrainer(
        network_without_batch_statistics(), arguments(tmp_path, **settings, learning_rate=0.0), train_dataset=images
    )
    drawn = trainer.task.collapse.centers.detach().clone()
    means = trainer.class_means(images)[0].float()
    trainer.train()
    torch.testing.assert_close(trainer.task.collapse.centers.detach(), means if start == "data" else drawn)


@pytest.mark.parametrize(("rule", "share", "chosen"), [("first", 0.3, 0), ("dominant", 0.3, 1), ("dominant", 0.7, 0)])
def test_labels_of_a_mixed_feature_by_rule(images, rule, share, chosen):
    model, loss = network_without_batch_statistics(), NeuralCollapseLoss(4, 8, 0.5, 0.0, "learned")
    task = ClassificationTask(model, "head", 4, collapse=loss, mixup_rule=rule).train()
    task.collapse_active = True
    pixels, labels = images.images[:4], torch.arange(4)
    both = labels, labels.roll(1)
    found = task(pixels, labels, partners=both[1], mixing=share)["loss_within"]
    expected = [loss(model.body(pixels), y)["within"] for y in both]
    torch.testing.assert_close(found, expected[chosen])
    assert not torch.isclose(*expected)


def test_learned_centers_refuse_a_schedule_that_knows_no_groups(images, tmp_path):
    args = arguments(tmp_path, centers="learned", lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    trainer = NCTrainer(network_without_batch_statistics(), args, train_dataset=images, eval_dataset=images)
    with pytest.raises(ValueError, match="ReduceLROnPlateau cannot give to one group.*or `centers: ema`"):
        trainer.train()


def test_gradient_checkpointing_gives_the_same_losses(images, tmp_path):
    def losses(**settings) -> tuple[list[float], int]:
        args = arguments(tmp_path, centers="learned", max_steps=3, **settings)
        trainer, calls = NCTrainer(network(), args, train_dataset=images), []
        trainer.classifier.layer2[0].conv1.register_forward_hook(lambda *_: calls.append(1))
        trainer.train()
        return logged(trainer, "loss"), len(calls)

    (saving, more_calls), (plain, calls) = losses(activation_checkpointing=True), losses()
    np.testing.assert_allclose(saving, plain, rtol=1e-5)
    assert more_calls >= calls + 3  # once more in each step, on the way back
