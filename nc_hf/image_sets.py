"""From the section `data` of a recipe to the image sets that a trainer takes."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from datasets import DatasetDict

from nc_hf.data.augment import ImageTransform
from nc_hf.data.images import ImageSet, load_images
from nc_hf.data.splits import load_splits
from nc_hf.metrics.long_tail_accuracy import frequency_groups
from nc_hf.recipe import Recipe

logger = logging.getLogger(__name__)


def read_splits(recipe: Recipe) -> DatasetDict:
    """The splits that the section `data` describes."""
    data = recipe.data
    return load_splits(
        data.dataset,
        data_dir=data.data_dir,
        config_name=data.config_name,
        image_column=data.image_column,
        label_column=data.label_column,
        imbalance_ratio=data.imbalance_ratio,
        profile=data.profile,
        seed=data.seed,
        validation_fraction=data.validation_fraction,
        test_split=data.test_split,
        cache_dir=data.cache_dir,
    )


def image_sets(recipe: Recipe, splits: DatasetDict, settings: dict[str, Any]) -> dict[str, ImageSet]:
    """The splits as image sets for a model.

    Args:
        recipe: of the run.
        splits: from `read_splits`.
        settings: of the model's images, from `image_settings`.
    """
    data, images = recipe.data, {}
    transform = ImageTransform(**settings, augmentation=data.augmentation)
    for name, split in splits.items():
        images[name] = load_images(
            split,
            transform,
            input_path=data.input_path,
            seed=recipe.seed,
            on_bad_image=data.on_bad_image,
            check=name != "train",  # those are not met before the training is done
        )
        logger.info("%s: %s", name, describe_counts(images[name].class_counts))
    groups = frequency_groups(images["train"].class_counts, **recipe.evaluation.bounds)
    logger.info(
        "classes with %s training images", ", ".join(f"{name}: {sum(group)}" for name, group in groups.items())
    )
    return images


def describe_counts(counts: np.ndarray) -> str:
    """Images, classes and their sizes, and the imbalance ratio where there is one, in a few words."""
    present = counts[counts > 0]
    words = f"{counts.sum()} images, {len(counts)} classes of {counts.max()} to {counts.min()}"
    return words if present.min() == present.max() else f"{words}, ratio {present.max() / present.min():.4g}"
