"""Train with the collapse terms, re-train the head, and report: one command from a recipe to results.json.

    accelerate launch recipes/train.py                                         # digits-LT, a minute on a laptop
    accelerate launch recipes/train.py recipes/cifar10_lt/nc_drw_crt.yaml --data.data_dir <folder>
    accelerate launch --config_file recipes/accelerate/cpu_2.yaml recipes/train.py --stage1.expected_processes 2

Any setting of a recipe can be overridden by `--section.key value`; `--help` lists them. The same command again resumes
a run that was interrupted, and shows the table of one that is done. `--stage1.resume_from_checkpoint
<run>/checkpoints/stage1/checkpoint-<step>` goes on from another run, where the two recipes do the same until there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Python puts this folder first, where evaluate.py would stand in for the library `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

STAGES = ("stage1", "stage2")


def main(arguments: list[str]) -> None:
    """Run the recipe named by the first argument with the overrides that follow it."""
    from nc_hf.processes import start_processes
    from nc_hf.recipe import dump_recipe, load_recipe, recipe_digest

    if {"-h", "--help"} & set(arguments):
        from nc_hf.recipe_help import recipe_help

        return print(f"{__doc__}\n{recipe_help()}")
    default = str(HERE / "digits_lt" / "nc_drw_crt.yaml")
    path = arguments.pop(0) if arguments and not arguments[0].startswith("--") else default
    with usage_errors():
        recipe = load_recipe(path, arguments)
    state = start_processes((recipe.stage1 or recipe.stage2).get("expected_processes"))

    from nc_hf.branching import check_branch
    from nc_hf.image_sets import read_splits
    from nc_hf.models.saved_folder import weights_checksum
    from nc_hf.publishing import PushError, check_access
    from nc_hf.results import read_results, results_table

    if recipe.hub.repo_id and state.is_main_process:
        try:
            recipe.hub.repo_id = check_access(recipe.hub.repo_id)
        except PushError as error:
            raise SystemExit(str(error)) from None

    run = Path(recipe.output_dir) / (recipe.name or "-".join(Path(path).with_suffix("").parts[-2:]))
    with usage_errors():
        stages = {stage: stage_arguments(stage, recipe, run) for stage in STAGES if getattr(recipe, stage) is not None}
    for stage, args in stages.items():
        getattr(recipe, stage)["precision"] = args.precision  # what `auto` means on this machine
    results, started = read_results(run / "results.json"), is_started(run)
    branch = (recipe.stage1 or {}).get("resume_from_checkpoint")
    with usage_errors():
        if branch and not (results or started):  # later the run goes on from its own, and the other one may be gone
            check_branch(recipe, branch)
        splits = read_splits(recipe)
    digest = recipe_digest(recipe, splits["train"].info.description, weights_checksum(recipe.model.name))
    known = results.get("recipe_digest") or ((run / "digest").read_text() if started else None)
    if known not in (None, digest):
        raise SystemExit(
            f"{run} holds a run of another recipe or other data (digest {known}, this one is {digest}"
            f"{differences_of(run, recipe)}). Choose another --name or --output_dir, or remove that folder."
        )
    if state.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").write_text(dump_recipe(recipe))
        (run / "digest").write_text(digest)
    heads = {stage: heads_of(stage, args) for stage, args in stages.items()}
    if any(name not in results.get("heads", {}) for names in heads.values() for name in names):
        results = run_stages(recipe, run, stages, splits, results or {"recipe_digest": digest}, state)
    failed = None
    if state.is_main_process:
        print(f"\n{run / 'results.json'}\n{results_table(results)}")
        failed = release(recipe, run)
    state.destroy_process_group()
    if failed:
        raise SystemExit(failed)


@contextmanager
def usage_errors() -> Iterator[None]:
    """What is wrong with settings, data or model is said in a sentence, without a traceback."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None


def differences_of(run: Path, recipe: Any) -> str:
    """In which settings a recipe differs from that of a run's folder, where that can be told."""
    from nc_hf.recipe import differences, load_recipe

    path = run / "recipe.yaml"
    found = differences(load_recipe(path), recipe) if path.is_file() else []
    return "".join(f"; {line}" for line in found)


def run_stages(
    recipe: Any, run: Path, stages: dict[str, Any], splits: Any, results: dict[str, Any], state: Any
) -> dict[str, Any]:
    """Train and measure the stages that have no results yet; what can be refused is refused before."""
    from nc_hf.models.classifier import find_head
    from nc_hf.results import write_results
    from nc_hf.retraining import check_heads
    from nc_hf.retraining_args import check_stages

    with usage_errors():
        model, processor, images = load_model_and_images(recipe, splits)
        if "stage2" in stages:
            check_heads(find_head(model, head=recipe.model.head)[1], stages["stage2"])
            if "stage1" in stages:
                check_stages(*stages.values(), has_validation="validation" in splits)
    heads = {stage: heads_of(stage, args) for stage, args in stages.items()}
    if "heads" not in results:
        results = start_results(recipe, images, results["recipe_digest"], sum(heads.values(), []))
    for stage, args in stages.items():
        if all(name in results["heads"] for name in heads[stage]):
            continue
        trainer, results["training"][stage] = train_stage(stage, args, recipe, run, images, model, processor)
        report_stage(stage, trainer, recipe, run, images, results)
        if state.is_main_process:
            write_results(run / "results.json", results)
        state.wait_for_everyone()
    return results


def is_started(run: Path) -> bool:
    """Whether a run's folder has checkpoints to go on from; `digest` is then of the recipe that made them."""
    from nc_hf.checkpoints import is_complete

    found = (run / "checkpoints").glob("**/checkpoint-*")
    return (run / "digest").is_file() and any(map(is_complete, found))


def release(recipe: Any, run: Path) -> str | None:
    """Gather the model with its card in one folder, and push it where the recipe says so: the reason if that fails."""
    from nc_hf.publishing import PushError, push_folder
    from nc_hf.release import build_release

    hub = recipe.hub
    folder = build_release(run, repo_id=hub.repo_id)
    print(f"\nmodel and card: {folder}")
    if hub.repo_id:
        try:
            url = push_folder(folder, hub.repo_id, private=hub.private, revision=hub.revision, create_pr=hub.create_pr)
            print(f"pushed: {url}")
        except PushError as error:
            return str(error)
    return None


def load_model_and_images(recipe: Any, splits: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The classifier with its image processor, and the image set of each split."""
    from transformers import set_seed

    from nc_hf.image_sets import image_sets
    from nc_hf.models.classifier import load_classifier
    from nc_hf.models.headed import replace_head
    from nc_hf.models.image_settings import image_settings

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
    return model, processor, image_sets(recipe, splits, image_settings(model, processor))


def heads_of(stage: str, args: Any) -> list[str]:
    """Names of the heads that a stage leaves; the model carries the first."""
    return ["base"] if stage == "stage1" else list(args.heads)


def start_results(recipe: Any, images: dict[str, Any], digest: str, heads: list[str]) -> dict[str, Any]:
    """What results.json says before any stage is done."""
    from nc_hf.paper_results import method_name
    from nc_hf.release import public_name
    from nc_hf.results import environment

    data, train = recipe.data, images["train"]
    name = data.title or public_name(data.dataset)
    dataset = {"name": name, "imbalance_ratio": data.imbalance_ratio, "profile": data.profile}
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


def stage_arguments(stage: str, recipe: Any, run: Path) -> Any:
    """The arguments of a stage, built and so checked before any data are read."""
    from nc_hf.retraining_args import RetrainingArguments
    from nc_hf.training_args import NCTrainingArguments

    settings = {
        "output_dir": str(run / "checkpoints" / stage),
        "seed": recipe.seed,
        "logging_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "per_device_eval_batch_size": recipe.evaluation.batch_size,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
    } | getattr(recipe, stage)
    return (NCTrainingArguments if stage == "stage1" else RetrainingArguments)(**settings)


def train_stage(
    stage: str, args: Any, recipe: Any, run: Path, images: dict[str, Any], model: Any, processor: Any
) -> tuple[Any, dict[str, float]]:
    """Train one stage, resumed where it was interrupted: its trainer, and what results.json says of the training."""
    from transformers.trainer_utils import IntervalStrategy

    from nc_hf.checkpoints import newest_complete
    from nc_hf.collapse_callback import CollapseCallback
    from nc_hf.interruption import SaveOnSignal
    from nc_hf.models.classifier import load_classifier
    from nc_hf.retraining import retrain_classifier
    from nc_hf.run_log import RunLog
    from nc_hf.trainer import NCTrainer

    log = RunLog(run / "log.jsonl", stage)
    shared = {"head": recipe.model.head, "processing_class": processor, "callbacks": [log, SaveOnSignal()]}
    if "validation" in images:
        if args.eval_strategy == "no":
            args.eval_strategy = IntervalStrategy.EPOCH
        shared |= {"eval_dataset": images["validation"], "compute_metrics": validation_metrics(recipe, images)}
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
    return trainer, wall | speed | {"batch": batch, "processes": args.world_size}


def validation_metrics(recipe: Any, images: dict[str, Any]) -> Any:
    """Metrics of the validation split, shown after each epoch."""
    from nc_hf.metrics import compute_metrics_for

    return compute_metrics_for(
        images["train"].class_counts,
        **recipe.evaluation.bounds,
        test_counts=images["validation"].class_counts,
    )


def report_stage(
    stage: str, trainer: Any, recipe: Any, run: Path, images: dict[str, Any], results: dict[str, Any]
) -> None:
    """Measure a stage's classifier with each of its heads, once on the test split, and save it."""
    from nc_hf.evaluation import evaluate_classifier, geometry_of
    from nc_hf.hub import load_heads

    train, evaluation = images["train"], recipe.evaluation
    split = "test" if "test" in images else "validation"
    results["split"] = recipe.data.test_split or split if split == "test" else split
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
        results["routing"] = route_experts(trainer, recipe, images[split], train)
    if stage == "stage1":
        results["geometry_course"] = [log for log in trainer.state.log_history if "nc4_agreement" in log]
    tensors = load_heads(run / "stage1")[1] if stage == "stage2" else {}
    trainer.export(
        str(run / stage),
        class_means=means["train"][0].float(),
        metadata={"stage": stage, "recipe_digest": results["recipe_digest"], "seed": recipe.seed},
        **{name: tensors[name] for name in ("centers",) if name in tensors},
    )


def route_experts(trainer: Any, recipe: Any, test: Any, train: Any) -> dict[str, Any]:
    """Train the gates that decide how many experts an image takes (RIDE's second stage), and measure them."""
    from torch.utils.data import DataLoader

    from nc_hf.models.routing import evaluate_routing, train_routing

    train_routing(trainer.classifier, train, seed=recipe.seed)
    batches = DataLoader(test, recipe.evaluation.batch_size, collate_fn=test.collate)  # all of them on each process
    return evaluate_routing(trainer.classifier, batches, train.class_counts, **recipe.evaluation.bounds)


if __name__ == "__main__":
    main(sys.argv[1:])
