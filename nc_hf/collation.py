"""Batches from what data sets give: ready ones of our image sets, and samples of any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from transformers import default_data_collator

Collator = Callable[[Any], Any]


def collate(batch: Any) -> dict[str, Any]:
    """Batches of our image sets are ready; the images of other data sets are stacked."""
    return batch if isinstance(batch, Mapping) else default_data_collator(batch)


def spare_ready_batches(collator: Collator, removing: Collator) -> Collator:
    """A collator that removes unused columns from samples, and leaves a ready batch to `collator` as it is.

    Args:
        collator: makes a batch.
        removing: the same one inside the `RemoveColumnsCollator` of `Trainer`, which takes a ready batch for samples.
    """
    return partial(_by_kind, collator=collator, removing=removing)


def _by_kind(batch: Any, *, collator: Collator, removing: Collator) -> Any:
    return collator(batch) if isinstance(batch, Mapping) else removing(batch)
