"""The user's own data through the commands: five forms, trained, evaluated and drawn with nothing else written."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from perfect_outputs import make_instances, perfect_instances, perfect_panoptic, perfect_semantic, read_segment_ids
from PIL import Image
from scripts import Program, program
from test_engine_train import RECIPE
from tiny_dataset import make_tiny_dataset, unregister_tiny_dataset
from tiny_nuclei_model import one_thread

from mask2former.config import get_default_config
from mask2former.data import register_data
from mask2former.engine import load_config
from mask2former.errors import UserError
from mask2former.evaluation import build_evaluator

FORMS = ("coco", "semantic", "panoptic", "instance-maps", "object-masks")
# The tiny data set's dataset ids.
NAMES = {1: "disc", 3: "square", 7: "ground"}


@pytest.fixture(scope="module", autouse=True)
def slow_machine_friendly() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two folders with ``images/``, ``instances.json``, ``panoptic.json``, ``panoptic/`` and ``semantic/``."""
    root = tmp_path_factory.mktemp("tiny")
    for seed, split in enumerate(("train", "val")):
        make_tiny_dataset(root / split, num_images=3, seed=seed)
    unregister_tiny_dataset()
    return {split: root / split for split in ("train", "val")}


@pytest.fixture(autouse=True)
def forget_own_data() -> Iterator[None]:
    yield
    forget()


def forget() -> None:
    """What a new process does not know."""
    for name in [name for name in DatasetCatalog.list() if name.startswith("own_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def write_form(form: str, source: Path, target: Path) -> Path:
    """The data of ``source`` in another form: one path, of which the rest is found."""
    if form in ("coco", "panoptic"):
        name = "instances" if form == "coco" else "panoptic"
        shutil.copytree(source / "images", target / "images")
        shutil.copy(source / f"{name}.json", target)
        if form == "panoptic":
            shutil.copytree(source / "panoptic", target / "panoptic")
        return target / f"{name}.json"
    if form != "object-masks":
        shutil.copytree(source / "images", target / "images")
    if form == "semantic":
        shutil.copytree(source / "semantic", target / "labels")
        (target / "classes.txt").write_text("disc\nsquare\nground\n")
        return target
    rows = []
    for annotation in read(source / "panoptic.json")["annotations"]:
        stem = Path(annotation["file_name"]).stem
        ids = read_segment_ids(str(source / "panoptic" / annotation["file_name"]))
        things = {s["id"]: NAMES[s["category_id"]] for s in annotation["segments_info"] if s["category_id"] != 7}
        if form == "instance-maps":
            save(target / "instances" / f"{stem}.png", np.where(np.isin(ids, list(things)), ids, 0))
            rows += [(stem, str(number), name) for number, name in things.items()]
            continue
        (target / stem / "images").mkdir(parents=True)
        shutil.copy(source / "images" / f"{stem}.png", target / stem / "images")
        for number, name in things.items():
            save(target / stem / "masks" / f"object{number}.png", (ids == number) * 255)
            rows.append((stem, f"object{number}", name))
    with open(target / "objects.csv", "w", newline="") as file:
        csv.writer(file).writerows([("picture", "object", "class"), *rows])
    return target


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = read(path)
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def train_net(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    return program(repository / "train_net.py", monkeypatch, capsys)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe for data sets that do not exist, with as many classes as there are."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("tiny_panoptic", "nothing").replace("NUM_CLASSES: 3", "NUM_CLASSES: 11"))
    return path


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("form", FORMS)
def test_one_command_then_the_demo(
    form: str, splits: dict[str, Path], tmp_path: Path, recipe: Path, train_net: Program, repository: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    paths = {split: write_form(form, folder, tmp_path / split) for split, folder in splits.items()}
    output = tmp_path / "output"
    code, printed = train_net(
        "--config-file", str(recipe), "--train-data", str(paths["train"]), "--val-data", str(paths["val"]),
        "SOLVER.MAX_ITER", "20", "SOLVER.STEPS", "(15,)", "OUTPUT_DIR", str(output),
    )  # fmt: skip
    assert code == 0, printed
    assert "train: 3 pictures" in printed and "val: 3 pictures" in printed and "disc" in printed
    results = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert results[-1]["iteration"] >= 19
    metric = {"semantic": "sem_seg/mIoU", "panoptic": "panoptic_seg/PQ"}.get(form, "segm/AP")
    assert any(metric in row for row in results)

    cfg = load_config(str(output / "config.yaml"))
    assert (3 if form in ("semantic", "panoptic") else 2) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    assert cfg.DATASETS.OWN[0]["name"] == cfg.DATASETS.TRAIN[0]
    task = {"semantic": "semantic", "panoptic": "panoptic"}.get(form, "instance")
    assert f"coco_{task}_lsj" == cfg.INPUT.DATASET_MAPPER_NAME

    # A trained model needs its classes' names, and no longer the data.
    picture = tmp_path / "picture.png"
    shutil.copy(splits["val"] / "images" / "001.png", picture)
    for split in splits:
        shutil.rmtree(tmp_path / split)
    command = [
        str(repository / "demo" / "demo.py"), "--input", str(picture), "--config-file", str(output / "config.yaml"),
        "--weights", str(output / "model_final.pth"), "--output", str(tmp_path / "drawn"),
        "--confidence-threshold", "0",
    ]  # fmt: skip
    if form == "coco":
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
    else:
        forget()
        assert program(Path(command[0]), monkeypatch, capsys)(*command[1:])[0] == 0
    drawn = read(tmp_path / "drawn" / "picture.json")
    classes = {item["class"] for key in ("instances", "segments", "semantic") for item in found(drawn, key)}
    assert classes and classes <= set(NAMES.values())


def found(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return [item for name, items in document.items() if key in name and isinstance(items, list) for item in items]


# ---------------------------------------------------------------------------------------------------- evaluators


@pytest.mark.parametrize("form", FORMS)
def test_perfect_predictions_score_100(form: str, splits: dict[str, Path], tmp_path: Path) -> None:
    """The registered loader and the evaluator agree, whatever the ids in the files."""
    paths = [write_form(form, folder, tmp_path / split) for split, folder in splits.items()]
    data = register_data(*paths, output_dir=str(tmp_path / "output"))
    cfg = get_default_config()
    data.configure(cfg)
    test = cfg.MODEL.MASK_FORMER.TEST
    evaluator = build_evaluator(
        cfg.DATASETS.TEST[0], None, semantic_on=test.SEMANTIC_ON, panoptic_on=test.PANOPTIC_ON,
        instance_on=test.INSTANCE_ON,
    )  # fmt: skip
    evaluator.reset()
    for record in DatasetCatalog.get(cfg.DATASETS.TEST[0]):
        evaluator.process([record], [perfect(record, test, len(data.classes))])
    results = evaluator.evaluate()
    expected = {"semantic": [("sem_seg", "mIoU")], "panoptic": [("sem_seg", "mIoU"), ("panoptic_seg", "PQ")]}
    for task, metric in [*expected.get(form, []), *([] if form == "semantic" else [("segm", "AP")])]:
        assert results[task][metric] == pytest.approx(100)


def perfect(record: dict[str, Any], test: Any, num_classes: int) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    if test.SEMANTIC_ON:
        outputs["sem_seg"] = perfect_semantic(record, num_classes)
    if test.PANOPTIC_ON:
        outputs["panoptic_seg"] = perfect_panoptic(record)
        ids = torch.from_numpy(read_segment_ids(record["pan_seg_file_name"]))
        things = [segment for segment in record["segments_info"] if segment["isthing"]]
        masks = torch.stack([ids == segment["id"] for segment in things])
        outputs["instances"] = make_instances(masks, [s["category_id"] for s in things], [1.0] * len(things))
    elif test.INSTANCE_ON:
        outputs["instances"] = perfect_instances(record)
    return outputs


# ---------------------------------------------------------------------------------------------------- label maps


def label_maps(folder: Path, *maps: np.ndarray, classes: str = "") -> Path:
    for number, values in enumerate(maps):
        save(folder / "images" / f"{number}.png", np.zeros((*values.shape[:2], 3)))
        save(folder / "labels" / f"{number}.png", values)
    if classes:
        (folder / "classes.json").write_text(classes)
    return folder


def loaded_labels(row: dict[str, Any]) -> list[np.ndarray]:
    return [np.array(Image.open(record["sem_seg_file_name"])) for record in DatasetCatalog.get(row["name"])]


def test_values_of_label_maps_are_not_shifted(tmp_path: Path) -> None:
    data = register_data(label_maps(tmp_path / "a", np.array([[0, 1], [2, 255]])), output_dir=str(tmp_path / "out"))
    assert [category["id"] for category in data.classes] == [0, 1, 2]
    assert data.train["labels"] == str(tmp_path / "a" / "labels")
    assert "25.0 % of the pixels" in data.summary


def test_gaps_in_the_values_are_closed_and_told(tmp_path: Path) -> None:
    folder = label_maps(tmp_path / "a", np.array([[7, 7], [40, 255]]), np.array([[200, 7], [7, 7]]))
    data = register_data(folder, output_dir=str(tmp_path / "out"))
    assert "#1 (in the files 40)" in data.summary
    first, second = loaded_labels(data.train)
    assert first.tolist() == [[0, 0], [1, 255]] and second.tolist() == [[2, 0], [0, 0]]
    later = register_data((), label_maps(tmp_path / "b", np.array([[200, 40]])), output_dir=str(tmp_path / "out"),
                          classes=data.classes)  # fmt: skip
    assert loaded_labels(later.val)[0].tolist() == [[2, 1]]


def test_0_and_255_are_two_classes(tmp_path: Path) -> None:
    data = register_data(label_maps(tmp_path / "a", np.array([[0, 255]])), output_dir=str(tmp_path / "out"))
    assert [category["id"] for category in data.classes] == [0, 255]
    assert "255 is taken for a class" in data.summary
    assert loaded_labels(data.train)[0].tolist() == [[0, 1]]


def test_colours_are_classes(tmp_path: Path) -> None:
    red, green = [200, 0, 0], [0, 90, 1]
    classes = json.dumps([{"id": 5, "name": "leaf", "color": green}, {"id": 6, "name": "fruit", "color": red}])
    folder = label_maps(tmp_path / "a", np.array([[red, green]]), classes=classes)
    data = register_data(folder, output_dir=str(tmp_path / "out"))
    assert [category["name"] for category in data.classes] == ["leaf", "fruit"]
    assert loaded_labels(data.train)[0].tolist() == [[1, 0]]


def test_warnings(tmp_path: Path) -> None:
    folder = label_maps(tmp_path / "a", np.array([[3, 255, 255, 255]]))
    summary = register_data(folder, output_dir=str(tmp_path / "out")).summary
    assert "one class is left" in summary and "75 % of the pixels have no label" in summary


def test_summary_tells_sizes_and_empty_pictures(splits: dict[str, Path], tmp_path: Path) -> None:
    path = write_form("coco", splits["train"], tmp_path / "a")
    edit(path, lambda c: c["annotations"].__setitem__(slice(None), [a for a in c["annotations"] if a["image_id"] != 2]))
    content = read(path)
    areas = [annotation["area"] for annotation in content["annotations"]]
    summary = register_data(path, output_dir=str(tmp_path / "out")).summary
    assert "1 pictures have no objects, the first is '002.png'" in summary
    assert f"smallest object {min(areas)} pixels" in summary and f"{max(areas)} pixels (in" in summary
    assert f"3 pictures, {len(areas)} objects of 2 classes" in summary and "smallest picture 64 x 64" in summary


def test_flat_object_masks_of_one_class(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", np.zeros((4, 4, 3)))
    save(tmp_path / "images" / "a_b.png", np.zeros((4, 4, 3)))
    save(tmp_path / "masks" / "a_1.png", np.eye(4))
    save(tmp_path / "masks" / "a_b_1.png", np.eye(4))
    save(tmp_path / "masks" / "a_b_2.png", np.eye(4)[::-1])
    data = register_data([tmp_path / "images", tmp_path / "masks"], output_dir=str(tmp_path / "out"))
    assert [len(record["annotations"]) for record in DatasetCatalog.get(data.train["name"])] == [1, 2]
    assert [category["name"] for category in data.classes] == ["object"]


@pytest.mark.parametrize("family", ["mask_former_semantic", "microscopy_panoptic", "coco_panoptic_lsj"])
def test_the_recipe_keeps_its_augmentations(family: str, splits: dict[str, Path], tmp_path: Path) -> None:
    cfg = get_default_config()
    cfg.INPUT.DATASET_MAPPER_NAME = family
    path = write_form("coco", splits["train"], tmp_path / "a")
    register_data(path, output_dir=str(tmp_path / "out")).configure(cfg)
    assert family.replace("semantic", "instance").replace("panoptic", "instance") == cfg.INPUT.DATASET_MAPPER_NAME


def test_evaluation_alone_keeps_the_classes_of_the_run(splits: dict[str, Path], tmp_path: Path) -> None:
    path = write_form("coco", splits["train"], tmp_path / "a")
    cfg = get_default_config()
    register_data(path, output_dir=str(tmp_path / "out")).configure(cfg)
    other = write_form("coco", splits["val"], tmp_path / "b")
    edit(other, lambda c: c["categories"].pop(0))
    edit(other, lambda c: c.update(annotations=[a for a in c["annotations"] if a["category_id"] == 3]))
    later = register_data((), other, output_dir=str(tmp_path / "out"), classes=cfg.DATASETS.OWN[0]["classes"])
    later.configure(cfg)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 2 and len(cfg.DATASETS.OWN) == 2
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    assert {a["category_id"] for record in records for a in record["annotations"]} == {1}


# --------------------------------------------------------------------------------------------------- broken files


def first(content: Any) -> Any:
    return content["annotations"][0]


def change_png(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    save(path, change(np.array(Image.open(path))))


def json_case(form: str, change: Callable[[Any], Any]) -> tuple[str, Callable[[Path], None]]:
    name = "instances.json" if form == "coco" else "panoptic.json"
    return form, lambda folder: edit(folder / name, change)


BROKEN: dict[str, tuple[tuple[str, Callable[[Path], None]], str]] = {
    "category": (json_case("coco", lambda c: first(c).update(category_id=9)), "category_id 9"),
    "picture id": (json_case("coco", lambda c: first(c).update(image_id=77)), r"of picture 77"),
    "two pictures of an id": (json_case("coco", lambda c: c["images"][1].update(id=1)), "picture id 1 is used by"),
    "id twice": (json_case("coco", lambda c: first(c).update(id=2)), "annotation 2.*more than once"),
    "size": (json_case("coco", lambda c: c["images"][0].update(width=65)), r"001.png' is 64 x 64.*65 x 64"),
    "no segmentation": (
        json_case("coco", lambda c: first(c).update(segmentation=[])),
        r"annotation 1.*segmentation \[\]",
    ),
    "outside": (
        json_case("coco", lambda c: first(c).update(segmentation=[[70, 1, 80, 1, 80, 9]])),
        "annotation 1.*outside its picture",
    ),
    "run lengths": (
        json_case("coco", lambda c: first(c).update(segmentation={"size": [64, 64], "counts": [5]})),
        "annotation 1.*add up to 5",
    ),
    "missing picture": (("coco", lambda f: (f / "images" / "002.png").unlink()), "002.png' does not exist"),
    "no picture": (("coco", lambda f: (f / "images" / "002.png").write_text("x")), "cannot read picture.*002.png"),
    "no JSON": (("coco", lambda f: (f / "instances.json").write_text("{")), "cannot read.*instances.json"),
    "another JSON": (("coco", lambda f: (f / "instances.json").write_text("{}")), "instances.json' is not in COCO"),
    "segment of an unknown class": (
        json_case("panoptic", lambda c: first(c)["segments_info"][0].update(category_id=9)),
        "001.png.*segment 1 has category_id 9",
    ),
    "segment without a class": (
        json_case("panoptic", lambda c: first(c)["segments_info"][0].pop("category_id")),
        "001.png.*segment 1 lacks 'category_id'",
    ),
    "segment twice": (
        json_case("panoptic", lambda c: first(c)["segments_info"].append(first(c)["segments_info"][0])),
        "001.png' has segment 1 twice",
    ),
    "overlapping segments": (
        json_case("panoptic", lambda c: first(c)["segments_info"][0].update(area=4096)),
        "001.png' has [0-9]+ pixels of segment 1, but its area is said to be 4096.*overlaps",
    ),
    "unknown segment": (
        ("panoptic", lambda f: change_png(f / "panoptic" / "001.png", lambda p: np.where(p == 1, 90, p))),
        "001.png' has [0-9]+ pixels of segment (90|[0-9]{5,})",
    ),
    "no isthing": (json_case("panoptic", lambda c: c["categories"][0].pop("isthing")), "disc lacks 'isthing'"),
    "label": (
        ("semantic", lambda f: change_png(f / "labels" / "002.png", lambda p: np.where(p == 2, 14, p))),
        "002.png' has the value 14 in [0-9]+ pixels.*0, 1, 2, or 255",
    ),
    "label map's size": (("semantic", lambda f: change_png(f / "labels" / "002.png", lambda p: p[:50])), "64 x 50"),
    "missing label map": (("semantic", lambda f: (f / "labels" / "002.png").unlink()), "1 of 3 pictures.*002.png"),
    "instance map's size": (
        ("instance-maps", lambda f: change_png(f / "instances" / "002.png", lambda p: p[:50])),
        "002.png' is 64 x 50",
    ),
    "object without a class": (
        ("instance-maps", lambda f: change_png(f / "instances" / "002.png", lambda p: p * 0 + 99)),
        "no class for object 99 of picture '002'",
    ),
    "empty object": (
        ("object-masks", lambda f: save(f / "002" / "masks" / "zero.png", np.zeros((64, 64)))),
        "zero.png' has no pixel",
    ),
    "object of another size": (
        ("object-masks", lambda f: save(f / "002" / "masks" / "small.png", np.ones((8, 9)))),
        "small.png' is 9 x 8 pixels",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_takes_one_line(case: str, splits: dict[str, Path], tmp_path: Path) -> None:
    (form, break_it), message = BROKEN[case]
    path = write_form(form, splits["train"], tmp_path / "a")
    break_it(tmp_path / "a")
    with pytest.raises(UserError, match=message) as caught:
        register_data(path, output_dir=str(tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_the_command_prints_the_one_line(
    splits: dict[str, Path], tmp_path: Path, recipe: Path, train_net: Program
) -> None:
    path = write_form("coco", splits["train"], tmp_path / "a")
    edit(path, lambda c: first(c).update(category_id=9))
    code, printed = train_net("--config-file", str(recipe), "--train-data", str(path))
    assert code == 1 and printed.startswith("error: ") and printed.count("\n") == 1
    for arguments, message in (
        (("--train-data", str(tmp_path / "none")), "none' does not exist"),
        (("--data-form", "coco"), "neither --train-data nor --val-data"),
    ):
        code, printed = train_net("--config-file", str(recipe), *arguments)
        assert code == 1 and message in printed and printed.count("\n") == 1


def test_other_classes_in_the_validation_data_are_named(splits: dict[str, Path], tmp_path: Path) -> None:
    train, val = (write_form("coco", folder, tmp_path / split) for split, folder in splits.items())
    edit(val, lambda c: c["categories"][0].update(name="circle"))
    with pytest.raises(UserError, match="class 1 is 'circle', but 'disc' in the training data"):
        register_data(train, val, output_dir=str(tmp_path / "out"))


def test_other_data_in_the_same_folder_do_not_replace_the_first(splits: dict[str, Path], tmp_path: Path) -> None:
    """A run's config.yaml goes on describing its own data after an evaluation on others."""
    rows = []
    for split, folder in splits.items():
        path = write_form("instance-maps", folder, tmp_path / split)
        rows.append(register_data((), path, output_dir=str(tmp_path / "out")).val)
    assert len({row["json"] for row in rows}) == len({row["name"] for row in rows}) == 2
    assert all(Path(row["json"]).is_file() for row in rows)


def test_a_lazy_config_is_refused(repository: Path, splits: dict[str, Path], train_net: Program) -> None:
    lazy = next((repository / "configs" / "lazy").rglob("*.py"))
    code, printed = train_net("--config-file", str(lazy), "--train-data", str(splits["train"]))
    assert code == 1 and "need a YAML recipe" in printed and printed.count("\n") == 1
