"""The paper's tables and figures as text and pictures, its numbers beside ours, from results that are there."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nc_hf.paper_figures import FigureSpec
from nc_hf.paper_tables import Setting, Table
from nc_hf.recipe import Recipe
from nc_hf.recipe_sections import defaults_of
from nc_hf.reproduction import MEANS, Found, Plan
from nc_hf.retraining_args import TRAINED_HEADS

CLOSE = 1.0  # points below the paper that still count as reproduced
ROUNDING = 1e-9
JUDGED = ("nc", "ce_drw")  # how the methods begin that have to


def render_table(table: Table, setting: Setting, plans: dict[str, Plan]) -> str:
    """Markdown of one data set's column of a table: the paper's numbers beside ours, and what the paper claims.

    Args:
        table: of the paper.
        setting: one of its data sets.
        plans: of the rows to show, by printed name.
    """
    several = len(table.metrics) > 1
    numbers = ["paper", "ours", "difference"]
    if not table.printed:
        numbers = list(table.metrics.values())
    elif several:
        numbers = [f"{title}: ours / paper (difference)" for title in table.metrics.values()]
    header = ["method", *numbers, "seeds", "epochs", "precision", "wall time", "protocol"]
    lines = [f"## {table.title}: {setting.title}", "", _line(header), _line(["---"] * len(header))]
    shared, ours, counted = _shared_protocol(plans.values()), {}, {}
    for name, plan in plans.items():
        found = [one for one in plan.found() if any(_values([one], plan.row.head, key) for key in table.metrics)]
        counted[name] = found
        printed = _printed(table, setting, name)
        cells = [_values(found, plan.row.head, metric) for metric in table.metrics]
        if values := _values(found, plan.row.head, "accuracy"):
            ours[name] = statistics.mean(values)
        if not table.printed:
            shown = [_mean(values) for values in cells]
        elif several:
            shown = [_beside(values, paper) for values, paper in zip(cells, printed, strict=True)]
        else:
            shown = [_number(printed[0]), _mean(cells[0]), _difference(cells[0], printed[0])]
        lines.append(_line([name, *shown, *_circumstances(plan, found, shared)]))
    lines += [
        "",
        f"Where a row says nothing else: {', '.join([*shared.values(), 'last epoch'])}.",
        "",
        *_order(table, setting, plans, counted),
        *_closeness(table, setting, plans, ours),
        *_gains(table, setting, plans, counted),
    ]
    return "\n".join([*lines, *([table.note] if table.note else [])]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _printed(table: Table, setting: Setting, name: str) -> tuple[float | None, ...]:
    cell = table.printed[name][table.settings.index(setting)] if name in table.printed else None
    return cell if isinstance(cell, tuple) else (cell,) * len(table.metrics)


def _values(found: Sequence[Found], head: str, metric: str) -> list[float]:
    """Percentages of the seeds that have the metric."""
    return [value for one in found if (value := one.value(head, metric)) is not None]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "not run"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _difference(values: Sequence[float], printed: float | None) -> str:
    return "-" if not values or printed is None else f"{statistics.mean(values) - printed:+.1f}"


def _beside(values: Sequence[float], printed: float | None) -> str:
    difference = _difference(values, printed)
    return f"{_mean(values)} / {_number(printed)}" + (f" ({difference})" if difference != "-" else "")


def _circumstances(plan: Plan, found: Sequence[Found], shared: Mapping[str, str]) -> list[str]:
    """Seeds, epochs, precision, wall time, and what of the protocol the rows do not share."""
    recipe = plan.recipe()
    if recipe is None:
        return ["-"] * 4 + [f"there is no recipe {plan.name}"]
    seeds = ", ".join(str(one.seed) for one in found) or "-"
    precisions = ", ".join(sorted({one.precision for one in found})) or "-"
    own = [part for key, part in protocol(recipe, plan.row.head).items() if shared.get(key) != part]
    notes = [", ".join([plan.name, *own])]
    if unused := {path.name for path in plan.folder.glob("seed*.json")} - {one.path.name for one in found}:
        notes.append(f"{', '.join(sorted(unused))} not used: of another recipe, or without this measurement")
    if any("not the standard subset" in one.results["dataset"].get("description", "") for one in found):
        notes.append("not the standard subset")
    if skipped := sum(sum(one.results.get("skipped_images", {}).values()) for one in found):
        notes.append(f"{skipped} images could not be read")
    epochs = "-" if recipe.stage1 is None else f"{(defaults_of('stage1') | recipe.stage1)['num_train_epochs']:g}"
    return [seeds, epochs, precisions, _wall_time(plan.row.head, found), "; ".join(notes)]


def _wall_time(head: str, found: Sequence[Found]) -> str:
    """Mean over the seeds of which it is known; a run that was interrupted does not know its own."""
    seconds = []
    for one in found:
        stages = one.results["training"]
        parts = [stages[s].get("seconds") for s in stages if s == "stage1" or head != "base"]
        seconds += [sum(parts)] if parts and None not in parts else []
    return f"{statistics.mean(seconds) / 60:.0f} min" if seconds else "-"


def _shared_protocol(plans: Iterable[Plan]) -> dict[str, str]:
    """What most rows have of that which all rows have to say."""
    protocols = [protocol(recipe, plan.row.head) for plan in plans if (recipe := plan.recipe()) is not None]
    keys = [key for key in (protocols[0] if protocols else ()) if all(key in other for other in protocols)]
    return {key: statistics.mode(other[key] for other in protocols) for key in keys}


def protocol(recipe: Recipe, head: str = "base") -> dict[str, str]:
    """What decides a row's number, in words: network, images, optimizer, re-balancing, terms, second stage.

    Args:
        recipe: of the row.
        head: of the run.
    """
    parts = {"model": recipe.model.name, "augmentation": recipe.data.augmentation}
    if recipe.model.head_type != "linear":
        parts["head"] = f"{recipe.model.head_type} head"
    if recipe.stage1 is not None:
        stage = defaults_of("stage1") | recipe.stage1
        batch = stage["per_device_train_batch_size"] * stage["gradient_accumulation_steps"]
        parts["batch"] = f"batch {batch * (stage['expected_processes'] or 1)}"
        if stage["ghost_batch_size"]:
            parts["ghost"] = f"ghost batches of {stage['ghost_batch_size']}"
        parts["optimizer"] = f"{stage['optim']} {stage['learning_rate']:g}, weight decay {stage['weight_decay']:g}"
        if stage["lr_milestones"]:
            milestones = " and ".join(f"{milestone:g}" for milestone in stage["lr_milestones"])
            parts["schedule"] = f"learning rate times {stage['lr_decay']:g} at {milestones}"
        else:
            parts["schedule"] = "cosine" if stage["lr_cosine"] else f"{stage['lr_scheduler_type']} schedule"
        if stage["warmup_epochs"]:
            parts["warmup"] = f"warm-up up to {_when(stage['warmup_epochs'])}"
        parts["mixup"] = f"mixup {stage['mixup_alpha']:g}"
        if stage["cutmix_alpha"]:
            parts["cutmix"] = f"CutMix {stage['cutmix_alpha']:g}"
        parts["loss"] = f"loss {stage['loss']}"
        if stage["label_smoothing_factor"]:
            parts["smoothing"] = f"labels smoothed by {stage['label_smoothing_factor']:g}"
        for name in ("loss_settings", "objective_settings"):
            parts |= {f"{name}.{key}": f"{key} {value}" for key, value in stage[name].items()}
        if stage["sampler"] != "instance":
            parts["sampler"] = f"{stage['sampler']} sampling"
        if stage["class_weighting"] != "none":
            parts["weighting"] = f"{stage['class_weighting']} weights"
            if stage["drw_epoch"] is not None:
                parts["weighting"] += f" from {_when(stage['drw_epoch'])}"
        terms = {"L_W": stage["within_weight"], "L_B": stage["between_weight"]}
        if any(terms.values()):
            kind = {"mean": "", "images": " as center loss"}.get(stage["within_reduction"], " as a sum")
            kinds = {"L_W": kind, "L_B": ""}
            weights = ", ".join(f"{name} {weight:g}{kinds[name]}" for name, weight in terms.items() if weight)
            parts["terms"] = f"{weights}, {stage['centers']} centers"
            if stage["start_epoch"]:
                parts["terms"] += f", from {_when(stage['start_epoch'])}"
    if head != "base" and recipe.stage2 is not None:
        parts["stage2"] = _second_stage(recipe, head) if head in TRAINED_HEADS else f"{head}, computed"
    return parts


def _when(value: float) -> str:
    """A number of epochs, or a share of the run."""
    return f"{value:g} of the run" if 0 < value < 1 else f"epoch {value:g}"


def _second_stage(recipe: Recipe, head: str) -> str:
    """How a head was trained."""
    usual = defaults_of("stage2")
    stage = usual | recipe.stage2
    parts = [f"{head} {stage['num_train_epochs']:g} epochs", f"weight decay {stage['weight_decay']:g}"]
    if stage["sampler"] != usual["sampler"]:
        parts.append(f"{stage['sampler']} sampling")
    if stage["class_weighting"] != "none":
        parts.append(f"{stage['class_weighting']} weights")
    for name in ("loss", "learning_rate", "lws_weight_factor", "head_init", "max_norm_threshold"):
        if stage[name] != usual[name]:
            parts.append(f"{name} {stage[name]}")
    if stage["match_base_norm"]:
        parts.append("norm of stage one's")
    return f"{parts[0]} ({', '.join(parts[1:])})"


def _order(
    table: Table, setting: Setting, plans: Mapping[str, Plan], counted: Mapping[str, Sequence[Found]]
) -> list[str]:
    """Whether ours have the paper's order, each two beside each other by the seeds of both, else by all of each."""
    every = table.order[::2]
    values = {
        name: _by_seed(counted.get(name, ()), plans[name].row.head, "accuracy") for name in every if name in plans
    }
    names = [name for name in every if values.get(name)]
    if len(names) < 2:
        return []
    wrong = []
    for left, right in itertools.pairwise(names):
        shared = values[left].keys() & values[right].keys()
        first, second = (_mean_of(values[name], shared or values[name]) for name in (left, right))
        strict = "<" in table.order[table.order.index(left) : table.order.index(right)]
        if first > second or (first == second and strict and not _printed_alike(table, setting, left, right)):
            apart = shared and values[left].keys() != values[right].keys()
            seeds = f" (seed {', '.join(map(str, sorted(shared)))})" if apart else ""
            wrong.append(f"{left} {first:.1f}, {right} {second:.1f}{seeds}")
    verdict = f"fails: {'; '.join(wrong)}" if wrong else "holds"
    return [f"Order {' '.join(table.order)}: {verdict}{_without([name for name in every if name not in names])}.", ""]


def _closeness(table: Table, setting: Setting, plans: Mapping[str, Plan], ours: Mapping[str, float]) -> list[str]:
    """Which means of the paper's own methods come within 1.0 of its numbers.

    Other methods' numbers are copied from other papers, whose protocols differ.
    """
    judged = [name for name in ours if plans[name].row.method.startswith(JUDGED)] if len(table.metrics) == 1 else []
    printed = {name: value for name in judged if (value := _printed(table, setting, name)[0]) is not None}
    if not printed:
        return []
    below = [name for name, value in printed.items() if ours[name] < value - CLOSE - ROUNDING]
    verdict = f"all but {', '.join(below)}" if below else "all"
    return [
        f"Within {CLOSE:.1f} of the paper or above it, of CE-DRW and the rows with NC: "
        f"{verdict} of the {len(printed)} that were run.",
        "",
    ]


def _by_seed(found: Sequence[Found], head: str, metric: str) -> dict[int, float]:
    return {one.seed: value for one in found if (value := one.value(head, metric)) is not None}


def _mean_of(values: Mapping[int, float], seeds: Iterable[int]) -> float:
    return statistics.mean(values[seed] for seed in seeds)


def _printed_alike(table: Table, setting: Setting, left: str, right: str) -> bool:
    """Whether the paper has one number for both, which is not None."""
    numbers = {_printed(table, setting, name) for name in (left, right)}
    return len(numbers) == 1 and None not in next(iter(numbers))


def _gains(
    table: Table, setting: Setting, plans: Mapping[str, Plan], counted: Mapping[str, Sequence[Found]]
) -> list[str]:
    """What NC adds to a row of the same settings, over the seeds of both, beside the paper's.

    By the accuracy of all classes, or where the table has none by its first metric.
    """
    metric = "accuracy" if "accuracy" in table.metrics else next(iter(table.metrics))
    title, lines, gains = table.metrics[metric], [], []
    pairs = [(plain, other) for plain in plans for other in _with_terms(plain) if other in plans]
    for name, other in pairs:
        plain, with_nc = (_by_seed(counted[row], plans[row].row.head, metric) for row in (name, other))
        seeds = [seed for seed in plain if seed in with_nc]
        if seeds:
            gain = statistics.mean(with_nc[seed] - plain[seed] for seed in seeds)
            gains.append(gain)
            before, after = (_printed(table, setting, row)[list(table.metrics).index(metric)] for row in (name, other))
            paper = "" if None in (before, after) else f", in the paper {after - before:+.1f}"
            lines.append(f"NC adds to {name} ({title}): {gain:+.1f} (seed {', '.join(map(str, seeds))}){paper}.")
    if len(gains) > 1:
        lines.append(f"NC helps {sum(round(gain, 1) > 0 for gain in gains)} of these {len(gains)} rows.")
    return [*lines, ""] if lines else []


def _with_terms(name: str) -> tuple[str, ...]:
    """What tables call the row of that name with NC."""
    method, bracket, rest = name.partition(" (")
    return f"{method}+NC{bracket}{rest}", f"{name} + NC"


def _without(missing: Sequence[str]) -> str:
    return f" (without {', '.join(missing)})" if missing else ""


# ---- Figures ----


def draw_paper_figure(spec: FigureSpec, panels: Mapping[str, Sequence[Plan]], path: Path) -> list[str]:
    """Draw a figure from stored results, as PNG and SVG; where there are none at all, nothing is drawn.

    Args:
        spec: of the figure.
        panels: by title the rows that can stand for it; the first that has results does.
        path: of the picture, without a suffix.

    Returns:
        What the panels show, and which are missing, a line each.
    """
    from safetensors.torch import load_file

    from nc_hf.figures import angle_figure, class_accuracy_figure, collapse_figure, norm_figure, save_figure

    shown, counts, names, lines = {}, [], [], []
    for title, plans in panels.items():
        plan, one = next(((plan, one) for plan in plans for one in plan.means()), (None, None))
        if one is None:
            lines.append(f"{title}: not run ({' or '.join(plan.name for plan in plans)})")
            continue
        if spec.kind == "collapse" and not one.results.get("geometry_course"):
            lines.append(f"{title}: not followed over the epochs (evaluation.geometry_every) in {one.path}")
            continue
        if spec.kind == "collapse":
            shown[title] = one.results["geometry_course"]
        elif spec.kind == "classes":
            shown[title] = one.results["heads"][plan.row.head]["per_class_accuracy"]
        else:
            shown[title] = load_file(one.means_path)[MEANS]
        # The long-tailed set orders the classes; in the balanced one all are alike.
        counts = max(counts, one.results["dataset"]["class_counts"], key=lambda sizes: len(set(sizes)))
        names = one.results["dataset"]["class_names"]
        lines.append(f"{title}: {one.path}")
    if shown:
        if spec.kind == "collapse":
            figure = collapse_figure(shown)
        elif spec.kind == "classes":
            figure = class_accuracy_figure(counts, shown, names)
        else:
            figure = (angle_figure if spec.kind == "angles" else norm_figure)(shown, counts, names)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path, svg=True)
    return lines
