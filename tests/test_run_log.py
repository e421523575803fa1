"""The speed that a run's log tells."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nc_hf.run_log import RunLog


@pytest.mark.parametrize(("sampler", "images"), [("instance", 100), ("two_views", 200), ("bilateral", 200)])
def test_images_of_an_epoch_are_those_that_are_drawn(sampler: str, images: int, tmp_path, monkeypatch) -> None:
    """13 (25) batches of 8, the last one not full."""
    clock = iter((10.0, 14.0))
    monkeypatch.setattr("nc_hf.run_log.time.perf_counter", lambda: next(clock))
    log = RunLog(tmp_path / "log.jsonl", "stage1")
    args = SimpleNamespace(per_device_train_batch_size=8, gradient_accumulation_steps=1, world_size=1, sampler=sampler)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    log.on_epoch_begin(args, state, None)
    state.global_step = -(-images // 8)
    log.on_epoch_end(args, state, None, train_dataloader=SimpleNamespace(dataset=range(100)))
    assert log.speed() == {"train_seconds": 4.0, "images_per_second": images / 4}
