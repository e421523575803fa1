"""Which checkpoint to resume from, the newest one that was written to its end, and whether this run may."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import Tensor, nn

from nc_hf.deciding_settings import decides_weights

logger = logging.getLogger(__name__)

MARKER = "complete.json"
PASSING = (MARKER, "checkpoint-is-incomplete.txt")  # the second is there while `Trainer` saves upon SIGTERM


def mark_complete(folder: Path, run: dict[str, Any]) -> None:
    """Write the names and sizes (bytes) of a checkpoint's files, as the last of its files.

    Args:
        folder: of the checkpoint.
        run: what `check_resume` compares.
    """
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in PASSING]
    partial = folder / f"{MARKER}.partial"
    partial.write_text(json.dumps({"files": {path.name: path.stat().st_size for path in paths}, "run": run}, indent=1))
    partial.replace(folder / MARKER)


def is_complete(folder: Path) -> bool:
    """Whether every file that the marker names is there with its size."""
    try:
        content = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    sizes = content.get("files", content)
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def check_resume(folder: Path, run: dict[str, Any], same_run: bool) -> None:
    """Refuse to go on from a checkpoint of other data or another number of updates an epoch, or of weights alone.

    Args:
        folder: of the checkpoint. One that says nothing of its run, as those of a plain `Trainer`, is not compared.
        run: `class_counts` and `updates_per_epoch` (None where not known), `processes` and `arguments`, as
            `mark_complete` was given them.
        same_run: name what else differs in a warning; a branch differs on purpose.

    Raises:
        ValueError: when class counts or updates an epoch differ, and for one that `save_only_model` left without the
            state of optimizer and schedule.
    """
    marker = folder / MARKER
    before = json.loads(marker.read_text()).get("run") if marker.is_file() else None
    if before is None:
        return
    if before["arguments"].get("save_only_model"):
        raise ValueError(
            f"{folder} was saved with save_only_model, without optimizer and schedule, which would begin anew. Leave "
            "save_only_model out and give another output_dir to start afresh."
        )
    if _differ(before, run, "class_counts"):
        raise ValueError(
            f"{folder} was trained on images of the class counts {_short(before['class_counts'])}, and these are "
            f"{_short(run['class_counts'])}. Give the same data, or another output_dir to start afresh."
        )
    if _differ(before, run, "updates_per_epoch"):
        raise ValueError(
            f"{folder} was trained with {before['updates_per_epoch']} updates an epoch on {before['processes']} "
            f"process(es), and now there are {run['updates_per_epoch']} on {run['processes']}: epochs would be "
            "miscounted. Choose per_device_train_batch_size and gradient_accumulation_steps for the same batch."
        )
    settings = [{**one["arguments"], "processes": one["processes"]} for one in (before, run)]
    old, new = ({name: value for name, value in one.items() if decides_weights(name)} for one in settings)
    changed = [f"{name} {old.get(name)} (now {new.get(name)})" for name in new if old.get(name) != new[name]]
    if same_run and changed:
        logger.warning(
            "%s was saved with other settings: %s. What follows is not what either would have given from the start.",
            folder,
            ", ".join(changed),
        )


def _differ(before: dict[str, Any], run: dict[str, Any], name: str) -> bool:
    return None not in (before[name], run[name]) and before[name] != run[name]


def _short(counts: list[int]) -> str:
    return str(counts) if len(counts) <= 10 else f"{str(counts[:10])[:-1]}, …] ({len(counts)} classes)"


def newest_complete(output_dir: str | Path) -> str | None:
    """The newest complete `checkpoint-<step>` folder, the same on all processes; None when there is none.

    Broken newer ones are named in a warning and left where they are.
    """
    found: list[str | None] = [None]
    folders = sorted(
        (path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()),
        key=lambda path: int(path.name.split("-")[-1]),
        reverse=True,
    )
    for folder in folders:
        if is_complete(folder):
            found = [str(folder)]
            break
        if PartialState().is_main_process:
            logger.warning("%s was not written to its end and is skipped.", folder)
    return broadcast_object_list(found, from_process=0)[0]


def check_names(folder: Path, expected: Iterable[str]) -> None:
    """Refuse a checkpoint that would leave tensors of the model as they are.

    Args:
        folder: of the checkpoint.
        expected: names of all tensors of the model.

    Raises:
        ValueError: when one of them is not in the checkpoint.
    """
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return
    with safe_open(weights, "pt") as file:
        missing = sorted(set(expected) - set(file.keys()))
    if missing:
        raise ValueError(
            f"{folder} has no {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}: it was saved with another "
            "model or without class centers. Start afresh (another output_dir or no resume), or use centers: batch, "
            "which has no centers to restore."
        )


def check_disk_space(folder: Path, model: nn.Module, kept: int, *, weights_only: bool = False) -> None:
    """Make sure that checkpoints will fit on the disk, before the first of them is due.

    Args:
        folder: existing, where they go; those that lie there already need no more room.
        model: to be trained.
        kept: checkpoints kept at a time; one more lies beside them while it is written.
        weights_only: they have no state of the optimizer.

    Raises:
        OSError: when less is free than weights and two numbers of the optimizer a trained weight take.
    """
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    trained = 0 if weights_only else sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    there = sum(path.stat().st_size for path in folder.glob("checkpoint-*/*") if path.is_file())
    needed, free = (weights + 2 * trained) * (kept + 1) - there, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"checkpoints in {folder} may take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free. Make room, "
            "choose another --output_dir, or lower save_total_limit."
        )


def check_agreement(accelerator: Accelerator, tensor: Tensor) -> None:
    """Stop before a checkpoint of class centers that differ between processes is written.

    Raises:
        RuntimeError: when they do.
    """
    if accelerator.num_processes > 1:
        sums = accelerator.gather(tensor.double().sum()[None])
        if (sums != sums[0]).any():
            raise RuntimeError(f"the class centers differ between processes (their sums are {sums.tolist()}).")
