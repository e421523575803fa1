"""The two stages of a recipe: load what they work on, train, measure, and save."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from datasets import DatasetDict
from torch import nn
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy

from nc_hf.checkpoints import newest_complete
from nc_hf.collapse_callback import CollapseCallback
from nc_hf.data.images import ImageSet
from nc_hf.data.splits import preset_ratio
from nc_hf.evaluation import evaluate_classifier, geometry_of
from nc_hf.head_trainer import HeadTrainer
from nc_hf.hub import load_heads
from nc_hf.image_sets import image_sets
from nc_hf.interruption import SaveOnSignal
from nc_hf.metrics import compute_metrics_for
from nc_hf.models.classifier import find_head, load_classifier
from nc_hf.models.headed import replace_head
from nc_hf.models.image_settings import image_settings
from nc_hf.models.normalized_heads import check_head_for
from nc_hf.models.routing import evaluate_routing, train_routing
from nc_hf.paper_results import method_name
from nc_hf.preflight import check_trainer
from nc_hf.recipe import Recipe
from nc_hf.release import public_name
from nc_hf.results import environment, write_results
from nc_hf.retraining import check_heads, retrain_classifier
from nc_hf.retraining_args import RetrainingArguments, check_stages
from nc_hf.run_log import RunLog
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments

STAGES = ("stage1", "stage2")


class Loaded(NamedTuple):
    """What the stages of a recipe work on."""

    model: nn.Module
    processor: Any  # of a transformers model, or as load_classifier makes it of a timm one
    images: dict[str, ImageSet]  # by split


def stage_arguments(stage: str, recipe: Recipe, run: Path) -> NCTrainingArguments:
    """The arguments of a stage, built and so checked before any data are read."""
    settings = {
        "output_dir": str(run / "checkpoints" / stage),
        "seed": recipe.seed,
        "logging_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "per_device_eval_batch_size": recipe.evaluation.batch_size,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
    }
    if (given := getattr(recipe, stage)).get("load_best_model_at_end"):
        settings["eval_strategy"] = "epoch"
    settings |= given
    return (NCTrainingArguments if stage == "stage1" else RetrainingArguments)(**settings)


def heads_of(stage: str, args: NCTrainingArguments) -> list[str]:
    """Names of the heads that a stage leaves; the model carries the first."""
    return ["base"] if stage == "stage1" else list(args.heads)


def load_for_stages(recipe: Recipe, stages: dict[str, NCTrainingArguments], splits: DatasetDict) -> Loaded:
    """The classifier with its image processor, and the image set of each split.

    Args:
        recipe: of the run.
        stages: from `stage_arguments`, by name.
        splits: from `read_splits`.

    Raises:
        ValueError: for a stage two that cannot follow this network or stage one, and as the loaders of either.
    """
    spec = recipe.model
    names = splits["train"].features["label"].names
    set_seed(recipe.seed)
    model, processor = load_classifier(
        spec.name,
        len(names),
        names,
        pretrained=spec.pretrained,
        revision=spec.revision,
        image_size=spec.image_size,
        **spec.model_args,
    )
    if spec.head_type != "linear":
        replace_head(model, spec.head_type, **spec.head_settings)
    images = image_sets(recipe, splits, image_settings(model, processor))
    for stage, args in stages.items():
        if args.load_best_model_at_end and "validation" not in images:
            raise ValueError(
                f"`{stage}.load_best_model_at_end` chooses on a validation split, which these data do not have. Set "
                "data.validation_fraction, such as 0.1, or leave it out."
            )
        if args.eval_strategy != IntervalStrategy.NO and "validation" not in images:
            raise ValueError(
                f"`{stage}.eval_strategy` measures on a validation split, which these data do not have. Set "
                "data.validation_fraction, such as 0.1, or leave it out."
            )
    head = find_head(model, head=recipe.model.head)[1]
    if "stage1" in stages and (stage1 := stages["stage1"]).objective != "contrastive":
        check_head_for(stage1.supervised_loss(images["train"].class_counts), head)
    if "stage2" in stages:
        check_heads(head, stages["stage2"])
        check_trainer(stages["stage2"], {"train_dataset": images["train"]})  # what would be met after stage one
        if "stage1" in stages:
            check_stages(*stages.values(), has_validation="validation" in splits)
    return Loaded(model, processor, images)


def check_stage_one(run: Path, results: dict[str, Any]) -> None:
    """Make sure that the network of a stage one that has its results is there for stage two.

    Raises:
        FileNotFoundError: when its folder is gone.
    """
    if "base" in results.get("heads", {}) and not (run / "stage1").is_dir():
        raise FileNotFoundError(
            f"{run / 'stage1'} is not there, the network of stage one that {run / 'results.json'} has results of. "
            "Bring it back, or remove the run's folder to train it again."
        )


def run_stages(
    recipe: Recipe,
    run: Path,
    stages: dict[str, NCTrainingArguments],
    loaded: Loaded,
    results: dict[str, Any],
    state: PartialState,
) -> dict[str, Any]:
    """Train and measure the stages that have no results yet.

    Args:
        recipe: of the run.
        run: its folder.
        stages: from `stage_arguments`, by name.
        loaded: from `load_for_stages`.
        results: what `results.json` holds so far, or the `recipe_digest` alone.
        state: of the processes.

    Returns:
        What `results.json` holds then.
    """
    heads = {stage: heads_of(stage, args) for stage, args in stages.items()}
    if "heads" not in results:
        results = start_results(recipe, loaded.images, results["recipe_digest"], sum(heads.values(), []))
    for stage, args in stages.items():
        if all(name in results["heads"] for name in heads[stage]):
            continue
        trainer, results["training"][stage] = _train_stage(stage, args, recipe, run, loaded)
        _report_stage(stage, trainer, recipe, run, loaded.images, results)
        if state.is_main_process:
            write_results(run / "results.json", results)
        state.wait_for_everyone()
    return results


def start_results(recipe: Recipe, images: dict[str, ImageSet], digest: str, heads: list[str]) -> dict[str, Any]:
    """What results.json says before any stage is done."""
    data, train = recipe.data, images["train"]
    name = data.title or public_name(data.dataset)
    ratio = data.imbalance_ratio or preset_ratio(data.dataset, data.config_name)
    dataset = {"name": name, "imbalance_ratio": ratio, "profile": data.profile}
    dataset |= {"description": train.description, **recipe.evaluation.bounds}
    # Figures on other images than the whole training and test set are not the paper's.
    dataset |= {name: value for name in ("test_split", "validation_fraction") if (value := getattr(data, name))}
    return {
        "recipe_digest": digest,
        "seed": recipe.seed,
        "model": public_name(recipe.model.name),
        "dataset": dataset | {"class_names": train.class_names, "class_counts": train.class_counts.tolist()},
        "skipped_images": {name: split.skipped for name, split in images.items() if split.skipped},
        "methods": {head: method_name(recipe, head) for head in heads},
        "heads": {},
        "geometry": {},
        "training": {},
        **environment(),
    }


def _train_stage(
    stage: str, args: NCTrainingArguments, recipe: Recipe, run: Path, loaded: Loaded
) -> tuple[NCTrainer, dict[str, float]]:
    """Train one stage, resumed where it was interrupted: its trainer, and what results.json says of the training."""
    model, processor, images = loaded
    log = RunLog(run / "log.jsonl", stage)
    shared = {"head": recipe.model.head, "processing_class": processor, "callbacks": [log, SaveOnSignal()]}
    if "validation" in images:
        if "eval_strategy" not in getattr(recipe, stage) and args.eval_strategy == "no":
            args.eval_strategy = IntervalStrategy.EPOCH
        shared |= {"eval_dataset": images["validation"], "compute_metrics": _validation_metrics(recipe, images)}
    folders = [args.output_dir, *(f"{args.output_dir}/{head}" for head in heads_of(stage, args))]
    started, resumed = time.perf_counter(), any([newest_complete(folder) for folder in folders])
    if stage == "stage1":
        resumed = resumed or args.resume_from_checkpoint is not None
        trainer = NCTrainer(model, args, train_dataset=images["train"], **shared)
        if every := recipe.evaluation.geometry_every:
            trainer.add_callback(CollapseCallback(trainer, every))
        trainer.train(resume_from_checkpoint=True)
    else:
        if (run / "stage1").is_dir():
            model, _ = load_classifier(str(run / "stage1"))
        trainer = retrain_classifier(model, images["train"], args, resume_from_checkpoint=True, **shared)
    # Of a run that was cut off, the time of the last call alone would say nothing.
    wall = {} if resumed else {"seconds": time.perf_counter() - started}
    speed = log.speed()
    if resumed:
        speed.pop("train_seconds", None)
    if stage == "stage1" and (branch := args.resume_from_checkpoint):
        wall["branched_at_epoch"] = int(Path(branch).name.rpartition("-")[2]) / trainer.updates_per_epoch
    if args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        wall["best_epoch"] = trainer.state.best_global_step / trainer.updates_per_epoch
    size = trainer.state.train_batch_size or args.per_device_train_batch_size  # as auto_find_batch_size may have it
    batch = size * args.gradient_accumulation_steps * args.world_size
    epochs = args.num_train_epochs if args.max_steps <= 0 else getattr(trainer, "num_epochs", 0)  # 0: nothing trained
    told = {"epochs": float(epochs), "batch": batch, "processes": args.world_size}
    return trainer, wall | speed | told


def _validation_metrics(recipe: Recipe, images: dict[str, ImageSet]) -> Callable:
    """Metrics of the validation split, shown after each epoch."""
    return compute_metrics_for(
        images["train"].class_counts,
        **recipe.evaluation.bounds,
        test_counts=images["validation"].class_counts,
    )


def _report_stage(
    stage: str,
    trainer: NCTrainer | HeadTrainer,
    recipe: Recipe,
    run: Path,
    images: dict[str, ImageSet],
    results: dict[str, Any],
) -> None:
    """Measure a stage's classifier with each of its heads, once on the test split, and save it."""
    train, evaluation = images["train"], recipe.evaluation
    split = "test" if "test" in images else "validation"
    results["split"] = recipe.data.own_name(split)
    heads = {"base": trainer.task.head.state_dict()} if stage == "stage1" else trainer.heads
    with trainer.keeping_features():
        means = {name: trainer.class_means(images[name]) for name in ("train", split)}
        for head in reversed(heads):  # the first one stays in the model
            trainer.task.head.load_state_dict(heads[head])
            results["heads"][head] = evaluate_classifier(
                trainer, images[split], train.class_counts, **evaluation.bounds
            )
            if evaluation.geometry:
                results["geometry"][head] = {name: geometry_of(trainer, images[name], means[name]) for name in means}
    if getattr(trainer.classifier, "routing", None) is not None:  # an expert assignment, which the folder carries
        results["routing"] = _route_experts(trainer, recipe, images[split], train)
    if taus := getattr(trainer, "taus", None):
        results["taus"] = taus
        results["taus_chosen_on"] = "validation" if trainer.args.tau is None and "validation" in images else None
    if stage == "stage1":
        results["geometry_course"] = [log for log in trainer.state.log_history if "nc4_agreement" in log]
    tensors = load_heads(run / "stage1")[1] if stage == "stage2" else {}
    trainer.export(
        str(run / stage),
        class_means=means["train"][0].float(),
        metadata={"stage": stage, "recipe_digest": results["recipe_digest"], "seed": recipe.seed},
        **{name: tensors[name] for name in ("centers",) if name in tensors},
    )


def _route_experts(trainer: NCTrainer, recipe: Recipe, test: ImageSet, train: ImageSet) -> dict[str, Any]:
    """Train the gates that decide how many experts an image takes (RIDE's second stage), and measure them."""
    train_routing(trainer.classifier, train, seed=recipe.seed)
    batches = DataLoader(test, recipe.evaluation.batch_size, collate_fn=test.collate)  # all of them on each process
    return evaluate_routing(trainer.classifier, batches, train.class_counts, **recipe.evaluation.bounds)
