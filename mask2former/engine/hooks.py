"""What happens around the steps of a run, beyond Detectron2's hooks."""

import datetime
import logging
import os
import signal
import threading
import time
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import EventWriter, get_event_storage

__all__ = ["ConsoleWriter", "LRScheduler", "SaveOnInterrupt"]


class LRScheduler(hooks.LRScheduler):
    """Detectron2's hook; a checkpoint says how far the schedule is, and the recipe alone what it is.

    So a run can be resumed with more steps.
    """

    PROGRESS = ("last_epoch", "_step_count", "_last_lr")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: value for key, value in state_dict.items() if key in self.PROGRESS})


class SaveOnInterrupt(HookBase):
    """On Ctrl-C finish the step, save a checkpoint and stop; a second Ctrl-C stops at once.

    Python hands Ctrl-C to the main thread alone, so in another thread this does nothing.

    Args:
        checkpointer: has a method ``save(name, **kwargs)``.
    """

    def __init__(self, checkpointer: Any) -> None:
        self._checkpointer = checkpointer
        self._interrupted = False
        self._previous: Any = None
        self._process = os.getpid()

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_interrupt)

    def after_train(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def after_step(self) -> None:
        if self._interrupted:
            iteration = self.trainer.iter
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            raise KeyboardInterrupt

    def _on_interrupt(self, *_: Any) -> None:
        if os.getpid() != self._process:  # a loader's worker, which inherits the handler and is still needed
            return
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        logging.getLogger(__name__).warning("interrupted: saving after this step; go on with --resume")


class ConsoleWriter(EventWriter):
    """One line of progress: step, losses of the last decoder layer, learning rate, time, memory, time left.

    Args:
        max_iter: steps of the whole run.
        window: steps over which values are smoothed by their median.
    """

    LOSSES = ("total_loss", "loss_ce", "loss_mask", "loss_dice", "loss_sem_seg")

    def __init__(self, max_iter: int, window: int = 20) -> None:
        self._logger = logging.getLogger(__name__)
        self._max_iter = max_iter
        self._window = window
        self._start: tuple[int, float] | None = None

    def write(self) -> None:
        storage = get_event_storage()
        iteration = storage.iter
        if iteration >= self._max_iter:
            return
        histories = storage.histories()
        now = time.perf_counter()
        if self._start is None:
            self._start = (iteration, now)
        parts = [f"step {iteration + 1}/{self._max_iter}"]
        if iteration > self._start[0]:
            seconds = (now - self._start[1]) / (iteration - self._start[0]) * (self._max_iter - iteration - 1)
            parts.append(f"eta {datetime.timedelta(seconds=round(seconds))}")
        parts += [f"{name} {histories[name].median(self._window):.4g}" for name in self.LOSSES if name in histories]
        parts += [f"{name} {histories[name].latest():.3g}" for name in ("lr",) if name in histories]
        for name in ("time", "data_time"):
            if name in histories:
                parts.append(f"{name} {histories[name].median(self._window):.3f} s")
        if torch.cuda.is_available():
            parts.append(f"memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
        self._logger.info("  ".join(parts))
