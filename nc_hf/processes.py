"""Processes: their start in a script, with log and threads, and what they share."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import nn

logger = logging.getLogger(__name__)

LAUNCHERS = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}  # what accelerate launch and torchrun leave
LAUNCH = {"accelerate", "accelerate-launch", "accelerate.commands.launch"}  # how the first is called
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def start_processes(expected: int | None = None) -> PartialState:
    """Set up processes, logging and threads.

    A process has the threads that `OMP_NUM_THREADS` gives it, else its share of the cores that it may run on. A 1 that
    comes through a launcher counts as not given: launchers set it where nobody did. Narrow the cores there.

    Args:
        expected: number of processes that must have started; any when None.

    Raises:
        SystemExit: when another number started.
    """
    end_with_launcher()
    state = PartialState(cpu=not torch.accelerator.is_available())
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logging.getLogger("nc_hf").setLevel(logging.INFO if state.is_main_process else logging.WARNING)
    if expected is not None and expected != state.num_processes:
        raise SystemExit(
            f"the recipe asks for {expected} processes (expected_processes) but {state.num_processes} started. "
            "Launch with a file of recipes/accelerate/ (`accelerate launch --cpu --num_processes 2` starts one)."
        )
    if not _threads_are_given():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes_here()))
    logger.info("%d process(es) on %s with %d threads", state.num_processes, state.device, torch.get_num_threads())
    return state


def end_with_launcher() -> None:
    """Get SIGTERM when the `accelerate launch` that started this one process ends (on Linux).

    It does not pass that signal on: the training would go on unseen, beside the one that the same command starts.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun passes it on
        return
    with contextlib.suppress(psutil.Error):
        launcher = psutil.Process().parent()
        if launcher is not None and not LAUNCH.isdisjoint(Path(word).name for word in launcher.cmdline()):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def processes_here() -> int:
    """Number of processes of this run on this machine, which share its cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _threads_are_given() -> bool:
    launched = not LAUNCHERS.isdisjoint(os.environ)
    return os.environ.get("OMP_NUM_THREADS") not in ((None, "", "1") if launched else (None, ""))


def share_buffers(module: nn.Module) -> None:
    """Give all processes the buffers of the first one, which it saves: batch statistics are each process's own."""
    for buffer in module.buffers():
        broadcast(buffer)
