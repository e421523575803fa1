"""Real pushes and pulls, through the unmodified clients, in both ways of transfer: `tests/hub`, a process for each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 600  # seconds; a run takes about a tenth of it
OURS_ALONE = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTEST_")  # settings of this process that the child must not see


@pytest.mark.parametrize("mode", ["xet", "lfs"])
def test_pushes_and_pulls(mode):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS_ALONE)}
    environment |= {"NC_HF_HUB_MODE": mode, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command.append(str(Path(__file__).with_name("hub")))
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **output)
    try:
        printed, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        pytest.fail(f"{mode}: not done after {LIMIT} s:\n{printed[-8000:]}")
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, f"{mode}:\n{printed[-8000:]}"
    assert " passed" in printed
