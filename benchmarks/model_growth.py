"""How the time of our model, and of Hugging Face's, grows with what they are given, beside how the work grows."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib import ticker
from matplotlib.figure import Figure
from model_sides import Task

__all__ = ["SERIES", "Point", "draw", "growth_rows", "sides_of"]


@dataclass(frozen=True)
class Series:
    """Tasks that differ in one thing.

    Attributes:
        title: what is measured, of one of the tasks.
        label: what it is measured against, with its unit.
        value: how much of that a task has.
        tasks: tasks, from the side of the loss's pictures, and whether they are to be small.
    """

    title: Callable[[Task], str]
    label: str
    value: Callable[[Task], int]
    tasks: Callable[[int, bool], list[Task]]


def _sides(side: int, quick: bool) -> list[Task]:
    return [Task("inference", (n, n)) for n in ((64, 128) if quick else (256, 512, 1024, 2048))]


def _queries(side: int, quick: bool) -> list[Task]:
    size = (64, 64) if quick else (256, 256)
    return [Task("inference", size, queries=count) for count in ((4, 8) if quick else (50, 100, 200, 400))]


def _masks(side: int, quick: bool) -> list[Task]:
    return [Task("loss", (side, side), objects=count) for count in ((1, 4) if quick else (1, 10, 50, 200))]


SERIES = {
    "side": Series(
        lambda task: f"Inference, {task.queries} queries",
        "side of the picture, pixels",
        lambda task: task.size[0],
        _sides,
    ),
    "masks": Series(
        lambda task: "Matching and loss, {} x {}".format(*task.size), "masks", lambda task: task.objects, _masks
    ),
    "queries": Series(
        lambda task: "Inference, {} x {}".format(*task.size), "queries", lambda task: task.queries, _queries
    ),
}


def sides_of(task: Task) -> tuple[str, ...]:
    """What takes turns: at the largest sizes ours alone, because Hugging Face's would take as long as all the rest."""
    return ("ours", "huggingface") if math.prod(task.size) <= 1024 * 1024 else ("ours",)


@dataclass(frozen=True)
class Point:
    """Seconds of each side and GFLOP of ours for one value of a series."""

    value: int
    seconds: dict[str, float]
    gigaflop: float


def growth_rows(points: Sequence[Point], sgemm: float) -> Iterator[list[str]]:
    """Of each point value, seconds, GFLOP and floor; how many times the previous point's time and work it has."""
    for before, point in pairwise([None, *points]):
        grown = ["", ""]
        if before is not None:
            grown = [
                f"x {point.seconds['ours'] / before.seconds['ours']:.2f}",
                f"x {point.gigaflop / before.gigaflop:.2f}",
            ]
        seconds = [f"{point.seconds[name]:.3f}" if name in point.seconds else "" for name in ("ours", "huggingface")]
        floor = [f"{point.gigaflop:.1f}", f"{point.gigaflop / sgemm:.3f}"]
        yield [str(point.value), *seconds, *floor, *grown]


def draw(growth: Mapping[str, Sequence[Point]], titles: Mapping[str, str], sgemm: float) -> Figure:
    """A panel for each series that has points, with logarithmic axes."""
    shown = {name: points for name, points in growth.items() if points}
    figure = Figure(figsize=(4.5 * len(shown), 4.6), dpi=120)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, (name, points) in zip(panels, shown.items(), strict=True):
        values = [point.value for point in points]
        for side, label, style in (("ours", "ours", "o-"), ("huggingface", "Hugging Face", "s-")):
            shown_points = [point for point in points if side in point.seconds]
            times = [point.seconds[side] for point in shown_points]
            panel.plot([point.value for point in shown_points], times, style, mfc="white", label=label)
        floor = [point.gigaflop / sgemm for point in points]
        panel.plot(values, floor, "k:", label=f"floor: products and convolutions at {sgemm:.0f} GFLOP/s")
        panel.set(xscale="log", yscale="log", title=titles[name], xlabel=SERIES[name].label, ylabel="time, s")
        panel.set_xticks(values, [f"{value:,}" for value in values])
        panel.minorticks_off()
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="lower center", ncol=3)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure
