"""`results.json`: what a run measured, and the table people read."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "datasets", "accelerate", "huggingface-hub", "nc-hf")
GROUPS = ("accuracy", "accuracy_many", "accuracy_medium", "accuracy_few")


def read_results(path: Path) -> dict[str, Any]:
    """The content of a `results.json`; empty when there is none.

    Raises:
        ValueError: for a file that is not JSON.
    """
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it, or collect its run again.") from None


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Replace a `results.json` at once, so that a reader never finds half of one.

    Raises:
        ValueError: for a number that is not finite.
    """
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"schema": SCHEMA, **results}, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def environment() -> dict[str, Any]:
    """Versions of the libraries, nc_hf's git revision if it is in a repository, and the kind of machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "git_revision": git_revision(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def git_revision(file: Path = Path(__file__)) -> str | None:
    """HEAD of the repository that keeps nc_hf; an installed package may lie in a repository that does not."""
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        return _git(file.parent, "rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def results_table(results: dict[str, Any]) -> str:
    """Percentages of each head as aligned text: all, many, medium, few, class mean, ECE; "-" for an empty group."""
    header = ["head", "all", "many", "medium", "few", "class mean", "ECE"]
    rows = [header]
    for name, metrics in results["heads"].items():
        keys = [*GROUPS, "class_mean_accuracy", "ece"]
        rows.append([name] + [f"{100 * metrics[key]:.2f}" if key in metrics else "-" for key in keys])
    lines = aligned(rows)
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def aligned(rows: list[list[str]], first: str = ">") -> list[str]:
    """Rows of cells as lines of text, columns to the right; `first` is `"<"` for a first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [first, *">" * (len(widths) - 1)]
    return ["  ".join(f"{cell:{s}{w}}" for cell, s, w in zip(row, sides, widths, strict=True)) for row in rows]
