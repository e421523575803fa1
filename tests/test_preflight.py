"""What the trainer makes of a data set's first sample, before the first step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from small_images import SmallImages, network_without_batch_statistics
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import TensorDataset

from nc_hf.data.augment import ImageTransform
from nc_hf.data.images import load_images
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments

SHORT = {"max_steps": 2, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "precision": "fp32"}


def trainer(folder, dataset: Any, *, eval_dataset: Any = None, data_collator: Any = None, **settings) -> NCTrainer:
    args = NCTrainingArguments(output_dir=str(folder), **SHORT | settings)
    given = {"train_dataset": dataset, "eval_dataset": eval_dataset, "data_collator": data_collator}
    return NCTrainer(network_without_batch_statistics(), args, head="head", **given)


class Rows(TorchDataset):
    """Samples as the function makes them; it keeps the indices that it was asked for."""

    def __init__(self, make) -> None:
        self.make, self.asked = make, []

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return self.make(index)


def pixels(index: int) -> torch.Tensor:
    return SmallImages().images[index]


def table_of_images() -> Dataset:
    colours = [PIL.Image.new("RGB", (16, 16), (17 * k, 0, 0)) for k in range(8)]
    return Dataset.from_dict({"image": colours, "label": [0, 1, 2, 3] * 2})


NO_SAMPLES = [
    (table_of_images, r"gives a dict with `image` \(\w+\), `label` \(int\), of which no batch with `pixel_values`"),
    (lambda: TensorDataset(torch.zeros(8, 3, 16, 16), torch.zeros(8)), "gives a tuple of Tensor, Tensor"),
    (lambda: Rows(lambda k: {"x": pixels(k), "labels": 0}), r"gives a dict with `x` \(Tensor\), `labels` \(int\)"),
    (
        lambda: Rows(lambda k: {"pixel_values": pixels(k), "y": 0}),
        "gives a dict with .* no batch with `labels` can be made",
    ),
    (lambda: Rows(lambda k: 5), "gives a int, of which"),
]


@pytest.mark.parametrize(("make", "message"), NO_SAMPLES)
def test_samples_that_make_no_batch_are_refused_with_what_was_found(tmp_path, make, message):
    with pytest.raises(ValueError, match=f"`train_dataset` {message}") as error:
        trainer(tmp_path, make()).train()
    assert "load_images makes a set for NCTrainer" in str(error.value)


@pytest.mark.parametrize("measure", ["evaluate", "predict"])
def test_sets_that_are_given_to_a_call_are_looked_at_too(tmp_path, measure):
    one = trainer(tmp_path, SmallImages())
    with pytest.raises(ValueError, match="`the data set to evaluate` gives a dict with `image`.*load_images makes"):
        getattr(one, measure)(table_of_images())


def test_several_sets_are_evaluated_by_name(tmp_path):
    one = trainer(tmp_path, SmallImages(), eval_dataset={"old": SmallImages(), "new": SmallImages((5, 5, 5, 5))})
    assert {"eval_old_loss", "eval_new_loss"} <= set(one.evaluate())
    with pytest.raises(ValueError, match="gives a dict with `image`"):
        trainer(tmp_path, SmallImages(), eval_dataset={"new": table_of_images()}).evaluate()


def test_evaluation_sets_are_looked_at_before_the_training(tmp_path):
    one = trainer(tmp_path, SmallImages(), eval_dataset={"new": table_of_images()}, eval_strategy="steps")
    with pytest.raises(ValueError, match="`eval_dataset new` gives a dict with `image`"):
        one.train()
    assert one.state.global_step == 0
    trainer(tmp_path, SmallImages(), eval_dataset=table_of_images()).train()  # which is never looked at


def test_a_collator_of_the_users_makes_batches_of_anything(tmp_path):
    def stack(rows: list) -> dict[str, torch.Tensor]:
        images, labels = zip(*rows, strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}

    rows = Rows(lambda index: (pixels(index), index % 4))
    one = trainer(tmp_path, rows, data_collator=stack)
    one.train()
    assert one.state.global_step == 2


def test_one_sample_is_read_and_no_generator_moves(tmp_path):
    def noisy(index: int) -> dict[str, Any]:
        noise = torch.randn(3, 16, 16) * random.random() * np.random.rand()
        return {"pixel_values": pixels(index) + noise, "labels": index % 4}

    rows = Rows(noisy)
    one = trainer(tmp_path, rows)
    loader = one.get_train_dataloader()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    one.set_initial_training_values(one.args, loader)
    assert rows.asked == [0]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_samples_under_other_indices_are_left_to_the_training(tmp_path):
    class Named(Rows):
        def __getitem__(self, index: Any) -> Any:
            raise KeyError(index)

    with pytest.raises(KeyError):  # its own, and not a word of samples that make no batch
        trainer(tmp_path, Named(None)).train()


@pytest.mark.parametrize("own_collator", [False, True])
def test_image_sets_train_also_where_unused_columns_are_removed(tmp_path, own_collator):
    transform = ImageTransform(size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, augmentation="crop_flip")
    images = load_images(table_of_images(), transform)
    collator = images.collate if own_collator else None
    one = trainer(tmp_path, images, data_collator=collator, eval_dataset=images, remove_unused_columns=True)
    one.train()
    assert one.state.global_step == 2 and one.evaluate()["eval_loss"] > 0


def test_columns_that_cannot_be_stacked_are_removed_where_that_is_asked_for(tmp_path):
    rows = Rows(lambda index: {"pixel_values": pixels(index), "labels": index % 4, "file": object()})
    with pytest.raises(ValueError, match="nothing else that cannot be stacked"):
        trainer(tmp_path, rows).train()
    trainer(tmp_path, rows, remove_unused_columns=True).train()
