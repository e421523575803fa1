"""Neural collapse for long-tailed image classification with timm and Hugging Face.

Importing this makes our architectures known to timm: CIFAR ResNets, RIDE, BBN, and cosine and ETF heads. Everything
else is imported when it is first used, since `transformers.Trainer`, `datasets` and `evaluate` take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import nc_hf.models.bilateral
import nc_hf.models.cifar_resnet
import nc_hf.models.experts
import nc_hf.models.experts_imagenet
import nc_hf.models.headed  # noqa: F401

__version__ = "0.1.0"

_HOMES = {
    "CollapseCallback": "collapse_callback",
    "EpochSampler": "sampling",
    "ImageTransform": "data.augment",
    "LongTailAccuracy": "metrics",
    "NCTrainer": "trainer",
    "NCTrainingArguments": "training_args",
    "NeuralCollapseLoss": "losses.collapse",
    "RetrainingArguments": "retraining_args",
    "SaveOnSignal": "interruption",
    "build_release": "release",
    "between_class_loss": "losses.collapse",
    "class_counts": "data.long_tail",
    "class_weights": "rebalancing",
    "compute_metrics_for": "metrics",
    "evaluate_classifier": "evaluation",
    "image_settings": "models.image_settings",
    "load_classifier": "models.classifier",
    "load_images": "data.images",
    "load_pretrained": "hub",
    "load_splits": "data.splits",
    "long_tailed_counts": "data.long_tail",
    "make_long_tailed": "data.long_tail",
    "push_folder": "publishing",
    "retrain_classifier": "retraining",
    "save_pretrained": "hub",
    "train_validation_split": "data.long_tail",
    "within_class_loss": "losses.collapse",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """A public name, imported from its home at its first use."""
    if name in _HOMES:
        return getattr(import_module(f"nc_hf.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'nc_hf' has no attribute {name!r}")
