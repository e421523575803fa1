"""Ctrl-C and SIGTERM between two updates: a checkpoint is saved before the process ends."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback, TrainerControl

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 3.0  # seconds; a launcher passes on at once what the terminal has sent already


class SaveOnSignal(TrainerCallback):
    """Upon Ctrl-C or SIGTERM, saves after the update that is running and exits with 128 + the signal's number.

    After the last update of an epoch, what an epoch ends with is done before. A second signal, some seconds later,
    ends the process at once. All processes stop after the same update, whichever of them was told. Workers of a data
    loader do not outlive SIGTERM, so send it to the training processes alone. Make this the last callback.
    """

    def __init__(self) -> None:
        self.told, self.first = 0, 0.0  # this process, and when
        self.received = 0  # by any process, which all know since the same update
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Take the two signals over, but not one that is ignored, as Ctrl-C is in the background of a shell."""
        self.give_back()
        self.told, self.received, self.first = 0, 0, 0.0
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self.before = {number: signal.signal(number, self._receive) for number in heard}

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Save if any process has received a signal, unless the epoch's end is next."""
        self._agree(args)
        if self.received and not (state.epoch or 0.5).is_integer():
            control.should_save = True
            # There may be little time, but one left out could change which weights are the best.
            control.should_evaluate &= args.load_best_model_at_end

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Save if a signal was received."""
        if self.received:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Exit when all processes have written their part of the checkpoint."""
        if self.received:
            PartialState().wait_for_everyone()
            self._exit("stopped and saved after %d of %d updates", state.global_step, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Give the signals back; exit if there was one that nothing was saved upon."""
        self._agree(args)
        if self.received:
            self._exit("stopped at the end of the training, after %d updates", state.global_step)
        self.give_back()

    def give_back(self) -> None:
        """Handle signals as before the training."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _agree(self, args: Any) -> None:
        """Tell all processes of a signal at the same point of the run, or they would wait for each other forever."""
        self.received = self.told
        if args.world_size > 1:
            self.received = int(gather(torch.tensor([self.told], device=args.device)).max())

    def _exit(self, message: str, *values: int) -> None:
        self.give_back()
        logger.warning(message, *values)
        raise SystemExit(128 + self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.told:
            self.told, self.first = number, time.monotonic()
            logger.warning("%s: saves after this update; once more ends at once", signal.Signals(number).name)
        elif time.monotonic() - self.first > AGAIN:
            self.give_back()
            signal.raise_signal(number)
