"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core, so one thread a worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


LONGEST = ("test_hub_server.py", "test_train_recipe.py", "test_recipes.py", "test_distributed.py", "test_doors.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long start first, so that no core waits for another at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Scripts that run in this process set the number of threads; the next test has its own again."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """A script of recipes/ as a module: `script("train").main([...])`."""

    @cache
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "recipes" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


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

    def cases(name: str) -> list[dict]:
        found = json.loads((shared / "golden" / "open" / f"{name}.json").read_text())["cases"]
        assert found, f"{name} has no cases"
        return found

    return cases
