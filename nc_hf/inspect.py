"""Look into any image classifier: its accuracies by class frequency, and how far its features have collapsed.

    python -m nc_hf.inspect <folder or Hub id> --data cifar10 --data.imbalance_ratio 100 --data.data_dir <folder>
    python -m nc_hf.inspect <folder or Hub id> recipes/cifar10_lt/nc_drw_crt.yaml --output look
    python -m nc_hf.inspect out/<run>/stage1

The classifier is one of timm or transformers, trained by nc_hf or not. The data are those of a recipe: the one given,
or that of the run the folder is of; all settings can be given beside it, such as `--model.head <module path>` for a
model whose head is not found. Prints accuracies on the test split and NC1-NC4 on training and test features, and
writes them with the figures to `--output` (`inspect-<name>` here by default).
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nc_hf.data.images import ImageSet
    from nc_hf.recipe import Recipe
    from nc_hf.trainer import NCTrainer

logger = logging.getLogger(__name__)

QUANTITIES = {
    "nc1_variability": "NC1: within / between variability",
    "nc1_variability_balanced": "     the same, classes alike",
    "nc1_cdnv": "     class-distance normalized variance",
    "nc2_norm_cov": "NC2: variation of the means' norms",
    "nc2_min_angle": "     smallest angle of two means",
    "nc2_mean_angle": "     mean angle",
    "nc2_best_angle": "     best smallest angle there is",
    "nc2_best_angle_bound": "     no smallest angle is above",
    "nc2_etf_error": "     distance to a simplex ETF",
    "nc3_duality_gap": "NC3: distance of head and means",
    "nc3_head_norm_cov": "     variation of the head's norms",
    "nc4_agreement": "NC4: agreement with the nearest mean",
}


def main(arguments: Sequence[str]) -> None:
    """Inspect the folder or Hub id named by the first argument; settings of a recipe may follow."""
    from nc_hf.processes import start_processes
    from nc_hf.results import results_table, write_results

    parser = argparse.ArgumentParser(
        "python -m nc_hf.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", help="folder or Hub id")
    parser.add_argument("--data", "--data.dataset", metavar="DATA", help="data set, as in a recipe")
    parser.add_argument("--output", type=Path, help="folder of the results and figures")
    options, rest = parser.parse_known_args(arguments)
    source = options.source
    recipe = recipe_for(source, rest if options.data is None else [*rest, "--data.dataset", options.data])
    state = start_processes()
    results, means = inspect_classifier(source, recipe)
    if state.is_main_process:
        folder = options.output or Path(f"inspect-{_last_part(source)}")
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder / "results.json", results)
        draw_figures(folder, results, means)
        print(f"\n{results_table(results)}")
        for head, geometry in results["geometry"].items():
            print(f"\nhead {head}\n{geometry_table(geometry)}")
        print(f"\nresults and figures: {folder}")
    state.destroy_process_group()


def recipe_for(source: str, arguments: Sequence[str]) -> Recipe:
    """The recipe that says on which data a classifier is measured.

    Args:
        source: a folder or Hub id.
        arguments: overrides; before them the path of a recipe, or else it is that of the run the folder is of, or the
            defaults where there is none.

    Raises:
        ValueError: when no data are named at all.
        FileNotFoundError: when there is no such recipe or source.
    """
    from nc_hf.models.classifier import local_folder
    from nc_hf.recipe import load_recipe

    given = bool(arguments) and not arguments[0].startswith("--")
    path, overrides = (Path(arguments[0]), arguments[1:]) if given else (None, arguments)
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--model.revision", dest="revision")
    parser.add_argument("--data.dataset", dest="dataset")
    named, _ = parser.parse_known_args(overrides)
    if path is None:
        folder = local_folder(source, named.revision)
        # A release has its recipe inside, a stage of a run beside it.
        places = (folder / "recipe.yaml", folder.parent / "recipe.yaml")
        path = next((place for place in places if place.is_file()), None)
        if path is not None and not Path(source.removeprefix("local-dir:")).is_dir():
            overrides = [*_without_places(path), *overrides]
    if path is None and named.dataset is None:
        raise ValueError(
            f"{source} has no recipe.yaml, so its data are not known. Give a recipe after it, or name the data by "
            "--data.dataset and, where needed, --data.data_dir and --data.imbalance_ratio."
        )
    recipe = load_recipe(path, overrides)
    recipe.model.revision = named.revision  # in a recipe, it is of the model that training started from
    return recipe


def _without_places(path: Path) -> list[str]:
    """Overrides after which a recipe from the Hub names no folder of this machine."""
    from nc_hf.recipe_file import read_entries

    if "extends" in read_entries(path):
        raise ValueError(
            f"{path} is from the Hub and extends another file, which is not read. Give a recipe of yours."
        )
    return ["--data.data_dir", "null", "--data.cache_dir", "null"]


def inspect_classifier(source: str, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measure each head of a classifier on the data of a recipe.

    Args:
        source: a folder or Hub id of timm, transformers or nc_hf.
        recipe: its sections `data` and `evaluation`, `model.head`, `model.revision` and the precision are used.

    Returns:
        What `results.json` of a run says of `heads` and `geometry`, and the class means (K, P) of the features by
        split.

    Raises:
        ValueError: for data whose classes are not the model's.
    """
    from nc_hf.evaluation import evaluate_classifier, geometry_of
    from nc_hf.results import environment

    results: dict[str, Any] = {"model": _last_part(source), "heads": {}, "geometry": {}}
    means: dict[str, Any] = {}
    for head, trainer, images in trainers_of(source, recipe):
        split, train = evaluated_split(images), images["train"]
        bounds = recipe.evaluation.bounds
        # The features are the same for each head.
        means = means or {name: trainer.class_means(images[name]) for name in dict.fromkeys(("train", split))}
        results["heads"][head] = evaluate_classifier(trainer, images[split], train.class_counts, **bounds)
        results["geometry"][head] = {name: geometry_of(trainer, images[name], means[name]) for name in means}
        counts = train.class_counts.tolist()
        dataset = {"name": _last_part(recipe.data.dataset), "description": train.description, **bounds}
        results["dataset"] = dataset | {"class_names": train.class_names, "class_counts": counts}
        results["split"] = recipe.data.own_name(split)
    return results | environment(), {name: split_means for name, (split_means, _) in means.items()}


def trainers_of(source: str, recipe: Recipe) -> Iterator[tuple[str, NCTrainer, dict[str, ImageSet]]]:
    """Each head of a saved classifier by name, in a trainer that only evaluates, with the image set of each split.

    A folder that was not saved by nc_hf has one head, called `"head"`. The backbone sees each image once: later
    heads get its features from memory.

    Args:
        source: a folder or Hub id.
        recipe: as for `inspect_classifier`.
    """
    from nc_hf.hub import load_heads, load_pretrained
    from nc_hf.image_sets import image_sets, read_splits
    from nc_hf.models.classifier import find_head, local_folder
    from nc_hf.models.image_settings import image_settings
    from nc_hf.precision import precision_to_measure
    from nc_hf.task import ClassificationTask
    from nc_hf.trainer import NCTrainer
    from nc_hf.training_args import NCTrainingArguments

    folder, images, kept = local_folder(source, recipe.model.revision), None, None
    for head in sorted(load_heads(folder)[0]) or [None]:
        model, processor = load_pretrained(str(folder), head)
        if images is None:
            splits = read_splits(recipe)
            check_classes(model, splits["train"].features["label"].names, source)
            images = image_sets(recipe, splits, image_settings(model, processor))
        with tempfile.TemporaryDirectory() as scratch:
            args = NCTrainingArguments(
                output_dir=scratch,
                per_device_eval_batch_size=recipe.evaluation.batch_size,
                precision=precision_to_measure((recipe.stage1 or recipe.stage2)["precision"]),
                within_weight=0.0,
                between_weight=0.0,
                report_to="none",
                disable_tqdm=True,
            )
            head_name, layer = find_head(model, head=recipe.model.head)
            task = ClassificationTask(model, head_name, layer.weight.shape[0])  # by whatever the model was trained
            trainer = NCTrainer(task, args, train_dataset=images["train"], processing_class=processor)
            with trainer.keeping_features(kept) as kept:
                yield head or "head", trainer, images


def check_classes(model: nn.Module, names: Sequence[str], source: str) -> None:
    """Refuse data whose classes cannot be those of the model.

    Raises:
        ValueError: for another number of classes, or the same names in another order.
    """
    from nc_hf.labels import check_class_order

    if hasattr(model, "pretrained_cfg"):
        number, own = model.num_classes, model.pretrained_cfg.get("label_names")
    else:
        number, own = model.config.num_labels, [name for _, name in sorted(model.config.id2label.items())]
    if number != len(names):
        raise ValueError(f"{source} has {number} classes, and the data have {len(names)}. Choose its own data set.")
    check_class_order(source, own, names)


def evaluated_split(images: dict[str, Any]) -> str:
    """The split to measure on: test, else validation, else the training images."""
    return next(name for name in ("test", "validation", "train") if name in images)


def draw_figures(folder: Path, results: dict[str, Any], means: dict[str, Tensor]) -> None:
    """Accuracy per class, and angles and norms of the class means, as PNG and SVG.

    Args:
        folder: to write to.
        results: from `inspect_classifier`.
        means: class means (K, P) by split, zero for a class without images. A split that lacks a class of the
            training images has no panel in angles and norms, whose classes it would change, and a log line says so;
            fewer than two classes have none of these figures.
    """
    from nc_hf.figures import angle_figure, class_accuracy_figure, norm_figure, save_figure

    dataset = results["dataset"]
    counts, bounds = dataset["class_counts"], {name: dataset[name] for name in ("few_below", "many_above")}
    accuracies = {head: metrics["per_class_accuracy"] for head, metrics in results["heads"].items()}
    panels = {}
    for name, split_means in means.items():
        lacking = sum(count > 0 and not mean.any() for count, mean in zip(counts, split_means, strict=True))
        if name == "train" or not lacking:
            panels[f"{name} images"] = split_means
        else:
            logger.warning("the %s images lack %d classes: angles and norms are of the training images", name, lacking)
    of_means = {"angles": angle_figure, "norms": norm_figure}
    figures = {"classes": class_accuracy_figure(counts, accuracies, dataset["class_names"], **bounds)}
    if sum(count > 0 for count in counts) > 1:
        figures |= {name: draw(panels, counts, dataset["class_names"]) for name, draw in of_means.items()}
    for name, figure in figures.items():
        save_figure(figure, folder / name, svg=True)


def geometry_table(geometry: dict[str, dict[str, float]]) -> str:
    """NC1-NC4 as aligned text, one column a split; "-" for what these data do not define."""
    from nc_hf.results import aligned

    names = [name for name in QUANTITIES if any(name in metrics for metrics in geometry.values())]
    rows = [["", *geometry]]
    for name in names:
        rows.append([QUANTITIES[name]] + [_shown(name, metrics.get(name)) for metrics in geometry.values()])
    return "\n".join(aligned(rows, first="<"))


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if "angle" in name:
        return f"{value:.1f}°"
    return f"{100 * value:.1f} %" if name == "nc4_agreement" else f"{value:.3g}"


def _last_part(source: str) -> str:
    name = source.removeprefix("hf-hub:").partition("@")[0]
    return Path(name.removeprefix("local-dir:")).resolve().name or "model"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
