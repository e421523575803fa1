"""Short runs of NCTrainer on small images: arguments, network, and what was logged."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Trainer

from nc_hf.models.classifier import load_classifier
from nc_hf.training_args import NCTrainingArguments


def arguments(folder, **settings) -> NCTrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "num_train_epochs": 4,
        "per_device_train_batch_size": 36,
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "precision": "fp32",
        "within_weight": 0.01,
        "feature_scale": "none",
    }
    return NCTrainingArguments(**defaults | settings)


def network(num_labels: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return load_classifier("resnet20_cifar", num_labels)[0]


def logged(trainer: Trainer, name: str) -> list[float | None]:
    return [record.get(name) for record in trainer.state.log_history if "loss" in record]
