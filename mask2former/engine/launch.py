"""Starting the processes of a run: one, Detectron2's one a GPU, or those that torchrun started."""

import argparse
import os
from collections.abc import Callable

import torch
from detectron2.engine import launch as launch_on_gpus
from detectron2.utils import comm

from ..errors import UserError

__all__ = ["launch"]


def launch(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call ``run(args)`` in every process of the run.

    Under torchrun (``RANK`` and ``WORLD_SIZE`` in the environment) this process joins the others, over NCCL
    where there are GPUs and over gloo on CPUs. Otherwise ``--num-gpus``, ``--num-machines``, ``--machine-rank`` and
    ``--dist-url`` say what to start, as everywhere in Detectron2.

    Raises:
        UserError: if the machine has fewer GPUs than asked for.
    """
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        _join(run, args)
        return
    gpus = torch.cuda.device_count()
    if args.num_gpus > max(gpus, 1):
        raise UserError(
            f"--num-gpus is {args.num_gpus}, but this machine has {gpus}: give at most {max(gpus, 1)} "
            "(several processes on CPUs: torchrun --nproc-per-node N train_net.py ...)"
        )
    launch_on_gpus(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def _join(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpus else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        run(args)
        comm.synchronize()  # gloo can end a process whose peers leave while it works
    finally:
        torch.distributed.destroy_process_group()
