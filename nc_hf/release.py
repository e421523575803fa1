"""From a run folder to a folder that is ready for the Hub: model, card, pictures, results and recipe."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from torch import Tensor

from nc_hf.branching import COLLAPSE
from nc_hf.data.provenance import PROVENANCE
from nc_hf.data.splits import BUILDERS
from nc_hf.figures import angle_figure, class_accuracy_figure, collapse_figure, norm_figure, save_figure
from nc_hf.finished_run import class_means_of, read_run
from nc_hf.model_card import RELEASE_FOLDER, write_card
from nc_hf.recipe import Recipe, differences, dump_recipe, recipe_digest
from nc_hf.recipe_sections import defaults_of
from nc_hf.results import read_results, write_results

PATHS = ("/", "~", "./", "../", "local-dir:")
SECTIONS = ("model", "data", "stage1", "stage2")  # of a recipe, those that decide the weights


def build_release(
    run: str | Path,
    folder: str | Path | None = None,
    *,
    repo_id: str | None = None,
    twin: str | Path | None = None,
    seeds: Sequence[str | Path] = (),
    **metadata: Any,
) -> Path:
    """Gather what a finished run leaves into one folder, the content of a Hub repository.

    The model is that of the last stage. No path of this machine goes into it.

    Args:
        run: with `results.json`, `recipe.yaml`, and `stage1` or `stage2`.
        folder: to write, `release` in the run when None. In one that is there, a person's words in the README
            and files of other names stay.
        repo_id: Hub id that the card's examples name; they name the folder when None.
        twin: a run of the same settings without the collapse terms, for comparison.
        seeds: runs of the same recipe, each with another seed.
        **metadata: entries of the card's metadata, such as `license`.

    Raises:
        FileNotFoundError: for a run, twin or seed that is not finished.
        ValueError: for a figure that is not finite, a twin that differs in more than the collapse terms or has them,
            or seeds that are of another recipe or were given twice.
    """
    run = Path(run)
    folder = run / RELEASE_FOLDER if folder is None else Path(folder)
    # All of it is read, and refused where it has to be, before what is there is touched.
    (results, recipe), means = read_run(run), class_means_of(run)
    recipe = _without_paths(recipe)
    if recipe.data.title:  # which may have been given after the training
        results["dataset"]["name"] = recipe.data.title
    stage = next((run / name for name in ("stage2", "stage1") if (run / name).is_dir()), None)
    if stage is None:
        raise FileNotFoundError(f"{run} has no stage1 or stage2: it is no folder of a run. Give out/<run>.")
    others = _results_of_seeds(run, recipe, results, seeds)
    of_twin = None if twin is None else (_results_of_twin(run, recipe, Path(twin)), class_means_of(Path(twin)))
    for old in ("twin.json", "seeds", "figures", ".eval_results"):
        shutil.rmtree(folder / old) if (folder / old).is_dir() else (folder / old).unlink(missing_ok=True)
    shutil.copytree(stage, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    write_results(folder / "results.json", results)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    if of_twin is not None:
        write_results(folder / "twin.json", of_twin[0])
    for seed, other in others.items():
        (folder / "seeds").mkdir(exist_ok=True)
        write_results(folder / "seeds" / f"seed{seed}.json", other)
    _write_evaluation(folder, results)
    _draw_figures(folder, results, means, None if of_twin is None else of_twin[1])
    write_card(folder, repo_id, **metadata)
    return folder


def _results_of_twin(run: Path, recipe: Recipe, twin: Path) -> dict[str, Any]:
    """Results of a run whose stage one differs from this one's in the collapse terms alone, which it lacks."""
    found, theirs = read_run(twin)
    theirs = _without_paths(theirs)
    plain = defaults_of("stage1") | (theirs.stage1 or {})
    ours, alike = (_without_terms(one) for one in (recipe, theirs))
    if differing := [line.partition(" ")[0] for line in differences(ours, alike)]:
        names = " and ".join(differing)
        raise ValueError(f"{twin} is no twin of {run}: their {names} differ. Give one of the same.")
    if plain["within_weight"] or plain["between_weight"]:
        raise ValueError(f"{twin} is no twin of {run}: it was trained with collapse terms. Give a run without them.")
    return found


def _without_terms(recipe: Recipe) -> Recipe:
    """What a run has in common with its twin: all but the terms, the second stage, and the precision of a machine."""
    stage = {name: value for name, value in (recipe.stage1 or {}).items() if name not in (*COLLAPSE, "precision")}
    return dataclasses.replace(recipe, stage1=stage, stage2=None)


def _results_of_seeds(
    run: Path, recipe: Recipe, results: dict[str, Any], seeds: Sequence[str | Path]
) -> dict[int, dict[str, Any]]:
    """Results by seed of further runs, which must differ from this one in the seed alone."""
    others = {results["seed"]: results}
    for other in map(Path, seeds):
        found, theirs = read_run(other)
        theirs = _without_paths(theirs)
        if recipe_digest(dataclasses.replace(theirs, seed=recipe.seed)) != recipe_digest(recipe):
            sections = [name for name in SECTIONS if getattr(theirs, name) != getattr(recipe, name)]
            raise ValueError(
                f"{other} is of another recipe than {run}: {', '.join(sections)} differ. Give runs that differ in the "
                "seed alone."
            )
        if found["seed"] in others:
            raise ValueError(f"{other} has the seed {found['seed']} as well. Give one run of each seed.")
        others[found["seed"]] = found
    del others[results["seed"]]
    return others


def _write_evaluation(folder: Path, results: dict[str, Any]) -> None:
    """The file from which the Hub reads results of data sets that it has."""
    known = PROVENANCE.get(results["dataset"]["name"])
    if known is None or known.hub_id is None or results["split"] != "test":
        return
    entries = [
        EvalResultEntry(
            dataset_id=known.hub_id,
            task_id="image-classification",
            value=round(100 * metrics["accuracy"], 2),
            notes=f"top-1 accuracy (%) of head {head}, trained on {sum(results['dataset']['class_counts'])} images",
        )
        for head, metrics in results["heads"].items()
    ]
    path = folder / ".eval_results" / f"{known.hub_id.split('/')[-1]}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))


def _draw_figures(
    folder: Path, results: dict[str, Any], means: Tensor | None, means_without_terms: Tensor | None
) -> None:
    """The pictures of the card, as far as the results go; class means (K, P) are those of training features."""
    dataset, twin = results["dataset"], read_results(folder / "twin.json")
    counts, figures = dataset["class_counts"], folder / "figures"
    figures.mkdir()
    bounds = {name: dataset[name] for name in ("few_below", "many_above") if name in dataset}
    accuracies = {head: metrics["per_class_accuracy"] for head, metrics in results["heads"].items()}
    save_figure(class_accuracy_figure(counts, accuracies, dataset["class_names"], **bounds), figures / "classes")
    courses = {_method(results): results.get("geometry_course")}
    panels = {_method(results): means}
    if means_without_terms is not None:
        courses = {_method(twin): twin.get("geometry_course"), **courses}
        panels = {_method(twin): means_without_terms, **panels}
    if means is not None and sum(count > 0 for count in counts) > 1:
        save_figure(angle_figure(panels, counts, dataset["class_names"]), figures / "angles")
        save_figure(norm_figure(panels, counts, dataset["class_names"]), figures / "norms")
    if courses := {name: course for name, course in courses.items() if course}:
        save_figure(collapse_figure(courses), figures / "collapse")


def _method(results: dict[str, Any]) -> str:
    return results.get("methods", {}).get("base") or "features"


def _without_paths(recipe: Recipe) -> Recipe:
    """The recipe as anybody may run it: no folder of this machine, and no push to where this one went."""
    data = dataclasses.replace(recipe.data, data_dir=None, cache_dir=None, dataset=public_name(recipe.data.dataset))
    model_args = _public(recipe.model.model_args)
    model = dataclasses.replace(recipe.model, name=public_name(recipe.model.name), model_args=model_args)
    stages = {
        stage: settings and {key: _public(value) for key, value in settings.items() if key != "resume_from_checkpoint"}
        for stage, settings in (("stage1", recipe.stage1), ("stage2", recipe.stage2))
    }
    return dataclasses.replace(recipe, output_dir="out", data=data, model=model, hub=type(recipe.hub)(), **stages)


def _public(value: Any) -> Any:
    """A setting with absolute paths in it cut down to their last part."""
    if isinstance(value, dict):
        return {name: _public(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_public(inner) for inner in value]
    is_path = isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())
    return Path(value).name if is_path else value


def public_name(source: str) -> str:
    """What may be published of the name of a model or data set: of a folder, the last part of its path.

    A bare name of a benchmark or an architecture is that one, whatever folder is called so here. A path to a folder of
    such a name is said to be a folder, since it need not be that one.
    """
    path = Path(source.removeprefix("local-dir:"))
    if source in BUILDERS or timm.is_model(source) or not (source.startswith(PATHS) or path.is_dir()):
        return source
    name = path.expanduser().resolve().name
    return f"{name} (a folder)" if name in PROVENANCE or name in BUILDERS or timm.is_model(name) else name
