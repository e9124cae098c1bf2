"""From the user's files to registered data sets and a config for them.

A row describes one split: a plain dict with ``name``, ``form`` ("instances", "semantic" or "panoptic"), ``classes`` and
the paths of its files. Rows are kept in the config, as ``DATASETS.OWN``, so whatever reads a run's ``config.yaml`` has
the data sets and, with or without their files, the names and colours of the classes.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ...errors import UserError
from ..datasets.panoptic import panoptic_metadata, register_panoptic
from .forms import Source, recognise
from .instances import load_instances, read_instances_json
from .label_maps import IGNORE_LABEL, load_label_maps, read_label_maps
from .object_masks import make_instances_json
from .panoptic import read_panoptic_json
from .summary import Tally

__all__ = ["OwnData", "register_data", "register_rows"]

Row = dict[str, Any]

# A recipe's mapper keeps its family of augmentations and gets the reader of the data's form.
_MAPPER_NAME = re.compile(r"(coco|mask_former|microscopy)_(?:instance|panoptic|semantic)(_lsj)?")
_TASKS = {"instances": "instance", "panoptic": "panoptic", "semantic": "semantic"}


@dataclass(frozen=True)
class OwnData:
    """The user's own data, checked and registered.

    Attributes:
        train, val: rows of the splits, see this module; None: not given.
        summary: what was found, as lines of text.
    """

    train: Row | None
    val: Row | None
    summary: str

    @property
    def form(self) -> str:
        """ "instances", "semantic" or "panoptic"."""
        return (self.train or self.val or {})["form"]

    @property
    def classes(self) -> list[dict[str, Any]]:
        """``id`` in the files, ``name``, ``color`` and ``isthing``, by contiguous id."""
        return (self.train or self.val or {})["classes"]

    def configure(self, cfg: CfgNode) -> None:
        """Set all keys of ``cfg`` that depend on the data: data sets, number of classes, mapper, outputs.

        Raises ``UserError`` if the recipe's model can't learn from data of this form.
        """
        if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor" and self.form != "semantic":
            raise UserError(
                f"the recipe's model, {cfg.MODEL.META_ARCHITECTURE}, gives semantic output alone, but the data are "
                f"{self.form}: choose a recipe with MODEL.META_ARCHITECTURE MaskFormer"
            )
        earlier = [row for row in cfg.DATASETS.OWN if row["name"] in cfg.DATASETS.TRAIN]
        train = [self.train] if self.train else earlier
        val = [self.val] if self.val else []
        cfg.DATASETS.OWN = [*train, *val]
        cfg.DATASETS.TRAIN = tuple(row["name"] for row in train)
        cfg.DATASETS.TEST = tuple(row["name"] for row in val)
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(self.classes)
        cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = IGNORE_LABEL
        cfg.INPUT.DATASET_MAPPER_NAME = _mapper_for(self.form, cfg.INPUT.DATASET_MAPPER_NAME)
        test = cfg.MODEL.MASK_FORMER.TEST
        test.SEMANTIC_ON = self.form != "instances"
        test.PANOPTIC_ON = self.form == "panoptic"
        test.INSTANCE_ON = self.form != "semantic" and any(category["isthing"] for category in self.classes)


def register_data(
    train: str | Path | Sequence[str | Path] = (),
    val: str | Path | Sequence[str | Path] = (),
    *,
    output_dir: str,
    form: str = "",
    classes: Sequence[dict[str, Any]] | None = None,
) -> OwnData:
    """Recognise, check and register the user's own data; ``OwnData.configure`` then sets a recipe to them.

    Args:
        train, val: paths of a split: a JSON file in COCO's instance or panoptic format, or folders; see
            ``mask2former.data.own.forms.FORMS``. Parts that lie near each other need one path alone.
        output_dir: gets, in a folder ``data``, what is made of the files: object masks as JSON, label maps with
            contiguous ids.
        form: a key of ``FORMS``, where the files are ambiguous.
        classes: those of an earlier call; by default the training data's.

    Raises:
        UserError: naming the file and the value that is wrong.
    """
    rows: dict[str, Row] = {}
    lines: list[str] = []
    for split, paths in (("train", train), ("val", val)):
        if paths:
            source = recognise([str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)], form)
            row, tally = _read(source, classes, Path(output_dir).absolute() / "data", split)
            rows[split] = row = _named(row, split)
            classes = row["classes"]
            if source.note:  # what the training data were taken for, the validation data are too
                form = source.form
            lines += [*([source.note] if source.note else []), *tally.lines(split, row["form"], row["classes"])]
    if not rows:
        raise UserError("no data are given: name the training data, the validation data or both")
    forms = [row["form"] for row in rows.values()]
    if len(set(forms)) > 1:
        raise UserError(f"the training data are {forms[0]}, but the validation data {forms[1]}: give both in one form")
    register_rows(list(rows.values()))
    return OwnData(rows.get("train"), rows.get("val"), "\n".join(lines))


def _read(source: Source, classes: Sequence[dict[str, Any]] | None, output: Path, split: str) -> tuple[Row, Tally]:
    # Other data evaluated in the same folder later have files of their own.
    output = output / f"{split}_{_digest(str(source))}"
    if source.form in ("instance-maps", "object-masks"):
        source = make_instances_json(source, classes, output / "instances.json")
    if source.form == "coco":
        return read_instances_json(source, classes)
    if source.form == "semantic":
        return read_label_maps(source, classes, output / "labels")
    # Evaluation alone reads more than the format has.
    return read_panoptic_json(source, classes, output if split == "val" else None)


def _named(row: Row, split: str) -> Row:
    """The row, sharing nothing with others, with a name of its own, the same in every process."""
    text = json.dumps(row, sort_keys=True)
    return {"name": f"own_{split}_{_digest(text)}", **json.loads(text)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _mapper_for(form: str, name: str) -> str:
    found = _MAPPER_NAME.fullmatch(name)
    if not found:
        raise UserError(
            f"INPUT.DATASET_MAPPER_NAME is '{name}', of which no form for other data is known: choose a recipe with "
            "one of the mappers coco_*_lsj, mask_former_* or microscopy_*"
        )
    return f"{found[1]}_{_TASKS[form]}{found[2] or ''}"


# ---------------------------------------------------------------------------------------------------- catalogs


def register_rows(rows: Sequence[Row]) -> None:
    """Register the data sets of ``DATASETS.OWN``; their files are read when one is used."""
    for row in rows:
        if row["name"] not in DatasetCatalog:
            _REGISTER[row["form"]](row)


def _register_instances(row: Row) -> None:
    classes = row["classes"]
    DatasetCatalog.register(row["name"], lambda: load_instances(row["json"], row["pictures"], classes))
    MetadataCatalog.get(row["name"]).set(
        evaluator_type="coco",
        json_file=row["json"],
        image_root=row["pictures"],
        thing_classes=[category["name"] for category in classes],
        thing_colors=[category["color"] for category in classes],
        thing_dataset_id_to_contiguous_id={category["id"]: index for index, category in enumerate(classes)},
    )


def _register_semantic(row: Row) -> None:
    classes = row["classes"]
    DatasetCatalog.register(row["name"], lambda: load_label_maps(row["pictures"], row["labels"]))
    MetadataCatalog.get(row["name"]).set(
        evaluator_type="sem_seg",
        ignore_label=IGNORE_LABEL,
        image_root=row["pictures"],
        sem_seg_root=row["labels"],
        stuff_classes=[category["name"] for category in classes],
        stuff_colors=[category["color"] for category in classes],
        stuff_dataset_id_to_contiguous_id={category["id"]: index for index, category in enumerate(classes)},
    )


def _register_panoptic(row: Row) -> None:
    register_panoptic(
        row["name"],
        panoptic_metadata(row["classes"]),
        row["pictures"],
        row["panoptic"],
        row["json"],
        row.get("labels"),
        row.get("instances"),
    )


_REGISTER: dict[str, Callable[[Row], None]] = {
    "instances": _register_instances,
    "semantic": _register_semantic,
    "panoptic": _register_panoptic,
}
