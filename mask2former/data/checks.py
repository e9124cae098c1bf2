"""Checks of a data set before the first step, so that a mistake costs seconds and not a night.

No picture is decoded: on all of COCO they take seconds.
"""

import difflib
import os
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from ..errors import UserError
from .datasets.cityscapes import check_polygon_files, require_cityscapesscripts
from .datasets.coco_format import is_flag, is_segment_id, is_whole, load_instances_json, load_panoptic_json

__all__ = ["check_dataset", "count_classes", "load_dataset"]

DatasetDicts = list[dict[str, Any]]

_WHERE = "set the environment variable DETECTRON2_DATASETS to the folder of the data sets, see datasets/README.md"
# What Detectron2's loaders raise for values that they don't expect.
_BROKEN = (AssertionError, AttributeError, LookupError, NotImplementedError, RecursionError, TypeError, ValueError)
_FILE_KEYS = {"file_name": "pictures", "pan_seg_file_name": "panoptic annotations"}


def load_dataset(name: str) -> DatasetDicts:
    """The dataset dicts of a registered data set.

    Raises ``UserError`` if nothing has that name (similar names are listed), its files or a package that reads them are
    missing, its annotation file is broken, an annotation has an unknown class, or it is empty.
    """
    if name not in DatasetCatalog:
        raise UserError(f"data set '{name}' is not registered{_similar(name, DatasetCatalog.list())}")
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    # A panoptic data set's loader says itself what is wrong; the instance file is only used in its evaluation.
    is_instances = json_file is not None and metadata.get("panoptic_json") is None
    if is_instances and not os.path.isfile(json_file):
        raise UserError(f"data set '{name}' needs '{json_file}', which does not exist: {_WHERE}")
    if metadata.get("evaluator_type") == "cityscapes_instance":
        require_cityscapesscripts()
    dicts = _read(name, metadata)
    if not dicts:
        place = metadata.get("panoptic_json") or json_file or metadata.get("image_root")
        raise UserError(f"data set '{name}' has no pictures: check '{place}'")
    return dicts


def _read(name: str, metadata: Metadata) -> DatasetDicts:
    try:
        return DatasetCatalog.get(name)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"data set '{name}' needs '{error.filename}', which does not exist: {_WHERE}") from error
    except OSError as error:
        raise UserError(f"data set '{name}' needs '{error.filename}', which can't be read: {error.strerror}") from error
    except ModuleNotFoundError as error:
        raise UserError(f"data set '{name}' needs the package {error.name}: pip install {error.name}") from error
    except _BROKEN as error:
        _explain(metadata)
        if isinstance(error, AssertionError):  # so Detectron2's loaders report files that are missing
            place = metadata.get("gt_dir") or metadata.get("sem_seg_root") or metadata.get("json_file")
            raise UserError(f"data set '{name}' can't be loaded from '{place}': {error}: {_WHERE}") from error
        raise


def check_dataset(
    name: str,
    num_classes: int | None = None,
    *,
    dataset_dicts: DatasetDicts | None = None,
    num_classes_key: str = "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    semantic_files: bool = False,
) -> DatasetDicts:
    """Check a registered data set and return its dataset dicts.

    ``num_classes`` is the model's number of classes, called ``num_classes_key`` in the message. Pass
    ``dataset_dicts`` if they are loaded already. ``semantic_files``: the semantic PNGs are needed too.

    Raises ``UserError`` for what ``load_dataset`` does, for a wrong number of classes, for missing files, and
    for an annotation whose class is out of range.
    """
    dicts = load_dataset(name) if dataset_dicts is None else dataset_dicts
    classes = count_classes(name, dicts)
    if num_classes is not None and classes is not None and num_classes != classes:
        noun = "class" if classes == 1 else "classes"
        raise UserError(
            f"{num_classes_key} is {num_classes}, but data set '{name}' has {classes} {noun}: set it to {classes}"
        )
    _check_values(dicts, classes if classes is not None else num_classes)
    keys = {**_FILE_KEYS, "sem_seg_file_name": "semantic annotations"} if semantic_files else _FILE_KEYS
    for key, noun in keys.items():
        _check_files(name, [d[key] for d in dicts if key in d], noun)
    return dicts


def count_classes(name: str, dataset_dicts: DatasetDicts) -> int | None:
    """How many classes the annotations of a data set have; None if its metadata doesn't say.

    Panoptic annotations have things and stuff, instance annotations things alone, semantic ones stuff (by which
    Detectron2 means all classes).
    """
    metadata = MetadataCatalog.get(name)
    if "segments_info" in dataset_dicts[0]:
        maps = [metadata.get(f"{kind}_dataset_id_to_contiguous_id") or {} for kind in ("thing", "stuff")]
        contiguous_ids = {index for id_map in maps for index in id_map.values()}
        return len(contiguous_ids) or _length(metadata.get("stuff_classes"))
    if "annotations" in dataset_dicts[0]:
        return _length(metadata.get("thing_classes"))
    return _length(metadata.get("stuff_classes"))


def _length(classes: Sequence[str] | None) -> int | None:
    return None if classes is None else len(classes)


def _similar(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(names), n=4, cutoff=0.6)
    return f": did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ": register it first"


def _check_values(dicts: DatasetDicts, num_classes: int | None) -> None:
    """Raise ``UserError`` for a size, class, crowd flag or segment id that can't be one."""
    for dataset_dict in dicts:
        for key in ("height", "width"):
            if not is_whole(dataset_dict.get(key, 1)):
                raise UserError(f"'{dataset_dict['file_name']}' has {key} {_short(dataset_dict[key])}, expected pixels")
        for kind in ("annotations", "segments_info"):
            for index, annotation in enumerate(dataset_dict.get(kind, ())):
                problem = _problem(annotation, num_classes, segment=kind == "segments_info")
                if problem:
                    number = annotation.get("id", f"number {index + 1}")
                    raise UserError(f"'{dataset_dict['file_name']}': annotation {number} has {problem}")


def _problem(annotation: dict[str, Any], num_classes: int | None, *, segment: bool) -> str:
    """What is wrong with an annotation, or ""."""
    category, crowd = annotation["category_id"], annotation.get("iscrowd", 0)
    if not is_whole(category) or not 0 <= category < (num_classes or category + 1):
        expected = "an integer" if num_classes is None else f"0 to {num_classes - 1}"
        return f"category_id {_short(category)}, expected {expected}"
    if not is_flag(crowd):
        return f"iscrowd {_short(crowd)}, expected 0 or 1"
    if segment and not is_segment_id(annotation["id"]):
        return f"the segment id {_short(annotation['id'])}, expected an integer from 0 to 16777215"
    return ""


def _short(value: Any) -> str:
    return repr(value)[:60]


def _check_files(name: str, paths: list[str], noun: str) -> None:
    """Look each folder up once: a look-up a file takes minutes on network file systems."""
    folders: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, file_name = os.path.split(path)
        if folder not in folders:
            folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if file_name not in folders[folder]:
            missing.append(path)
    if missing:
        raise UserError(
            f"data set '{name}': {len(missing)} of {len(paths)} {noun} are missing, the first is '{missing[0]}': see "
            "datasets/README.md for the files expected"
        )


def _explain(metadata: Metadata) -> None:
    """Say what is wrong with the files that a loader of Detectron2 could not use, where that is known."""
    evaluator_type = metadata.get("evaluator_type")
    if evaluator_type in ("cityscapes_instance", "cityscapes_sem_seg"):
        check_polygon_files(metadata.gt_dir)
    elif metadata.get("panoptic_json") is not None:
        load_panoptic_json(metadata.panoptic_json, pictures_named=False)
    elif metadata.get("json_file") is not None:
        load_instances_json(metadata.json_file)
