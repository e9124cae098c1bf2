"""Making panoptic and semantic annotation files from others, as the ``datasets/prepare_*.py`` commands do.

Files appear under their names only when they are complete, and complete ones are kept, so a command that was
interrupted can be started again.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import UserError
from .annotations import decode_segmentation, ids_from_rgb, rgb_from_ids
from .datasets.coco_format import check_panoptic_annotations, load_instances_json, load_json
from .images import read_image

__all__ = [
    "extent",
    "instances_to_panoptic",
    "is_newer",
    "panoptic_from_instances",
    "panoptic_to_semantic",
    "run_jobs",
    "save_json",
    "save_png",
    "semantic_from_panoptic",
    "write_whole",
]

IGNORE_LABEL = 255


# ------------------------------------------------------------------------------------------------- files


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file that gets the name ``path`` only once it is complete. Folders are made.

    Raises ``UserError`` if the folder or the disk doesn't allow it.
    """
    unfinished = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(unfinished, "wb") as file:
                write(file)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error}") from error


def save_png(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8 ``pixels`` as a PNG, all or nothing."""
    write_whole(path, lambda file: Image.fromarray(pixels).save(file, format="PNG"))


def save_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, all or nothing."""
    encoded = json.dumps(content).encode()
    write_whole(path, lambda file: file.write(encoded))


def is_newer(path: Path, *sources: Path) -> bool:
    """Whether ``path`` exists and is not older than what it is made from."""
    if not path.is_file():
        return False
    made = path.stat().st_mtime_ns
    return all(made >= source.stat().st_mtime_ns for source in sources if source.exists())


def run_jobs(jobs: Sequence[Callable[[], None]], *, workers: int, description: str) -> list[str]:
    """Run ``jobs`` in ``workers`` threads under a progress bar; the messages of those that failed.

    A job fails by ``UserError`` or ``OSError``; the others go on. Threads are enough: the time goes into
    compression and array arithmetic, which leave Python's lock. On Ctrl-C, jobs that have begun are finished.
    """
    problems = []
    executor = ThreadPoolExecutor(max_workers=max(1, workers))
    try:
        futures = [executor.submit(job) for job in jobs]
        # On a terminal only; a log file gets the summary that the command prints.
        for future in tqdm(as_completed(futures), total=len(futures), desc=description, unit="file", disable=None):
            error = future.exception()
            if isinstance(error, UserError | OSError):
                problems.append(str(error))
            elif error is not None:
                raise error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    return problems


# ------------------------------------------------------------------------------------ panoptic → semantic


def semantic_from_panoptic(
    ids: np.ndarray, segments: Sequence[Mapping[str, Any]], labels: Mapping[int, int], name: str
) -> np.ndarray:
    """Semantic labels (H, W) uint8 of segment ids (H, W): ``labels`` of each segment's category, else 255.

    ``name`` says in errors which file it is. Raises ``UserError`` for a category without a label.
    """
    semantic = np.full(ids.shape, IGNORE_LABEL, dtype=np.uint8)
    for segment in segments:
        if segment["category_id"] not in labels:
            raise UserError(
                f"{name}: segment {segment['id']} has category_id {segment['category_id']}, which is not among the "
                f"{len(labels)} classes of the data set"
            )
        semantic[ids == segment["id"]] = labels[segment["category_id"]]
    return semantic


def panoptic_to_semantic(
    panoptic_json: Path, panoptic_root: Path, sem_seg_root: Path, labels: Mapping[int, int], *, workers: int = 1
) -> list[str]:
    """Make the semantic PNGs of a data set in the COCO panoptic format; one line for each file that failed.

    ``labels``: category id → label in the PNGs, 0 to 254. Pixels of no segment get 255.
    """
    content = load_json(panoptic_json)
    annotations: Any = content.get("annotations") if isinstance(content, dict) else None
    check_panoptic_annotations(annotations, panoptic_json)

    def convert(annotation: Mapping[str, Any]) -> None:
        source, target = panoptic_root / annotation["file_name"], sem_seg_root / annotation["file_name"]
        if is_newer(target, source, panoptic_json):
            return
        ids = ids_from_rgb(read_image(source, "RGB"))
        save_png(target, semantic_from_panoptic(ids, annotation["segments_info"], labels, f"'{source}'"))

    jobs = [lambda annotation=annotation: convert(annotation) for annotation in annotations]
    return run_jobs(jobs, workers=workers, description=sem_seg_root.name)


# ----------------------------------------------------------------------------------- instances → panoptic


def panoptic_from_instances(
    annotations: Sequence[Mapping[str, Any]],
    height: int,
    width: int,
    *,
    background: int | None = None,
    name: str = "picture",
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Segment ids (height, width) uint32 and ``segments_info`` of COCO instance annotations of one picture.

    Where objects overlap, the smaller is on top, since a small object under a large one would vanish; crowd regions
    are below all. Objects of which nothing is visible are left out. What no object covers becomes a segment of the
    category ``background``, or stays 0, unlabelled, if that is None.
    """
    masks = [
        decode_segmentation(
            annotation.get("segmentation"), height, width, f"annotation {annotation.get('id')} of {name}"
        )
        for annotation in annotations
    ]
    crowd = [int(annotation.get("iscrowd", 0)) for annotation in annotations]
    ids = np.zeros((height, width), dtype=np.uint32)
    for index in sorted(range(len(masks)), key=lambda i: (-crowd[i], -int(masks[i].sum()))):
        ids[masks[index]] = index + 1
    categories = [annotation["category_id"] for annotation in annotations]
    if background is not None:
        categories, crowd = [*categories, background], [*crowd, 0]
        ids[ids == 0] = len(categories)
    segments = [
        {"id": index + 1, "category_id": category, "iscrowd": crowd[index], **extent(ids == index + 1)}
        for index, category in enumerate(categories)
    ]
    return ids, [segment for segment in segments if segment["area"] > 0]


def extent(mask: np.ndarray) -> dict[str, Any]:
    """Area and bbox (x, y, width, height) of a mask, in pixels."""
    y, x = np.nonzero(mask)
    if not len(x):
        return {"area": 0, "bbox": [0, 0, 0, 0]}
    left, top = int(x.min()), int(y.min())
    return {"area": len(x), "bbox": [left, top, int(x.max()) - left + 1, int(y.max()) - top + 1]}


def instances_to_panoptic(
    instances_json: Path,
    categories: Sequence[Mapping[str, Any]],
    panoptic_json: Path,
    panoptic_root: Path,
    sem_seg_root: Path,
    *,
    background: int | None = None,
    workers: int = 1,
) -> list[str]:
    """Make panoptic JSON, panoptic PNGs and semantic PNGs from a file in COCO's instance format.

    ``categories`` are those of the panoptic data set, in the order of their contiguous ids, which are the labels of
    the semantic PNGs (see ``mask2former.data.datasets.panoptic_metadata``). Returns one line for each picture that
    failed; the JSON is written only if there are none.
    """
    labels = {category["id"]: index for index, category in enumerate(categories)}
    content = load_instances_json(instances_json, categories=labels)
    annotations: dict[Any, list[Mapping[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    file_names = _png_names(content["images"], instances_json)
    segments_info: dict[Any, list[dict[str, Any]]] = {}

    def convert(image: Mapping[str, Any]) -> None:
        name = f"picture '{image['file_name']}'"
        try:
            ids, segments = panoptic_from_instances(
                annotations[image["id"]], int(image["height"]), int(image["width"]), background=background, name=name
            )
        except UserError as error:
            raise UserError(f"'{instances_json}': {error}") from error
        segments_info[image["id"]] = segments
        panoptic, semantic = panoptic_root / file_names[image["id"]], sem_seg_root / file_names[image["id"]]
        if not is_newer(panoptic, instances_json):
            save_png(panoptic, rgb_from_ids(ids))
        if not is_newer(semantic, instances_json):
            save_png(semantic, semantic_from_panoptic(ids, segments, labels, name))

    jobs = [lambda image=image: convert(image) for image in content["images"]]
    problems = run_jobs(jobs, workers=workers, description=panoptic_root.name)
    if not problems:
        save_json(
            panoptic_json,
            {
                "images": content["images"],
                "annotations": [
                    {"image_id": key, "file_name": file_names[key], "segments_info": segments_info[key]}
                    for key in file_names
                ],
                "categories": list(categories),
            },
        )
    return problems


def _png_names(images: Sequence[Mapping[str, Any]], source: Path) -> dict[Any, str]:
    """Image id → name of its PNGs. Raises ``UserError`` if two pictures would share one."""
    names = {image["id"]: Path(image["file_name"]).with_suffix(".png").as_posix() for image in images}
    if len(set(names.values())) < len(images):
        ordered = sorted(names.values())
        twice = next(name for name, following in zip(ordered, ordered[1:], strict=False) if name == following)
        raise UserError(
            f"'{source}': two pictures would have the annotation file '{twice}': give pictures names that differ in "
            "more than their ending"
        )
    return names
