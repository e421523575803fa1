"""Model cards: what a visitor of a Hub repository reads, rendered from what a run measured and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from nc_hf.card_block import escaped, marked, merge_cards, metadata_of
from nc_hf.card_citations import citations
from nc_hf.card_facts import (
    dataset_facts,
    further_seeds,
    has_public_data,
    input_size,
    is_public,
    needs_folder,
    origin,
    parameters,
    stages,
)
from nc_hf.card_tables import ACCURACIES, HEADS, accuracy_table, better_head, class_rows, geometry_table
from nc_hf.doors import doors_of, needs_nc_hf

TEMPLATE = Path(__file__).with_name("model_card_template.md")
RELEASE_FOLDER = "release"  # in the folder of a run, which then names the model
PICTURES = {  # what a screen reader says, and the caption
    "classes": (
        "Accuracy and training images per class",
        "Above, the accuracy of each class on the {split} images; below, its training images. The largest class is on "
        "the left.",
    ),
    "angles": (
        "Angles between class means",
        "Angles between the centered class means of the training features (Figure 2 of the paper). The line on the "
        "scale is the best that the smallest of them can be: collapsed features have no pair below it.",
    ),
    "norms": (
        "Norms of class means",
        "Norms of the centered class means of the training features (Figure 3 of the paper). Those of collapsed "
        "features are on the dotted line.",
    ),
    "collapse": (
        "NC1 to NC4 by epoch",
        "NC1 to NC4 of the training features during stage one. In each panel, lower is closer to collapse.",
    ),
}


def write_card(folder: str | Path, repo_id: str | None = None, **metadata: Any) -> Path:
    """Write the README of a saved folder from its `results.json`; what a person wrote around our block stays.

    Args:
        folder: as `build_release` writes it.
        repo_id: Hub id that the examples name; they name the folder when None.
        **metadata: entries of the card's metadata, such as `license` and `language`.

    Raises:
        ValueError: for a figure that is not finite.
    """
    folder = Path(folder)
    readme = folder / "README.md"
    readme.write_text(renewed_card(folder, repo_id, metadata), encoding="utf-8")
    return readme


def card_metadata(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a card from keywords of `Trainer.create_model_card`, without those that the card has of the run."""
    names = {"finetuned_from": "base_model", "dataset": "datasets", "dataset_tags": "datasets"}
    of_the_run = ("model_name", "tasks", "dataset_args")
    return {
        names.get(name, name): value
        for name, value in keywords.items()
        if value is not None and name not in of_the_run
    }


def renewed_card(folder: Path, repo_id: str | None, metadata: Mapping[str, Any] | None = None) -> str:
    """The README that a folder has, with our block and our metadata as its other files have them now.

    Args:
        folder: of a saved model.
        repo_id: as for `write_card`.
        metadata: further entries of the card's metadata.
    """
    readme = folder / "README.md"
    present = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if not (folder / "results.json").is_file():
        return present
    metadata = dict(metadata or {})
    if present and "license" not in metadata:  # the text names it, too
        metadata["license"] = metadata_of(present).get("license")
    card = model_card(folder, repo_id, metadata)
    return merge_cards(card, present) if present else card


def model_card(folder: str | Path, repo_id: str | None = None, metadata: Mapping[str, Any] | None = None) -> str:
    """The README of a saved folder, all of it from the folder's own files. What is not known is left out.

    Read are `config.json`, `results.json`, and where they exist `recipe.yaml`, `figures/*.png`, `seeds/*.json`
    (results of further seeds: figures become mean and standard deviation; the weights are those of `results.json`)
    and `twin.json` (results of a run without the collapse terms, shown beside).

    Args:
        folder: with the files above.
        repo_id: as for `write_card`.
        metadata: further entries of the card's metadata.

    Raises:
        ValueError: for a figure that is not finite.
    """
    folder = Path(folder)
    # An absolute path says nothing to others.
    source = repo_id or (folder.name if folder.is_absolute() else folder.as_posix())
    own = folder.resolve()
    name = repo_id.split("/")[-1] if repo_id else own.parent.name if own.name == RELEASE_FOLDER else own.name
    config = json.loads((folder / "config.json").read_text())
    results = [_read(path) for path in (folder / "results.json", *sorted((folder / "seeds").glob("*.json")))]
    twin = _read(folder / "twin.json") if (folder / "twin.json").is_file() else None
    recipe = (folder / "recipe.yaml").read_text() if (folder / "recipe.yaml").is_file() else None
    first, head, metadata = results[0], config["nc_hf"]["active_head"], dict(metadata or {})
    dataset, told, base_model = dataset_facts(first), stages(first, recipe), origin(recipe)
    card = ModelCard.from_template(
        card_data=_card_data(folder, name, head, first, dataset, _tags(dataset, told), metadata, base_model),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=escaped(name),
        source=source,
        timm_source=f"hf-hub:{source}" if repo_id else f"local-dir:{source}",
        architecture=config.get("architecture") or config["architectures"][0],
        parameters=parameters(folder),
        input_size=input_size(folder),
        method=first.get("methods", {}).get(head),
        dataset=dataset,
        doors=doors_of(folder),
        needs_nc_hf=needs_nc_hf(folder),
        heads=list(first.get("heads", {})),
        saved_heads=config["nc_hf"]["heads"],
        active_head=head,
        head_names=HEADS,
        accuracies=accuracy_table(results, twin),
        better=better_head(results, head),
        ece=first.get("heads", {}).get(head, {}).get("ece"),
        split=first.get("split"),
        when=_when(first, told),
        seeds=[run["seed"] for run in results if "seed" in run],
        of_seed=f" (seed {first['seed']})" if len(results) > 1 else "",
        class_rows=class_rows(first),
        geometry=geometry_table(first),
        pictures={
            key: (alternative, caption.format(split=first.get("split")))
            for key, (alternative, caption) in PICTURES.items()
            if (folder / "figures" / f"{key}.png").is_file()
        },
        recipe=recipe,
        base_model=base_model and escaped(base_model),
        repeatable=recipe is not None and (base_model is None or is_public(base_model)) and has_public_data(recipe),
        needs_folder=recipe is not None and needs_folder(recipe),
        stages=told,
        skipped=sum(first.get("skipped_images", {}).values()),
        further_seeds=further_seeds(results),
        environment={key: first[key] for key in ("versions", "device", "git_revision") if first.get(key)},
        license=metadata.get("license"),
        citations=citations(config, first),
    )
    return marked(str(card))


def _when(results: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> str | None:
    """Of which epoch the figures are, where that is known."""
    if results.get("epoch") is not None:
        return f"after epoch {results['epoch']:g}"
    if any("best_epoch" in stage for stage in stages):
        return "with the weights of the epoch that was best on the validation images"
    return "after the last epoch" if stages else None


def _read(path: Path) -> dict[str, Any]:
    results = json.loads(path.read_text())
    _check_finite(results, path.name)
    return results


def _card_data(
    folder: Path,
    name: str,
    head: str,
    results: Mapping[str, Any],
    dataset: Mapping[str, Any],
    tags: Sequence[str],
    metadata: Mapping[str, Any],
    base_model: str | None,
) -> ModelCardData:
    library = "nc_hf" if needs_nc_hf(folder) else "timm" if "timm" in doors_of(folder) else "transformers"
    further = dict(metadata)
    if base_model is not None and base_model.count("/") == 1:
        further.setdefault("base_model", base_model)
    own_tags, own_datasets = further.pop("tags", None) or [], further.pop("datasets", None)
    evaluations = []
    for key, value in results.get("heads", {}).get(head, {}).items():
        if key in ACCURACIES or key in ("class_mean_accuracy", "ece"):
            evaluations.append(
                EvalResult(
                    task_type="image-classification",
                    dataset_type=dataset["hub_id"] or dataset["name"],
                    dataset_name=dataset["plain_title"],
                    dataset_split=results.get("split"),
                    metric_type="accuracy" if key == "accuracy" else key,
                    metric_name=ACCURACIES.get(key, key).replace("all", "accuracy"),
                    metric_value=round(value, 4),
                )
            )
    settings = {
        "library_name": library,
        "pipeline_tag": "image-classification",
        "metrics": ["accuracy"] if evaluations else None,
        "model_name": name if evaluations else None,
        "eval_results": evaluations or None,
        **further,
        "tags": list(dict.fromkeys([*tags, *([own_tags] if isinstance(own_tags, str) else own_tags)])),
        "datasets": [dataset["hub_id"]] if dataset["hub_id"] else own_datasets,
    }
    return ModelCardData(**settings)


def _tags(dataset: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of long-tailed data where they were, and of neural collapse unless no stage is known to have had its terms."""
    uneven = dataset.get("largest") != dataset.get("smallest") or "largest" not in dataset
    collapse = not stages or any(stage["within_weight"] or stage["between_weight"] for stage in stages)
    tags = ["long-tailed", "class-imbalance"] * uneven + ["neural-collapse"] * collapse
    return ["image-classification", *tags, "nc_hf"]


def _check_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, so no card is made of it. Check that training did not diverge.")
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in entries:
        _check_finite(item, f"{where}.{key}")
