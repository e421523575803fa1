"""The tables of a model card: accuracies by head, accuracies by class, and the geometry of the features."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nc_hf.card_block import escaped
from nc_hf.paper_results import paper_accuracy

MOST_ROWS = 20  # of classes in a table; more are in results.json
NONE = "–"
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
COLUMNS = {
    "accuracy": "all",
    "class_mean_accuracy": "class mean",
    "accuracy_many": "many",
    "accuracy_medium": "medium",
    "accuracy_few": "few",
    "ece": "ECE",
    "paper": "paper (difference)",
}
GEOMETRY = {
    "nc1_variability_balanced": "NC1, within- to between-class variability (classes counted alike)",
    "nc2_norm_cov": "NC2, variation of the norms of the centered class means",
    "nc2_min_angle": "NC2, smallest angle between them (degrees{best})",
    "nc3_duality_gap": "NC3, distance of head and class means",
    "nc4_agreement": "NC4, agreement with the nearest class mean",
}


def accuracy_table(results: Sequence[Mapping[str, Any]], twin: Mapping[str, Any] | None) -> dict[str, Any]:
    """Columns and rows, one a head and one of the twin run, and whether there are gaps.

    Cells are percentages, with the standard deviation of several seeds. A column without any figure is left out, and
    the class mean where it is the accuracy, as it is on balanced test images.

    Args:
        results: of one run, and of further seeds.
        twin: results of a run without the collapse terms.
    """
    rows = (
        []
        if twin is None
        else [_row([twin], "base", f"the same without the collapse terms{', one run' * (len(results) > 1)}")]
    )
    rows += [_row(results, head, f"{HEADS.get(head, head)} (`{head}`)") for head in results[0].get("heads", {})]
    keys = [key for key in COLUMNS if any(row[key] != NONE for row in rows)]
    if all(row["class_mean_accuracy"] in (NONE, row["accuracy"]) for row in rows):
        keys = [key for key in keys if key != "class_mean_accuracy"]
    cells = [[row[key] for key in keys] for row in rows]
    return {
        "columns": [COLUMNS[key] for key in keys],
        "rows": [(row["label"], shown) for row, shown in zip(rows, cells, strict=True)],
        "gaps": any(NONE in shown for shown in cells),
    }


def _row(results: Sequence[Mapping[str, Any]], head: str, label: str) -> dict[str, str]:
    runs = [run["heads"][head] for run in results if head in run.get("heads", {})]
    method, printed = results[0].get("methods", {}).get(head), paper_accuracy(results[0], head)
    if head in (taus := results[0].get("taus", {})):
        chosen_on = results[0].get("taus_chosen_on")
        where = "these images" if chosen_on == results[0].get("split") else f"{chosen_on} images"
        label += f", tau {taus[head]:g}" + (f" (chosen on {where})" if chosen_on else "")
    row = {"label": f"{method}: {label}" if method else label, "paper": NONE}
    for key in COLUMNS.keys() - row.keys():
        values = [100 * run[key] for run in runs if key in run]
        row[key] = _mean_and_deviation(values) if values else NONE
    if printed is not None:
        difference = statistics.mean(100 * run["accuracy"] for run in runs) - printed
        row["paper"] = f"{printed:.1f} ({difference:+.1f})"
    return row


def _mean_and_deviation(values: Sequence[float]) -> str:
    text = f"{statistics.mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.1f}"


def better_head(results: Sequence[Mapping[str, Any]], deployed: str) -> dict[str, str] | None:
    """The head with a higher class-mean accuracy than the deployed one, and both figures; None where there is none.

    Args:
        results: of one run, and of further seeds.
        deployed: name of the head that every door gives.
    """
    means = {}
    for head in results[0].get("heads", {}):
        runs = [run["heads"][head] for run in results if head in run["heads"]]
        means[head] = 100 * statistics.mean(run.get("class_mean_accuracy", run["accuracy"]) for run in runs)
    best = max(means, key=means.__getitem__, default=deployed)
    if deployed not in means or means[best] - means[deployed] < 0.05:  # less than what is shown
        return None
    return {"head": best, "accuracy": f"{means[best]:.1f}", "deployed": f"{means[deployed]:.1f}"}


def class_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, training images and accuracies of each class, the largest first; none for many classes."""
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
    return NONE if share is None else f"{100 * share:.1f}"


def geometry_table(results: Mapping[str, Any]) -> dict[str, Any]:
    """Columns (splits) and rows; empty where nothing was measured.

    What all heads have in common, as the geometry of a frozen backbone's features, is one row.
    """
    heads = results.get("geometry", {})
    splits = list(dict.fromkeys(split for measured in heads.values() for split in measured))
    values = [values for measured in heads.values() for values in measured.values()]
    optima = {round(found["nc2_best_angle"], 1) for found in values if "nc2_best_angle" in found}
    best = f"; at best {next(iter(optima)):.1f}" if len(optima) == 1 else ""
    rows = []
    for key, label in GEOMETRY.items():
        cells = {
            head: [_number(measured.get(split, {}), key, among=optima) for split in splits]
            for head, measured in heads.items()
        }
        kinds = set(map(tuple, cells.values()))
        if len(kinds) == 1 and kinds != {(NONE,) * len(splits)}:
            rows.append((label.format(best=best), *kinds))
        elif len(kinds) > 1:
            rows += [(f"{label.format(best=best)}, `{head}`", shown) for head, shown in cells.items()]
    return {"columns": splits, "rows": rows}


def _number(measured: Mapping[str, float], key: str, among: Collection[float]) -> str:
    """A quantity of a split; an angle beside the best one of that split, where splits differ by missing classes."""
    if key not in measured:
        return NONE
    best = measured.get("nc2_best_angle") if key == "nc2_min_angle" and len(among) > 1 else None
    return f"{measured[key]:.3g}" + ("" if best is None else f" of {best:.1f}")
