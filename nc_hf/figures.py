"""The pictures of cards and of the paper, drawn from results and class means and never from a new run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from nc_hf.metrics.angles import best_angle, pairwise_angles
from nc_hf.metrics.long_tail_accuracy import FEW_BELOW, MANY_ABOVE

# Okabe and Ito's colors, told apart with any kind of color vision; markers tell them apart without color.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
BARS = "#BBBBBB"
WIDTH, DPI = 8.0, 200  # inches and dots an inch: 1600 pixels, shown at half that on the Hub
LEGEND_WIDTH = 84  # in letters
MOST_NAMES = 30  # of classes on an axis
MOST_MATRIX_NAMES = 20  # on both axes of a matrix
MOST_CELLS = 1000  # on an axis of a matrix, which has about as many pixels
# For letters that matplotlib's own font lacks.
FURTHER_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "Droid Sans Fallback"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "PingFang SC", "Hiragino Sans", "Arial Unicode MS"),
)
FONTS = ["DejaVu Sans", *filter(set(font_manager.get_font_names()).__contains__, FURTHER_FONTS)]
STYLE = {
    "font.family": FONTS,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "nc_hf",
}


def save_figure(figure: Figure, path: str | Path, *, svg: bool = False) -> None:
    """Write `<path>.png`, and `<path>.svg` if asked; the same figure gives the same bytes.

    Args:
        figure: one of those below.
        path: without a suffix.
        svg: for print and for pages that zoom.
    """
    path = Path(path)
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in a script that the font lacks: a box stands for it
        figure.savefig(path.with_suffix(".png"), dpi=DPI, metadata={"Software": None})
        if svg:
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def class_accuracy_figure(
    class_counts: Sequence[int],
    per_class_accuracy: Mapping[str, Sequence[float | None]],
    class_names: Sequence[str] | None = None,
    *,
    few_below: int = FEW_BELOW,
    many_above: int = MANY_ABOVE,
) -> Figure:
    """Training images per class as bars, and the accuracy of each head per class above them.

    Args:
        class_counts: (K,) training images; classes are ordered by them.
        per_class_accuracy: K accuracies in [0, 1] by the name of a head; None for classes without a test image.
        class_names: K names, shown where there is room.
        few_below: classes with fewer training images are few.
        many_above: classes with more training images are many.

    Raises:
        ValueError: for lists of other lengths, or an accuracy that is not finite.
    """
    counts = np.asarray(class_counts)
    order = np.argsort(-counts, kind="stable")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        lines, positions, size = [], np.arange(len(counts)), 5 if len(counts) <= 200 else 2
        points = {"markersize": size, "clip_on": False}
        for number, (name, accuracies) in enumerate(per_class_accuracy.items()):
            values = np.array([np.nan if a is None else 100 * a for a in _of_length(accuracies, len(counts), name)])
            if len(counts) > MOST_NAMES:  # points without a line, rings so that equal ones are all seen
                points |= {"linestyle": "none", "markerfacecolor": "none", "markersize": size + 2 * number}
            lines += upper.plot(positions, values[order], **_look(number), **points)
        upper.set(ylabel="accuracy (%)", ylim=(-3, 103))
        _legend(upper, lines, per_class_accuracy)
        lower.bar(positions, counts[order], color=BARS, width=0.8 if len(counts) <= 200 else 1.0)
        lower.set(ylabel="training images", xlim=(-0.7, len(counts) - 0.3))
        if counts.max() > 20 * max(1, counts.min()):
            _log_scale(lower, "{x:,.0f}")
        _mark_groups((upper, lower), counts[order], few_below, many_above)
        _name_classes(lower, order, class_names)
    return figure


def _mark_groups(axes: Sequence[Axes], counts: np.ndarray, few_below: int, many_above: int) -> None:
    """Lines between many, medium and few, where both sides have classes, and their names."""
    edges = [0, int((counts > many_above).sum()), int((counts >= few_below).sum()), len(counts)]
    for edge in {edge for edge in edges[1:-1] if 0 < edge < len(counts)}:
        for ax in axes:
            ax.axvline(edge - 0.5, color="black", linewidth=0.8, linestyle=":")
    last, raised = -np.inf, False
    for name, start, stop in zip(("many", "medium", "few"), edges[:-1], edges[1:], strict=True):
        if stop > start:
            middle = (start + stop - 1) / 2
            raised = middle - last < 0.1 * len(counts) and not raised  # names side by side would run into each other
            place = {"xytext": (0, 13 if raised else 0), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes[1].annotate(name, (middle, 1), xycoords=("data", "axes fraction"), fontsize=9, **place)
            last = middle


def _name_classes(ax: Axes, order: np.ndarray | Tensor, class_names: Sequence[str] | None) -> None:
    if class_names is not None and len(order) <= MOST_NAMES:
        names = [_plain(class_names[k]) for k in order]
        long = max(map(len, names)) * len(names) > 90
        ax.set_xticks(range(len(order)), names, rotation=40 if long else 0, ha="right" if long else "center")
    else:
        ax.set_xlabel(f"{len(order)} classes, by number of training images")


def angle_figure(
    means: Mapping[str, Tensor], class_counts: Sequence[int], class_names: Sequence[str] | None = None
) -> Figure:
    """Figure 2 of the paper: pairwise angles of the centered class means, one heat-map a method, on one color scale.

    Args:
        means: (K, P) class means by the name of a method.
        class_counts: (K,) training images; classes are ordered by them, those without any are left out.
        class_names: K names, shown where there is room.

    Raises:
        ValueError: for a mean that is not finite, or fewer than two classes.
    """
    if len(_present(class_counts)) < 2:
        raise ValueError(f"angles are between class means: at least 2 classes need images, got {list(class_counts)}.")
    centered = {name: _centered(mean, class_counts, name) for name, mean in means.items()}
    angles = {name: _cells(pairwise_angles(mean).numpy()) for name, mean in centered.items()}
    order = _present(class_counts)
    best, reachable = best_angle(len(order), next(iter(means.values())).shape[1])
    # Where class means coincide there is no angle.
    defined = [matrix[np.isfinite(matrix)] for matrix in angles.values()]
    known = np.concatenate([*defined, [best]])
    low = min(known.min(), known.max() - 5)  # degrees, so that rounding has no color
    with mpl.rc_context(STYLE):
        width = WIDTH if len(angles) > 1 else 0.65 * WIDTH
        figure = Figure(figsize=(width, 0.9 + WIDTH / max(2, len(angles))), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(angles)))
        most = min(MOST_MATRIX_NAMES, 2 * MOST_MATRIX_NAMES // len(angles))
        names = [_plain(class_names[k]) for k in order] if class_names and len(order) <= most else []
        size = len(next(iter(angles.values())))
        block = -(-len(order) // size)  # classes on each side of a cell
        side, scale = size * block - 0.5, {"cmap": "viridis", "vmin": low, "vmax": known.max()}
        for ax, (name, matrix), found in zip(axes, angles.items(), defined, strict=True):
            image = ax.imshow(matrix, extent=(-0.5, side, side, -0.5), interpolation="nearest", **scale)
            smallest = f"smallest {found.min():.1f}°" if len(found) else "no angle is defined"
            ax.set_title(f"{_plain(name, max(24, 52 // len(angles)))}\n{smallest}", fontsize=10)
            ax.spines[:].set_visible(True)
            if names:
                ax.set_xticks(range(len(names)), names, rotation=90)
                ax.set_yticks(range(len(names)), names if ax is axes[0] else [])
            else:
                cells = f"\n(a cell: smallest angle of {block} x {block})" if block > 1 else ""
                ax.set(xlabel=f"class, by number of training images{cells}")
        # The line on the scale is the best angle, which the words beside it name.
        words = f"angle (degrees); {'best' if reachable else 'bound'} {best:.1f}°"
        bar = figure.colorbar(image, ax=axes, label=words, shrink=0.85)
        bar.ax.axhline(best, color="white", linewidth=2.5)
        bar.ax.axhline(best, color="black", linewidth=1.2)
    return figure


def _cells(angles: np.ndarray) -> np.ndarray:
    """(K, K) angles without the diagonal; where K > MOST_CELLS, the smallest of each square block of them."""
    np.fill_diagonal(angles, np.nan)
    block = -(-len(angles) // MOST_CELLS)
    if block == 1:
        return angles
    padded = np.pad(angles, (0, -len(angles) % block), constant_values=np.nan)
    return np.fmin.reduce(padded.reshape(len(padded) // block, block, -1, block), axis=(1, 3))


def norm_figure(
    means: Mapping[str, Tensor], class_counts: Sequence[int], class_names: Sequence[str] | None = None
) -> Figure:
    """Figure 3 of the paper: norms of the centered class means, classes ordered by size, one line a method.

    Norms are divided by their mean, since the scale of features is each network's own.

    Args:
        means: (K, P) class means by the name of a method.
        class_counts: (K,) training images; classes without any are left out.
        class_names: K names, shown where there is room.

    Raises:
        ValueError: for a mean that is not finite, or fewer than two classes.
    """
    if len(_present(class_counts)) < 2:
        raise ValueError(f"norms are beside their mean: at least 2 classes need images, got {list(class_counts)}.")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        ax, lines = figure.subplots(), []
        for number, (name, mean) in enumerate(means.items()):
            norms = _centered(mean, class_counts, name).norm(dim=1).numpy()
            size = 5 if len(norms) <= 100 else 2
            lines += ax.plot(norms / norms.mean(), markersize=size, **_look(number))
        ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
        _name_classes(ax, _present(class_counts), class_names)
        ax.set_ylabel("norm of the centered\nclass mean / their mean")
        ax.set_ylim(bottom=0)
        _legend(ax, lines, means)
    return figure


def collapse_figure(courses: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """NC1 to NC4 of the training features over the epochs, one color a method.

    Args:
        courses: records with `epoch` and keys of `measure_geometry`, by the name of a method; of two records of one
            epoch the last counts.

    Raises:
        ValueError: for a course without a record.
    """
    panels = {
        "nc1_variability_balanced": "NC1: within- / between-class\nvariability",
        "nc2_angle_gap": "NC2: smallest angle below\nthe optimum (degrees)",
        "nc3_duality_gap": "NC3: distance of head\nand class means",
        "nc4_agreement": "NC4: images not predicted\nas by the nearest mean (%)",
    }
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
        axes, lines = figure.subplots(2, 2, sharex=True), []
        for number, (name, records) in enumerate(courses.items()):
            if not records:
                raise ValueError(f"there is no record of {name!r}. Train with CollapseCallback (geometry_every).")
            course = {record["epoch"]: record for record in records}
            for ax, key in zip(axes.flat, panels, strict=True):
                points = [(epoch, record[key]) for epoch, record in sorted(course.items()) if key in record]
                epochs, values = zip(*points, strict=True) if points else ((), ())
                values = [100 * (1 - value) for value in values] if key == "nc4_agreement" else values
                lines += ax.plot(epochs, values, markersize=4, **_look(number))
        for ax, (key, label) in zip(axes.flat, panels.items(), strict=True):
            ax.set_ylabel(label)
            if key == "nc1_variability_balanced":
                if any(max(line.get_ydata(), default=0) > 0 for line in ax.lines):  # a logarithm has no 0
                    _log_scale(ax, "{x:g}")
            elif key != "nc2_angle_gap":
                ax.set_ylim(bottom=0)
        for ax in axes[1]:
            ax.set_xlabel("epoch")
        _legend(axes[0, 0], lines[:: len(panels)], courses)
    return figure


def _centered(means: Tensor, class_counts: Sequence[int], name: str) -> Tensor:
    """Class means of the present classes by falling size, minus their mean, (K', P) in float64."""
    means = means.detach().cpu().double()[_present(class_counts)]
    if not means.isfinite().all():
        raise ValueError(f"the class means of {name!r} are not finite. Check that training did not diverge.")
    return means - means.mean(dim=0)


def _present(class_counts: Sequence[int]) -> Tensor:
    """Indices of the classes with training images, by falling size."""
    counts = torch.as_tensor(class_counts)
    order = counts.argsort(descending=True, stable=True)
    return order[counts[order] > 0]


def _of_length(values: Sequence[Any], length: int, name: str) -> Sequence[Any]:
    if len(values) != length:
        raise ValueError(f"{name!r} has {len(values)} accuracies for {length} classes.")
    if not all(value is None or np.isfinite(value) for value in values):
        raise ValueError(f"{name!r} has an accuracy that is not finite. Check that training did not diverge.")
    return values


def _legend(ax: Axes, lines: Sequence[Any], names: Iterable[str]) -> None:
    """A legend above the axes, in as many columns as the names leave room for."""
    # Given one by one, since matplotlib leaves out labels that begin with an underscore.
    labels = [_plain(name) for name in names]
    columns = min(4, max(1, LEGEND_WIDTH // (max(map(len, labels), default=0) + 6)))
    ax.legend(lines, labels, frameon=False, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1))


def _log_scale(ax: Axes, numbers: str) -> None:
    """A logarithmic axis with plain numbers, also where it covers little more than a decade."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(StrMethodFormatter(numbers))
    low, high = ax.get_ylim()
    # All nine would run into each other.
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5) if high < 20 * low else (2, 5)))
    ax.yaxis.set_minor_formatter(StrMethodFormatter(numbers) if high < 200 * low else NullFormatter())


def _look(number: int) -> dict[str, str]:
    rounds = number // len(COLORS)  # of the colors, in each of which they have other markers
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[(number + rounds) % len(MARKERS)]}


def _plain(name: Any, most: int = 24) -> str:
    """A name as matplotlib shows it: one line, no formulas, of at most so many letters."""
    text = " ".join(str(name).split()).replace("$", r"\$")
    return text if len(text) <= most else f"{text[: most - 1]}…"
