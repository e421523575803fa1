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
from transformers import set_seed

from nc_hf.cached_features import train_on_cached_features
from nc_hf.heads import LinearHead, choose, least_squares, logit_adjusted, nearest_class_mean, tau_normalized
from nc_hf.models.classifier import find_head, reset_head
from nc_hf.models.headed import replace_head
from nc_hf.models.normalized_heads import REPLACEABLE_HEADS
from nc_hf.models.saved_heads import remember_stage_one, stage_one_state
from nc_hf.retraining_args import TRAINED_HEADS, RetrainingArguments
from nc_hf.schedule import move_to_own_group
from nc_hf.trainer import NCTrainer

logger = logging.getLogger(__name__)

LINEAR = nn.Linear | nn.Conv2d
TAUS = [round(0.1 * step, 1) for step in range(21)]  # the grid of Kang et al. 2020


class HeadTrainer(NCTrainer):
    """An `NCTrainer` of a head alone: what is special about its parameters.

    With `learns_scales` each class's logit gets a learned factor (LWS), and the weights learn at a share of the
    learning rate; with `max_norm_threshold` rows are projected after each update (Alshammari et al. 2022).
    """

    def __init__(
        self, model: nn.Module, args: RetrainingArguments, *, learns_scales: bool = False, **kwargs: Any
    ) -> None:
        self.heads: dict[str, dict[str, Tensor]] = {}  # by name, once `retrain_classifier` is done
        self.taus: dict[str, float] = {}
        self._hook, (_, layer) = None, find_head(model, head=kwargs.get("head"))
        self._radius = None
        if args.max_norm_threshold is not None:  # not with the optimizer: a resumed run has other weights by then
            self._radius = max_norm_radius(layer.weight.detach(), args.max_norm_threshold)
        if learns_scales:
            layer.scale = nn.Parameter(torch.ones(len(layer.weight), device=layer.weight.device))
            self._hook = layer.register_forward_hook(_multiply_by_scale)
            layer.weight.requires_grad_(args.lws_weight_factor > 0)
            if layer.bias is not None:
                layer.bias.requires_grad_(args.lws_weight_factor > 0)
        super().__init__(model, args, freeze_backbone=True, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in `NCTrainer`, with the weights of LWS in groups of their own, and MaxNorm after each step."""
        fresh, layer = self.optimizer is None, self.task.head
        optimizer = super().create_optimizer(model)
        factor = self.args.lws_weight_factor
        if fresh and self._hook is not None and factor > 0:
            for parameter in (p for p in (layer.weight, layer.bias) if p is not None):
                settings = {"lr": factor * self.args.learning_rate, "weight_decay": self.args.weight_decay}
                move_to_own_group(optimizer, parameter, **settings)
        if fresh and self._radius is not None:
            optimizer.register_step_post_hook(lambda *_: project_rows(layer.weight, self._radius))
        return optimizer

    def finish_head(self) -> None:
        """Fold the learned factors into weight and bias, so that the head is a plain one again."""
        if self._hook is None:
            return
        layer = self.task.head
        self._hook.remove()
        with torch.no_grad():
            layer.weight.mul_(layer.scale.view(-1, *[1] * (layer.weight.ndim - 1)))
            if layer.bias is not None:
                layer.bias.mul_(layer.scale)
        del layer.scale


def _multiply_by_scale(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * layer.scale.view(-1, *[1] * (output.ndim - 2))


def max_norm_radius(weight: Tensor, threshold: float) -> float:
    """Smallest norm of the rows of `weight` (K, P), plus `threshold` times their range (Alshammari et al. 2022)."""
    norms = weight.flatten(1).norm(dim=1)
    return (norms.min() + threshold * (norms.max() - norms.min())).item()


@torch.no_grad()
def project_rows(weight: Tensor, radius: float) -> None:
    """Shorten the rows of `weight` (K, P) whose norm is above `radius` to that norm, in place."""
    rows = weight.flatten(1)
    shrink = (radius / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    weight.copy_((rows * shrink).view_as(weight))


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
    the parameters that were trained before are open to training again.

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
    head_name, layer = find_head(model, head=head)
    check_heads(layer, args)
    _check_given(args, kwargs)
    stage_one = stage_one_state(layer) if isinstance(layer, LINEAR) else None
    if not isinstance(layer, LINEAR):
        layer = replace_head(model, "linear")
    base = stage_one or {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    frozen = {name: tensor.clone() for name, tensor in _backbone(model, head_name, args).items()}
    kwargs |= {"train_dataset": train_dataset, "head": head_name}
    heads: dict[str, dict[str, Tensor]] = {}
    with _thawed_again(model):
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
    trainer.active_head = args.heads[0]
    layer.load_state_dict(trainer.heads[trainer.active_head])
    remember_stage_one(layer, stage_one)
    is_kept = stage_one is not None and args.backbone_statistics != "shifted"  # it is of use on the same features
    trainer.other_heads = ({"base": stage_one} if is_kept else {}) | trainer.heads
    changed = [name for name, now in _backbone(model, head_name, args).items() if not torch.equal(frozen[name], now)]
    if changed:
        raise RuntimeError(f"the frozen backbone changed in stage two: {', '.join(changed[:5])}.")
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


@contextmanager
def _thawed_again(model: nn.Module) -> Iterator[None]:
    """Afterwards the parameters that take part in training are those of before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _backbone(model: nn.Module, head_name: str, args: RetrainingArguments) -> dict[str, Tensor]:
    """What stage two must leave as it is."""
    may_move = ("running_mean", "running_var", "num_batches_tracked") if args.backbone_statistics == "shifted" else ()
    return {
        name: tensor.detach().cpu()
        for name, tensor in model.state_dict().items()
        if not name.startswith(f"{head_name}.") and not name.endswith(may_move)
    }


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
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        trainer.finish_head()
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
