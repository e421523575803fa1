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


def test_evaluations_and_saves_within_an_epoch_are_not_training_time(tmp_path, monkeypatch) -> None:
    """An epoch of 14 s, of which an evaluation after its third step takes 5 and a save after its last one takes 4."""
    clock = iter((10.0, 13.0, 18.0, 20.0, 24.0, 24.0))  # begin, stop, go on, stop, go on at its end, end
    monkeypatch.setattr("nc_hf.run_log.time.perf_counter", lambda: next(clock))
    log, args = RunLog(tmp_path / "log.jsonl", "stage1"), SimpleNamespace(gradient_accumulation_steps=1, world_size=1)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True, train_batch_size=8)
    log.on_epoch_begin(args, state, None)
    for state.global_step in range(1, 6):
        log.on_step_begin(args, state, None)
        stops = state.global_step in (3, 5)
        log.on_step_end(args, state, SimpleNamespace(should_evaluate=stops, should_save=False))
    log.on_epoch_end(args, state, None, train_dataloader=DataLoader(range(40)))
    assert log.speed() == {"train_seconds": 5.0, "images_per_second": 8.0}
