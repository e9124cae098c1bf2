"""Starting the processes of a run: one, one a GPU, several on CPUs, or those that torchrun started."""

import argparse
import atexit
import json
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import launch as start_processes
from detectron2.utils import comm
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..errors import INTERRUPTED, PREEMPTED, UserError

__all__ = ["add_launch_options", "launch"]

Run = Callable[[argparse.Namespace], None]


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--num-processes`` to Detectron2's options, and let a single machine choose its port by itself."""
    parser.add_argument(
        "--num-processes",
        type=int,
        default=0,
        metavar="N",
        help="processes on the CPUs of each machine, in place of --num-gpus",
    )
    parser.set_defaults(dist_url="auto")


def launch(run: Run, args: argparse.Namespace) -> None:
    """Call ``run(args)`` in every process of the run.

    Under torchrun (``RANK`` and ``WORLD_SIZE`` in the environment) this process joins the others, over NCCL
    where there are GPUs and over gloo on CPUs. Otherwise ``--num-gpus`` or ``--num-processes``, ``--num-machines``,
    ``--machine-rank`` and ``--dist-url`` say what to start. When one of the started processes fails, the others are
    ended within 30 seconds. SIGTERM and Ctrl-C reach them all.

    Raises:
        UserError: if the options don't go together, the machine has fewer GPUs than asked for, or the process that
            failed first raised one.
        SystemExit: if a started process failed otherwise, with its traceback; or if it left with an exit code of its
            own, with that; or behind SIGTERM, with ``PREEMPTED``.
        KeyboardInterrupt: behind Ctrl-C.
    """
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        _join(run, args)
        return
    if args.num_processes:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when the first of these processes looks for GPUs
    _check(args)
    processes = args.num_processes or max(args.num_gpus, 1)
    if processes * args.num_machines == 1:
        run(args)
        return
    if args.num_processes:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(torch.get_num_threads() // processes, 1)))
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # the first error comes first
    with tempfile.TemporaryDirectory() as folder:
        first_error = Path(folder) / "first_error.json"
        signals = _PassedOn()
        try:
            with signals:
                start_processes(
                    _run_and_report,
                    processes,
                    num_machines=args.num_machines,
                    machine_rank=args.machine_rank,
                    dist_url=args.dist_url,
                    args=(run, args, first_error),
                )
        except (ProcessExitedException, ProcessRaisedException) as error:
            _raise_first(first_error, error, signals.received)


class _PassedOn:
    """In a ``with`` block: the started processes get SIGTERM when this one gets it, or Ctrl-C, and then save and leave.

    Where this process alone got it they wouldn't know, and it would wait for them. A second Ctrl-C kills them.

    Attributes:
        received: SIGTERM or SIGINT, the first that came; None: none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._pressed = False  # Ctrl-C
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)
            }

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _: Any) -> None:
        at_once = self._pressed and number == signal.SIGINT
        self.received = self.received or number
        self._pressed = self._pressed or number == signal.SIGINT
        for process in multiprocessing.active_children():
            if at_once:
                process.kill()
            else:
                process.terminate()


def _check(args: argparse.Namespace) -> None:
    if args.num_processes and args.num_gpus > 1:
        raise UserError("--num-gpus starts processes on GPUs and --num-processes on CPUs: give one of them")
    if args.num_processes < 0:
        raise UserError(f"--num-processes is {args.num_processes}, expected 1 or more")
    if not args.num_processes and args.num_gpus > max(torch.cuda.device_count(), 1):
        gpus = torch.cuda.device_count()
        raise UserError(
            f"--num-gpus is {args.num_gpus}, but this machine has {gpus}: give at most {max(gpus, 1)} "
            "(several processes on CPUs: --num-processes N)"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError(
            f"--num-machines is {args.num_machines}, which needs --dist-url tcp://HOST:PORT with the name of machine 0 "
            "and a free port there"
        )


def _join(run: Run, args: argparse.Namespace) -> None:
    gpus, processes = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if 0 < gpus < processes:
        raise UserError(
            f"torchrun started {processes} processes, but this machine has {gpus} GPUs: give at most --nproc-per-node "
            f"{gpus}, or set CUDA_VISIBLE_DEVICES to nothing to run on CPUs"
        )
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if gpus else "gloo")
    if not gpus:
        # Gloo aborts a process that ends without this. At exit an error has been printed, before those of the peers
        # that lose this process.
        atexit.register(distributed.destroy_process_group)
    comm.create_local_process_group(processes)
    record(_run_to_the_end)(run, args)  # torchrun's summary has the error then
    if gpus:  # where another process has failed, NCCL would wait for it
        distributed.destroy_process_group()


def _run_to_the_end(run: Run, args: argparse.Namespace) -> None:
    """All processes leave together: gloo can end a process whose peers leave while it works."""
    run(args)
    comm.synchronize()


def _run_and_report(run: Run, args: argparse.Namespace, first_error: Path) -> None:
    """Write the error into the file ``first_error`` if no other process has: they fail when they lose this one."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(
        lambda message: not (message.exc_info and first_error.exists())
    )
    try:
        _run_to_the_end(run, args)
    except Exception as error:  # whatever ends the process is reported, and raised again
        mistake = isinstance(error, UserError)
        text = str(error) if mistake else f"process {comm.get_rank()} failed:\n{traceback.format_exc().rstrip()}"
        whole = first_error.with_suffix(f".{os.getpid()}")
        whole.write_text(json.dumps({"mistake": mistake, "text": text}), encoding="utf-8")
        with suppress(FileExistsError):
            os.link(whole, first_error)
        raise
    except KeyboardInterrupt:  # for which torch leaves with 0, as if the run were complete
        raise SystemExit(INTERRUPTED) from None


def _raise_first(
    first_error: Path, error: ProcessExitedException | ProcessRaisedException, received: int | None
) -> None:
    """Raise what the process that failed first would have ended a run of one process with.

    Args:
        first_error: what it has reported, if the file is there.
        error: what was found when the first process ended.
        received: the signal that was passed on before; None: none.
    """
    report = json.loads(first_error.read_text(encoding="utf-8")) if first_error.exists() else None
    if report and report["mistake"]:
        raise UserError(report["text"]) from None
    if received == signal.SIGINT:
        raise KeyboardInterrupt from None
    if received == signal.SIGTERM:
        raise SystemExit(PREEMPTED) from None
    if isinstance(error, ProcessExitedException):
        if error.signal_name:
            raise SystemExit(f"error: process {error.error_index} was ended by {error.signal_name}") from None
        raise SystemExit(error.exit_code) from None
    if report is None:
        raise error
    raise SystemExit(report["text"]) from None
