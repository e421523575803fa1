"""Model cards: what a visitor of a Hub repository reads, rendered from what a run measured and nothing else."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from nc_hf.card_block import escaped, marked, merge_cards
from nc_hf.data.provenance import LONG_TAIL_CITATION, PROVENANCE
from nc_hf.doors import doors_of, needs_nc_hf
from nc_hf.metrics.long_tail_accuracy import FEW_BELOW, MANY_ABOVE, frequency_groups
from nc_hf.models.saved_folder import WEIGHTS
from nc_hf.paper_results import paper_accuracy

TEMPLATE = Path(__file__).with_name("model_card_template.md")
MOST_ROWS = 20  # of classes in a table; more are in results.json
HEADS = {
    "base": "stage one",
    "crt": "stage two, re-trained head",
    "lws": "stage two, learned scales",
    "tau_norm": "stage one's head, weights normalized",
    "logit_adjusted": "stage one's head, adjusted by the prior",
    "ncm": "nearest class mean",
    "least_squares": "least squares on class-balanced features",
}
ACCURACIES = {"accuracy": "all", "accuracy_many": "many", "accuracy_medium": "medium", "accuracy_few": "few"}
PICTURES = {
    "classes": "Training images per class, and accuracy per class on the test images.",
    "angles": "Angles between the centered class means of the training features (Figure 2 of the paper).",
    "norms": "Norms of the centered class means, classes ordered by size (Figure 3 of the paper).",
    "collapse": "NC1 to NC4 of the training features while stage one was trained.",
}
GEOMETRY = {
    "nc1_variability_balanced": "NC1, within- to between-class variability (classes counted alike)",
    "nc2_norm_cov": "NC2, variation of the norms of the centered class means",
    "nc2_min_angle": "NC2, smallest angle between them (degrees{best})",
    "nc3_duality_gap": "NC3, distance of head and class means",
    "nc4_agreement": "NC4, agreement with the nearest class mean",
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
    config = json.loads((folder / "config.json").read_text())
    results = [_read(path) for path in (folder / "results.json", *sorted((folder / "seeds").glob("*.json")))]
    twin = _read(folder / "twin.json") if (folder / "twin.json").is_file() else None
    recipe = (folder / "recipe.yaml").read_text() if (folder / "recipe.yaml").is_file() else None
    first, saved = results[0], config["nc_hf"]
    dataset = _dataset_facts(first)
    card = ModelCard.from_template(
        card_data=_card_data(folder, source, saved["active_head"], first, dataset, dict(metadata or {})),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=escaped(source.split("/")[-1]),
        source=source,
        timm_source=f"hf-hub:{source}" if repo_id else f"local-dir:{source}",
        architecture=config.get("architecture") or config["architectures"][0],
        parameters=_parameters(folder),
        method=first.get("methods", {}).get(saved["active_head"]),
        dataset=dataset,
        doors=doors_of(folder),
        needs_nc_hf=needs_nc_hf(folder),
        heads=list(first.get("heads", {})) or saved["heads"],
        active_head=saved["active_head"],
        head_names=HEADS,
        accuracy_rows=_accuracy_rows(results, twin),
        split=first.get("split"),
        seeds=[run["seed"] for run in results if "seed" in run],
        class_rows=_class_rows(first),
        geometry=_geometry_rows(first),
        pictures={key: text for key, text in PICTURES.items() if (folder / "figures" / f"{key}.png").is_file()},
        recipe=recipe,
        stages=_stages(first, recipe),
        skipped=sum(first.get("skipped_images", {}).values()),
        environment={key: first[key] for key in ("versions", "device", "git_revision") if first.get(key)},
        citations=_citations(first),
    )
    return marked(str(card))


def _read(path: Path) -> dict[str, Any]:
    results = json.loads(path.read_text())
    _check_finite(results, path.name)
    return results


def _card_data(
    folder: Path,
    source: str,
    head: str,
    results: Mapping[str, Any],
    dataset: Mapping[str, Any],
    metadata: dict[str, Any],
) -> ModelCardData:
    library = "nc_hf" if needs_nc_hf(folder) else "timm" if "timm" in doors_of(folder) else "transformers"
    tags = ["image-classification", "long-tailed", "class-imbalance", "neural-collapse", "nc_hf"]
    evaluations = []
    for key, value in results.get("heads", {}).get(head, {}).items():
        if key in ACCURACIES or key in ("class_mean_accuracy", "ece"):
            evaluations.append(
                EvalResult(
                    task_type="image-classification",
                    dataset_type=dataset.get("hub_id") or dataset["name"],
                    dataset_name=dataset["title"],
                    dataset_split=results.get("split"),
                    metric_type="accuracy" if key == "accuracy" else key,
                    metric_name=ACCURACIES.get(key, key).replace("all", "accuracy"),
                    metric_value=round(value, 4),
                )
            )
    return ModelCardData(
        library_name=library,
        pipeline_tag="image-classification",
        tags=[*tags, *metadata.pop("tags", [])],
        datasets=[dataset["hub_id"]] if dataset.get("hub_id") else metadata.pop("datasets", None),
        metrics=["accuracy"] if evaluations else None,
        model_name=source.split("/")[-1] if evaluations else None,
        eval_results=evaluations or None,
        **metadata,
    )


def _dataset_facts(results: Mapping[str, Any]) -> dict[str, Any]:
    """Name, title and sizes of the data set, and what it says of itself."""
    facts = dict(results["dataset"])
    known, counts = PROVENANCE.get(facts.get("name")), facts.get("class_counts")
    facts["name"] = facts.get("name") or "own images"
    facts["title"] = known.title if known else escaped(facts["name"])
    if facts.get("imbalance_ratio"):
        facts["title"] += f"-LT, imbalance ratio {facts['imbalance_ratio']:g}"
    facts["hub_id"] = known.hub_id if known else None
    facts["classes"] = len(facts["class_names"])
    if counts is None:
        return facts
    facts |= {"images": sum(counts), "largest": max(counts), "smallest": min(counts)}
    facts["empty"] = [escaped(name) for name, n in zip(facts["class_names"], counts, strict=True) if n == 0]
    bounds = {"few_below": facts.get("few_below", FEW_BELOW), "many_above": facts.get("many_above", MANY_ABOVE)}
    groups = frequency_groups(counts, **bounds)
    facts["groups"] = bounds | {name: int(members.sum()) for name, members in groups.items()}
    return facts


def _parameters(folder: Path) -> int:
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = [name for name in file.keys() if not name.endswith(("running_mean", "running_var", "batches_tracked"))]
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def _accuracy_rows(results: Sequence[Mapping[str, Any]], twin: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """One row a head, and one of the twin run: percentages, with the standard deviation of several seeds."""
    rows = [] if twin is None else [_row([twin], "base", "the same without the collapse terms")]
    return rows + [_row(results, head, f"{HEADS.get(head, head)} (`{head}`)") for head in results[0].get("heads", {})]


def _row(results: Sequence[Mapping[str, Any]], head: str, label: str) -> dict[str, str]:
    runs = [run["heads"][head] for run in results if head in run.get("heads", {})]
    method, printed = results[0].get("methods", {}).get(head), paper_accuracy(results[0], head)
    row = {"label": f"{method}: {label}" if method else label, "paper": "–"}
    for key in (*ACCURACIES, "class_mean_accuracy", "ece"):
        values = [100 * run[key] for run in runs if key in run]
        row[key] = _mean_and_deviation(values) if values else "–"
    if printed is not None:
        difference = statistics.mean(100 * run["accuracy"] for run in runs) - printed
        row["paper"] = f"{printed:.1f} ({difference:+.1f})"
    return row


def _mean_and_deviation(values: Sequence[float]) -> str:
    text = f"{statistics.mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.1f}"


def _class_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    dataset, heads = results["dataset"], results.get("heads", {})
    names, counts = dataset["class_names"], dataset.get("class_counts")
    measured = heads and all("per_class_accuracy" in metrics for metrics in heads.values())
    if len(names) > MOST_ROWS or counts is None or not measured:
        return []
    order = sorted(range(len(names)), key=lambda k: -counts[k])
    return [
        {
            "name": escaped(names[k]),
            "images": counts[k],
            "accuracies": [_percent(heads[head]["per_class_accuracy"][k]) for head in heads],
        }
        for k in order
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _geometry_rows(results: Mapping[str, Any]) -> dict[str, Any]:
    """Columns (head and split) and rows of the geometry table; empty where nothing was measured."""
    measured = [
        (f"`{head}`, {split}", values)
        for head, splits in results.get("geometry", {}).items()
        for split, values in splits.items()
    ]
    best = next((values["nc2_best_angle"] for _, values in measured if "nc2_best_angle" in values), None)
    best = "" if best is None else f"; at best {best:.1f}"
    rows = [
        (label.format(best=best), [f"{values[key]:.3g}" if key in values else "–" for _, values in measured])
        for key, label in GEOMETRY.items()
    ]
    return {"columns": [column for column, _ in measured], "rows": rows}


def _stages(results: Mapping[str, Any], recipe: str | None) -> list[dict[str, Any]]:
    """The settings of each stage that was run, and the hours it took."""
    if recipe is None:
        return []
    settings = yaml.safe_load(recipe)
    return [
        {"number": number, "hours": results["training"][stage].get("seconds", 0) / 3600, **settings[stage]}
        for number, stage in enumerate(("stage1", "stage2"), start=1)
        if settings[stage] is not None and stage in results.get("training", {})
    ]


def _citations(results: Mapping[str, Any]) -> list[str]:
    dataset = results["dataset"]
    known = PROVENANCE.get(dataset.get("name"))
    return [*([known.citation] if known else []), *([LONG_TAIL_CITATION] if dataset.get("imbalance_ratio") else [])]


def _check_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, so no card is made of it. Check that training did not diverge.")
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in entries:
        _check_finite(item, f"{where}.{key}")
