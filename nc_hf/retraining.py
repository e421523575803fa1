"""Stage two: new heads on a frozen backbone, trained (cRT, LWS) or computed from its features."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_utils import HubStrategy

from nc_hf.cached_features import train_on_cached_features
from nc_hf.head_trainer import HeadTrainer
from nc_hf.heads import LinearHead, choose, least_squares, logit_adjusted, nearest_class_mean, tau_normalized
from nc_hf.models.classifier import find_head, reset_head
from nc_hf.models.headed import replace_head
from nc_hf.models.normalized_heads import REPLACEABLE_HEADS
from nc_hf.models.saved_heads import remember_stage_one, stage_one_state
from nc_hf.retraining_args import TRAINED_HEADS, RetrainingArguments
from nc_hf.trainer import uncompiled

logger = logging.getLogger(__name__)

LINEAR = nn.Linear | nn.Conv2d
IDENTITY = ("_model_args", "pretrained_cfg", "default_cfg")  # what `replace_head` sets on a timm network
TAUS = [round(0.1 * step, 1) for step in range(21)]  # the grid of Kang et al. 2020


@torch.no_grad()
def scale_to_norm(layer: nn.Module, norm: Tensor) -> None:
    """Multiply weight and bias of a linear layer by the factor that gives the weight this Frobenius norm."""
    factor = norm / layer.weight.norm().clamp(min=1e-12)
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            parameter.mul_(factor)


def retrain_classifier(
    model: nn.Module,
    train_dataset: Dataset,
    args: RetrainingArguments,
    *,
    head: str | None = None,
    resume_from_checkpoint: str | bool | None = None,
    **kwargs: Any,
) -> HeadTrainer:
    """Give a trained classifier the new heads of `args.heads`; the backbone stays as it is, bit for bit.

    They are made from stage one's head, also where an earlier stage two has put another one in its place. Afterwards
    the parameters that were trained before are open to training again. Where it is interrupted or fails, the model is
    as it was before.

    The backbone is in eval mode throughout, so the running statistics of its norms do not move, unless
    `backbone_statistics` is `"shifted"`. With `features="images"` every draw is augmented afresh; `"cached"` computes
    features once over several augmented views. Computed heads look at the training images without augmentation.

    Args:
        model: a trained classifier of timm or transformers, changed in place; its head becomes the first of `heads`.
        train_dataset: as for `NCTrainer`.
        args: `RetrainingArguments`.
        head: module path of the last layer, for a model whose head is not found.
        resume_from_checkpoint: as for `NCTrainer.train`.
        **kwargs: further arguments of `NCTrainer`; on `eval_dataset`, if given, a free tau is chosen.

    Returns:
        A trainer that holds the model: `.classifier`, `.evaluate()`, `.save_model(folder)`, which keeps every head by
        name, stage one's linear head as `"base"`; `.heads`, the state dict of each new head by name; and `.taus`, the
        tau of each head that has one.

    Raises:
        ValueError: as `NCTrainer` and `check_heads`; for several evaluation sets where one must choose a tau, and for
            `optimizers` of a head whose copy is trained.
        RuntimeError: should the backbone have changed.
    """
    model = uncompiled(model)
    head_name, layer = find_head(model, head=head)
    check_heads(layer, args)
    _check_given(args, kwargs)
    kwargs |= {"train_dataset": train_dataset, "head": head_name}
    with _all_or_nothing(model, head_name) as before:
        trainer = _retrain(model, args, resume_from_checkpoint, kwargs)
        changed = [name for name, now in _backbone(model, head_name, args) if not torch.equal(before[name], now.cpu())]
        if changed:
            raise RuntimeError(f"the frozen backbone changed in stage two: {', '.join(changed[:5])}.")
    return trainer


def _retrain(
    model: nn.Module, args: RetrainingArguments, resume_from_checkpoint: str | bool | None, kwargs: dict[str, Any]
) -> HeadTrainer:
    layer = model.get_submodule(kwargs["head"])
    stage_one = stage_one_state(layer) if isinstance(layer, LINEAR) else None
    if not isinstance(layer, LINEAR):
        layer = replace_head(model, "linear")
    base = stage_one or {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    heads: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in args.heads if name in TRAINED_HEADS]:
        layer.load_state_dict(base)
        trainer = _train_head(model, layer, name, args, resume_from_checkpoint, kwargs)
        if args.match_base_norm:
            scale_to_norm(layer, base["weight"].norm())
        heads[name] = {key: tensor.detach().clone() for key, tensor in layer.state_dict().items()}
    layer.load_state_dict(base)
    if computed := [name for name in args.heads if name not in TRAINED_HEADS]:
        if not heads:
            trainer = HeadTrainer(model, args, **kwargs)
        with trainer.keeping_features():
            found = _computed_heads(trainer, layer, computed, args)
        heads |= {name: _state_of(linear, layer) for name, linear in found.items()}
    trainer.heads = {name: heads[name] for name in args.heads}
    measured, trainer.active_head = trainer.active_head, args.heads[0]
    if measured != trainer.active_head or args.match_base_norm:
        trainer.forget_evaluations()
    trainer.args.output_dir, trainer.args.hub_strategy = args.output_dir, args.hub_strategy
    layer.load_state_dict(trainer.heads[trainer.active_head])
    remember_stage_one(layer, stage_one)
    is_kept = stage_one is not None and args.backbone_statistics != "shifted"  # it is of use on the same features
    trainer.other_heads = ({"base": stage_one} if is_kept else {}) | trainer.heads
    return trainer


def check_heads(layer: nn.Module, args: RetrainingArguments) -> None:
    """Refuse new heads that cannot follow a trained one, which is known before anything is trained.

    Args:
        layer: the head of stage one. A cosine or ETF head can be replaced by a linear one, not gone on from.
        args: of stage two.

    Raises:
        ValueError: for heads that need a linear one, a bias that the head does not have, or stage one's head where
            only a later one is left; and for experts.
    """
    reused = args.goes_on_from_stage_one
    if isinstance(layer, LINEAR):
        biased = [name for name in args.heads if name in ("ncm", "least_squares", "logit_adjusted")]
        if biased and layer.bias is None:
            raise ValueError(
                f"`heads: {biased}` need a bias, which the model's last layer does not have. Leave them out."
            )
        if reused and stage_one_state(layer) is None:
            raise ValueError(
                f"`{reused[0]}` goes on from stage one's head, in whose place the model has one of an earlier stage "
                "two. Load stage one's folder, or use crt with head_init: new, ncm or least_squares."
            )
        return
    if not isinstance(layer, REPLACEABLE_HEADS):
        raise ValueError(
            f"stage two cannot replace {type(layer).__name__} by a linear head. Leave stage two out (stage2: null)."
        )
    if reused:
        raise ValueError(
            f"`{reused[0]}` goes on from a linear head, and stage one's is {type(layer).__name__}. "
            "Use crt with head_init: new, ncm or least_squares."
        )


def _check_given(args: RetrainingArguments, given: dict[str, Any]) -> None:
    chooses = args.tau is None and any(name in args.heads for name in ("tau_norm", "logit_adjusted"))
    if chooses and isinstance(sets := given.get("eval_dataset"), dict):
        raise ValueError(f"tau is chosen on one evaluation set, got {', '.join(sets)}. Give one of them, or set tau.")
    if args.features == "cached" and any(given.get("optimizers") or ()):
        raise ValueError(
            "`optimizers` cannot train on `features: cached`, where a copy of the head is trained. Give "
            "optimizer_cls_and_kwargs, or set features: images."
        )
    kinds = [one if isinstance(one, type) else type(one) for one in given.get("callbacks") or ()]
    if args.features == "cached" and any(issubclass(kind, EarlyStoppingCallback) for kind in kinds):
        raise ValueError(
            "EarlyStoppingCallback stops by evaluations on the way, which `features: cached` has none of. Leave it "
            "out, or set features: images."
        )
    if any(given.get("optimizers") or ()) and ("lws" in args.heads or args.max_norm_threshold is not None):
        raise ValueError(
            "`optimizers` know neither the factors of `heads: lws` nor the rows of `max_norm_threshold`, which would "
            "not act. Give optimizer_cls_and_kwargs."
        )


@contextmanager
def _all_or_nothing(model: nn.Module, head_name: str) -> Iterator[dict[str, Tensor]]:
    """Gives the state of the model, which it has again, with the head of now, where anything fails or interrupts.

    Either way the parameters that take part in training are then those of before.
    """
    layer = model.get_submodule(head_name)
    identity = {name: getattr(model, name) for name in IDENTITY if hasattr(model, name)}
    before = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield before
    except BaseException:
        model.set_submodule(head_name, layer)
        for name, value in identity.items():
            setattr(model, name, value)
        model.load_state_dict(before)
        raise
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _backbone(model: nn.Module, head_name: str, args: RetrainingArguments) -> Iterator[tuple[str, Tensor]]:
    """What stage two must leave as it is, with names."""
    may_move = ("running_mean", "running_var", "num_batches_tracked") if args.backbone_statistics == "shifted" else ()
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{head_name}.") and not name.endswith(may_move):
            yield name, tensor.detach()


def _train_head(
    model: nn.Module,
    layer: nn.Module,
    name: str,
    args: RetrainingArguments,
    resume_from_checkpoint: str | bool | None,
    kwargs: dict[str, Any],
) -> HeadTrainer:
    if len(args.heads) > 1:
        args = copy.copy(args)
        args.hub_model_id = args.hub_model_id or Path(args.output_dir).absolute().name
        args.hub_strategy = HubStrategy.END  # the model is pushed when it has all of its heads
        args.output_dir = str(Path(args.output_dir) / name)
    layer.requires_grad_(True)
    if name == "crt" and args.head_init == "new":
        set_seed(args.seed)
        reset_head(model, kwargs["head"])
    learns_scales = name == "lws"
    images_only = args.features == "images"
    trainer = HeadTrainer(model, args, learns_scales=learns_scales and images_only, **kwargs)
    trainer.active_head = name
    logger.info("stage two trains the head %s (%s) alone", name, kwargs["head"])
    if images_only:
        try:
            trainer.train(resume_from_checkpoint=resume_from_checkpoint)
            trainer.finish_head()
        finally:
            trainer.drop_factors()
    else:
        optimizer = kwargs.get("optimizer_cls_and_kwargs")
        make = partial(HeadTrainer, learns_scales=learns_scales, optimizer_cls_and_kwargs=optimizer)
        train_on_cached_features(trainer, make, layer, args, resume_from_checkpoint)
    return trainer


def _computed_heads(
    trainer: HeadTrainer, layer: nn.Module, names: list[str], args: RetrainingArguments
) -> dict[str, LinearHead]:
    """Heads in closed form from class means, class counts and stage one's head, in float64."""
    dataset, validation = trainer.train_dataset, trainer.eval_dataset
    means, counts = trainer.class_means(dataset)
    means, counts = means.cpu(), counts.cpu()
    weight = layer.weight.detach().flatten(1).double().cpu()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double().cpu()
    base = LinearHead(weight, bias)
    prior = counts if trainer.class_counts is None else trainer.class_counts
    by_tau = {
        "tau_norm": lambda tau: tau_normalized(weight, tau),
        "logit_adjusted": lambda tau: logit_adjusted(base, prior, tau),
    }
    heads = {}
    for name in names:
        if name == "ncm":
            heads[name] = nearest_class_mean(means, counts)
        elif name == "least_squares":
            batches = ((features.cpu(), labels.cpu()) for features, _, labels in trainer.iterate_features(dataset))
            heads[name] = least_squares(batches, means, counts, ridge=1e-6)
        elif args.tau is None and validation is not None:
            parts = [(features.cpu(), labels.cpu()) for features, _, labels in trainer.iterate_features(validation)]
            features, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            trainer.taus[name], heads[name] = choose(TAUS, by_tau[name], features, labels, len(weight))
            logger.info("%s: tau %s chosen on %d validation images", name, trainer.taus[name], len(labels))
        else:
            trainer.taus[name] = 1.0 if args.tau is None else args.tau
            heads[name] = by_tau[name](trainer.taus[name])
    return heads


def _state_of(linear: LinearHead, layer: nn.Module) -> dict[str, Tensor]:
    """A computed head in the form of the model's layer."""
    state = {"weight": linear.weight.to(layer.weight).view_as(layer.weight)}
    if layer.bias is not None:
        state["bias"] = linear.bias.to(layer.bias)
    return state
