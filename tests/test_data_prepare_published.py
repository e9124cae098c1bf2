"""The commands that make ADE20K, ADE20K full and COCO-Stuff 10k from the files that are downloaded.

Each is run on a small data set in the layout of the true one, and what it makes is read as training reads it.
"""

import json
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_ade20k
from panopticapi.utils import IdGenerator
from PIL import Image
from published_layouts import registered_at
from scripts import Program, load_script, program

from mask2former.data import check_dataset
from mask2former.data.ade20k_files import SegmentIds, instance_classes
from mask2former.data.annotations import ids_from_rgb
from mask2former.data.datasets import read_classes
from mask2former.errors import UserError, command

ADE20K = "ADEChallengeData2016"
ADE20K_FULL = "ADE20K_2021_17_01"
STUFF_10K = "coco/coco_stuff_10k"
SEMANTIC, INSTANCE, PANOPTIC, FULL, STUFF = (
    "prepare_ade20k_sem_seg.py",
    "prepare_ade20k_ins_seg.py",
    "prepare_ade20k_pan_seg.py",
    "prepare_ade20k_full_sem_seg.py",
    "prepare_coco_stuff_10k_v1.0_sem_seg.py",
)

WALL, ROAD, SKY, BED, WINDOW, PERSON, SKYSCRAPER = 0, 6, 2, 7, 8, 12, 48


@pytest.fixture
def run(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """One of the commands with its arguments, where the data sets' folder is the test's."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    programs: dict[str, Program] = {}

    def call(name: str, *arguments: str) -> tuple[int, str]:
        if name not in programs:
            programs[name] = program(repository / "datasets" / name, monkeypatch, capsys)
        return programs[name](*arguments)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def errors(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("error: ")]


# ------------------------------------------------------------------------------------------------- ADE20K


def fake_ade20k(root: Path, pictures: int = 2, height: int = 18, width: int = 24, split: str = "val") -> None:
    """ADE20K as downloaded; the last pictures have four objects each, two of them beds, the first has none."""
    folder, subfolder = root / ADE20K, {"train": "training", "val": "validation"}[split]
    random = np.random.default_rng(pictures)
    instance_class = {category: number for number, category in instance_classes().items()}
    for index in range(pictures):
        stem = f"ADE_{split}_{index + 1:08d}"
        save(folder / f"images/{subfolder}/{stem}.jpg", random.integers(0, 256, (height, width, 3)).astype(np.uint8))
        labels = np.full((height, width), 1 + WALL, np.uint8)
        labels[: height // 3] = 1 + (SKY if index % 2 else ROAD)
        labels[height // 2 :, : width // 3] = 0
        labels[-4:, -4:] = 1 + BED  # no object is there, so these pixels get no label
        objects = np.zeros((height, width, 3), np.uint8)
        if index:
            for number, category, top, left in ((3, BED, 1, 2), (7, PERSON, 4, 9), (250, BED, 9, 9), (8, WINDOW, 6, 3)):
                objects[top : top + 5, left : left + 5, :2] = instance_class[category], number
        save(folder / f"annotations/{subfolder}/{stem}.png", labels)
        save(folder / f"annotations_instance/{subfolder}/{stem}.png", objects)


@contextmanager
def ade20k_semantic_at(root: Path) -> Iterator[None]:
    """Detectron2's own names of ADE20K stand for files under ``root``."""
    names = ("ade20k_sem_seg_train", "ade20k_sem_seg_val")
    before = {name: (DatasetCatalog.pop(name), MetadataCatalog.pop(name)) for name in names}
    register_all_ade20k(str(root))
    try:
        yield
    finally:
        for name, (loader, metadata) in before.items():
            DatasetCatalog.pop(name)
            DatasetCatalog.register(name, loader)
            MetadataCatalog[name] = metadata


def slow_panoptic(folder: Path, stem: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Ids and segments pixel by pixel, with the ids of the public ``panopticapi``; further ones of a class are random.

    Segments come without bbox.
    """
    classes = {category["id"]: category for category in read_classes("ade20k")}
    to_category = dict(enumerate(THINGS, start=1))
    labels = np.asarray(Image.open(folder / f"annotations/validation/{stem}.png")).tolist()
    objects = np.asarray(Image.open(folder / f"annotations_instance/validation/{stem}.png")).tolist()
    stuff: dict[int, list[tuple[int, int]]] = {}
    things: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y, row in enumerate(labels):
        for x, label in enumerate(row):
            red, green, _ = objects[y][x]
            if label and not classes[label - 1]["isthing"]:
                stuff.setdefault(label - 1, []).append((y, x))
            if green:
                things.setdefault((green, to_category[red]), []).append((y, x))
    generator = IdGenerator(classes)
    ids = np.zeros((len(labels), len(labels[0])), np.int64)
    segments = []
    layers = [(category, pixels) for category, pixels in sorted(stuff.items())]
    layers += [(category, pixels) for (_, category), pixels in sorted(things.items())]
    for category, pixels in layers:
        number = generator.get_id(category)
        for y, x in pixels:
            ids[y, x] = number
        segments.append({"id": number, "category_id": category, "area": len(pixels), "iscrowd": 0})
    return ids, segments


# Category ids of the 100 things, in the order of their classes in the instance PNGs.
THINGS = sorted(category["id"] for category in read_classes("ade20k") if category["isthing"])


def test_ade20k_classes_of_the_instance_files() -> None:
    assert instance_classes() == dict(enumerate(THINGS, start=1))
    assert [category["id"] for category in read_classes("ade20k_instance")] == THINGS


def test_ade20k_semantic(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    fake_ade20k(tmp_path)
    fake_ade20k(tmp_path, split="train")
    code, printed = run(SEMANTIC)
    assert code == 0, printed
    folder = tmp_path / ADE20K
    with ade20k_semantic_at(tmp_path):
        for split, subfolder in (("train", "training"), ("val", "validation")):
            records = check_dataset(f"ade20k_sem_seg_{split}", 150)
            assert len(records) == 2
            for record in records:
                made = np.asarray(Image.open(record["sem_seg_file_name"]))
                source = np.asarray(
                    Image.open(folder / "annotations" / subfolder / f"{Path(record['file_name']).stem}.png")
                )
                assert made.dtype == np.uint8
                assert made.tolist() == [[255 if label == 0 else label - 1 for label in row] for row in source.tolist()]


def test_ade20k_instances(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    fake_ade20k(tmp_path)
    code, printed = run(INSTANCE, "--splits", "val")
    assert code == 0, printed
    content = json.loads((tmp_path / ADE20K / "ade20k_instance_val.json").read_text())
    size = {"width": 24, "height": 18}
    assert content["images"] == [
        {"id": stem, "file_name": f"{stem}.jpg", **size} for stem in ("ADE_val_00000001", "ADE_val_00000002")
    ]
    assert content["categories"] == read_classes("ade20k_instance")
    found = content["annotations"]
    assert [(a["id"], a["image_id"], a["category_id"], a["iscrowd"]) for a in found] == [
        (number, "ADE_val_00000002", category, 0) for number, category in enumerate((BED, PERSON, WINDOW, BED), start=1)
    ]
    objects = np.asarray(Image.open(tmp_path / ADE20K / "annotations_instance/validation/ADE_val_00000002.png"))
    for annotation, number in zip(found, (3, 7, 8, 250), strict=True):
        mask = objects[..., 1] == number
        assert np.array_equal(coco_mask.decode(annotation["segmentation"]), mask)
        assert annotation["area"] == mask.sum() == coco_mask.area(annotation["segmentation"])
        assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()

    with registered_at(tmp_path):
        records = check_dataset("ade20k_instance_val", 100)
        names = MetadataCatalog.get("ade20k_instance_val").thing_classes
    assert [names[a["category_id"]] for a in records[-1]["annotations"]] == ["bed", "person", "windowpane", "bed"]


def test_ade20k_panoptic_against_a_loop_over_pixels(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    fake_ade20k(tmp_path, pictures=4)
    output = tmp_path / "mine" / ADE20K
    before = contents(tmp_path / ADE20K)
    for name in (SEMANTIC, PANOPTIC):
        code, printed = run(name, "--splits", "val", "--output", str(output), "--workers", "3")
        assert code == 0, printed
    assert contents(tmp_path / ADE20K) == before
    content = json.loads((output / "ade20k_panoptic_val.json").read_text())
    assert content["categories"] == read_classes("ade20k")
    assert len(content["annotations"]) == len(content["images"]) == 4
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        stem = annotation["image_id"]
        assert image == {"id": stem, "file_name": f"{stem}.jpg", "width": 24, "height": 18}
        assert annotation["file_name"] == f"{stem}.png"
        ids = ids_from_rgb(np.asarray(Image.open(output / f"ade20k_panoptic_val/{stem}.png")))
        expected_ids, expected = slow_panoptic(tmp_path / ADE20K, stem)
        found = annotation["segments_info"]
        assert [{**f, "id": s["id"], "bbox": None} for f, s in zip(found, expected, strict=True)] == [
            {**s, "bbox": None} for s in expected
        ]
        renamed = {s["id"]: f["id"] for s, f in zip(expected, found, strict=True)} | {0: 0}
        assert len(set(renamed.values())) == len(renamed)
        assert np.array_equal(ids, np.vectorize(renamed.get)(expected_ids))
        seen = set()
        for segment, own in zip(expected, found, strict=True):
            if segment["category_id"] not in seen:  # the others' ids are drawn at random there
                assert own["id"] == segment["id"]
            seen.add(segment["category_id"])
            x, y, width, height = own["bbox"]
            if segment["category_id"] in THINGS:
                assert (ids[y : y + height, x : x + width] == own["id"]).any()
                outside = ids == own["id"]
                outside[y : y + height, x : x + width] = False
                assert not outside.any()

    for part in ("images", "annotations_instance"):
        (output / part).symlink_to(tmp_path / ADE20K / part)
    with registered_at(tmp_path / "mine"):
        (output / "ade20k_instance_val.json").write_text("{}")
        records = check_dataset("ade20k_panoptic_val", 150, semantic_files=True)
    assert [len(record["segments_info"]) for record in records] == [2, 6, 6, 6]


def test_ade20k_ids_of_one_picture_are_all_different() -> None:
    classes = read_classes("ade20k")
    new_id = SegmentIds(classes)
    found = [new_id(ROAD), new_id(SKYSCRAPER), *(new_id(PERSON) for _ in range(255))]
    assert len(set(found)) == 257 and 0 not in found
    assert found[0] == 140 + 256 * 140 + 65536 * 140  # which is the skyscraper's colour too
    stuff = {c + 256 * g + 65536 * b for c, g, b in (k["color"] for k in classes if not k["isthing"])}
    assert not stuff & set(found[1:])
    for number, category in zip(found, [ROAD, SKYSCRAPER] + [PERSON] * 255, strict=True):
        color = np.array([number % 256, number // 256 % 256, number // 65536])
        assert np.abs(color - classes[category]["color"]).max() <= 30
    assert [SegmentIds(classes)(PERSON) for _ in range(2)] == [found[2]] * 2


def test_ade20k_stuff_below_things_keeps_its_area(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    fake_ade20k(tmp_path)
    path = tmp_path / ADE20K / "annotations_instance/validation/ADE_val_00000001.png"
    objects = np.zeros((18, 24, 3), np.uint8)
    objects[:12, :, :2] = 4, 1  # a person on all of the road
    save(path, objects)
    assert run(PANOPTIC, "--splits", "val")[0] == 0
    content = json.loads((tmp_path / ADE20K / "ade20k_panoptic_val.json").read_text())
    segments = content["annotations"][0]["segments_info"]
    assert [(s["category_id"], s["area"], s["bbox"]) for s in segments if s["category_id"] != WALL] == [
        (ROAD, 6 * 24, [0, 0, 24, 6]),
        (PERSON, 12 * 24, [0, 0, 24, 12]),
    ]


def test_ade20k_broken_and_missing_files_are_named(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    folder = tmp_path / ADE20K
    code, printed = run(PANOPTIC)
    assert code == 1 and "annotations/training' does not exist: give the folder of ADE20K as --root" in printed
    fake_ade20k(tmp_path, pictures=9)
    places = {kind: folder / kind / "validation" for kind in ("images", "annotations", "annotations_instance")}
    good = contents(folder)

    def png(kind: str, number: int) -> Path:
        return places[kind] / f"ADE_val_{number:08d}.png"

    png("annotations", 1).unlink()
    png("annotations", 2).write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    labels = np.zeros((18, 24), np.uint8)
    labels[0, 0] = 151
    save(png("annotations", 3), labels)
    png("annotations_instance", 4).unlink()
    objects = np.zeros((18, 24, 3), np.uint8)
    objects[:2, :2, :2] = 101, 5
    save(png("annotations_instance", 5), objects)
    objects[0, 0, 0], objects[1, :2, 0], objects[0, 1, 0] = 7, 8, 8
    save(png("annotations_instance", 6), objects)
    save(png("annotations_instance", 7), objects[:-1])
    picture = places["images"] / "ADE_val_00000008.jpg"
    picture.write_bytes(picture.read_bytes()[:400])
    save(png("annotations_instance", 9), np.repeat(labels[..., None], 3, axis=2))

    lines = {
        1: "label map '.*1.png' does not exist",
        2: "cannot read label map '.*2.png'",
        3: "3.png' has labels from 0 to 151, expected 0 (none) to 150",
        4: "annotations_instance/validation/ADE_val_00000004.png' does not exist",
        5: "5.png': object 5 has class 101, expected 1 to 100",
        6: "6.png': object 5 has more than one class",
        7: "7.png': object 5 has more than one class",
        8: "cannot read picture '.*8.jpg'",
        9: "9.png' is grey",
    }
    for name, made, numbers in (
        (SEMANTIC, "annotations_detectron2/validation", (1, 2, 3)),
        (INSTANCE, "ade20k_instance_val.json", (4, 5, 6, 7, 8, 9)),
        (PANOPTIC, "ade20k_panoptic_val", range(1, 10)),
    ):
        code, printed = run(name, "--splits", "val")
        assert code == 1
        found = errors(printed)
        assert len(found) == len(numbers), printed
        for number in numbers:
            assert any(all(part in line for part in lines[number].split(".*")) for line in found), (number, printed)
        assert f"not complete, {len(numbers)} missing or broken files" in printed
        assert (folder / made).is_dir() == (name == SEMANTIC)

    # The files are mended: what failed is made, and the JSON files are those of an undisturbed run.
    for path, data in good.items():
        if not (folder / path).exists() or (folder / path).read_bytes() != data:
            (folder / path).write_bytes(data)
    for name in (SEMANTIC, INSTANCE, PANOPTIC):
        code, printed = run(name, "--splits", "val")
        assert code == 0, printed
        code, printed = run(name, "--splits", "val", "--output", str(tmp_path / "undisturbed"))
        assert code == 0, printed
    made = contents(tmp_path / "undisturbed")
    assert contents(folder) == good | made


def test_ade20k_other_size_is_named(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    fake_ade20k(tmp_path)
    save(tmp_path / ADE20K / "annotations/validation/ADE_val_00000001.png", np.ones((18, 23), np.uint8))
    code, printed = run(PANOPTIC, "--splits", "val")
    assert code == 1
    assert "ADE_val_00000001.png' has 23 x 18 pixels, but " in errors(printed)[0]
    assert "ADE_val_00000001.jpg' has 24 x 18" in errors(printed)[0]


def test_a_picture_added_later_comes_into_the_json(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    fake_ade20k(tmp_path)
    for old in (tmp_path / ADE20K).rglob("*"):
        os.utime(old, (1, 1))
    assert run(INSTANCE, "--splits", "val")[0] == 0
    path = tmp_path / ADE20K / "ade20k_instance_val.json"
    os.utime(path, (100, 100))
    assert run(INSTANCE, "--splits", "val")[0] == 0
    assert path.stat().st_mtime == 100
    for old in (tmp_path / ADE20K).glob("*/validation/ADE_val_00000002.*"):
        os.link(old, old.with_stem("ADE_val_00000003"))
    assert run(INSTANCE, "--splits", "val")[0] == 0
    content = json.loads(path.read_text())
    assert [image["id"][-1] for image in content["images"]] == ["1", "2", "3"]
    assert [annotation["id"] for annotation in content["annotations"]] == list(range(1, 9))
    assert run(PANOPTIC, "--splits", "val")[0] == 0
    made = contents(tmp_path / ADE20K)
    os.unlink(tmp_path / ADE20K / "ade20k_panoptic_val/ADE_val_00000003.png")
    assert run(PANOPTIC, "--splits", "val")[0] == 0
    assert contents(tmp_path / ADE20K) == made


# -------------------------------------------------------------------------------------------- ADE20K full


def fake_ade20k_full(root: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """ADE20K full as downloaded; pictures of these heights and widths by their names."""
    folders = []
    random = np.random.default_rng(0)
    used = [category["id"] for category in read_classes("ade20k_full")]
    for stem, (height, width) in sizes.items():
        folder = "training/urban/street" if "train" in stem else "validation/home/kitchen"
        folders.append(f"{ADE20K_FULL}/images/ADE/{folder}")
        smooth = np.linspace(0, 255, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None] * [1, 0.5, 0.2]
        save(root / folders[-1] / f"{stem}.jpg", smooth.astype(np.uint8))
        ids = random.choice(used, (height // 8 + 1, width // 8 + 1)).repeat(8, 0).repeat(8, 1)[:height, :width]
        ids[:4, :9] = 0  # nothing
        ids[4:8, :9] = 3100  # none of the 847 classes
        pixels = np.stack([ids // 256 * 10 + 3, ids % 256, ids % 7], axis=-1).astype(np.uint8)
        save(root / folders[-1] / f"{stem}_seg.png", pixels)
    index = {
        "filename": [f"{stem}.jpg" for stem in sizes],
        "folder": folders,
        "objectnames": ["wall", "floor"],
        "objectPresence": np.zeros((2, len(sizes))),
        "objectcounts": np.ones(2, dtype=np.int16),
    }
    (root / ADE20K_FULL / "index_ade20k.pkl").write_bytes(pickle.dumps(index))


def test_ade20k_full(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    sizes = {
        "ADE_train_00000001": (30, 40),
        "ADE_val_00000002": (520, 777),
        "ADE_val_00000003": (901, 601),
        "ADE_val_00000004": (512, 700),
    }
    shapes = {**sizes, "ADE_val_00000002": (512, 765), "ADE_val_00000003": (768, 512)}
    fake_ade20k_full(tmp_path, sizes)
    code, printed = run(FULL)
    assert code == 0, printed
    labels = {category["id"]: label for label, category in enumerate(read_classes("ade20k_full"))}
    assert (labels[2978], labels[3148], len(labels)) == (0, 846, 847)  # "wall" and "adding machine"
    with registered_at(tmp_path):
        records = check_dataset("ade20k_full_sem_seg_train", 847) + check_dataset("ade20k_full_sem_seg_val", 847)
    assert len(records) == 4
    for record in records:
        stem = Path(record["file_name"]).stem
        (source,) = (tmp_path / ADE20K_FULL).glob(f"images/**/{stem}.jpg")
        assert ("training" in record["file_name"]) == ("training" in str(source))
        pixels = np.asarray(Image.open(source.with_name(f"{stem}_seg.png"))).astype(int)
        (height, width), (rows, columns) = sizes[stem], shapes[stem]
        y, x = np.arange(rows) * height // rows, np.arange(columns) * width // columns
        ids = (pixels[..., 0] // 10 * 256 + pixels[..., 1])[y][:, x]
        made = np.asarray(Image.open(record["sem_seg_file_name"]))
        assert made.dtype == np.uint16 and made.shape == (rows, columns)
        assert np.array_equal(made, np.vectorize(lambda number: labels.get(number, 65535))(ids))
        assert 65535 in made

        picture = torch.from_numpy(np.asarray(Image.open(source)).copy()).permute(2, 0, 1)[None].float()
        smaller = torch.nn.functional.interpolate(picture, (rows, columns), mode="bilinear", align_corners=False)
        difference = smaller[0].permute(1, 2, 0).numpy() - np.asarray(Image.open(record["file_name"]))
        assert np.abs(difference).mean() < 1.5


def test_ade20k_full_broken_and_missing_files_are_named(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, printed = run(FULL)
    assert code == 1 and "index_ade20k.pkl' does not exist: give the folder ADE20K_2021_17_01 as --root" in printed
    stems = [f"ADE_val_{number:08d}" for number in range(1, 6)]
    fake_ade20k_full(tmp_path, dict.fromkeys(stems, (20, 30)))
    folder = tmp_path / ADE20K_FULL / "images/ADE/validation/home/kitchen"
    (folder / f"{stems[0]}.jpg").unlink()
    (folder / f"{stems[1]}_seg.png").unlink()
    (folder / f"{stems[2]}_seg.png").write_bytes(b"broken")
    save(folder / f"{stems[3]}_seg.png", np.zeros((20, 31, 3), np.uint8))
    code, printed = run(FULL, "--splits", "val")
    assert code == 1
    found = errors(printed)
    assert len(found) == 4
    for part in (
        "1.jpg' does not exist",
        "2_seg.png' does not exist",
        "3_seg.png': replace or remove the file",
        "4_seg.png' has 31 x 20 pixels, but ",
    ):
        assert any(part in line for line in found), printed
    assert [path.stem for path in (tmp_path / ADE20K_FULL / "annotations_detectron2/validation").iterdir()] == stems[4:]

    index = tmp_path / ADE20K_FULL / "index_ade20k.pkl"
    for content, reason in (
        (pickle.dumps(os.getcwd), "which is no part of an array"),
        (pickle.dumps({"folder": []}), "'filename'"),
        (b"broken", "cannot read"),
    ):
        index.write_bytes(content)
        code, printed = run(FULL)
        assert code == 1 and len(errors(printed)) == 1
        assert "index_ade20k.pkl" in printed and reason in printed


# ---------------------------------------------------------------------------------------- COCO-Stuff 10k


def write_mat(path: Path, matrix: np.ndarray) -> None:
    """A file as MATLAB's version 7.3 writes it: HDF5 after a text of 512 bytes, columns first."""
    h5py = pytest.importorskip("h5py", reason="needs h5py to write annotations of COCO-Stuff 10k")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("S", data=matrix.T, chunks=True, compression="gzip").attrs["MATLAB_class"] = b"uint8"
        file.create_dataset("captions", data=np.zeros((1, 2)))
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")


def fake_stuff(root: Path, names: dict[str, list[int]], height: int = 20, width: int = 30) -> None:
    """COCO-Stuff 10k as downloaded; numbers of the pictures by split."""
    folder = root / STUFF_10K
    random = np.random.default_rng(0)
    (folder / "imageLists").mkdir(parents=True)
    for split, numbers in names.items():
        stems = [f"COCO_train2014_{number:012d}" for number in numbers]
        (folder / f"imageLists/{split}.txt").write_text("".join(f"{stem}\r\n" for stem in stems))
        for stem in stems:
            save(folder / f"images/{stem}.jpg", random.integers(0, 256, (height, width, 3)).astype(np.uint8))
            labels = random.integers(1, 173, (height, width)).astype(np.uint8)
            labels[:2, 0] = 1, 172
            write_mat(folder / f"annotations/{stem}.mat", labels)
            np.save(folder / f"{stem}.npy", labels)


def test_coco_stuff_10k(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    fake_stuff(tmp_path, {"train": [77, 109, 5], "test": [9]})
    code, printed = run(STUFF)
    assert code == 0, printed
    folder = tmp_path / STUFF_10K
    with registered_at(tmp_path):
        for split, count in (("train", 3), ("test", 1)):
            records = check_dataset(f"coco_2017_{split}_stuff_10k_sem_seg", 171)
            assert len(records) == count
            for record in records:
                name = Path(record["file_name"]).name
                assert Path(record["file_name"]).read_bytes() == (folder / "images" / name).read_bytes()
                labels = np.load((folder / name).with_suffix(".npy")).tolist()
                made = np.asarray(Image.open(record["sem_seg_file_name"]))
                assert made.dtype == np.uint8
                assert made.tolist() == [[255 if label == 1 else label - 2 for label in row] for row in labels]


def test_coco_stuff_10k_broken_and_missing_files_are_named(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="needs h5py to read annotations of COCO-Stuff 10k")
    code, printed = run(STUFF)
    assert code == 1 and "imageLists/train.txt' does not exist: give the folder of COCO-Stuff 10k" in printed
    fake_stuff(tmp_path, {"train": [1, 2, 3, 4, 5, 6, 7], "test": []})
    folder = tmp_path / STUFF_10K
    stems = [f"COCO_train2014_{number:012d}" for number in range(1, 8)]
    (folder / f"images/{stems[0]}.jpg").unlink()
    (folder / f"annotations/{stems[1]}.mat").unlink()
    (folder / f"annotations/{stems[2]}.mat").write_bytes(b"MATLAB 5.0 MAT-file".ljust(600))
    write_mat(folder / f"annotations/{stems[3]}.mat", np.ones((30, 20), np.uint8))
    write_mat(folder / f"annotations/{stems[4]}.mat", np.full((20, 30), 182, np.uint8))
    data = (folder / f"annotations/{stems[5]}.mat").read_bytes()
    (folder / f"annotations/{stems[5]}.mat").write_bytes(data[: len(data) // 2])
    code, printed = run(STUFF, "--splits", "train")
    assert code == 1
    found = errors(printed)
    assert len(found) == 6
    for part in (
        f"{stems[0]}.jpg' does not exist",
        f"{stems[1]}.mat' does not exist",
        f"{stems[2]}.mat'",
        f"{stems[3]}.mat': S is (30, 20), but the picture has 20 rows and 30 columns",
        f"{stems[4]}.mat' has labels from 182 to 182, expected 1 (none) to 172",
        f"{stems[5]}.mat'",
    ):
        assert any(part in line for line in found), printed
    assert [path.stem for path in (folder / "annotations_detectron2/train").iterdir()] == stems[6:]
    assert [path.stem for path in (folder / "images_detectron2/train").iterdir()] == stems[6:]


def test_coco_stuff_10k_without_h5py(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    module = load_script(repository / "datasets" / STUFF)
    with pytest.raises(UserError, match="pip install h5py"):
        module.main(["--splits", "train"])


# ---------------------------------------------------------------------------- stopped, and started again


@dataclass(frozen=True)
class Stopped:
    """A command on so many pictures that it can be stopped half-way."""

    name: str
    folder: str
    split: str
    fake: Callable[[Path], None]


def many(make_one: Callable[[Path], None], folder: str, old: str, numbers: range) -> Callable[[Path], None]:
    """A data set of many pictures that are all the file(s) of one, ``old``, by the names of their numbers."""

    def make(root: Path) -> None:
        make_one(root)
        for path in sorted((root / folder).rglob(f"*{old}*")):
            for number in numbers:
                os.link(path, path.with_name(path.name.replace(old, f"{number:0{len(old)}d}")))

    return make


COUNT = 500
LAST = f"{2:08d}"


def many_full(root: Path) -> None:
    many(lambda at: fake_ade20k_full(at, {"ADE_val_00000002": (300, 400)}), ADE20K_FULL, LAST, range(3, COUNT))(root)
    index = {"filename": [f"ADE_val_{number:08d}.jpg" for number in range(2, COUNT)]}
    index["folder"] = [f"{ADE20K_FULL}/images/ADE/validation/home/kitchen"] * len(index["filename"])
    (root / ADE20K_FULL / "index_ade20k.pkl").write_bytes(pickle.dumps(index))


def many_stuff(root: Path) -> None:
    many(lambda at: fake_stuff(at, {"train": [2]}, 300, 400), STUFF_10K, f"{2:012d}", range(3, COUNT))(root)
    names = "".join(f"COCO_train2014_{number:012d}\n" for number in range(2, COUNT))
    (root / STUFF_10K / "imageLists/train.txt").write_text(names)


many_ade20k = many(lambda at: fake_ade20k(at, 2, 300, 400), ADE20K, LAST, range(3, COUNT))


@pytest.mark.parametrize(
    "case",
    [
        Stopped(SEMANTIC, ADE20K, "val", many_ade20k),
        Stopped(INSTANCE, ADE20K, "val", many_ade20k),
        Stopped(PANOPTIC, ADE20K, "val", many_ade20k),
        Stopped(FULL, ADE20K_FULL, "val", many_full),
        Stopped(STUFF, STUFF_10K, "train", many_stuff),
    ],
    ids=lambda case: case.name.removesuffix(".py"),
)
def test_stopped_half_way_and_started_again(
    case: Stopped, run: Callable[..., tuple[int, str]], repository: Path, tmp_path: Path
) -> None:
    if os.name == "nt":
        pytest.skip("signals of POSIX")
    case.fake(tmp_path)
    output = tmp_path / "made"
    arguments = ["--splits", case.split, "--output", str(output)]
    program_line = [str(repository / "datasets" / case.name), *arguments, "--workers", "1"]

    assert stop(program_line, output, signal.SIGKILL) == -signal.SIGKILL
    killed = finished(output)
    assert stop(program_line, output, signal.SIGINT) == 130
    interrupted = finished(output)
    assert 0 < killed < interrupted < COUNT - 2
    assert not list(output.rglob("*.part"))

    kept = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.suffix in (".png", ".tif", ".jpg")}
    code, printed = run(case.name, *arguments)
    assert code == 0, printed
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    code, printed = run(case.name, *arguments[:-1], str(tmp_path / "undisturbed"))
    assert code == 0, printed
    made = contents(output)
    assert made and made == contents(tmp_path / "undisturbed")


def finished(output: Path) -> int:
    """How many pictures are done: their files, or their lines in a journal."""
    journals = [path.read_bytes().count(b"\n") for path in output.rglob("*.journal")]
    files = len([path for path in output.rglob("*") if path.suffix in (".png", ".tif")])
    return max([files, *journals])


def stop(arguments: list[str], output: Path, number: signal.Signals) -> int:
    """Start a command, send it a signal when it has done some more pictures, and return its exit code.

    The process is a fork of this one, since importing everything anew takes longer than all the rest.
    """
    enough = finished(output) + 5
    process = multiprocessing.get_context("fork").Process(target=main_process, args=(arguments,))
    process.start()
    while process.is_alive() and finished(output) < enough:
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(timeout=60)
    assert process.exitcode is not None
    return process.exitcode


def main_process(arguments: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have told us to ignore it
    os.nice(10)  # so that whoever is to stop it has its turn first
    sys.argv = arguments
    command(load_script(Path(arguments[0])).main)
