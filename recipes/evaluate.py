"""Measure every head of a saved classifier on the test split of its data.

    python recipes/evaluate.py out/digits_lt-nc_drw_crt/stage2
    python recipes/evaluate.py user/name recipes/cifar10_lt/nc_drw_crt.yaml --data.data_dir <folder>
    python recipes/evaluate.py model_cards/<name> --noise-std 0 0.1 0.2 0.3 0.4 --data.data_dir <folder>

The data are those of a recipe: the one given, or that of the run the folder belongs to; without either,
`--data` and other settings name them. Prints a table, and with `--json FILE` writes what it shows and more.
`--noise-std` adds a table of accuracies on images with Gaussian noise of these standard deviations; `--noise-scale`
says where: `normalized`, where the network sees them (default), or `pixels`, in [0, 1] before normalization;
`--noise-seed` (0 by default) is the seed of the noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

# Python puts this folder first, where this file would stand in for the library `evaluate`.
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]


def main(arguments: list[str]) -> None:
    """Evaluate the folder or Hub id named by the first argument."""
    from nc_hf.inspect import recipe_for
    from nc_hf.processes import start_processes
    from nc_hf.results import results_table
    from nc_hf.robustness import noise_table

    options, overrides = parse(arguments)
    noise = {"std": options.noise_std, "scale": options.noise_scale, "seed": options.noise_seed}
    recipe = recipe_for(options.source, overrides)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    state = start_processes()
    results = evaluate_heads(options.source, recipe, noise if options.noise_std else None)
    if state.is_main_process:
        print(results_table(results))
        if "noise" in results:
            print(f"\n{noise_table(results['noise'])}")
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the command line, and what of it is for the recipe.

    Raises:
        ValueError: for noise that means nothing.
    """
    from nc_hf.robustness import NoiseScale, check_noise

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("source", help="folder or Hub id")
    parser.add_argument("--data", "--data.dataset", metavar="DATA", help="data set, as in a recipe")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--noise-std", nargs="+", type=float, default=[], help="standard deviations")
    parser.add_argument("--noise-scale", choices=get_args(NoiseScale), default="normalized")
    parser.add_argument("--noise-seed", type=int, default=0)
    options, overrides = parser.parse_known_args(arguments)
    if not options.noise_std and (options.noise_scale, options.noise_seed) != ("normalized", 0):
        parser.error("--noise-scale and --noise-seed need --noise-std and its standard deviations")
    for std in options.noise_std:
        check_noise(std, options.noise_seed)
    return options, overrides if options.data is None else [*overrides, "--data.dataset", options.data]


def evaluate_heads(source: str, recipe: Any, noise: dict[str, Any] | None) -> dict[str, Any]:
    """Metrics by head name, and accuracies by head name under noise."""
    from nc_hf.evaluation import evaluate_classifier
    from nc_hf.inspect import evaluated_split, trainers_of
    from nc_hf.models.saved_folder import local_folder, read_config
    from nc_hf.robustness import NoisyImages, noisy_accuracies

    config = read_config(local_folder(source, recipe.model.revision)).get("nc_hf", {})
    results: dict[str, Any] = {"heads": {}}
    noisy: list[NoisyImages] = []
    for head, trainer, images in trainers_of(source, recipe):
        split = evaluated_split(images)
        tested, results["split"] = images[split], recipe.data.own_name(split)
        results["heads"][head] = evaluate_classifier(
            trainer,
            tested,
            config.get("class_counts", images["train"].class_counts.tolist()),
            **recipe.evaluation.bounds,
        )
        if noise:
            results.setdefault("noise", {**noise, "accuracy": {}})
            noisy = noisy or [NoisyImages(tested, std, noise["scale"], noise["seed"]) for std in noise["std"]]
            results["noise"]["accuracy"][head] = noisy_accuracies(trainer, noisy)
    return results


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
