"""A run that goes on from another run's checkpoint, where both have trained alike so far."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from nc_hf.recipe import Recipe, load_recipe, recipe_digest
from nc_hf.recipe_sections import defaults_of
from nc_hf.training_args import resolve_epoch

REWEIGHTING = ("class_weighting", "drw_epoch")  # a sampler uses beta of the effective number, too
COLLAPSE = (  # all that the terms have to be told
    "within_weight", "between_weight", "start_epoch", "centers", "centers_learning_rate", "centers_momentum",
    "center_init", "between_objective", "within_reduction", "feature_scale", "within_counts", "replicate_leak",
    "mixup_rule",
)  # fmt: skip


def check_branch(recipe: Recipe, checkpoint: str | Path) -> None:
    """Make sure that stage one of a recipe may go on from a checkpoint of another run: so far the two did the same.

    Re-weighting and collapse terms that start later, or never, may differ: CE-DRW can go on from CE, and CE from the
    first half of NC where `start_epoch` is 0.5 (not the other way: a run without terms keeps no class centers). All
    that is random is a function of seed and step, so such a run ends with the weights of one that was trained from
    its start.

    Args:
        recipe: of the run to start.
        checkpoint: `<run>/checkpoints/stage1/checkpoint-<step>`, of a run that left its `recipe.yaml` in `<run>`.

    Raises:
        FileNotFoundError: when the checkpoint, or the recipe of its run, is not there.
        ValueError: when the two recipes differ before the checkpoint, or it lacks the class centers of this one.
    """
    checkpoint = Path(checkpoint).resolve()
    state, other_path = checkpoint / "trainer_state.json", checkpoint.parents[2] / "recipe.yaml"
    for path in (state, other_path):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: `resume_from_checkpoint` must be <run>/checkpoints/stage1/checkpoint-<step> of a "
                "run of recipes/train.py."
            )
    told = json.loads(state.read_text())
    epoch, epochs = told["epoch"], told["num_train_epochs"]
    recipe, other = _with_defaults(recipe), _with_defaults(load_recipe(other_path))
    ours, theirs = _until(recipe, epoch, epochs), _until(other, epoch, epochs)
    wanted, kept = _centers(recipe), _centers(other)
    if recipe_digest(ours) != recipe_digest(theirs):
        names = sorted({*ours.stage1, *theirs.stage1})
        differing = [name for name in names if ours.stage1.get(name) != theirs.stage1.get(name)]
        raise ValueError(
            f"{checkpoint} is of epoch {epoch:g}, until which its run was trained otherwise "
            f"({', '.join(differing) or 'model, data or seed'}). Only what starts later may differ; take an "
            "earlier checkpoint, or train from the start."
        )
    if wanted != kept and (wanted == "ema" or "learned" in (wanted, kept)):  # buffers, and a group of the optimizer
        raise ValueError(
            f"{checkpoint} is of a run with {kept} class centers and this one has {wanted}, which a checkpoint keeps "
            "from the first step on: take a checkpoint of a run with the same ones, or train from the start."
        )


def _with_defaults(recipe: Recipe) -> Recipe:
    """The recipe with every setting of stage one written out."""
    return dataclasses.replace(recipe, stage1=defaults_of("stage1") | (recipe.stage1 or {}), stage2=None)


def _centers(recipe: Recipe) -> str:
    """The class centers of stage one, "no" without terms."""
    stage = recipe.stage1
    return stage["centers"] if stage["within_weight"] or stage["between_weight"] else "no"


def _until(recipe: Recipe, epoch: float, epochs: int) -> Recipe:
    """What decides the weights of stage one until an epoch, of so many."""
    stage = recipe.stage1
    if stage["class_weighting"] == "none" or resolve_epoch(stage["drw_epoch"] or 0, epochs) >= epoch:
        stage = _without(stage, REWEIGHTING)
    late = resolve_epoch(stage["start_epoch"], epochs) >= epoch and not stage["replicate_leak"]
    if late or not (stage["within_weight"] or stage["between_weight"]):
        stage = _without(stage, COLLAPSE) | {"within_weight": 0, "between_weight": 0}
    return dataclasses.replace(recipe, stage1=stage)


def _without(stage: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The settings but for some."""
    return {name: value for name, value in stage.items() if name not in names}
