"""What a finished run of recipes/train.py left: its results, its recipe, and the class means of its features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nc_hf.recipe import Recipe, load_recipe
from nc_hf.results import read_results

if TYPE_CHECKING:
    from torch import Tensor


def read_run(run: Path) -> tuple[dict[str, Any], Recipe]:
    """Results and recipe of a finished run.

    Args:
        run: folder of recipes/train.py, or of a release.

    Raises:
        FileNotFoundError: for a run without results, or without those of a head that its recipe has.
    """
    results = read_results(run / "results.json")
    if not results:
        raise FileNotFoundError(f"{run} has no results.json. Let the run finish first.")
    recipe = load_recipe(run / "recipe.yaml")
    heads = ["base"] if recipe.stage1 is not None else []
    heads += recipe.stage2["heads"] if recipe.stage2 is not None else []
    if missing := [head for head in heads if head not in results["heads"]]:
        raise FileNotFoundError(f"{run} has no results of its head {', '.join(missing)}. Let the run finish first.")
    return results, recipe


def class_means_of(run: Path) -> Tensor | None:
    """(K, P) class means of the training features, which stage two leaves as they are; None where none were saved.

    Args:
        run: as for `read_run`.

    Raises:
        FileNotFoundError: for a run without a saved stage.
    """
    from nc_hf.hub import load_heads

    saved = [folder for folder in (run / "stage1", run / "stage2", run) if (folder / "config.json").is_file()]
    if not saved:
        raise FileNotFoundError(f"{run} has no saved stage, in which the class means are. Give the whole run.")
    return load_heads(saved[0])[1].get("class_means")
