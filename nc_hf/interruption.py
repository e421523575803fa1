"""Ctrl-C and SIGTERM between two updates: a checkpoint is saved before the process ends."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather
from transformers import TrainerCallback, TrainerControl

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 3.0  # seconds; a launcher passes on at once what the terminal has sent already


class SaveOnSignal(TrainerCallback):
    """Upon Ctrl-C or SIGTERM, saves after the update that is running and exits with 128 + the signal's number.

    A second signal, some seconds later, ends the process at once. All processes stop after the same update, whichever
    of them was told. Make it the last callback: what would follow the training is not run.
    """

    def __init__(self) -> None:
        self.received, self.first = 0, 0.0
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Take the two signals over, but not one that is ignored, as Ctrl-C is in the background of a shell."""
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._receive) for number in heard}

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if any process has received a signal."""
        if args.world_size > 1:
            self.received = int(gather(torch.tensor([self.received], device=args.device)).max())
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Give the signals back; exit if there was one and updates are missing."""
        self._give_back()
        if self.received and state.global_step < state.max_steps:
            logger.warning("stopped and saved after %d of %d updates", state.global_step, state.max_steps)
            raise SystemExit(128 + self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self.first = number, time.monotonic()
            logger.warning("%s: saves after this update; once more ends at once", signal.Signals(number).name)
        elif time.monotonic() - self.first > AGAIN:
            self._give_back()
            signal.raise_signal(number)

    def _give_back(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
