"""What the processes that make a loader's samples heed."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable

__all__ = ["leaves_with_parent", "outlasts_sigterm"]


def leaves_with_parent(then: Callable[[int], None] | None = None) -> Callable[[int], None]:
    """A ``worker_init_fn`` for loaders of this process: a worker leaves if this process has been killed already.

    torch has a worker watch its parent from a moment later on. It takes whatever parent the worker has then for the
    one that counts, and would let it wait forever. Where workers are spawned, as in processes that are spawned
    themselves, they begin some seconds behind their creation.

    Args:
        then: another such function, called where the worker stays.
    """
    return _Start(None if multiprocessing.get_start_method() == "forkserver" else os.getpid(), then)


class _Start:
    """Can be pickled, for workers that are spawned."""

    def __init__(self, parent: int | None, then: Callable[[int], None] | None) -> None:
        self._parent = parent  # None: a worker's parent is a server that forks for this process
        self._then = then

    def __call__(self, worker_id: int) -> None:
        if self._parent is not None and os.getppid() != self._parent:
            os._exit(1)
        if self._then is not None:
            self._then(worker_id)


def outlasts_sigterm(worker_id: int) -> None:
    """In a worker: a SIGTERM for all of a job's processes doesn't end it while the last step still needs it."""
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
