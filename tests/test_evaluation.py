"""Measuring a trained classifier: what it refuses, since every reported number comes from there."""

from __future__ import annotations

import numpy as np
import pytest
from small_images import SmallImages, network_without_batch_statistics
from small_runs import arguments
from transformers import EvalPrediction

from nc_hf import NCTrainer, compute_metrics_for
from nc_hf.evaluation import evaluate_classifier


@pytest.fixture
def trainer(tmp_path) -> NCTrainer:
    return NCTrainer(network_without_batch_statistics(), arguments(tmp_path), train_dataset=SmallImages())


def test_accuracies_are_those_of_a_loop_over_images(trainer):
    images = SmallImages(seed=1)
    found = evaluate_classifier(trainer, images, images.class_counts)
    right = [
        trainer.classifier(image[None]).argmax().item() == y
        for image, y in zip(images.images, images.labels, strict=True)
    ]
    assert found["accuracy"] == pytest.approx(sum(right) / len(images)) and found["images"] == len(images)


def test_images_that_are_lost_or_counted_twice_are_noticed(trainer):
    images = SmallImages()
    images.class_counts = images.class_counts + 1
    with pytest.raises(RuntimeError, match="saw 108 images"):
        evaluate_classifier(trainer, images, images.class_counts)


def test_a_data_set_that_does_not_tell_its_counts_is_refused(trainer):
    rows = [{"pixel_values": image, "labels": 0} for image in SmallImages().images[:4]]
    with pytest.raises(ValueError, match="images per class of list are not known. Give it an attribute"):
        evaluate_classifier(trainer, rows, [1, 1, 1, 1])


@pytest.mark.parametrize("wrong", [-100, 4])
def test_labels_that_name_no_class_are_told(trainer, wrong):
    images = SmallImages()
    images.labels[5] = wrong
    with pytest.raises(ValueError, match=rf"references must lie in \[0, 4\).*row 5 has {wrong}"):
        evaluate_classifier(trainer, images, images.class_counts)
    predictions = EvalPrediction(predictions=np.zeros((len(images), 4)), label_ids=images.labels)
    with pytest.raises(ValueError, match=f"row 5 has {wrong}"):
        compute_metrics_for(images.class_counts, test_counts=images.class_counts)(predictions)


def test_an_empty_set_is_told(trainer):
    images = SmallImages((0, 0, 0, 0))
    with pytest.raises(ValueError, match="SmallImages is empty: there is nothing to evaluate"):
        evaluate_classifier(trainer, images, [5, 5, 5, 5])
