"""How many threads a process has: what its user asked for, else its share of the cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nc_hf import processes

CORES = 12
ACCELERATE, TORCHRUN = {"ACCELERATE_MIXED_PRECISION": "no"}, {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, CORES),
        ({"OMP_NUM_THREADS": ""}, CORES),
        ({"OMP_NUM_THREADS": "1"}, None),  # None: as torch has read it
        ({"OMP_NUM_THREADS": "5"}, None),
        ({"OMP_NUM_THREADS": "1"} | ACCELERATE, CORES),
        ({"OMP_NUM_THREADS": "1"} | TORCHRUN, CORES // 2),
        ({"OMP_NUM_THREADS": "5"} | ACCELERATE, None),
        ({"OMP_NUM_THREADS": "5"} | TORCHRUN, None),
        ({"LOCAL_WORLD_SIZE": "64"}, 1),
    ],
)
def test_threads(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], threads: int | None) -> None:
    """A launcher's 1 is nobody's wish, where that of a user's many runs side by side is one."""
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", *processes.LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(CORES)))
    monkeypatch.setattr(os, "cpu_count", lambda: CORES)
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)

    processes.start_processes()

    assert given == ([] if threads is None else [threads])


def test_a_real_launch_leaves_all_cores(tmp_path: Path) -> None:
    """accelerate's launcher leaves a 1 behind, and a mark by which it is known."""
    script = tmp_path / "threads.py"
    script.write_text(
        "import os, torch\nfrom nc_hf.processes import start_processes\nstart_processes()\n"
        "print(os.environ['OMP_NUM_THREADS'], torch.get_num_threads())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert done.stdout.split()[-2:] == ["1", str(cores)]
