"""Losses and metrics of runs as a picture, from the ``metrics.json`` that Detectron2's writer makes.

The file has a JSON object a line; those of an evaluation have keys such as ``segm/AP``.
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.utils.events import EventWriter, get_event_storage
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..data.panoptic_files import write_whole
from ..errors import UserError

__all__ = ["CurvesWriter", "cut_off_half_line", "draw_curves", "read_metrics"]

# From a quantity's name to its values by step.
Curves = dict[str, dict[int, float]]

METRICS_FILE = "metrics.json"
PICTURE = "metrics.png"
# Drawn if nothing else is asked for: losses (of the last decoder layer), learning rate, and these of every task.
TRAINING = ("total_loss", "loss_ce", "loss_mask", "loss_dice", "loss_sem_seg", "lr")
HEADLINES = ("PQ", "AP", "mIoU")
COLUMNS = 3
PANEL = (4.6, 3.1)  # inches


class CurvesWriter(EventWriter):
    """Draws ``metrics.png`` beside ``metrics.json`` after each evaluation and at the end.

    It goes behind the writer of ``metrics.json``. What goes wrong with a drawing is a line in the log.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self._folder = Path(output_dir)
        self._drawn = -1  # step of the last evaluation in the picture

    def write(self) -> None:
        evaluated = [step for name, (_, step) in get_event_storage().latest().items() if _is_headline(name)]
        if evaluated and max(evaluated) > self._drawn:
            self._drawn = max(evaluated)
            self._draw()

    def close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        if not (self._folder / METRICS_FILE).is_file():  # a run that ended before its first line
            return
        try:
            draw_curves({self._folder.name: read_metrics(self._folder)}, self._folder / PICTURE)
        except (UserError, ValueError, TypeError, RuntimeError, MemoryError) as error:
            logging.getLogger(__name__).warning("no curves were drawn: %s", error)


def cut_off_half_line(folder: str | Path) -> None:
    """Remove what a killed process or a full disk left of the last line of ``metrics.json``, before others follow."""
    path = Path(folder) / METRICS_FILE
    content = path.read_bytes() if path.is_file() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def read_metrics(folder: str | Path) -> Curves:
    """The curves of the run in an output folder. Where a resumed run has a step twice, the later values are taken.

    Raises:
        UserError: if the folder has no ``metrics.json``, or it has no values.
    """
    path = Path(folder) / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read '{path}' ({error}): give the output folder of a run") from error
    curves: Curves = {}
    for number, line in enumerate(lines, start=1):
        record = _parse(line, f"'{path}' line {number}", is_last=number == len(lines))
        for name, value in record.items():
            if name != "iteration" and isinstance(value, int | float):
                curves.setdefault(name, {})[record["iteration"]] = float(value)
    if not curves:
        raise UserError(f"'{path}' has no values yet: wait for the run's first steps")
    return curves


def _parse(line: str, place: str, *, is_last: bool) -> dict[str, Any]:
    try:
        record = json.loads(line) if line.strip() else {}
    except json.JSONDecodeError as error:
        if is_last:  # being written, or cut off
            return {}
        raise UserError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(record, dict) or (record and not isinstance(record.get("iteration"), int)):
        raise UserError(f"{place} is not a record with an 'iteration': is it the metrics.json of a run?")
    return record


def _is_headline(name: str) -> bool:
    """Whether it is the main metric of a task, such as ``segm/AP``."""
    return name.rpartition("/")[0] != "" and name.rpartition("/")[2] in HEADLINES


def draw_curves(runs: Mapping[str, Curves], path: Path, *, names: Sequence[str] = ()) -> None:
    """Write a picture with a panel a quantity and a line a run.

    Args:
        runs: what to call a run, and its curves.
        path: ending in .png, .pdf or .svg.
        names: the quantities; default: losses, learning rate, and PQ, AP and mIoU of every task.

    Raises:
        UserError: if no run has a quantity of ``names``, the ending is another one, or the file can't be written.
    """
    suffix = path.suffix.removeprefix(".").lower()
    if suffix not in ("png", "pdf", "svg"):
        raise UserError(f"'{path}' must end in .png, .pdf or .svg")
    known = {name: None for curves in runs.values() for name in curves}  # in their order
    for name in names:
        if name not in known:
            raise UserError(f"no run has values of '{name}': there are {', '.join(sorted(known))}")
    chosen = list(names) or _default_names(known)
    if not chosen:
        raise UserError(f"the runs have neither losses nor metrics to draw, but {', '.join(sorted(known))}")

    columns = min(COLUMNS, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    for index, name in enumerate(chosen, start=1):
        _draw_panel(figure.add_subplot(rows, columns, index), name, runs)
    if len(runs) > 1:
        figure.axes[0].legend(fontsize="x-small")  # the colours are the same in all panels
    write_whole(path, lambda file: figure.savefig(file, format=suffix, dpi=100))


def _default_names(known: Iterable[str]) -> list[str]:
    known = list(known)
    return [name for name in TRAINING if name in known] + [name for name in known if _is_headline(name)]


def _draw_panel(axes: Axes, name: str, runs: Mapping[str, Curves]) -> None:
    values: list[float] = []
    for run, curves in runs.items():
        points = sorted(curves.get(name, {}).items())
        values += [value for _, value in points if math.isfinite(value)]
        # Evaluations are few: each is a dot.
        marker = "o" if len(points) <= 50 else None
        axes.plot([step for step, _ in points], [value for _, value in points], label=run, marker=marker, markersize=3)
    if "loss" in name and values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set_title(name, fontsize="medium")
    axes.set_xlabel("step", fontsize="small")
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.3)
