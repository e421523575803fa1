"""The pictures show what they are given: ordered by size, on one scale, whatever the classes are called."""

from __future__ import annotations

import itertools
import math

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nc_hf.figures import (
    angle_figure,
    class_accuracy_figure,
    collapse_figure,
    norm_figure,
    save_figure,
)


def simplex(num_classes: int, feature_dim: int) -> torch.Tensor:
    """A rotated and shifted simplex ETF."""
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(feature_dim, num_classes, dtype=torch.float64))
    return (basis @ (torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes)).T + 3.0


def heat_maps(figure) -> list:
    return [ax.images[0] for ax in figure.axes if ax.images]


def test_classes_are_ordered_by_size_and_keep_their_accuracies():
    counts, accuracy = [5, 500, 50], {"base": [0.1, 0.9, None], "crt": [0.3, 0.8, 0.6]}
    upper, lower = class_accuracy_figure(counts, accuracy, ["a", "b", "c"]).axes
    assert [bar.get_height() for bar in lower.patches] == [500, 50, 5]
    assert [label.get_text() for label in lower.get_xticklabels()] == ["b", "c", "a"]
    legend = [text.get_text() for text in upper.get_legend().get_texts()]
    heads = dict(zip(legend, (line.get_ydata() for line in upper.lines), strict=False))
    np.testing.assert_allclose(heads["base"], [90, np.nan, 10])
    np.testing.assert_allclose(heads["crt"], [80, 60, 30])
    assert lower.get_yscale() == "log"
    groups = [text.get_text() for text in lower.texts]
    assert groups == ["many", "medium", "few"]


@pytest.mark.parametrize("counts", [[500, 60] + 38 * [5], 38 * [500] + [60, 5], 19 * [500] + [60] + 20 * [5]])
def test_names_of_narrow_groups_do_not_run_into_each_other(counts):
    figure = class_accuracy_figure(counts, {"base": [0.5] * len(counts)})
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[1].texts]
    assert len(boxes) == 3
    assert not any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))


def test_angles_of_a_simplex_are_the_best_ones():
    best = math.degrees(math.acos(-1 / 5))
    figure = angle_figure({"simplex": simplex(6, 8), "worse": torch.randn(6, 8)}, [6, 5, 4, 3, 2, 1])
    first, second = heat_maps(figure)
    angles = first.get_array().data
    assert np.isnan(np.diag(angles)).all()
    np.testing.assert_allclose(angles[~np.eye(6, dtype=bool)], best, atol=1e-6)
    assert first.get_clim() == second.get_clim()
    low, high = first.get_clim()
    assert low == pytest.approx(np.nanmin(second.get_array().data)) and high >= best
    assert f"smallest {best:.1f}°" in figure.axes[0].get_title()
    assert f"best {best:.1f}°" in figure.axes[-1].get_ylabel()


def test_angles_leave_out_absent_classes_and_order_the_others():
    means = simplex(5, 6)
    means[2], means[4] = float("nan"), 3 * means[4]
    (only,) = heat_maps(angle_figure({"x": means}, [1, 9, 0, 2, 5]))
    assert only.get_array().shape == (4, 4)
    present = means[[1, 4, 3, 0]]
    centered = present - present.mean(dim=0)
    cosine = torch.nn.functional.cosine_similarity(centered[0], centered[1], dim=0)
    assert only.get_array().data[0, 1] == pytest.approx(math.degrees(math.acos(cosine)))


def test_more_classes_than_pixels_show_the_smallest_angle_of_each_block(monkeypatch):
    means, counts = torch.randn(7, 5), range(7, 0, -1)
    (whole,) = heat_maps(angle_figure({"x": means}, counts))
    monkeypatch.setattr("nc_hf.figures.MOST_CELLS", 3)
    figure = angle_figure({"x": means}, counts)
    (pooled,) = heat_maps(figure)
    angles, blocks = whole.get_array().data, [range(3), range(3, 6), range(6, 7)]
    for (row, rows), (column, columns) in itertools.product(enumerate(blocks), enumerate(blocks)):
        pairs = [angles[k, j] for k in rows for j in columns if k != j]
        cell = pooled.get_array().data[row, column]
        assert cell == min(pairs) if pairs else np.isnan(cell)
    assert figure.axes[0].get_title() == f"x\nsmallest {np.nanmin(angles):.1f}°"
    assert "smallest angle of 3 x 3" in figure.axes[0].get_xlabel() and pooled.get_extent()[:2] == [-0.5, 8.5]


def test_class_means_that_coincide_leave_the_other_panel_as_it_is():
    dead, alive = torch.ones(4, 6), simplex(4, 6)
    dead_first = angle_figure({"dead": dead, "alive": alive}, [4, 3, 2, 1])
    assert heat_maps(dead_first)[1].get_clim() == heat_maps(angle_figure({"alive": alive}, [4, 3, 2, 1]))[0].get_clim()
    assert "no angle is defined" in dead_first.axes[0].get_title()
    with pytest.raises(ValueError, match=r"at least 2 classes need images, got \[4, 0\]"):
        angle_figure({"one": simplex(2, 6)}, [4, 0])


def test_equal_accuracies_of_many_classes_are_all_seen():
    counts, accuracies = range(40, 0, -1), [0.5] * 40
    lines = class_accuracy_figure(counts, {"base": accuracies, "crt": accuracies}).axes[0].lines
    assert {line.get_markerfacecolor() for line in lines if len(line.get_xdata()) == 40} == {"none"}


def test_classes_are_named_in_their_order_where_there_is_room():
    means, names = torch.randn(4, 6), ["one", "nine", "none", "two"]
    left, right, _ = angle_figure({"x": means, "y": means}, [1, 9, 0, 2], names).axes
    (ax,) = norm_figure({"x": means}, [1, 9, 0, 2], names).axes
    for shown in (left.get_xticklabels(), left.get_yticklabels(), right.get_xticklabels(), ax.get_xticklabels()):
        assert [label.get_text() for label in shown] == ["nine", "two", "one"]
    assert not any(label.get_text() for label in right.get_yticklabels())
    many = list(map(str, range(31)))
    for figure in (angle_figure, norm_figure):
        assert (
            "by number of training" in figure({"x": torch.randn(31, 6)}, range(31, 0, -1), many).axes[0].get_xlabel()
        )


def test_no_words_of_a_picture_run_into_each_other():
    means = {"CE-DRW": torch.randn(10, 16), "NC-DRW": torch.randn(10, 16)}
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    figure = angle_figure(means, range(10, 0, -1), names)
    figure.draw_without_rendering()
    left, right, scale = figure.axes
    boxes = [ax.get_tightbbox() for ax in (left, right, scale)]
    assert boxes[0].x1 <= boxes[1].x0 and boxes[1].x1 <= boxes[2].x0


def test_rounding_has_no_color():
    """Two means are always 180 degrees apart."""
    means = {name: torch.randn(2, 5, generator=torch.Generator().manual_seed(k)) for k, name in enumerate("ab")}
    for image in heat_maps(angle_figure(means, [9, 1])):
        assert image.get_clim() == pytest.approx((175, 180), abs=1e-4)


def test_twelve_lines_differ_in_color_or_marker():
    figure = class_accuracy_figure([9, 5], {f"head {k}": [0.5, 0.4] for k in range(12)})
    looks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines if line.get_marker() != "None"}
    assert len(looks) == 12


def test_zero_variability_is_drawn(recwarn):
    figure = collapse_figure({"CE": [{"epoch": 1.0, "nc1_variability_balanced": 0.0, "nc4_agreement": 1.0}]})
    assert figure.axes[0].get_yscale() == "linear" and not recwarn.list


def test_norms_of_one_class_are_refused():
    with pytest.raises(ValueError, match="at least 2 classes need images"):
        norm_figure({"CE": torch.ones(3, 4)}, [5, 0, 0])


def test_norms_are_relative_to_their_mean():
    means = simplex(4, 6) * 7
    (ax,) = norm_figure({"even": means, "odd": torch.randn(4, 6)}, [1, 2, 3, 4]).axes
    even, odd = (line.get_ydata() for line in ax.lines[:2])
    np.testing.assert_allclose(even, 1, atol=1e-9)
    assert odd.mean() == pytest.approx(1) and odd.std() > 0


def record(epoch: float, nc4: float) -> dict:
    metrics = {"nc1_variability_balanced": 0.5, "nc2_angle_gap": 3.0, "nc3_duality_gap": 0.1, "nc4_agreement": nc4}
    return {"epoch": epoch, **metrics}


def test_the_course_shows_the_last_record_of_an_epoch():
    figure = collapse_figure({"NC": [record(2, 0.5), record(4, 0.7), record(2, 0.6)]})
    shown = figure.axes[3].lines[0]
    assert list(shown.get_xdata()) == [2, 4]
    assert list(shown.get_ydata()) == pytest.approx([40, 30])
    with pytest.raises(ValueError, match="no record of 'CE'"):
        collapse_figure({"CE": []})


@settings(max_examples=15, deadline=None)
@given(names=st.lists(st.text(max_size=40), min_size=3, max_size=3))
def test_no_name_breaks_a_picture(names, tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    save_figure(class_accuracy_figure([9, 3, 1], {names[0]: [1.0, 0.5, 0.0]}, names), folder / "classes")
    assert PIL.Image.open(folder / "classes.png").width == 1600


def test_files_are_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        save_figure(norm_figure({"a": simplex(4, 6)}, [4, 3, 2, 1]), tmp_path / name, svg=True)
    for suffix in (".png", ".svg"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


@pytest.mark.parametrize("num_classes", [2, 100, 1000])
def test_any_number_of_classes_is_drawn(num_classes, tmp_path):
    counts = np.linspace(900, 2, num_classes).astype(int)
    accuracy = np.random.default_rng(0).random(num_classes)
    save_figure(class_accuracy_figure(counts, {"base": accuracy}, list(map(str, counts))), tmp_path / "classes")
    save_figure(angle_figure({"a": torch.randn(num_classes, 16)}, counts), tmp_path / "angles")
    assert {path.name for path in tmp_path.iterdir()} == {"classes.png", "angles.png"}


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: class_accuracy_figure([3, 2], {"base": [0.5]}), "'base' has 1 accuracies for 2 classes"),
        (lambda: class_accuracy_figure([3, 2], {"base": [0.5, math.inf]}), "accuracy that is not finite"),
        (lambda: angle_figure({"x": torch.full((3, 4), math.nan)}, [3, 2, 1]), "means of 'x' are not finite"),
    ],
)
def test_figures_that_are_not_finite_are_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
