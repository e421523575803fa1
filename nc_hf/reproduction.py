"""The runs behind the paper's tables: where their results lie, whether these count, and how a finished run joins them.

Results lie in `<results>/<data set>/<method>/seed<N>.json`, each with the class means (K, P) of its training features
in `seed<N>.safetensors`. One counts when the digest in it is that of the row's recipe with the data set's checksum and
the precision that the run had. Both are known without the images: `results.json` has the description that the digest
was made with, and where a recipe leaves the precision to the machine, it is the one with which the digests agree.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nc_hf.finished_run import class_means_of, read_run
from nc_hf.methods_table import METHODS_TABLE
from nc_hf.paper_figures import FIGURES
from nc_hf.paper_tables import TABLES as PAPER_TABLES
from nc_hf.paper_tables import Row, Setting
from nc_hf.recipe import Recipe, load_recipe, recipe_digest
from nc_hf.recipe_sections import defaults_of
from nc_hf.results import read_results, write_results

MEANS = "class_means"
TABLES = {**PAPER_TABLES, "methods": METHODS_TABLE}
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Found:
    """Results that count, and the precision of their run."""

    seed: int
    path: Path
    results: dict[str, Any]
    precision: str

    @property
    def means_path(self) -> Path:
        """Of the class means."""
        return self.path.with_suffix(".safetensors")

    def value(self, head: str, metric: str) -> float | None:
        """A metric of a table in percent; None where it was not measured, or the noise on another scale."""
        if metric.startswith("noise "):
            noise = self.results.get("noise", {})
            measured = is_of_table6(noise) and head in noise["accuracy"]
            accuracies = dict(zip(noise["std"], noise["accuracy"][head], strict=True)) if measured else {}
            share = accuracies.get(float(metric.removeprefix("noise ")))
        else:
            share = self.results["heads"][head].get(metric)
        return None if share is None else 100 * share


@dataclass(frozen=True)
class Plan:
    """A row on a data set.

    Attributes:
        setting: the data set.
        row: of a table.
        recipe_path: of its recipe, whether or not there is one.
        folder: of its results.
        epochs: of stage one; the recipe's own when None.
    """

    setting: Setting
    row: Row
    recipe_path: Path
    folder: Path
    epochs: float | None = None

    @property
    def name(self) -> str:
        """Of the recipe, with its folder."""
        return "/".join(self.recipe_path.parts[-2:])

    def overrides(self, seed: int) -> list[str]:
        """What the recipe is changed by, as `load_recipe` and recipes/train.py take it."""
        epochs = [] if self.epochs is None else ["--stage1.num_train_epochs", f"{self.epochs:g}"]
        own = [*self.row.overrides, *self.row.on.get(self.setting, ())]
        return [*self.setting.overrides, *own, *epochs, "--seed", str(seed)]

    def recipe(self, seed: int = 0) -> Recipe | None:
        """The recipe, or None when there is no such file."""
        return load_recipe(self.recipe_path, self.overrides(seed)) if self.recipe_path.is_file() else None

    def target(self, seed: int) -> Path:
        """Where results of a seed lie."""
        return self.folder / f"seed{seed}.json"

    def found(self) -> list[Found]:
        """Results that count, by seed."""
        found = []
        for path in self.folder.glob("seed*.json"):
            results = read_results(path)
            recipe = self.recipe(results["seed"])
            precision = None if recipe is None else matching_precision(recipe, results)
            if precision and self._is_measured(recipe, results) and path == self.target(results["seed"]):
                found.append(Found(results["seed"], path, results, precision))
        return sorted(found, key=lambda one: one.seed)

    def _is_measured(self, recipe: Recipe, results: dict[str, Any]) -> bool:
        """Whether the row's head was, on the test images, with the recipe's bounds of many, medium and few."""
        bounds = recipe.evaluation.bounds
        same = {name: results["dataset"].get(name, bound) for name, bound in bounds.items()} == bounds
        return same and self.row.head in results["heads"] and results["split"] == "test"

    def means(self) -> list[Found]:
        """Those of them that have class means."""
        return [one for one in self.found() if one.means_path.is_file()]


def plan_row(setting: Setting, row: Row, recipes: Path, results: Path, epochs: float | None = None) -> Plan:
    """Where recipe and results of a row are; runs of another number of epochs than the recipe's lie beside the others.

    Args:
        setting: the data set.
        row: of a table.
        recipes: folder of the recipes.
        results: folder of all results.
        epochs: of stage one; the recipe's own when None.
    """
    method = row.balanced if row.balanced and setting.is_balanced else row.method
    stem = method if row.recipe is None else row.recipe
    path = recipes / setting.recipes / f"{stem}.yaml"
    if epochs is not None and path.is_file():
        own = load_recipe(path, setting.overrides).stage1 or {}
        epochs = None if epochs == own.get("num_train_epochs") else epochs
    folder = results / setting.folder / (method if epochs is None else f"{method}_{epochs:g}_epochs")
    return Plan(setting, row, path, folder, epochs)


def matching_precision(recipe: Recipe, results: dict[str, Any]) -> str | None:
    """The precision with which results are those of a recipe; None when they are of another one.

    Args:
        recipe: with the seed of the results.
        results: content of a `results.json`.
    """
    description = results["dataset"].get("description")
    for precision in PRECISIONS:
        resolved = copy.deepcopy(recipe)
        for stage in filter(None, (resolved.stage1, resolved.stage2)):
            stage["precision"] = precision if stage["precision"] == "auto" else stage["precision"]
        if recipe_digest(resolved, description) == results["recipe_digest"]:
            return (resolved.stage1 or resolved.stage2)["precision"]
    return None


def is_of_table6(noise: dict[str, Any]) -> bool:
    """Whether noise is of the scale and seed that Table 6 is measured with."""
    return noise.get("scale") == "normalized" and noise.get("seed") == 0


def collect_run(run: Path, target: Path) -> None:
    """Copy what a finished run measured to the place of its results: no weights, no paths.

    Args:
        run: as for `read_run`. A `noise.json` of recipes/evaluate.py in it is added; without one, the noise in earlier
            results of the same recipe stays.
        target: `.../seed<N>.json`; the class means go beside it.

    Raises:
        FileNotFoundError: for a run that is not finished.
        ValueError: as `check_batches`, or for a `noise.json` of other images, another scale or another seed than
            Table 6 is of.
    """
    from safetensors.torch import save_file

    (results, recipe), earlier, means = read_run(run), read_results(target), class_means_of(run)
    check_batches(run, recipe, results)
    same = earlier.get("recipe_digest") == results["recipe_digest"]
    measured = read_results(run / "noise.json")
    if "noise" in measured and (measured.get("split", "test") != "test" or not is_of_table6(measured["noise"])):
        raise ValueError(
            f"{run / 'noise.json'} has noise of {measured.get('split', 'test')} images, scale "
            f"{measured['noise']['scale']}, seed {measured['noise']['seed']}; Table 6 is of test images, scale "
            "normalized, seed 0. Measure it so by recipes/evaluate.py, or remove that file."
        )
    if noise := measured.get("noise", earlier.get("noise") if same else None):
        results["noise"] = noise
    target.parent.mkdir(parents=True, exist_ok=True)
    if means is not None:
        save_file({MEANS: means.float()}, target.with_suffix(".safetensors"))
        shutil.copymode(run / "results.json", target.with_suffix(".safetensors"))
    write_results(target, {name: value for name, value in results.items() if name != "schema"})


def check_batches(run: Path, recipe: Recipe, results: dict[str, Any]) -> None:
    """Refuse a run on another number of processes than its recipe expects, which had other batches.

    Raises:
        ValueError: when images an update differ.
    """
    for stage, trained in results["training"].items():
        settings = defaults_of(stage) | (getattr(recipe, stage) or {})
        batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        batch *= settings["expected_processes"] or 1
        if trained.get("batch", batch) != batch:
            raise ValueError(
                f"{stage} of {run} was trained in batches of {trained['batch']} on {trained['processes']} processes, "
                f"and its recipe is of {batch}: it is no result of that recipe. Divide per_device_train_batch_size by "
                "the number of processes, and set expected_processes."
            )


def plan_of_run(run: Path, recipes: Path, results: Path) -> tuple[Plan, int] | None:
    """The row that a run is of, and its seed; None when it is of no table's recipe; as `read_run` if not finished."""
    measured, own = read_run(run)
    for setting, row in _all_rows():
        plan = plan_row(setting, row, recipes, results, (own.stage1 or {}).get("num_train_epochs"))
        recipe = plan.recipe(measured["seed"])
        if recipe is not None and matching_precision(recipe, measured):
            return plan, measured["seed"]
    return None


def _all_rows() -> Iterator[tuple[Setting, Row]]:
    for table in TABLES.values():
        for setting in table.settings:
            for row in table.rows.values():
                yield setting, row
    for figure in FIGURES.values():
        for setting, rows in figure.panels.values():
            for row in rows:
                yield setting, row
