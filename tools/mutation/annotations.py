"""Annotation files in every form that the project reads, of two small pictures, whole and damaged, and what reads them.

Letters: H, W of a picture, in pixels.
"""

import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic
from detectron2.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image
from torch import nn

from mask2former.data import build_test_loader, build_train_loader, register_panoptic
from mask2former.data.ade20k_files import make_instances, make_panoptic, make_semantic
from mask2former.data.annotations import rgb_from_ids
from mask2former.data.datasets import panoptic_metadata
from mask2former.data.datasets.catalog import register_semantic
from mask2former.data.own import register_data
from mask2former.data.own.instances import encode
from mask2former.data.panoptic_files import instances_to_panoptic, panoptic_to_semantic
from mask2former.data.preparation import Options
from mask2former.engine import load_config
from mask2former.errors import UserError
from mask2former.evaluation import build_evaluator

from .changes import Change, change_array, change_bytes, change_value
from .runner import Subject, digest

__all__ = ["annotation_subjects", "damage_annotation"]

HEIGHT, WIDTH = 48, 64
CATEGORIES = [
    {"id": 1, "name": "cell", "isthing": 1, "color": [220, 60, 40]},
    {"id": 3, "name": "crystal", "isthing": 1, "color": [40, 90, 220]},
    {"id": 7, "name": "ground", "isthing": 0, "color": [90, 140, 80]},
]
CELL, CRYSTAL, GROUND = (category["id"] for category in CATEGORIES)
CONTIGUOUS = {CELL: 0, CRYSTAL: 1, GROUND: 2}
# Rectangles (left, top, right, bottom) of each picture, with their categories; what they leave is ground.
OBJECTS = {
    "a": [(4, 5, 24, 20, CELL), (30, 8, 50, 30, CRYSTAL), (8, 30, 26, 44, CELL)],
    "b": [(10, 10, 40, 40, CRYSTAL), (44, 4, 60, 16, CELL)],
}
# Cityscapes' names, ids and contiguous ids of all classes and of things.
CITYSCAPES = {CELL: ("person", 24, 11, 0), CRYSTAL: ("car", 26, 13, 2), GROUND: ("road", 7, 0, None)}

Files = dict[str, bytes]


# ------------------------------------------------------------------------------------------- reading them


class Truth(nn.Module):
    """A model that gives the good files' annotations, whatever the damaged ones say.

    Args:
        classes: category id → contiguous id; None: not given.
        thing_classes: likewise, of instances.
    """

    def __init__(self, classes: Mapping[int, int], thing_classes: Mapping[int, int | None]) -> None:
        super().__init__()
        self._classes = classes
        self._thing_classes = thing_classes

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self._outputs(Path(picture["file_name"]).name[0]) for picture in batch]

    def _outputs(self, stem: str) -> dict[str, Any]:
        ids, categories = segments_of(stem)
        labels = np.vectorize(lambda number: self._classes[categories[number]])(ids)
        things = [number for number, category in categories.items() if self._thing_classes[category] is not None]
        things = [number for number in things if categories[number] != GROUND]
        instances = Instances(
            ids.shape,
            pred_masks=torch.from_numpy(np.stack([ids == number for number in things])),
            scores=torch.linspace(0.9, 0.8, len(things)),
            pred_classes=torch.tensor([self._thing_classes[categories[number]] for number in things]),
        )
        segments = [
            {"id": number, "category_id": self._classes[category], "isthing": category != GROUND}
            for number, category in categories.items()
        ]
        return {
            "sem_seg": torch.from_numpy(labels),
            "instances": instances,
            "panoptic_seg": (torch.from_numpy(ids.astype(np.int32)), segments),
        }


class Reader:
    """Trains a step on annotations and evaluates with them, as ``train_net.py`` does.

    Args:
        recipe: the small model's.
        model: with its number of classes.
    """

    def __init__(self, recipe: Path, model: nn.Module) -> None:
        self._recipe = recipe
        self._model = model

    def config(self, *options: str) -> CfgNode:
        return load_config(str(self._recipe), options)

    def registered(self, register: Callable[[Path], str], mapper: str, classes: int, folder: Path, _: Path) -> str:
        """Of a data set that ``register`` registers and names."""
        name = register(folder)
        sets = ("DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)")
        options = ("INPUT.DATASET_MAPPER_NAME", mapper, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(classes))
        outputs = tuple(
            item
            for kind in ("SEMANTIC", "INSTANCE", "PANOPTIC")
            for item in (f"MODEL.MASK_FORMER.TEST.{kind}_ON", "True")
        )
        return self.use(self.config(*sets, *options, *outputs))

    def own(self, paths: Sequence[str], form: str, folder: Path, output: Path) -> str:
        """Of the user's own data: ``--train-data`` and ``--val-data``."""
        places = [folder / path for path in paths]
        data = register_data(places, places, output_dir=str(output), form=form)
        cfg = self.config().clone()
        cfg.defrost()
        data.configure(cfg)
        return digest(self.use(cfg), data.summary.replace(str(folder), ""), [row["name"] for row in data.classes])

    def use(self, cfg: CfgNode) -> str:
        batch = next(iter(build_train_loader(cfg)))
        losses = self._of_classes(cfg).train()(batch)
        bad = [name for name, loss in losses.items() if not torch.isfinite(loss)]
        if bad:
            raise FloatingPointError(f"{', '.join(bad)} are not finite")
        results = [self._evaluate(cfg, name) for name in cfg.DATASETS.TEST]
        return digest([_sample(sample) for sample in batch], losses, results)

    def _of_classes(self, cfg: CfgNode) -> nn.Module:
        count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        if count == len(CATEGORIES):
            return self._model
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_model(cfg)

    def _evaluate(self, cfg: CfgNode, name: str) -> Any:
        test = cfg.MODEL.MASK_FORMER.TEST
        outputs = {"semantic_on": test.SEMANTIC_ON, "panoptic_on": test.PANOPTIC_ON, "instance_on": test.INSTANCE_ON}
        evaluator = build_evaluator(name, None, **outputs)
        cityscapes = name.startswith("cityscapes")
        classes = {category: row[2] for category, row in CITYSCAPES.items()} if cityscapes else CONTIGUOUS
        things: dict[int, Any] = dict(classes)
        if name == "cityscapes_instances":
            things = {category: row[3] for category, row in CITYSCAPES.items()}
        if name.startswith("own") and len(MetadataCatalog.get(name).get("thing_classes", CATEGORIES)) == 1:
            things = dict.fromkeys(things, 0)
        return inference_on_dataset(Truth(classes, things), build_test_loader(cfg, name), evaluator)


def _sample(sample: dict[str, Any]) -> list[Any]:
    instances = sample["instances"]
    parts = [sample["image"], instances.gt_classes, instances.gt_masks, sample["padding_mask"]]
    return [*parts, sample.get("sem_seg"), sample["height"], sample["width"]]


def _prepare(make: Callable[[Path, Path], Sequence[str]], folder: Path, output: Path) -> str:
    """One of the commands ``datasets/prepare_*.py``, which print a line for each file that is broken."""
    problems = make(folder, output)
    if problems:
        raise UserError(problems[0])
    return digest({str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*.*"))})


# --------------------------------------------------------------------------------------------- making them


def segments_of(stem: str) -> tuple[np.ndarray, dict[int, int]]:
    """Segment ids (H, W) int64 of a picture, and their categories."""
    ids = np.ones((HEIGHT, WIDTH), dtype=np.int64)
    categories = {1: GROUND}
    for number, (left, top, right, bottom, category) in enumerate(OBJECTS[stem], start=2):
        ids[top:bottom, left:right] = number
        categories[number] = category
    return ids, categories


def _png(pixels: np.ndarray, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()


def _picture(stem: str) -> np.ndarray:
    ids, categories = segments_of(stem)
    colors = {category["id"]: category["color"] for category in CATEGORIES}
    pixels = np.array([colors[categories[number]] for number in ids.ravel().tolist()])
    noise = np.random.default_rng(ord(stem)).normal(0, 12, pixels.shape)
    return (pixels + noise).clip(0, 255).astype(np.uint8).reshape(HEIGHT, WIDTH, 3)


def _pictures(folder: str, form: str = "PNG", ending: str = "png") -> Files:
    return {f"{folder}/{stem}.{ending}": _png(_picture(stem), form) for stem in OBJECTS}


def _maps(folder: str, values: Callable[[int, int], int], dtype: Any = np.uint8) -> Files:
    """A PNG for each picture, with a value of each segment's (id, category)."""
    files = {}
    for stem in OBJECTS:
        ids, categories = segments_of(stem)
        labels = np.vectorize(lambda number, categories=categories: values(number, categories[number]))(ids)
        files[f"{folder}/{stem}.png"] = _png(labels.astype(dtype))
    return files


def _images() -> list[dict[str, Any]]:
    return [
        {"id": number, "file_name": f"{stem}.png", "height": HEIGHT, "width": WIDTH}
        for number, stem in enumerate(OBJECTS, start=1)
    ]


def _instances_json() -> bytes:
    """Polygons, compressed and uncompressed run lengths, and a crowd region."""
    annotations: list[dict[str, Any]] = []
    for image_id, stem in enumerate(OBJECTS, start=1):
        for number, (left, top, right, bottom, category) in enumerate(OBJECTS[stem]):
            mask = segments_of(stem)[0] == number + 2
            parts = encode(mask)
            if number == 0:
                parts["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
            elif number == 1 and stem == "a":
                parts["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": _run_lengths(mask)}
            annotations.append({"image_id": image_id, "category_id": category, "iscrowd": 0, **parts})
    crowd = np.zeros((HEIGHT, WIDTH), dtype=bool)
    crowd[2:8, 50:60] = True
    annotations.append({"image_id": 1, "category_id": CRYSTAL, "iscrowd": 1, **encode(crowd)})
    annotations = [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)]
    things = [{"id": category["id"], "name": category["name"]} for category in CATEGORIES if category["isthing"]]
    return _json({"info": {}, "images": _images(), "annotations": annotations, "categories": things})


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: column by column, first of False."""
    values = np.concatenate([[False], mask.T.ravel()])
    changes = np.flatnonzero(values[1:] != values[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


def _panoptic_json(category_ids: Mapping[int, int], names: Callable[[str], str], image_ids: Sequence[Any]) -> bytes:
    annotations = []
    for image_id, stem in zip(image_ids, OBJECTS, strict=True):
        ids, categories = segments_of(stem)
        segments = []
        for number, category in categories.items():
            area = int((ids == number).sum())
            segments.append({"id": number, "category_id": category_ids[category], "area": area, "iscrowd": 0})
        annotations.append({"image_id": image_id, "file_name": names(stem), "segments_info": segments})
    images = [{**image, "id": image_id} for image, image_id in zip(_images(), image_ids, strict=True)]
    categories = [{**category, "id": category_ids[category["id"]]} for category in CATEGORIES]
    return _json({"images": images, "annotations": annotations, "categories": categories})


def _panoptic_pngs(folder: str, names: Callable[[str], str] = "{}.png".format) -> Files:
    return {f"{folder}/{names(stem)}": _png(rgb_from_ids(segments_of(stem)[0])) for stem in OBJECTS}


def _cityscapes_files() -> Files:
    files = {}
    for stem in OBJECTS:
        ids, categories = segments_of(stem)
        base = f"gtFine/town/{stem}_000000_000001_gtFine"
        rows = {number: CITYSCAPES[category] for number, category in categories.items()}
        whole = (0, 0, WIDTH, HEIGHT, GROUND)
        objects = [
            {
                "label": CITYSCAPES[category][0],
                "polygon": [[left, top], [right - 1, top], [right - 1, bottom - 1], [left, bottom - 1]],
            }
            for left, top, right, bottom, category in [whole, *OBJECTS[stem]]
        ]
        files[f"leftImg8bit/town/{stem}_000000_000001_leftImg8bit.png"] = _png(_picture(stem))
        files[f"{base}_polygons.json"] = _json({"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": objects})
        values = {
            "labelIds": {number: row[1] for number, row in rows.items()},
            "labelTrainIds": {number: row[2] for number, row in rows.items()},
            "instanceIds": {
                number: row[1] * 1000 + number if row[3] is not None else row[1] for number, row in rows.items()
            },
        }
        for kind, table in values.items():
            labels = np.vectorize(table.__getitem__)(ids)
            files[f"{base}_{kind}.png"] = _png(labels.astype(np.uint16 if kind == "instanceIds" else np.uint8))
    names = "{}_000000_000001_gtFine_panoptic.png".format
    ids = {category: row[1] for category, row in CITYSCAPES.items()}
    image_ids = [f"{stem}_000000_000001" for stem in OBJECTS]
    return {
        **files,
        **_panoptic_pngs("panoptic", names),
        "panoptic.json": _panoptic_json(ids, names, image_ids),
    }


def _ade20k_files() -> Files:
    """As downloaded: semantic labels from 1 on, instances' classes in red and numbers in green."""
    instances = {}
    for stem in OBJECTS:
        ids, categories = segments_of(stem)
        things = np.vectorize(lambda number, categories=categories: categories[number] != GROUND)(ids)
        classes = np.vectorize(lambda number, categories=categories: categories[number])(ids)
        pixels = np.stack([classes * things, (ids - 1) * things, ids * 0], axis=-1)
        instances[f"annotations_instance/training/{stem}.png"] = _png(pixels.astype(np.uint8))
    return {
        **_pictures("images/training", "JPEG", "jpg"),
        **_maps("annotations/training", lambda _, category: category),
        **instances,
    }


# ------------------------------------------------------------------------------------------------ subjects


def annotation_subjects(work: Path, model: nn.Module) -> list[Subject]:
    """Every form of annotations and what reads them. ``model`` is that of ``work/recipe.yaml``."""
    reader = Reader(work / "recipe.yaml", model)
    pictures = _pictures("pictures")
    instances = {"instances.json": _instances_json()}
    panoptic = {
        "panoptic.json": _panoptic_json({i: i for i in CONTIGUOUS}, "{}.png".format, [1, 2]),
        **_panoptic_pngs("panoptic"),
    }
    labels = _maps("labels", lambda _, category: CONTIGUOUS[category])
    values = _maps("labels", lambda _, category: category)
    numbers = _maps("instances", lambda number, _: number - 1, np.uint16)
    classes = _json([{"id": row["id"], "name": row["name"]} for row in CATEGORIES])
    things = {"classes.txt": b"1 cell\n3 crystal\n"}
    names = {category["id"]: category["name"] for category in CATEGORIES}
    owners = [(s, number - 1, names[c]) for s in OBJECTS for number, c in segments_of(s)[1].items() if number > 1]
    rows = "".join(f"{stem},{number},{name}\n" for stem, number, name in owners)
    masks = {
        f"masks/{stem}_{number}.png": _png(((segments_of(stem)[0] == number + 1) * 255).astype(np.uint8))
        for stem, number, _ in owners
    }
    by_picture = {stem: {f"{s}_{number}": name for s, number, name in owners if s == stem} for stem in OBJECTS}
    bowl = {
        **{f"{stem}/images/{stem}.png": pictures[f"pictures/{stem}.png"] for stem in OBJECTS},
        **{f"{path[6]}/masks/{path[6:]}": content for path, content in masks.items()},
    }
    cityscapes = _cityscapes_files()
    polygons, instance_ids, train_ids = (
        [path for path in cityscapes if path.endswith(ending)]
        for ending in ("_polygons.json", "_instanceIds.png", "_labelTrainIds.png")
    )
    cityscapes_panoptic = ["panoptic.json", "panoptic.json", *(path for path in cityscapes if "_panoptic.png" in path)]

    def registered(name: str, files: Files, targets: Sequence[str], register: Any, mapper: str, count: int) -> Subject:
        return Subject(name, files, targets, partial(reader.registered, register, mapper, count))

    def own(name: str, files: Files, targets: Sequence[str], paths: Sequence[str], form: str = "") -> Subject:
        return Subject(f"own {name}", files, targets, partial(reader.own, paths, form))

    return [
        registered(
            "COCO instances",
            {**pictures, **instances},
            list(instances),
            _register_instances,
            "coco_instance_lsj",
            2,
        ),
        registered(
            "COCO panoptic",
            {**pictures, **panoptic, **instances, **labels},
            ["panoptic.json", "panoptic.json", "instances.json", "panoptic/a.png", "labels/b.png"],
            _register_panoptic,
            "mask_former_panoptic",
            3,
        ),
        registered("label maps", {**pictures, **labels}, list(labels), _register_semantic, "mask_former_semantic", 3),
        own("instances", {**pictures, **instances}, list(instances), ["instances.json", "pictures"]),
        own(
            "panoptic",
            {**pictures, **panoptic},
            ["panoptic.json", "panoptic.json", "panoptic/a.png"],
            ["panoptic.json", "pictures", "panoptic"],
        ),
        own(
            "label maps",
            {**pictures, **values, "classes.json": classes},
            [*values, "classes.json"],
            ["pictures", "labels"],
        ),
        own(
            "numbered objects",
            {**pictures, **numbers, **things, "objects.csv": f"picture,object,class\n{rows}".encode()},
            [*numbers, "classes.txt", "objects.csv"],
            ["pictures", "instances"],
        ),
        own(
            "object masks",
            {**pictures, **masks, "objects.json": _json(by_picture)},
            ["masks/a_1.png", "masks/b_2.png", "objects.json"],
            ["pictures", "masks"],
        ),
        own("Bowl", bowl, ["a/masks/a_1.png", "b/masks/b_2.png", "a/images/a.png"], ["."]),
        Subject("prepare nuclei", {**instances}, list(instances), partial(_prepare, _prepare_from_instances)),
        Subject(
            "prepare COCO's label maps",
            {**panoptic},
            ["panoptic.json", "panoptic.json", "panoptic/a.png"],
            partial(_prepare, _prepare_semantic),
        ),
        Subject(
            "prepare ADE20K",
            _ade20k_files(),
            [f"{folder}/training/a.png" for folder in ("annotations", "annotations_instance")],
            partial(_prepare, _prepare_ade20k),
        ),
        registered(
            "Cityscapes instances",
            cityscapes,
            polygons + instance_ids[:1],
            _register_city_instances,
            "coco_instance_lsj",
            8,
        ),
        registered(
            "Cityscapes label maps",
            cityscapes,
            train_ids + polygons[:1],
            _register_city_labels,
            "mask_former_semantic",
            19,
        ),
        registered(
            "Cityscapes panoptic",
            cityscapes,
            cityscapes_panoptic,
            _register_city_panoptic,
            "mask_former_panoptic",
            19,
        ),
    ]


def _register_instances(folder: Path) -> str:
    path, pictures = str(folder / "instances.json"), str(folder / "pictures")
    DatasetCatalog.register("instances", lambda: load_coco_json(path, pictures, "instances"))
    MetadataCatalog.get("instances").set(json_file=path, image_root=pictures, evaluator_type="coco")
    return "instances"


def _register_panoptic(folder: Path) -> str:
    parts = {
        "image_root": "pictures",
        "panoptic_root": "panoptic",
        "panoptic_json": "panoptic.json",
        "sem_seg_root": "labels",
        "instances_json": "instances.json",
    }
    register_panoptic(
        "panoptic", panoptic_metadata(CATEGORIES), **{key: str(folder / path) for key, path in parts.items()}
    )
    return "panoptic"


def _register_semantic(folder: Path) -> str:
    register_semantic(
        "labels",
        str(folder / "pictures"),
        str(folder / "labels"),
        image_ext="png",
        stuff_classes=[category["name"] for category in CATEGORIES],
    )
    return "labels"


def _like(builtin: str, name: str, load: Callable[[], Any], **places: str) -> str:
    """Register files elsewhere as a data set like one of Detectron2's."""
    metadata = {**MetadataCatalog.get(builtin).as_dict(), **places}
    del metadata["name"]
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)
    return name


def _register_city_instances(folder: Path) -> str:
    pictures, truth = str(folder / "leftImg8bit"), str(folder / "gtFine")
    return _like(
        "cityscapes_fine_instance_seg_val",
        "cityscapes_instances",
        lambda: load_cityscapes_instances(pictures, truth, from_json=True, to_polygons=True),
        image_dir=pictures,
        gt_dir=truth,
    )


def _register_city_labels(folder: Path) -> str:
    pictures, truth = str(folder / "leftImg8bit"), str(folder / "gtFine")
    return _like(
        "cityscapes_fine_sem_seg_val",
        "cityscapes_labels",
        lambda: load_cityscapes_semantic(pictures, truth),
        image_dir=pictures,
        gt_dir=truth,
    )


def _register_city_panoptic(folder: Path) -> str:
    pictures, panoptic, path = (str(folder / part) for part in ("leftImg8bit", "panoptic", "panoptic.json"))
    metadata = MetadataCatalog.get("cityscapes_fine_panoptic_val").as_dict()
    return _like(
        "cityscapes_fine_panoptic_val",
        "cityscapes_panoptic",
        lambda: load_cityscapes_panoptic(pictures, panoptic, path, metadata),
        panoptic_root=panoptic,
        image_root=pictures,
        panoptic_json=path,
        gt_dir=str(folder / "gtFine"),
    )


def _prepare_from_instances(folder: Path, output: Path) -> Sequence[str]:
    places = output / "panoptic.json", output / "panoptic", output / "semantic"
    return instances_to_panoptic(folder / "instances.json", CATEGORIES, *places, background=GROUND)


def _prepare_semantic(folder: Path, output: Path) -> Sequence[str]:
    return panoptic_to_semantic(folder / "panoptic.json", folder / "panoptic", output / "semantic", CONTIGUOUS)


def _prepare_ade20k(folder: Path, output: Path) -> Sequence[str]:
    options = Options(root=folder, output=output, splits=["train"], workers=1)
    made = [make(options, "train") for make in (make_semantic, make_instances, make_panoptic)]
    return [problem for _, problems in made for problem in problems]


# ------------------------------------------------------------------------------------------- damaging them


def damage_annotation(path: Path, rng: random.Random) -> Change:
    """Damage an annotation file in place; what was done."""
    kind = rng.random()
    if kind < 0.04:
        path.unlink()
        if rng.random() < 0.5:
            return Change("removed")
        path.mkdir()
        return Change("a folder in its place")
    content = path.read_bytes()
    if kind < 0.3 or path.suffix not in (".json", ".png"):
        content, change = change_bytes(content, rng)
    elif path.suffix == ".png":
        content, change = _change_png(content, rng)
    elif kind < 0.4:
        name = rng.choice(list(HOSTILE_JSON))
        content, change = HOSTILE_JSON[name](content), Change(name)
    else:
        value, change = change_value(json.loads(content), rng)
        content = _json(value)
    path.write_bytes(content)
    return change


def _change_png(content: bytes, rng: random.Random) -> tuple[bytes, Change]:
    with Image.open(io.BytesIO(content)) as picture:
        pixels = np.array(picture)
    if rng.random() < 0.35:
        name = rng.choice(list(HOSTILE_PICTURES))
        return HOSTILE_PICTURES[name](pixels), Change(name)
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.uint8)
    pixels, change = change_array(pixels, rng)
    return _png(pixels), change


def _saved(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def _with_every(content: bytes, key: str, value: Any) -> bytes:
    """The file with ``value`` under every ``key``, at any depth."""

    def replaced(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: value if name == key else replaced(item) for name, item in part.items()}
        return [replaced(item) for item in part] if isinstance(part, list) else part

    return _json(replaced(json.loads(content)))


# Files in the place of the good one (JSON).
HOSTILE_JSON: dict[str, Callable[[bytes], bytes]] = {
    "lists in lists": lambda _: b"[" * 100_000 + b"]" * 100_000,
    "dicts in dicts": lambda _: b'{"images":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of a million digits": lambda _: b'{"images": [' + b"9" * 10**6 + b"]}",
    "a number beyond all": lambda good: good.replace(b": 1,", b": 1e999,"),
    "a byte order mark": lambda good: b"\xef\xbb\xbf" + good,
    "UTF-16": lambda good: good.decode().encode("utf-16"),
    "two documents": lambda good: good + good,
    "no pictures": lambda good: _with_every(good, "images", []),
    "no annotations": lambda good: _with_every(good, "annotations", []),
    "no categories": lambda good: _with_every(good, "categories", []),
    "annotations that are a dict": lambda good: _with_every(good, "annotations", {"1": {"id": 1}}),
    "pictures that are numbers": lambda good: _with_every(good, "images", [1, 2, 3]),
    "pictures of a billion pixels": lambda good: _with_every(_with_every(good, "height", 10**5), "width", 10**4),
    "pictures without an area": lambda good: _with_every(good, "height", 0),
    "pictures of another size": lambda good: _with_every(good, "height", HEIGHT + 1),
    "run lengths of a huge size": lambda good: _with_every(good, "size", [10**9, 10**9]),
    "run lengths that are garbage": lambda good: _with_every(good, "counts", "\x7f\x00zzzz\u00e9\uffff"),
    "run lengths that never end": lambda good: _with_every(good, "counts", "o" * 1000),
    "run lengths that are negative": lambda good: _with_every(good, "counts", [-5, HEIGHT * WIDTH + 5]),
    "run lengths that are numbers and text": lambda good: _with_every(good, "counts", [1, "2", None]),
    "polygons of huge numbers": lambda good: _with_every(good, "segmentation", [[1e300, -1e300, 5, 1e308, 7, 9]]),
    "polygons of text": lambda good: _with_every(good, "segmentation", [["1", "2", "3", "4", "5", "6"]]),
    "polygons of two points": lambda good: _with_every(good, "segmentation", [[1, 2, 3, 4]]),
    "polygons in polygons": lambda good: _with_every(good, "segmentation", [[[1, 2], [3, 4], [5, 6]]]),
    "a polygon of 20,000 points": lambda good: _with_every(good, "polygon", [[i % 64, i % 48] for i in range(20_000)]),
    "one id for all": lambda good: _with_every(good, "id", 1),
    "huge ids": lambda good: _with_every(good, "id", 2**70),
    "one file for all": lambda good: _with_every(good, "file_name", "a.png"),
    "files elsewhere": lambda good: _with_every(good, "file_name", "../../../../etc/hostname"),
    "file names with NUL": lambda good: _with_every(good, "file_name", "a\0.png"),
    "an unknown label": lambda good: _with_every(good, "label", "elephant"),
    "only crowds": lambda good: _with_every(good, "iscrowd", 1),
}
# Files in the place of the good one (PNG), from its values.
HOSTILE_PICTURES: dict[str, Callable[[np.ndarray], bytes]] = {
    "400 million pixels": lambda _: _saved(Image.new("1", (20_000, 20_000))),
    "100 million pixels": lambda _: _saved(Image.new("L", (10_000, 10_000))),
    "a palette": lambda pixels: _saved(Image.fromarray(pixels.astype(np.uint8)).convert("P")),
    "transparency": lambda pixels: _saved(Image.fromarray(pixels.astype(np.uint8)).convert("RGBA")),
    "grey and transparency": lambda pixels: _saved(Image.fromarray(pixels.astype(np.uint8)).convert("LA")),
    "a JPEG": lambda pixels: _saved(Image.fromarray(pixels.astype(np.uint8)), "JPEG"),
    "a GIF": lambda pixels: _saved(Image.fromarray(pixels.astype(np.uint8)).convert("P"), "GIF"),
    "a TIFF of floating-point numbers": lambda pixels: _saved(
        Image.fromarray(np.full(pixels.shape[:2], np.nan, np.float32)), "TIFF"
    ),
    "a TIFF of negative numbers": lambda pixels: _saved(
        Image.fromarray(np.full(pixels.shape[:2], -5, np.int32)), "TIFF"
    ),
    "a TIFF of CMYK": lambda pixels: _saved(Image.fromarray(pixels.astype(np.uint8)).convert("CMYK"), "TIFF"),
}
