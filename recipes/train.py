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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
# Python puts this folder first, where evaluate.py would stand in for the library `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

if TYPE_CHECKING:
    from accelerate import PartialState

    from nc_hf.recipe import Recipe


def main(arguments: list[str]) -> None:
    """Run the recipe named by the first argument with the overrides that follow it."""
    from nc_hf.processes import start_processes
    from nc_hf.recipe import load_recipe

    if {"-h", "--help"} & set(arguments):
        from nc_hf.recipe_help import recipe_help

        return print(f"{__doc__}\n{recipe_help()}")
    default = str(HERE / "digits_lt" / "nc_drw_crt.yaml")
    path = arguments.pop(0) if arguments and not arguments[0].startswith("--") else default
    with usage_errors():
        recipe = load_recipe(path, arguments)
    state = start_processes((recipe.stage1 or recipe.stage2).get("expected_processes"))
    parts = [part for part in Path(path).with_suffix("").parts[-2:] if part not in (Path(path).anchor, "..")]
    run = Path(recipe.output_dir) / (recipe.name or "-".join(parts))
    if recipe.hub.repo_id and state.is_main_process:
        check_destination(recipe)
    results, failed = train(recipe, run, state), None
    if state.is_main_process:
        from nc_hf.results import results_table

        print(f"\n{run / 'results.json'}\n{results_table(results)}")
        failed = release(recipe, run)
    state.destroy_process_group()
    if failed:
        raise SystemExit(failed)
    return None


def train(recipe: Recipe, run: Path, state: PartialState) -> dict[str, Any]:
    """Train and measure what the run's folder does not have yet: what its results.json holds then."""
    from nc_hf.branching import check_branch
    from nc_hf.image_sets import read_splits
    from nc_hf.results import read_results
    from nc_hf.stages import STAGES, check_stage_one, heads_of, load_for_stages, run_stages, stage_arguments

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
    digest = take_folder(run, recipe, splits["train"].info.description, results, started, state)
    heads = {stage: heads_of(stage, args) for stage, args in stages.items()}
    if all(name in results.get("heads", {}) for names in heads.values() for name in names):
        return results
    with usage_errors():
        check_stage_one(run, results)
        loaded = load_for_stages(recipe, stages, splits)
    return run_stages(recipe, run, stages, loaded, results or {"recipe_digest": digest}, state)


def take_folder(
    run: Path, recipe: Recipe, description: str, results: dict[str, Any], started: bool, state: PartialState
) -> str:
    """The run's digest, which is written into its folder; a folder with a run of another one is refused."""
    from nc_hf.models.saved_folder import weights_checksum
    from nc_hf.recipe import dump_recipe, recipe_digest

    digest = recipe_digest(recipe, description, weights_checksum(recipe.model.name))
    known = results.get("recipe_digest") or ((run / "digest").read_text() if started else None)
    if known not in (None, digest):
        raise SystemExit(
            f"{run} holds a run of another recipe or other data (digest {known}, this one is {digest}"
            f"{differences_of(run, recipe)}). Choose another --name or --output_dir, or remove that folder."
        )
    bounds = recipe.evaluation.bounds
    measured = {name: results.get("dataset", {}).get(name, value) for name, value in bounds.items()}
    if measured != bounds:
        raise SystemExit(f"{run} is measured with {measured}, and this recipe has {bounds}. Choose another --name.")
    if state.is_main_process:
        with usage_errors():
            run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").write_text(dump_recipe(recipe))
        (run / "digest").write_text(digest)
    return digest


def check_destination(recipe: Recipe) -> None:
    """Stop before anything is trained if the push at the end could not succeed."""
    from nc_hf.publishing import PushError, check_access

    try:
        recipe.hub.repo_id = check_access(recipe.hub.repo_id)
    except PushError as error:
        raise SystemExit(str(error)) from None


@contextmanager
def usage_errors() -> Iterator[None]:
    """What is wrong with settings, data or model is said in a sentence, without a traceback."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


def differences_of(run: Path, recipe: Recipe) -> str:
    """In which settings a recipe differs from that of a run's folder, where that can be told."""
    from nc_hf.recipe import differences, load_recipe

    path = run / "recipe.yaml"
    found = differences(load_recipe(path), recipe) if path.is_file() else []
    return "".join(f"; {line}" for line in found)


def is_started(run: Path) -> bool:
    """Whether a run's folder has checkpoints to go on from; `digest` is then of the recipe that made them."""
    from nc_hf.checkpoints import is_complete

    found = (run / "checkpoints").glob("**/checkpoint-*")
    return (run / "digest").is_file() and any(map(is_complete, found))


def release(recipe: Recipe, run: Path) -> str | None:
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


if __name__ == "__main__":
    main(sys.argv[1:])
