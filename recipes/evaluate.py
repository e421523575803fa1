"""Measure every head of a saved classifier on the test split of its data.

    python recipes/evaluate.py out/digits_lt-nc_drw_crt/stage2
    python recipes/evaluate.py user/name recipes/cifar10_lt/nc_drw_crt.yaml --data.data_dir <folder>

The data are those of the recipe: the one given, or that of the run the folder belongs to. Prints a table, and with
`--json FILE` writes what it shows and more.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

# Python puts this folder first, where this file would stand in for the library `evaluate`.
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]


def main(arguments: list[str]) -> None:
    """Evaluate the folder or Hub id named by the first argument."""
    from nc_hf.processes import start_processes
    from nc_hf.recipe import load_recipe
    from nc_hf.results import results_table

    if not arguments or arguments[0].startswith("--"):
        raise SystemExit(__doc__)
    source, json_path = arguments.pop(0), None
    if "--json" in arguments:
        position = arguments.index("--json")
        json_path = Path(arguments[position + 1])
        del arguments[position : position + 2]
    own = Path(source) / "recipe.yaml"  # of a release; the other folders of a run have it beside them
    path = own if own.is_file() else Path(source).parent / "recipe.yaml"
    if arguments and not arguments[0].startswith("--"):
        path = arguments.pop(0)
    recipe = load_recipe(path, arguments)
    state = start_processes()
    results = {"heads": evaluate_heads(source, recipe)}
    if state.is_main_process:
        print(results_table(results))
        if json_path is not None:
            json_path.write_text(json.dumps(results, indent=1) + "\n")


def evaluate_heads(source: str, recipe: Any) -> dict[str, dict[str, Any]]:
    """Metrics by head name."""
    from nc_hf.evaluation import evaluate_classifier
    from nc_hf.hub import load_heads, load_pretrained
    from nc_hf.image_sets import image_sets, read_splits
    from nc_hf.models.classifier import image_settings, local_folder
    from nc_hf.trainer import NCTrainer
    from nc_hf.training_args import NCTrainingArguments

    folder, evaluation = local_folder(source, recipe.model.revision), recipe.evaluation
    config = json.loads((folder / "config.json").read_text()).get("nc_hf", {})
    heads, metrics, images = sorted(load_heads(folder)[0]), {}, None
    for head in heads or [None]:
        model, processor = load_pretrained(str(folder), head)
        if images is None:
            images = image_sets(recipe, read_splits(recipe), image_settings(model, processor))
        counts = config.get("class_counts", images["train"].class_counts.tolist())
        with tempfile.TemporaryDirectory() as scratch:
            args = NCTrainingArguments(
                output_dir=scratch,
                per_device_eval_batch_size=evaluation.batch_size,
                within_weight=0.0,
                between_weight=0.0,
                report_to="none",
                disable_tqdm=True,
            )
            trainer = NCTrainer(model, args, train_dataset=images["train"], head=recipe.model.head)
            metrics[head or "head"] = evaluate_classifier(
                trainer,
                images["test" if "test" in images else "validation"],
                counts,
                few_below=evaluation.few_below,
                many_above=evaluation.many_above,
            )
    return metrics


if __name__ == "__main__":
    main(sys.argv[1:])
