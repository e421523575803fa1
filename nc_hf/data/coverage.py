"""Which classes have no images in which split, as warnings."""

from __future__ import annotations

import difflib
import logging

import numpy as np
from datasets import Dataset

from nc_hf.data.columns import dataset_labels
from nc_hf.data.long_tail import FEWEST_TO_SPLIT

logger = logging.getLogger(__name__)

SHOWN = 5
SIMILAR = 0.75  # ratio of difflib from which one name may be the other, misspelt


def warn_of_untrained_classes(splits: dict[str, Dataset]) -> None:
    """Warn of classes without a training image: in which splits they are, and whose name looks like theirs.

    Args:
        splits: with labels of the same classes.
    """
    names, present = _classes_with_images(splits)
    missing = np.flatnonzero(~present["train"]).tolist()
    if missing:
        trained = [names[k] for k in np.flatnonzero(present["train"]) if not names[k].isdigit()]
        told = [f"{names[k]!r} ({_where(names[k], k, present, trained)})" for k in missing[:SHOWN]]
        logger.warning("%s no training image: %s", _classes_have(len(missing)), _shortened(told, len(missing)))


def warn_of_unseen_classes(splits: dict[str, Dataset], held_out: bool) -> None:
    """Warn of trained classes that a split to evaluate on does not have, so that none of its numbers covers them.

    Args:
        splits: with labels of the same classes.
        held_out: whether `validation` is a part of the training images.
    """
    names, present = _classes_with_images(splits)
    for name in [name for name in splits if name != "train"]:
        missing = np.flatnonzero(present["train"] & ~present[name]).tolist()
        if missing:
            why = f" Classes of fewer than {FEWEST_TO_SPLIT} images give it none."
            logger.warning(
                "%s training images and none in %s: %s. The per-class accuracies of %s leave such classes out.%s",
                _classes_have(len(missing)),
                name,
                _shortened([repr(names[k]) for k in missing[:SHOWN]], len(missing)),
                name,
                why if held_out and name == "validation" else "",
            )


def _classes_with_images(splits: dict[str, Dataset]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Class names (K,), and for each split whether it has images of each, (K,) bool."""
    found = {name: dataset_labels(split) for name, split in splits.items()}
    names = found["train"][1]
    return names, {name: np.bincount(labels, minlength=len(names)) > 0 for name, (labels, _) in found.items()}


def _where(name: str, k: int, present: dict[str, np.ndarray], trained: list[str]) -> str:
    """The splits that have images of class k and, if there are any, the trained class with a similar name."""
    splits = [split for split, classes in present.items() if classes[k]]
    if not splits:
        return "in no split"
    near = difflib.get_close_matches(name, trained, n=1, cutoff=SIMILAR)
    return f"in {' and '.join(splits)} only{f'; is it {near[0]!r}?' if near else ''}"


def _classes_have(count: int) -> str:
    return "1 class has" if count == 1 else f"{count} classes have"


def _shortened(told: list[str], count: int) -> str:
    more = [f"and {count - len(told)} more"] if count > len(told) else []
    return ", ".join(told + more)
