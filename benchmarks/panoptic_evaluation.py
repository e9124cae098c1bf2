#!/usr/bin/env python
"""How long panoptic quality takes, beside Detectron2's evaluator with panopticapi-lite.

Both evaluators get the same panoptic_seg outputs, picture by picture, and write predictions.json. Outputs are the
truth moved by some pixels, with segments left out, joined and of another class. Ours compares pictures in N threads.
The other makes PNGs in this process, then N processes, or this one alone, compare them. The two take turns; a figure
of a group or category that differs is an error.

examples (DETECTRON2_DATASETS names the folder with the data sets):
  python benchmarks/panoptic_evaluation.py
  python benchmarks/panoptic_evaluation.py --dataset coco_2017_val_panoptic --rounds 9 --json panoptic.json
"""

import argparse
import contextlib
import copy
import functools
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import detectron2
import numpy as np
import PIL
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator
from machine import describe, processors
from panopticapi import evaluation as panopticapi
from PIL import Image
from tabulate import tabulate

from mask2former.data.annotations import rgb_from_ids
from mask2former.errors import UserError, command
from mask2former.evaluation import PanopticEvaluator
from mask2former.evaluation.truth import read_json, read_segment_ids

Record = dict[str, Any]
Segments = list[dict[str, Any]]
Output = tuple[torch.Tensor, Segments]

NAME = "panoptic_evaluation_benchmark"
METRICS = ("pq", "sq", "rq")

# Of pictures that are made here; as many categories of things and of all as COCO has.
HEIGHT, WIDTH, SEGMENTS = 480, 640, 12
THINGS, CATEGORIES = 80, 133


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    torch.set_num_threads(1)
    for name in ("detectron2", "mask2former"):
        logging.getLogger(name).setLevel(logging.WARNING)
    machine = describe(
        threads=args.threads,
        numpy=np.__version__,
        pillow=PIL.__version__,
        detectron2=detectron2.__version__,
        panopticapi_lite=version("panopticapi-lite"),
    )
    with _truth(args) as truth:
        outputs = _outputs(truth)
        results = [_compare(truth, outputs, threads, args.rounds) for threads in args.threads]
        pictures = len(outputs)
    print(f"\n{pictures} pictures of {args.dataset or f'{HEIGHT} x {WIDTH} pixels'}; the figures are equal")
    print(tabulate([_row(result, pictures) for result in results], headers=HEADERS, disable_numparse=True))
    print("\n" + "\n".join(f"{key}: {value}" for key, value in machine.items()))
    if args.json:
        of = {"dataset": args.dataset, "pictures": pictures}
        content = {"machine": machine, **of, "results": [asdict(result) for result in results]}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", metavar="NAME", help="registered panoptic data set; default: pictures of random regions")
    add("--pictures", type=int, default=100, metavar="N", help="at most; default: %(default)s")
    add("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    threads = sorted({1, processors()})
    add("--threads", type=int, nargs="+", default=threads, metavar="N", help="and processes; 1 and all processors")
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args(arguments)
    for option, least in (("pictures", args.pictures), ("rounds", args.rounds), ("threads", min(args.threads))):
        if least < 1:
            raise UserError(f"--{option} is {least}, expected at least 1")
    return args


# ------------------------------------------------------------------------------------------- measuring


class Seconds(NamedTuple):
    """An evaluation's steps: making the evaluator and giving it all outputs, and its ``evaluate``."""

    process: float
    evaluate: float


class Figures(NamedTuple):
    """Of all groups by Detectron2's names, and PQ, SQ and RQ of each category (K, 3), 0 where there is none of it."""

    groups: dict[str, float]
    categories: np.ndarray


@dataclass(frozen=True)
class Result:
    """What the two sides took in each round."""

    threads: int
    ours: list[Seconds]
    panopticapi: list[Seconds]


HEADERS = [
    "threads",
    "ours, ms/picture",
    "panopticapi-lite",
    "of it evaluate()",
    "times as fast: median",
    "min",
    "max",
    "evaluate() alone",
]


def _row(result: Result, pictures: int) -> list[str]:
    ours, theirs = (np.array(seconds) for seconds in (result.ours, result.panopticapi))
    steps = [ours.sum(axis=1), theirs.sum(axis=1), theirs[:, 1]]
    ratios = (theirs.sum(axis=1) / ours.sum(axis=1)).tolist()
    compared = [value(ratios) for value in (statistics.median, min, max)]
    compared.append(np.median(theirs[:, 1] / ours.sum(axis=1)))
    times = [1000 * np.median(step) / pictures for step in steps]
    return [str(result.threads), *(f"{value:.2f}" for value in (*times, *compared))]


def _compare(truth: "Truth", outputs: list[Output], threads: int, rounds: int) -> Result:
    result = Result(threads, [], [])
    for _ in range(rounds):
        figures, seconds = _ours(truth, outputs, threads)
        result.ours.append(seconds)
        theirs, seconds = _panopticapi(truth, outputs, threads)
        result.panopticapi.append(seconds)
        _check_equal(figures, theirs)
    return result


def _check_equal(ours: Figures, theirs: Figures) -> None:
    for name, value in ours.groups.items():
        # One without a category is NaN here and ends panopticapi.
        if not abs(value - theirs.groups[name]) < 1e-9:
            raise RuntimeError(f"{name} is {value}, but {theirs.groups[name]} by panopticapi-lite")
    different = np.abs(ours.categories - theirs.categories).max(axis=1) > 1e-9
    if different.any():
        raise RuntimeError(f"categories number {np.flatnonzero(different).tolist()} differ from panopticapi-lite's")


# ------------------------------------------------------------------------------------------- the two sides


def _ours(truth: "Truth", outputs: list[Output], threads: int) -> tuple[Figures, Seconds]:
    with tempfile.TemporaryDirectory() as output_dir:
        start = time.perf_counter()
        evaluator = PanopticEvaluator(NAME, output_dir, threads=threads)
        groups, seconds = _evaluate(evaluator, truth, outputs, start)
    quality = evaluator.quality()
    return Figures(groups, np.nan_to_num(np.stack([quality.pq, quality.sq, quality.rq], axis=1))), seconds


def _panopticapi(truth: "Truth", outputs: list[Output], processes: int) -> tuple[Figures, Seconds]:
    """In several processes as it does it itself; in one without a pool, which is faster."""
    by_category: dict[int, dict[str, float]] = {}
    compute, single_core = panopticapi.pq_compute, panopticapi.pq_compute_single_core

    def keep(*args: Any, **kwargs: Any) -> Any:
        results = compute(*args, **kwargs)
        by_category.update(results["per_class"])
        return results

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(panopticapi, "pq_compute", keep))
        stack.enter_context(mock.patch.object(panopticapi.multiprocessing, "cpu_count", lambda: processes))
        if processes == 1:
            stack.enter_context(
                mock.patch.object(panopticapi, "pq_compute_multi_core", functools.partial(single_core, 0))
            )
        output_dir = stack.enter_context(tempfile.TemporaryDirectory())
        given = [(ids, copy.deepcopy(segments)) for ids, segments in outputs]  # which Detectron2's evaluator changes
        start = time.perf_counter()
        groups, seconds = _evaluate(COCOPanopticEvaluator(NAME, output_dir), truth, given, start)
    figures = [[100 * by_category[c["id"]][metric] for metric in METRICS] for c in truth.content["categories"]]
    return Figures(groups, np.array(figures)), seconds


def _evaluate(
    evaluator: COCOPanopticEvaluator, truth: "Truth", outputs: list[Output], start: float
) -> tuple[dict[str, float], Seconds]:
    evaluator.reset()
    for record, output in zip(truth.records, outputs, strict=True):
        evaluator.process([record], [{"panoptic_seg": output}])
    processed = time.perf_counter()
    results = evaluator.evaluate()
    return results["panoptic_seg"], Seconds(processed - start, time.perf_counter() - processed)


# ------------------------------------------------------------------------------------------- truth and outputs


class Truth(NamedTuple):
    """A panoptic JSON's content, and the folder of its PNGs."""

    content: dict[str, Any]
    root: str

    @property
    def records(self) -> list[Record]:
        """What evaluators read of the dataset dicts."""
        return [
            {"image_id": a["image_id"], "file_name": str(Path(a["file_name"]).with_suffix(".jpg"))}
            for a in self.content["annotations"]
        ]

    @property
    def contiguous_ids(self) -> dict[int, int]:
        """Of the categories' ids, which are numbered in the order of the JSON."""
        return {category["id"]: number for number, category in enumerate(self.content["categories"])}

    @property
    def things(self) -> set[int]:
        """The categories of things."""
        return {category["id"] for category in self.content["categories"] if category["isthing"]}


@contextlib.contextmanager
def _truth(args: argparse.Namespace) -> Iterator[Truth]:
    """The ground truth, registered as ``NAME`` in the block."""
    with tempfile.TemporaryDirectory(prefix="panoptic_evaluation") as folder:
        truth = _load(args.dataset, args.pictures) if args.dataset else _make(Path(folder), args.pictures)
        path = Path(folder) / "truth.json"
        path.write_text(json.dumps(truth.content))
        ids = truth.contiguous_ids
        MetadataCatalog.get(NAME).set(
            panoptic_json=str(path),
            panoptic_root=truth.root,
            thing_dataset_id_to_contiguous_id={category: ids[category] for category in truth.things},
            stuff_dataset_id_to_contiguous_id=ids,
        )
        try:
            yield truth
        finally:
            MetadataCatalog.remove(NAME)


def _load(dataset: str, pictures: int) -> Truth:
    """The first pictures of a registered data set."""
    metadata = MetadataCatalog.get(dataset) if dataset in DatasetCatalog else None
    if metadata is None or metadata.get("panoptic_json") is None:
        raise UserError(f"'{dataset}' is no registered panoptic data set: name one such as coco_2017_val_panoptic")
    content = read_json(f"panoptic annotations of data set '{dataset}'", metadata.panoptic_json)
    annotations = content["annotations"][:pictures]
    kept = {annotation["image_id"] for annotation in annotations}
    images = [image for image in content["images"] if image["id"] in kept]
    return Truth({**content, "annotations": annotations, "images": images}, metadata.panoptic_root)


def _make(folder: Path, pictures: int) -> Truth:
    """Pictures of random regions; one region is of no segment, and in every third picture one is a crowd."""
    rng = np.random.default_rng(0)
    annotations = []
    for number in range(pictures):
        ids = _regions(rng)
        name = f"{number:06d}.png"
        Image.fromarray(rgb_from_ids(ids)).save(folder / name)
        segments = [
            {"id": int(i), "category_id": int(rng.integers(1, CATEGORIES + 1)), "iscrowd": 0, "area": int(area)}
            for i, area in zip(*np.unique(ids[ids > 0], return_counts=True), strict=True)
        ]
        if number % 3 == 0:
            segments[0].update(category_id=1, iscrowd=1)
        annotations.append({"image_id": number, "file_name": name, "segments_info": segments})
    images = [{"id": number, "file_name": f"{number:06d}.jpg"} for number in range(pictures)]
    categories = [{"id": c, "name": f"category {c}", "isthing": int(c <= THINGS)} for c in range(1, CATEGORIES + 1)]
    return Truth({"images": images, "annotations": annotations, "categories": categories}, str(folder))


def _regions(rng: np.random.Generator) -> np.ndarray:
    """Ids (H, W) of the regions around random points, with wavy borders; one region is 0."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    wave = 8 * np.sin(x / rng.uniform(5, 30)) * np.sin(y / rng.uniform(5, 30))
    points = rng.uniform((0, 0), (HEIGHT, WIDTH), size=(SEGMENTS + 1, 2))
    distances = np.stack([np.hypot(y + wave - py, x - wave - px) for py, px in points])
    ids = np.concatenate([[0], rng.choice(np.arange(1, 2**24), size=SEGMENTS, replace=False)])
    return ids[distances.argmin(axis=0)]


def _outputs(truth: Truth) -> list[Output]:
    """What a model that is often right would give: ids from 1 on, each of some pixels."""
    rng = np.random.default_rng(1)
    outputs = []
    for annotation in truth.content["annotations"]:
        ids = read_segment_ids(str(Path(truth.root) / annotation["file_name"]))
        moved = np.roll(ids, rng.integers(-6, 7, size=2), axis=(0, 1))
        outputs.append(_disturb(moved, annotation["segments_info"], truth, rng))
    return outputs


def _disturb(ids: np.ndarray, segments: Segments, truth: Truth, rng: np.random.Generator) -> Output:
    """Segments as they are (7 in 10), left out, joined with the last one or of the class of the first one."""
    found = np.zeros(ids.shape, dtype=np.int32)
    described: Segments = []
    for segment, fate in zip(segments, rng.random(len(segments)), strict=True):
        mask = ids == segment["id"]
        if fate < 0.1 or not mask.any():
            continue
        if fate < 0.2 and described:
            found[mask] = described[-1]["id"]
            continue
        category = segments[0]["category_id"] if fate < 0.3 else segment["category_id"]
        described.append(
            {
                "id": len(described) + 1,
                "category_id": truth.contiguous_ids[category],
                "isthing": category in truth.things,
            }
        )
        found[mask] = described[-1]["id"]
    return torch.from_numpy(found), described


if __name__ == "__main__":
    command(main)
