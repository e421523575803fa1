"""From arguments to the task that is trained: what is learned, by which loss, on which kind of network."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import set_seed

from nc_hf.bilateral_task import BilateralTask
from nc_hf.choices import check_choice
from nc_hf.contrastive_task import ContrastiveSettings, ContrastiveTask
from nc_hf.experts_task import ExpertsTask
from nc_hf.losses.collapse import NeuralCollapseLoss
from nc_hf.metrics.angles import best_angle
from nc_hf.models.bilateral import BilateralNetwork
from nc_hf.models.classifier import feature_dim, find_head
from nc_hf.models.classifier import freeze_backbone as freeze
from nc_hf.models.experts import Experts
from nc_hf.models.ghost_batch_norm import set_ghost_batches
from nc_hf.models.normalized_heads import check_head_for
from nc_hf.rebalancing import class_weights
from nc_hf.task import ClassificationTask
from nc_hf.training_args import NCTrainingArguments

logger = logging.getLogger(__name__)


def num_outputs(model: nn.Module | None, head: str | None = None) -> int | None:
    """K of a classifier, or of a task around one; None of none. Arguments and errors as `find_head`."""
    if model is None or isinstance(model, ClassificationTask):
        return None if model is None else model.num_classes
    return find_head(model, head=head)[1].weight.shape[0]


def build_task(
    model: nn.Module,
    args: NCTrainingArguments,
    class_counts: np.ndarray | None = None,
    *,
    head: str | None = None,
    freeze_backbone: bool = False,
) -> ClassificationTask:
    """The task that the arguments describe, around a classifier.

    Args:
        model: an image classifier, of timm or of transformers.
        args: of the run; `args.seed` seeds the centers.
        class_counts: (K,) training images per class, where known.
        head: module path of the last layer, for a model whose head is not found.
        freeze_backbone: train the head alone, which is classification whatever the backbone was trained by.

    Raises:
        ValueError: when the head does not fit the classes, or settings need counts that are not known, or another
            kind of network.
    """
    set_seed(args.seed)
    head_name, head_module = find_head(model, head=head)
    num_classes = head_module.weight.shape[0]
    if class_counts is not None and len(class_counts) != num_classes:
        raise ValueError(
            f"the head {head_name!r} has {num_classes} outputs but the training data have {len(class_counts)} classes."
            f" Load the model with num_labels={len(class_counts)}, give NCTrainer the class_counts of all outputs, or "
            "name another column of labels by its label_column."
        )
    if class_counts is None and (args.class_weighting != "none" or args.within_counts == "train"):
        raise ValueError(
            "`class_weighting` and `within_counts: train` need the number of training images per class, which the "
            "training set does not tell. Pass class_counts=[...] to NCTrainer."
        )
    set_ghost_batches(model, args.ghost_batch_size)
    objective = "classification" if freeze_backbone else args.objective
    if freeze_backbone:
        freeze(model, head_name)
        if args.collapse_enabled:
            logger.warning("the backbone is frozen, so the collapse terms have nothing to move and are left out")
    else:
        _check_network(model, objective)
        backbone = [parameter for name, parameter in model.named_parameters() if not name.startswith(f"{head_name}.")]
        if args.collapse_enabled and not any(parameter.requires_grad for parameter in backbone):
            logger.warning("no weight of the backbone requires a gradient, so the collapse terms have nothing to move")
    settings: dict[str, Any] = {}
    if args.collapse_enabled and not freeze_backbone:
        settings["collapse"] = _collapse_loss(model, num_classes, feature_dim(head_module), args, class_counts)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    own = _own_settings(objective, args.objective_settings)
    if objective == "contrastive":
        settings["settings"] = ContrastiveSettings(seed=args.seed, **own)
        return ContrastiveTask(model, head_name, num_classes, feature_dim=feature_dim(head_module), **settings)
    settings |= {"supervised": args.supervised_loss(class_counts), "mixup_rule": args.mixup_rule}
    check_head_for(settings["supervised"], head_module)
    if args.class_weighting != "none":
        settings["class_weights"] = class_weights(class_counts, args.class_weighting, beta=args.effective_number_beta)
    if args.within_counts == "train":
        # A sum over the images of all processes, whose gradients are then averaged.
        settings["within_counts"] = class_counts / args.world_size
    if objective == "experts":
        settings |= {"class_counts": class_counts, **own}
        return ExpertsTask(model, head_name, num_classes, **settings)
    if objective == "bilateral":
        return BilateralTask(model, head_name, num_classes, **settings)
    moving = getattr(args, "backbone_statistics", None) == "shifted"
    settings |= {"freeze_backbone": freeze_backbone, "moving_statistics": moving}
    return ClassificationTask(model, head_name, num_classes, **settings)


CONTRASTIVE_SETTINGS = {
    "fcl": ("method", "temperature", "dimension"),
    "kcl": ("method", "temperature", "dimension", "positives", "queue", "momentum"),
    "tsc": tuple(field.name for field in dataclasses.fields(ContrastiveSettings) if field.name != "seed"),
}
EXPERTS_SETTINGS = ("diversity_factor", "reweight_factor", "temperature")


def _own_settings(objective: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of an objective, none of them unknown or without effect."""
    known = EXPERTS_SETTINGS
    if objective == "contrastive":
        if "method" not in given:
            raise ValueError(
                "`objective: contrastive` needs its method: set objective_settings: {method: fcl, kcl or tsc}."
            )
        check_choice("method", given["method"], CONTRASTIVE_SETTINGS)
        objective, known = given["method"], CONTRASTIVE_SETTINGS[given["method"]]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(
            f"`objective_settings` of {objective} are {', '.join(known)}; it has no {', '.join(unknown)}."
        )
    return given


def _check_network(model: nn.Module, objective: str) -> None:
    """Networks of several branches learn by an objective of their own."""
    wanted = {Experts: "experts", BilateralNetwork: "bilateral"}
    own = next((name for kind, name in wanted.items() if isinstance(model, kind)), None)
    if own is not None and objective != own:
        raise ValueError(f"{type(model).__name__} learns by `objective: {own}`, got {objective!r}.")
    if own is None and objective in wanted.values():
        network = {"experts": "resnet32_ride_cifar", "bilateral": "resnet32_bbn_cifar"}[objective]
        raise ValueError(f"`objective: {objective}` needs a network such as {network}, got {type(model).__name__}.")


def _collapse_loss(
    model: nn.Module, num_classes: int, width: int, args: NCTrainingArguments, class_counts: np.ndarray | None
) -> NeuralCollapseLoss:
    if args.objective == "bilateral":
        width //= 2  # the features of one branch
    num_experts = model.num_experts if args.objective == "experts" else 1
    _say_what_terms_can_do(num_classes, width // num_experts, args)
    return NeuralCollapseLoss(
        num_classes,
        width,
        args.within_weight,
        args.between_weight,
        args.centers,
        between_objective=args.between_objective,
        within_reduction=args.within_reduction,
        feature_scale=args.feature_scale,
        momentum=args.centers_momentum,
        class_counts=class_counts,
        num_experts=num_experts,
    )


def _say_what_terms_can_do(num_classes: int, width: int, args: NCTrainingArguments) -> None:
    if num_classes == 2:
        logger.info("with two classes L_B is constant: their centered centers always lie opposite each other")
    elif num_classes > width + 1:
        angle, _ = best_angle(num_classes, width)
        logger.info("%d classes on %d features: class means get at most %.1f degrees apart", num_classes, width, angle)
    if args.objective == "contrastive" and args.start_epoch == 0:
        logger.warning(
            "beside the collapse terms a contrastive loss does not begin to fall. Set `start_epoch`, such as to 0.5, "
            "half of the run."
        )
    batch = args.per_device_train_batch_size * args.world_size
    if args.centers == "batch" and batch < num_classes:
        logger.warning(
            "`centers: batch` sees the classes of %d images alone, of %d classes; `ema` sees all.", batch, num_classes
        )
