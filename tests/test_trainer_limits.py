"""Data sets of every kind, names in a config's order, settings that cannot act, and what is said of them."""

from __future__ import annotations

import dataclasses
import json
from typing import get_type_hints

import pytest
import torch
from small_images import SmallImages, SmallStream, network_without_batch_statistics
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import Trainer, ViTConfig, ViTForImageClassification
from transformers import TrainingArguments as Arguments

from nc_hf import save_pretrained
from nc_hf.models.classifier import load_classifier
from nc_hf.retraining_args import RetrainingArguments
from nc_hf.task import ClassificationTask
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments


def trainer(folder, *, train_dataset=None, class_counts=None, **settings) -> NCTrainer:
    defaults = {"output_dir": str(folder), "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = NCTrainingArguments(**defaults | {"precision": "fp32"} | settings)
    images = SmallImages() if train_dataset is None else train_dataset
    own = {"train_dataset": images, "class_counts": class_counts, "head": "head"}
    return NCTrainer(network_without_batch_statistics(), args, eval_dataset=SmallImages((4, 3, 2, 1)), **own)


def test_workers_that_persist_read_the_data_set_they_are_asked_for(tmp_path):
    one = trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    one.evaluate()
    for images in (SmallImages((5, 5, 5, 5)), SmallImages((9, 1, 1, 1)), one.eval_dataset):
        counts = one.class_means(images)[1]
        assert counts.tolist() == images.class_counts.tolist()
    assert one.get_eval_dataloader() is one.get_eval_dataloader()


def test_a_stream_starts_again_when_it_ends(tmp_path):
    one = trainer(tmp_path, train_dataset=SmallStream(), class_counts=[60, 30, 12, 6], max_steps=20)
    one.train()
    assert one.state.global_step == 20  # 14 batches a pass


def test_a_compiled_run_is_the_same_run(tmp_path):
    """The compiler that changes nothing, since others round otherwise and take minutes."""
    settings = {"max_steps": 4, "within_weight": 0.01, "feature_scale": "none"}
    runs = [trainer(tmp_path, **settings), trainer(tmp_path, torch_compile_backend="eager", **settings)]
    for one in runs:
        one.train()
    plain, compiled = runs
    assert compiled.model_wrapped is not compiled.model and isinstance(compiled.task, ClassificationTask)
    torch.testing.assert_close(compiled.task.state_dict(), plain.task.state_dict())
    assert compiled.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_another_number_of_processes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`expected_processes` is 4 but 1 started"):
        trainer(tmp_path, expected_processes=4)


def test_the_beta_of_the_effective_number_reaches_the_sampler(tmp_path):
    one = trainer(tmp_path, sampler="effective_number", effective_number_beta=0.5)
    assert one._get_train_sampler().effective_number_beta == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train_epochs": 0}, "`num_train_epochs` must be above 0, got 0"),
        ({"num_train_epochs": float("nan")}, "`num_train_epochs` must be above 0, got nan"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be at least 1, got 0"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be at least 1, got 0"),
        ({"per_device_eval_batch_size": -2}, "`per_device_eval_batch_size` must be at least 1, got -2"),
        ({"learning_rate": -0.1}, "`learning_rate` must be at least 0, got -0.1"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` is 5.0, and adds noise to the token embeddings"),
        ({"precision": "fp32", "bf16": True}, "`precision: fp32` and `bf16: True` contradict each other"),
        ({"precision": "fp16", "bf16": True}, "`precision: fp16` and `bf16: True` contradict each other"),
        ({"precision": "bf16", "bf16": False}, "`precision: bf16` and `bf16: False` contradict each other"),
        ({"precision": "fp16", "fp16": False}, "`precision: fp16` and `fp16: False` contradict each other"),
        ({"precision": "auto", "bf16": True, "fp16": True}, "`bf16` and `fp16` are both True"),
        ({"lr_milestones": 0.8}, "`lr_milestones` must be a list of epochs, such as .*, got 0.8"),
        ({"centers_momentum": 1.0}, r"`centers_momentum` must lie in \[0, 1\), got 1.0"),
    ],
)
def test_numbers_and_precisions_that_no_run_can_have_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        NCTrainingArguments(str(tmp_path), report_to="none", **settings)


@pytest.mark.parametrize("cls", [NCTrainingArguments, RetrainingArguments])
def test_a_word_that_is_no_choice_is_refused(tmp_path, cls):
    own = {field.name for field in dataclasses.fields(cls)} - {field.name for field in dataclasses.fields(Arguments)}
    names = [name for name in own if "Literal" in str(get_type_hints(cls)[name])]
    assert {"objective", "mixup_rule", "within_counts", "center_init", "precision", "sampler"} <= set(names)
    assert cls is NCTrainingArguments or {"features", "head_init", "backbone_statistics"} <= set(names)
    for name in names:
        with pytest.raises(ValueError, match=f"{name}.*domnant"):
            cls(str(tmp_path), report_to="none", **{name: "domnant"})


def test_updates_instead_of_epochs_and_a_learning_rate_of_0_are_no_mistake(tmp_path):
    one = trainer(tmp_path, num_train_epochs=0, max_steps=1, learning_rate=0.0)
    one.train()
    assert one.state.global_step == 1


def test_metrics_of_predictions_that_are_not_joined_are_refused(tmp_path):
    args = NCTrainingArguments(str(tmp_path), report_to="none", eval_do_concat_batches=False)
    with pytest.raises(ValueError, match="`eval_do_concat_batches: False` would hand lists of batches"):
        NCTrainer(network_without_batch_statistics(), args, head="head", compute_metrics=lambda prediction: {})
    NCTrainer(network_without_batch_statistics(), args, head="head")


def test_an_epoch_without_a_batch_is_refused_with_the_numbers(tmp_path):
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 200}
    one = trainer(tmp_path, **settings)
    with pytest.raises(ValueError, match=r"108 images, drawn once each, do not fill one batch of 200 on 1 process"):
        one.train()
    two_views = {"objective": "contrastive", "sampler": "two_views", "objective_settings": {"method": "fcl"}}
    trainer(tmp_path, max_steps=1, **settings, **two_views).train()  # 216 draws


def test_names_of_classes_go_by_number_whatever_the_order_of_the_config(tmp_path):
    names = [f"class {k}" for k in range(12)]
    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    shape = ViTConfig(**settings, image_size=8, patch_size=8, num_labels=12)
    ViTForImageClassification(shape).save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config["id2label"] = {str(k): names[k] for k in sorted(range(12), key=str)}  # 0, 1, 10, 11, 2, as on the Hub
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    model, _ = load_classifier(str(tmp_path / "theirs"))
    save_pretrained(model, tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())["id2label"]
    assert [saved[str(k)] for k in range(12)] == names
    args = NCTrainingArguments(output_dir=str(tmp_path), report_to="none")
    assert NCTrainer(model, args).task_label_names() == names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"features": "cached", "load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
            "so there is no best checkpoint",
        ),
        ({"objective": "experts"}, "stage two trains the head by classification, got `objective: experts`"),
        ({"max_norm_threshold": 0.1}, r"set head_init: keep \(weight balancing\)"),
    ],
)
def test_settings_of_stage_two_that_cannot_act_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        RetrainingArguments(output_dir=str(tmp_path), report_to="none", **settings)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda images: Subset(images, [0, 1, 2]),
        lambda images: Subset(Subset(images, [0, 1, 2]), [1, 2]),
        lambda images: ConcatDataset([Subset(images, [0]), Subset(images, [1])]),
    ],
)
def test_part_of_an_image_set_would_lose_its_augmentation(tmp_path, wrap):
    with pytest.raises(ValueError, match="without augmentation. Divide or join the data before load_images"):
        trainer(tmp_path, train_dataset=wrap(SmallImages()), class_counts=[60, 30, 12, 6])
    trainer(tmp_path).evaluate(Subset(SmallImages(), [0, 61, 95]))  # which has none to lose


class Rows(Dataset):
    """A map-style set whose attribute `labels` is whatever its author meant."""

    def __init__(self, labels: object, shift: int = 0) -> None:
        self.labels, self.shift = labels, shift

    def __len__(self) -> int:
        return 72

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"pixel_values": SmallImages().images[index], "labels": index % 4 + self.shift}


@pytest.mark.parametrize("labels", [["ant", "bee", "cat", "dog"], [0, 1, 2, 3], 4])
def test_an_attribute_labels_of_another_meaning_is_left_alone(tmp_path, labels):
    one = trainer(tmp_path, train_dataset=Rows(labels), per_device_train_batch_size=36, num_train_epochs=1)
    assert one.class_counts is None
    one.train()
    assert one.state.global_step == 2


@pytest.mark.parametrize(("shift", "found"), [(-1, "-1"), (1, "4"), (-100, "-(97|98|99|100)")])
def test_labels_that_are_no_class_are_refused_by_name(tmp_path, shift, found):
    one = trainer(tmp_path, train_dataset=Rows(None, shift), num_train_epochs=1)
    with pytest.raises(ValueError, match=f"`labels` must lie in 0 to 3, the model's outputs, got {found}"):
        one.train()


def test_a_full_device_says_how_to_halve_the_batch(tmp_path, monkeypatch):
    def full(*arguments: object, **settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trainer, "training_step", full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer(tmp_path).train()
    assert "Halve per_device_train_batch_size and double gradient_accumulation_steps" in error.value.__notes__[0]


class SmallMaps(nn.Module):
    """A network whose batch norm sees one value a channel of each image."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 16), nn.BatchNorm2d(8), nn.Flatten())
        self.head = nn.Linear(8, 4)

    def forward(self, pixel_values):
        return self.head(self.body(pixel_values))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        pass


def small_maps(folder, **settings) -> NCTrainer:
    defaults = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "precision": "fp32", "max_steps": 5}
    args = NCTrainingArguments(str(folder), **defaults | {"per_device_train_batch_size": 4} | settings)
    return NCTrainer(SmallMaps(), args, train_dataset=SmallImages((6, 4, 4, 3)), head="head")


def test_a_last_batch_of_one_image_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="more than 1 value per channel") as error:
        small_maps(tmp_path).train()
    assert "this batch has one image" in error.value.__notes__[0]
    assert "set dataloader_drop_last=True or another batch size" in error.value.__notes__[0]
    small_maps(tmp_path, dataloader_drop_last=True).train()


def test_batch_norms_that_move_twice_are_said_once(tmp_path, caplog):
    small_maps(tmp_path, dataloader_drop_last=True, gradient_checkpointing=True).train()
    assert caplog.text.count("SmallMaps has 1 batch norms. Those inside what is recomputed see each batch twice") == 1
    caplog.clear()
    frozen = ClassificationTask(SmallMaps(), "head", 4, freeze_backbone=True)
    frozen.activation_checkpointing_enable()
    small_maps(tmp_path, dataloader_drop_last=True).train()
    assert "recomputed" not in caplog.text


def test_a_model_of_which_no_folder_can_be_made_is_named_at_once(tmp_path, caplog):
    one = trainer(tmp_path)
    message = "NoBatchStatistics is neither a timm model nor a transformers one. It trains, and its checkpoints resume"
    assert caplog.text.count(message) == 1
    with pytest.raises(ValueError, match="neither a timm model nor a transformers one"):
        one.save_model(str(tmp_path / "saved"))
    caplog.clear()
    args = NCTrainingArguments(str(tmp_path), report_to="none")
    NCTrainer(load_classifier("resnet20_cifar", 4)[0], args)
    assert "neither" not in caplog.text


def test_what_the_terms_cannot_do_is_said(tmp_path, caplog):
    network = network_without_batch_statistics()
    with caplog.at_level("INFO", logger="nc_hf"):
        for num_classes in (2, 4, 30):
            network.head = nn.Linear(8, num_classes)
            args = NCTrainingArguments(str(tmp_path), report_to="none", centers="batch")
            NCTrainer(network, args, class_counts=[5] * num_classes, head="head")
    assert caplog.text.count("with two classes L_B is constant") == 1
    assert caplog.text.count("30 classes on 8 features: class means get at most 90.0 degrees apart") == 1
    assert caplog.text.count("sees the classes of 8 images alone, of 30 classes; `ema` sees all") == 1


def test_terms_on_a_backbone_frozen_by_hand_are_said_to_do_nothing(tmp_path, caplog):
    network, args = network_without_batch_statistics(), NCTrainingArguments(str(tmp_path), report_to="none")
    NCTrainer(network, args, class_counts=[5] * 4, head="head")
    assert "nothing to move" not in caplog.text
    network.requires_grad_(False).head.requires_grad_(True)
    NCTrainer(network, args, class_counts=[5] * 4, head="head")
    assert caplog.text.count("no weight of the backbone requires a gradient, so the collapse terms have nothing") == 1


@pytest.mark.parametrize(("settings", "times"), [({}, 1), ({"start_epoch": 0.5}, 0), ({"between_weight": 0.0}, 0)])
def test_terms_beside_a_contrastive_loss_from_the_start_are_warned_of(tmp_path, caplog, settings, times):
    settings |= {"objective": "contrastive", "objective_settings": {"method": "fcl"}, "sampler": "two_views"}
    args = NCTrainingArguments(str(tmp_path), report_to="none", within_weight=0.0, **settings)
    NCTrainer(network_without_batch_statistics(), args, class_counts=[5] * 4, head="head")
    assert caplog.text.count("a contrastive loss does not begin to fall. Set `start_epoch`") == times
