"""What happens around the steps of a run, beyond Detectron2's hooks."""

import datetime
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage

from ..checkpoint import Checkpointer, check_state
from ..errors import PREEMPTED

__all__ = ["ConsoleWriter", "LRScheduler", "LossHistory", "PeriodicCheckpointer", "SaveOnInterrupt"]


class LRScheduler(hooks.LRScheduler):
    """Detectron2's hook; a checkpoint says how far the schedule is, and the recipe alone what it is.

    So a run can be resumed with more steps.
    """

    PROGRESS = ("last_epoch", "_step_count", "_last_lr")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = self.state_dict()
        progress = {key: own[key] for key in self.PROGRESS if key in own}
        check_state(state_dict, progress, "trainer.hooks.LRScheduler")
        super().load_state_dict({key: state_dict[key] for key in progress})


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's hook, which keeps the newest checkpoints in the output folder, whichever part of a run wrote them.

    It is there on all processes, whose parts of a checkpoint the main one writes.

    Args:
        checkpointer: a ``Checkpointer``.
        period: steps between checkpoints.
        keep: how many are kept, at least 1, and ``model_final.pth`` besides; None: all.
    """

    def __init__(self, checkpointer: Checkpointer, period: int, *, keep: int | None) -> None:
        super().__init__(checkpointer, period)
        self._keep = keep

    def before_train(self) -> None:
        super().before_train()
        if self.checkpointer.save_to_disk:
            self.checkpointer.remove_unfinished()

    def after_step(self) -> None:
        super().after_step()
        due = (self.trainer.iter + 1) % self.period == 0
        if self._keep is not None and due and self.checkpointer.save_to_disk:
            for path in self.checkpointer.numbered_files()[: -self._keep]:
                os.remove(path)


class LossHistory(HookBase):
    """Puts the last losses into checkpoints: a resumed run's log has medians over the same steps.

    Of all scalars the last ``KEPT`` values stay in memory, where Detectron2 keeps a million: more than a GiB by the end
    of a long run.
    """

    STEPS = 20
    KEPT = 200

    def __init__(self) -> None:
        self._losses: dict[str, list[tuple[float, int]]] = {}

    def before_train(self) -> None:
        for name, values in self._losses.items():
            for value, iteration in values:
                self.trainer.storage.put_scalar(name, value, cur_iter=iteration)

    def after_step(self) -> None:
        if self.trainer.iter % self.KEPT == 0:
            for history in self.trainer.storage.histories().values():
                del history.values()[: -self.KEPT]

    def state_dict(self) -> dict[str, Any]:
        histories = self.trainer.storage.histories()
        return {name: history.values()[-self.STEPS :] for name, history in histories.items() if "loss" in name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, values in state_dict.items():
            like = [[None, 0]] * (len(values) if isinstance(values, list) else self.STEPS)  # a loss and its step
            check_state(values, like, f"trainer.hooks.LossHistory.{name}")
        self._losses = state_dict


class SaveOnInterrupt(HookBase):
    """In a ``with`` block: Ctrl-C or SIGTERM ends training behind the step, with a checkpoint; a second Ctrl-C at once.

    SIGTERM is what clusters send before they take a machine away; the process then ends with the exit code
    ``PREEMPTED``, and on Ctrl-C by ``KeyboardInterrupt``. A process can get it twice, from the cluster and from what
    started it. All ranks end behind the same step, whichever of them got the signal. In an evaluation, where ranks
    don't wait for one another, each ends at once.

    Python hands signals to the main thread alone, so in another thread this does nothing. The hook comes behind those
    whose state it saves and before those that evaluate.

    Args:
        checkpointer: has a method ``save(name, **kwargs)``.
    """

    def __init__(self, checkpointer: Any) -> None:
        self._checkpointer = checkpointer
        self._received: int | None = None
        self._pressed = False  # Ctrl-C
        self._evaluating = False
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
            }

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A block in which signals are heeded at once."""
        self._evaluating = True
        try:
            if self._received:
                self._save_and_end(self._received)
            yield
        finally:
            self._evaluating = False

    def after_step(self) -> None:
        received = [number for number in comm.all_gather(self._received) if number]
        if received:
            self._save_and_end(max(received))

    def _on_signal(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:  # a loader's worker, which inherits the handler and is still needed
            return
        if number == signal.SIGINT:
            if self._pressed:
                raise KeyboardInterrupt
            self._pressed = True
        if self._received:
            return
        self._received = number
        name = signal.Signals(number).name
        logging.getLogger(__name__).warning("interrupted by %s: saving after this step; go on with --resume", name)
        if self._evaluating:
            self._save_and_end(number)

    def _save_and_end(self, number: int) -> None:
        iteration = self.trainer.iter
        if iteration + 1 < self.trainer.max_iter:  # the last step's checkpoint is there
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        if not self._evaluating:
            comm.synchronize()  # what started the ranks ends those that are left when one leaves
        raise _end(number)


def _end(number: int) -> BaseException:
    return SystemExit(PREEMPTED) if number == signal.SIGTERM else KeyboardInterrupt()


class ConsoleWriter(EventWriter):
    """One line of progress: step, losses of the last decoder layer, learning rate, times, memory, time left.

    ``time`` is that of a step, and ``data_time`` what of it was a wait for data, on the rank that waited longest.
    The memory is the main process's largest so far: what PyTorch has taken of its GPU, or all that is resident.

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
        self._written = -1

    def write(self) -> None:
        storage = get_event_storage()
        iteration = storage.iter
        if iteration >= self._max_iter or iteration <= self._written:
            return
        self._written = iteration
        histories = storage.histories()
        parts = [f"step {iteration + 1}/{self._max_iter}"]
        seconds = self._seconds_a_step(iteration, histories)
        if seconds is not None:
            left = round(seconds * (self._max_iter - iteration - 1))
            parts.append(f"eta {datetime.timedelta(seconds=left)}")
        parts += [f"{name} {histories[name].median(self._window):.4g}" for name in self.LOSSES if name in histories]
        parts += [f"{name} {histories[name].latest():.3g}" for name in ("lr",) if name in histories]
        for name in ("time", "data_time"):
            if name in histories:
                parts.append(f"{name} {histories[name].median(self._window):.3f} s")
        parts += [f"memory {memory:.0f} MiB" for memory in _peak_memory()]
        self._logger.info("  ".join(parts))

    def _seconds_a_step(self, iteration: int, histories: Mapping[str, Any]) -> float | None:
        """The mean since this process's first line, with evaluations; on that line, of a step alone."""
        now = time.perf_counter()
        if self._start is not None:
            return (now - self._start[1]) / (iteration - self._start[0])
        self._start = (iteration, now)
        return histories["time"].median(self._window) if "time" in histories else None


def _peak_memory() -> list[float]:
    """The largest memory of this process so far in MiB, or nothing where the system doesn't tell."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return [torch.cuda.max_memory_allocated() / 2**20]
    status = Path("/proc/self/status")  # the peak that getrusage gives can be that of the process that started this one
    lines = status.read_text().splitlines() if status.is_file() else []
    return [int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM")]
