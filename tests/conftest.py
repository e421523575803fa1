"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core, so one thread a worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and golden numbers beside the checkout; absent on a user's machine."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}, which only the project's own machines have")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Callable[[str], list[dict]]:
    """Cases of one golden file: `golden("nc1_lw")`."""
    return lambda name: json.loads((shared / "golden" / "open" / f"{name}.json").read_text())["cases"]
