"""What users hand to `NCTrainer`: makers of models, streams, other columns, names of labels, their own optimizers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from small_images import SmallImages, network_without_batch_statistics
from torch.utils.data import IterableDataset, Subset
from transformers.trainer_utils import HPSearchBackend

from nc_hf.hub import load_pretrained
from nc_hf.labels import counts_of, labels_of, names_of
from nc_hf.models.classifier import load_classifier
from nc_hf.retraining import retrain_classifier
from nc_hf.retraining_args import RetrainingArguments
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments

SHORT = {"max_steps": 2, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "precision": "fp32"}


def trainer(folder, model: Any = None, *, settings: dict[str, Any] | None = None, **given) -> NCTrainer:
    args = NCTrainingArguments(output_dir=str(folder), **SHORT | (settings or {}))
    if model is None and "model_init" not in given:
        model = network_without_batch_statistics()
    return NCTrainer(model, args, head="head", **{"train_dataset": SmallImages()} | given)


class Stream(IterableDataset):
    def __iter__(self):
        images = SmallImages()
        for index in range(len(images)):
            yield {name: values[0] for name, values in images.__getitems__([index]).items()}


def table(columns: dict[str, list], names: dict[str, list[str]]) -> Dataset:
    """Rows of flat images with columns of labels."""
    images = SmallImages().images[: len(next(iter(columns.values())))].numpy()
    dataset = Dataset.from_dict({"pixel_values": images.tolist(), **columns})
    for column, own in names.items():
        dataset = dataset.cast_column(column, ClassLabel(names=own))
    return dataset.with_format("torch")


def test_a_maker_of_models_without_arguments_is_called_without_any(tmp_path):
    one = trainer(tmp_path, model_init=lambda: network_without_batch_statistics())
    one.train()
    assert one.state.global_step == 2


def test_a_trial_is_trained_with_its_own_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)  # optuna is not installed
    one = trainer(tmp_path, model_init=lambda trial: network_without_batch_statistics())
    one.hp_search_backend, one.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    for number, weight in enumerate((0.25, 0.5)):
        one.train(trial=SimpleNamespace(number=number, params={"within_weight": weight}))
        assert one.task.collapse.within_weight == one.args.within_weight == weight
        one.model = one.model_wrapped = None  # as `hyperparameter_search` frees memory between trials


def test_a_frozen_backbone_keeps_its_weights(tmp_path):
    model = network_without_batch_statistics()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer(tmp_path, model, freeze_backbone=True).train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"head.weight", "head.bias"}


def test_an_endless_stream_has_no_pass_for_the_first_centers(tmp_path):
    with pytest.raises(ValueError, match="`center_init: data` takes a pass.*Leave it at auto"):
        trainer(tmp_path, train_dataset=Stream(), class_counts=[9, 4, 2, 1], settings={"center_init": "data"})


def test_a_compiled_model_is_trained_and_saved_as_the_plain_one(tmp_path):
    model = load_classifier("test_resnet", 4)[0]
    for given in ({"model": torch.compile(model)}, {"model_init": lambda: torch.compile(model)}):
        one = NCTrainer(**given, args=NCTrainingArguments(str(tmp_path), **SHORT))
        assert one.classifier is model
        one.save_model(str(tmp_path / "model"))
        assert load_pretrained(tmp_path / "model")[0].num_classes == 4


def test_a_stream_may_have_an_attribute_of_that_name(tmp_path):
    stream = Stream()
    stream.labels = ["ant", "bee", "cat", "dog"]
    assert labels_of(stream) is None


def test_stage_two_on_a_stream_is_refused_as_it_could_not_draw_classes_alike(tmp_path):
    args = RetrainingArguments(output_dir=str(tmp_path), **SHORT | {"lr_cosine": False})
    with pytest.raises(ValueError, match=r"`sampler: class_balanced` draws images by their labels.*stream \(Stream\)"):
        retrain_classifier(network_without_batch_statistics(), Stream(), args, head="head", class_counts=[9, 4, 2, 1])


@pytest.mark.parametrize(
    "settings", [{"lr_cosine": True}, {"start_epoch": 0.5}, {"class_weighting": "inverse", "drw_epoch": 0.8}]
)
def test_epochs_of_a_stream_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=f"`{list(settings)[-1]}` count epochs, which a stream"):
        trainer(tmp_path, settings=settings, train_dataset=Stream(), class_counts=[60, 30, 12, 6])


def test_what_starts_after_a_run_of_few_updates_is_said(tmp_path, caplog):
    one = trainer(tmp_path, settings={"start_epoch": 0.8})
    one.train()
    assert "`start_epoch` is 0.8, a share of the run cut to whole epochs" in caplog.text
    assert "and the run ends after 1, so it is never switched on" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_cosine": True}, "`lr_cosine` changes the learning rate between epochs, and the run has 1: it stays"),
        ({"lr_milestones": [0.5]}, "`lr_milestones` is 0.5, a share of the run cut to whole epochs, at least one"),
    ],
)
def test_a_schedule_by_epochs_of_a_single_epoch_is_said(tmp_path, caplog, settings, words):
    NCTrainingArguments(str(tmp_path), num_train_epochs=1, **settings)
    assert words in caplog.text
    caplog.clear()
    NCTrainingArguments(str(tmp_path), num_train_epochs=2, **settings)
    assert not caplog.text


def test_another_draw_of_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`train_sampling_strategy: sequential` would be ignored"):
        trainer(tmp_path, settings={"train_sampling_strategy": "sequential"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dispatch_batches": True}, "`dispatch_batches` draws other images when a run is resumed"),
        ({"split_batches": True}, "`split_batches` divides each batch among the processes"),
        ({"even_batches": False}, "`even_batches: False` gives processes batches of different sizes"),
    ],
)
def test_ways_of_accelerate_that_do_not_fit_are_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, settings={"accelerator_config": config})


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_learned_centers_with_an_optimizer_of_the_users_are_refused(tmp_path, how):
    model = network_without_batch_statistics()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    own = {"optimizers": (sgd, None), "optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 1e-3})}[how]
    settings = {"centers": "learned", "feature_scale": "none", "optim": "sgd"}
    with pytest.raises(ValueError, match="which yours replaces"):
        trainer(tmp_path, model, settings=settings, **{how: own})
    trainer(tmp_path, model, settings={"optim": "sgd"}, **{how: own}).train()


def test_ready_batches_and_single_images_go_side_by_side(tmp_path):
    images = SmallImages()
    rows = [{name: values[0] for name, values in images.__getitems__([row]).items()} for row in range(8)]
    alone = trainer(tmp_path, train_dataset=None)
    expected = alone.evaluate(images)["eval_loss"]
    assert trainer(tmp_path, train_dataset=rows, eval_dataset=images).evaluate()["eval_loss"] == expected
    assert alone.evaluate(Subset(images, range(8)))["eval_loss"] == pytest.approx(alone.evaluate(rows)["eval_loss"])
    trainer(tmp_path, train_dataset=rows, class_counts=[60, 30, 12, 6]).train()


def test_columns_beside_image_and_label_are_not_looked_at(tmp_path):
    dataset = table({"label": [0, 0, 1, 2, 3], "row": [5, 6, 7, 8, 9]}, {"label": SmallImages.class_names})
    one = trainer(tmp_path, train_dataset=dataset)
    one.train()
    assert one.evaluate(dataset)["eval_loss"] > 0
    assert one.class_names == SmallImages.class_names


def test_a_prediction_is_of_every_image_where_training_drops_the_last(tmp_path):
    one = trainer(tmp_path, settings={"dataloader_drop_last": True, "per_device_eval_batch_size": 50})
    assert one.predict(SmallImages()).predictions.shape == (108, 4)
    assert one.args.dataloader_drop_last


def test_the_column_of_labels_can_be_named(tmp_path):
    fine, coarse = [0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 3]
    names = {"fine_label": list("uvwxyz"), "coarse_label": list("abcd")}
    dataset = table({"fine_label": fine, "coarse_label": coarse}, names)
    assert counts_of(dataset).tolist() == [1] * 6
    one = trainer(tmp_path, train_dataset=dataset, label_column="coarse_label", settings={"sampler": "class_balanced"})
    assert one.class_counts.tolist() == [2, 2, 1, 1] and one.class_names == list("abcd")
    np.testing.assert_array_equal(one._get_train_sampler().labels, coarse)
    with pytest.raises(ValueError, match="the columns are"):
        labels_of(dataset, "colour")


def test_a_table_without_one_column_of_labels_tells_nothing(tmp_path):
    dataset = table({"left": [0, 1], "right": [1, 0]}, {"left": ["a", "b"], "right": ["c", "d"]})
    assert labels_of(dataset) is counts_of(dataset) is names_of(dataset) is None
    with pytest.raises(ValueError, match="name the column of a `datasets.Dataset` by NCTrainer's label_column"):
        trainer(tmp_path, train_dataset=dataset, settings={"sampler": "class_balanced"}).train()
