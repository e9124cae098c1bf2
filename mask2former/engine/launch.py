"""Starting the processes of a run: one, one a GPU, several on CPUs, or those that torchrun started."""

import argparse
import atexit
import json
import logging
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from detectron2.engine import launch as start_processes
from detectron2.utils import comm
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..errors import UserError

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
    ended within 30 seconds.

    Raises:
        UserError: if the options don't go together, the machine has fewer GPUs than asked for, or the process that
            failed first raised one.
        SystemExit: if a started process failed otherwise, with its traceback; or if it left with an exit code of its
            own, with that.
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
        try:
            start_processes(
                _run_and_report,
                processes,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(run, args, first_error),
            )
        except (ProcessExitedException, ProcessRaisedException) as error:
            _raise_first(first_error, error)


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


def _raise_first(first_error: Path, error: ProcessExitedException | ProcessRaisedException) -> None:
    """Raise what the process that failed first would have ended a run of one process with."""
    if isinstance(error, ProcessExitedException):
        if error.signal_name:
            raise SystemExit(f"error: process {error.error_index} was ended by {error.signal_name}") from None
        raise SystemExit(error.exit_code) from None
    if not first_error.exists():
        raise error
    report = json.loads(first_error.read_text(encoding="utf-8"))
    raise (UserError if report["mistake"] else SystemExit)(report["text"]) from None
