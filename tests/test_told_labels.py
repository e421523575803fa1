"""Labels that a data set tells beside its samples: found, of any integer type, and refused where samples differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from small_images import SmallImages
from test_trainer_inputs import table, trainer
from torch.utils.data import Dataset

from nc_hf import evaluate_classifier
from nc_hf.sampling import EpochSampler

LABELS, KINDS = [0, 0, 0, 1, 1, 2, 3, 3], [3, 3, 3, 2, 2, 1, 0, 0]
BATCH = {"per_device_train_batch_size": 8}


def two_columns():
    """Two columns of classes; samples are of the one that has no usual name."""
    dataset = table({"label": LABELS, "kind": KINDS}, {"label": list("abcd"), "kind": list("wxyz")})
    dataset.set_transform(
        lambda rows: {
            "pixel_values": list(torch.tensor(np.asarray(rows["pixel_values"])).float()),
            "labels": rows["kind"],
        }
    )
    return dataset


@pytest.mark.parametrize("settings", [{"class_weighting": "inverse"}, {"sampler": "class_balanced"}])
def test_counts_and_draws_of_another_column_than_the_samples_are_refused(tmp_path, settings):
    dataset = two_columns()
    wrong = trainer(tmp_path, train_dataset=dataset, settings=settings)
    with pytest.raises(
        ValueError, match=r"image 0 .* the label 3 in its sample, and 0 .* Name the column .*label_column"
    ):
        wrong.train()
    right = trainer(tmp_path, train_dataset=dataset, label_column="kind", settings=settings)
    right.train()
    assert right.class_counts.tolist() == [2, 1, 2, 3] and right.class_names == list("wxyz")
    found = evaluate_classifier(right, dataset, right.class_counts)
    assert found["images"] == 8
    with pytest.raises(ValueError, match="samples of Dataset have 2 images of class 0, and what it tells .* says 3"):
        evaluate_classifier(wrong, dataset, right.class_counts)


def test_samples_with_labels_of_their_own_train_where_the_counts_are_given(tmp_path):
    dataset = two_columns().cast_column("label", ClassLabel(names=list("abcdef")))
    one = trainer(tmp_path, train_dataset=dataset, class_counts=[2, 1, 2, 3], settings={"class_weighting": "inverse"})
    one.train()
    assert one.class_names is None  # those of the column are of other classes


class Rows(Dataset):
    """Samples as dicts, and their labels in an attribute, as a set of the user's own or of torchvision."""

    def __init__(self, labels: list, attribute: str = "labels", kind: type = int) -> None:
        self.images, self.own, self.kind = SmallImages().images, labels, kind
        setattr(self, attribute, labels)

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.images[index], "labels": self.kind(self.own[index])}


@pytest.mark.parametrize("attribute", ["labels", "targets"])
@pytest.mark.parametrize(
    "settings", [{"class_weighting": "inverse"}, {"loss": "logit_adjustment"}, {"sampler": "class_balanced"}]
)
def test_labels_in_an_attribute_are_enough(tmp_path, attribute, settings):
    rows = Rows([0, 0, 0, 1, 1, 2], attribute)  # none of the last class
    one = trainer(tmp_path, train_dataset=rows, settings=settings)
    one.train()
    assert one.class_counts.tolist() == [3, 2, 1, 0]
    assert evaluate_classifier(one, rows, one.class_counts)["images"] == 6


def test_class_names_are_those_of_torchvision(tmp_path):
    rows = Rows([0, 0, 1, 2, 3], "targets")
    rows.classes = ["ant", "bee", "cat", "dog"]
    assert trainer(tmp_path, train_dataset=rows).class_names == rows.classes


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int16, bool, lambda label: torch.tensor(label).byte()])
def test_labels_of_every_integer_type_train_and_are_measured(tmp_path, kind):
    labels = [0, 1, 1, 0, 1, 1]
    rows, whole = Rows(labels, kind=kind), Rows(labels)
    one, other = (trainer(tmp_path, settings=BATCH, train_dataset=given) for given in (rows, whole))
    one.train(), other.train()
    for a, b in zip(one.classifier.parameters(), other.classifier.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.evaluate(rows)["eval_loss"] == other.evaluate(whole)["eval_loss"]
    assert evaluate_classifier(one, rows, [2, 4, 0, 0]) == evaluate_classifier(other, whole, [2, 4, 0, 0])


def test_labels_below_0_are_refused_with_their_image(tmp_path):
    message = "labels must be 0 or more, got -1 of image 1"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, train_dataset=Rows([0, -1, 2]))
    with pytest.raises(ValueError, match=message):
        EpochSampler(np.array([0, -1, 2]), seed=0)


def test_images_that_are_not_finite_are_named(tmp_path):
    rows = Rows([0, 1, 2, 3, 0, 1, 2, 3])
    rows.images[2, 0, 0, 0] = float("nan")
    one = trainer(tmp_path, settings=BATCH, train_dataset=rows)
    position = list(one._get_train_sampler()).index(2)
    with pytest.raises(
        FloatingPointError, match=rf"Images of the batch .* not finite \(rows \[{position}\]\)"
    ) as error:
        one.train()
    assert "learning rate, or" not in str(error.value)


def test_a_class_that_only_the_measured_set_has_and_no_image_is_no_obstacle(tmp_path):
    measured = table({"label": [0, 1, 1, 2]}, {"label": list("abcde")})
    found = evaluate_classifier(trainer(tmp_path), measured, [60, 30, 12, 6])
    assert found["images"] == 4
