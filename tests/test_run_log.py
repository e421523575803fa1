"""The speed that a run's log tells."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader, IterableDataset

from nc_hf.run_log import RunLog


@pytest.mark.parametrize(("sampler", "images"), [("instance", 100), ("two_views", 200), ("bilateral", 200)])
def test_images_of_an_epoch_are_those_that_are_drawn(sampler: str, images: int, tmp_path, monkeypatch) -> None:
    """13 (25) batches of 8, the last one not full."""
    clock = iter((10.0, 14.0))
    monkeypatch.setattr("nc_hf.run_log.time.perf_counter", lambda: next(clock))
    log = RunLog(tmp_path / "log.jsonl", "stage1")
    args = SimpleNamespace(gradient_accumulation_steps=1, world_size=1, sampler=sampler)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True, train_batch_size=8)
    log.on_epoch_begin(args, state, None)
    state.global_step = -(-images // 8)
    log.on_epoch_end(args, state, None, train_dataloader=DataLoader(range(100)))
    assert log.speed() == {"train_seconds": 4.0, "images_per_second": images / 4}


def test_images_of_a_stream_are_counted_by_their_batches(tmp_path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            yield from range(16)

    log, args = RunLog(tmp_path / "log.jsonl", "stage1"), SimpleNamespace(gradient_accumulation_steps=1, world_size=1)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True, train_batch_size=8)
    log.on_epoch_begin(args, state, None)
    state.global_step = 2
    log.on_epoch_end(args, state, None, train_dataloader=DataLoader(Stream(), batch_size=8))
    assert log.train_images == 16
