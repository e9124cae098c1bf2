"""What a run needs before its first step: a device, a log, seeds."""

import argparse
import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..errors import UserError
from .best_checkpoint import StoppedEarly

__all__ = ["available_device", "setup_run"]


def available_device(name: str) -> str:
    """The device ``name``, or "cpu" with one line in the log where it is not there.

    Raises:
        UserError: if torch knows no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE must be cpu, cuda, cuda:0, mps or the like, but is {name!r}") from error
    # torch.cuda, but torch.backends.mps
    backends: list[Any] = [getattr(place, device.type, None) for place in (torch, torch.backends)]
    if device.type != "cpu" and not any(hasattr(b, "is_available") and b.is_available() for b in backends):
        logging.getLogger(__name__).warning("no %s device is available: running on the CPU", device.type)
        return "cpu"
    return name


def setup_run(cfg: Any, args: argparse.Namespace) -> None:
    """Detectron2's set-up of log, output folder and seeds, for this package's log too."""
    output_dir = cfg.OUTPUT_DIR if isinstance(cfg, CfgNode) else cfg.train.output_dir
    setup_logger(output_dir, distributed_rank=comm.get_rank(), name="mask2former")
    default_setup(cfg, args)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_user_error)


def _is_no_user_error(record: logging.LogRecord) -> bool:
    """False for the traceback of a user's mistake or of a run's early end, which is reported in one line."""
    return not (record.exc_info and isinstance(record.exc_info[1], UserError | KeyboardInterrupt | StoppedEarly))
