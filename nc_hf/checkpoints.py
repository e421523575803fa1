"""Which checkpoint to resume from: the newest one that was written to its end."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import Tensor, nn

logger = logging.getLogger(__name__)

MARKER = "complete.json"


def mark_complete(folder: Path) -> None:
    """Write the names and sizes (bytes) of a checkpoint's files, as the last of its files."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    sizes.pop(MARKER, None)
    partial = folder / f"{MARKER}.partial"
    partial.write_text(json.dumps(sizes, indent=1))
    partial.replace(folder / MARKER)


def is_complete(folder: Path) -> bool:
    """Whether every file that the marker names is there with its size."""
    try:
        sizes = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


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


def check_disk_space(folder: Path, model: nn.Module, kept: int) -> None:
    """Make sure that checkpoints will fit on the disk, before the first of them is due.

    Args:
        folder: existing, where they go.
        model: to be trained.
        kept: checkpoints kept at a time; one more lies beside them while it is written.

    Raises:
        OSError: when less is free than weights and two numbers a weight of the optimizer take.
    """
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    needed, free = 3 * weights * (kept + 1), shutil.disk_usage(folder).free
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
