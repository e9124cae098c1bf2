"""Setting a recipe to the user's own data."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..data.own import FORMS, OwnData, register_data, register_rows
from ..errors import UserError

__all__ = ["DataPaths", "add_data_options", "use_own_data"]


@dataclass(frozen=True)
class DataPaths:
    """Where the user's own data are, and their form, a key of ``FORMS``, where the files leave it open."""

    train: Sequence[str] = ()
    val: Sequence[str] = ()
    form: str = ""

    @classmethod
    def from_options(cls, args: argparse.Namespace) -> "DataPaths | None":
        """Those that the options of ``add_data_options`` name; None if they name none."""
        if not args.train_data and not args.val_data:
            if args.data_form:
                raise UserError("--data-form says the form of data, but neither --train-data nor --val-data is given")
            return None
        return cls(tuple(args.train_data), tuple(args.val_data), args.data_form)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--train-data``, ``--val-data`` and ``--data-form``."""
    group = parser.add_argument_group(
        "your own data", "everything else that depends on them (classes, mapper, outputs, ...) follows from the files"
    )
    # Not nargs="+", which would take the KEY VALUE pairs at the end of the command too.
    group.add_argument(
        "--train-data",
        action="append",
        default=[],
        metavar="PATH",
        help="to train on: a JSON file in COCO's instance or panoptic format, or a folder of pictures and PNGs. Where "
        "the parts lie apart, once for each: the JSON file, the pictures, the PNGs, in this order",
    )
    group.add_argument("--val-data", action="append", default=[], metavar="PATH", help="to evaluate on, likewise")
    forms = "; ".join(f"{name}: {meaning}" for name, meaning in FORMS.items())
    group.add_argument("--data-form", default="", choices=list(FORMS), help=f"where the files leave it open. {forms}")


def use_own_data(cfg: CfgNode, paths: DataPaths) -> None:
    """Check and register the data, tell what was found, and set ``cfg`` to them.

    Without training data, the classes are those of the data that ``cfg``, a run's ``config.yaml``, describes.
    """
    classes = cfg.DATASETS.OWN[0]["classes"] if cfg.DATASETS.OWN and not paths.train else None
    data: OwnData = _on_main_process(
        lambda: register_data(paths.train, paths.val, output_dir=cfg.OUTPUT_DIR, form=paths.form, classes=classes)
    )
    register_rows([row for row in (data.train, data.val) if row is not None])
    data.configure(cfg)
    if comm.is_main_process():
        print(data.summary, flush=True)


def _on_main_process(function: Callable[[], Any]) -> Any:
    """What ``function`` returns or raises on the main process, in all."""
    result, problem = None, ""
    if comm.is_main_process():
        try:
            result = function()
        except UserError as error:
            problem = str(error)
    result, problem = comm.all_gather((result, problem))[0]
    if problem:
        raise UserError(problem)
    return result
