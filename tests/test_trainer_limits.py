"""Data loaders whose workers persist, streams that end, names in a config's order, settings that cannot act."""

from __future__ import annotations

import json

import pytest
from small_images import SmallImages, network_without_batch_statistics
from torch.utils.data import IterableDataset
from transformers import ViTConfig, ViTForImageClassification

from nc_hf import save_pretrained
from nc_hf.models.classifier import load_classifier
from nc_hf.retraining_args import RetrainingArguments
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


class Stream(IterableDataset):
    def __iter__(self):
        images = SmallImages()
        for index in range(len(images)):
            yield {name: values[0] for name, values in images.__getitems__([index]).items()}


def test_a_stream_starts_again_when_it_ends(tmp_path):
    one = trainer(tmp_path, train_dataset=Stream(), class_counts=[60, 30, 12, 6], max_steps=20)
    one.train()
    assert one.state.global_step == 20  # 14 batches a pass


def test_another_number_of_processes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`expected_processes` is 4 but 1 started"):
        trainer(tmp_path, expected_processes=4)


def test_the_beta_of_the_effective_number_reaches_the_sampler(tmp_path):
    one = trainer(tmp_path, sampler="effective_number", effective_number_beta=0.5)
    assert one._get_train_sampler().effective_number_beta == 0.5


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
