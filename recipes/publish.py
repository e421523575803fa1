"""Push what runs left behind to the Hub.

    python recipes/publish.py out/<run>/release user/name            # a model folder with its card
    python recipes/publish.py release out/<run> model_cards/<name>   # gather a run into such a folder, push nothing
    python recipes/publish.py dataset recipes/cifar10_lt/nc_drw_crt.yaml user/cifar10-lt --data.data_dir <folder>
    python recipes/publish.py --all                                  # every model of model_cards/, to your namespace

The token is that of `hf auth login`. A README that somebody edited on the Hub keeps
what stands outside our marks, and metadata of other names than ours.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Python puts this folder first, where evaluate.py would stand in for the library `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

MODEL_CARDS = HERE.parent / "model_cards"


def main(arguments: list[str]) -> None:
    """Do what the first argument says."""
    from nc_hf.publishing import PushError

    command = {"dataset": push_dataset, "release": gather_release}.get(arguments[0] if arguments else "")
    try:
        if command is not None:
            command(arguments[1:])
        else:
            push_models(arguments)
    except (PushError, FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None


def push_models(arguments: list[str]) -> None:
    """Push one folder, or with `--all` every folder of model_cards/."""
    from nc_hf.publishing import check_access, push_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="of the model, with its card")
    parser.add_argument("repo_id", nargs="?", help="user/name")
    parser.add_argument("--all", action="store_true", help="push every model of model_cards/")
    _add_push_options(parser)
    options = vars(parser.parse_args(arguments))
    folder, repo_id = options.pop("folder"), options.pop("repo_id")
    if options.pop("all"):
        folders = {path.parent.name: path.parent for path in sorted(MODEL_CARDS.glob("*/config.json"))}
        if not folders:
            parser.error(f"{MODEL_CARDS} has no model; `publish.py release` gathers one")
    elif folder and repo_id:
        folders = {repo_id: Path(folder)}
    else:
        parser.error("give a folder and user/name, or --all")
    folders = {check_access(name): path for name, path in folders.items()}  # all, before the first is pushed
    for name, path in folders.items():
        print(push_folder(path, name, **options))


def gather_release(arguments: list[str]) -> None:
    """Make a model folder of a run, its twin without the collapse terms, and its other seeds."""
    from nc_hf.release import build_release

    parser = argparse.ArgumentParser(prog="publish.py release", description=gather_release.__doc__)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("folder", help="to write")
    parser.add_argument("--twin", help="run of the same settings without the collapse terms, to compare with")
    parser.add_argument("--seeds", nargs="*", default=[], help="runs of the same recipe with other seeds")
    parser.add_argument("--license", help="of the weights, such as apache-2.0; without it a card keeps the one it has")
    options = parser.parse_args(arguments)
    metadata = {"license": options.license} if options.license else {}
    print(build_release(options.run, options.folder, twin=options.twin, seeds=options.seeds, **metadata))


def push_dataset(arguments: list[str]) -> None:
    """Push the splits of a recipe's section `data` as parquet, with a card; overrides follow as for train.py."""
    from nc_hf.dataset_card import config_name_for, push_splits
    from nc_hf.image_sets import read_splits
    from nc_hf.publishing import check_access
    from nc_hf.recipe import load_recipe

    parser = argparse.ArgumentParser(prog="publish.py dataset", description=push_dataset.__doc__)
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("repo_id", help="user/name")
    _add_push_options(parser)
    options, overrides = parser.parse_known_args(arguments)
    options = vars(options)
    recipe = load_recipe(options.pop("recipe"), overrides)
    data = recipe.data
    if data.test_split or data.validation_fraction:
        raise SystemExit(
            "`data.test_split` and `data.validation_fraction` choose splits for one's own work, which others would "
            "take for those of the data set. Leave them out."
        )
    repo_id = check_access(options.pop("repo_id"), repo_type="dataset")
    options |= {"config_name": config_name_for(data), "dataset": data.dataset}
    if data.imbalance_ratio is not None:
        options["facts"] = {"profile": data.profile, "imbalance_ratio": data.imbalance_ratio, "seed": data.seed}
    print(push_splits(read_splits(recipe), repo_id, **options))


def _add_push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--private", action="store_true", default=None, help="visibility of a new repository")
    parser.add_argument("--revision", help="branch to push to; main by default")
    parser.add_argument("--create_pr", "--create-pr", action="store_true", help="open a pull request instead")


if __name__ == "__main__":
    main(sys.argv[1:])
