"""One annotation file becomes two."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from scripts import Program, program


@pytest.fixture
def split(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    return program(repository / "tools" / "split_dataset.py", monkeypatch, capsys)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Fifty pictures with zero to three annotations each."""
    images = [{"id": i, "file_name": f"{i:03d}.png", "width": 8, "height": 8} for i in range(50)]
    annotations = [
        {"id": 10 * i + k, "image_id": i, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}
        for i in range(50)
        for k in range(i % 4)
    ]
    return write(
        tmp_path / "all.json",
        {
            "info": {"year": 2020},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": "thing"}],
        },
    )


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def names(path: Path) -> list[str]:
    return [image["file_name"] for image in json.loads(path.read_text())["images"]]


def test_every_picture_and_annotation_is_in_one_part(split: Program, file: Path) -> None:
    code, printed = split(str(file), "--val-share", "0.3")
    assert code == 0, printed
    train, val = file.with_name("all_train.json"), file.with_name("all_val.json")
    assert f"{val}: 15 pictures" in printed
    whole, parts = json.loads(file.read_text()), [COCO(str(path)) for path in (train, val)]
    assert [len(part.imgs) for part in parts] == [35, 15]
    assert not set(parts[0].imgs) & set(parts[1].imgs)
    assert sorted(set(parts[0].anns) | set(parts[1].anns)) == [a["id"] for a in whole["annotations"]]
    for part in parts:
        assert part.dataset["info"] == whole["info"] and part.dataset["categories"] == whole["categories"]
        for image_id in part.imgs:
            assert len(part.getAnnIds(imgIds=[image_id])) == image_id % 4
    assert names(train) == sorted(names(train))  # in the file's order


def test_the_seed_alone_decides(split: Program, file: Path, tmp_path: Path) -> None:
    content = json.loads(file.read_text())
    random.Random(3).shuffle(content["images"])
    other_order = write(tmp_path / "shuffled.json", content)
    chosen = []
    for number, (source, seed) in enumerate(((file, 1), (other_order, 1), (file, 2))):
        folder = tmp_path / str(number)
        assert split(str(source), "--seed", str(seed), "--output", str(folder))[0] == 0
        chosen.append(set(names(folder / f"{source.stem}_val.json")))
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 10


def test_entries_of_one_picture_stay_together(split: Program, file: Path) -> None:
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["file_name"] = f"{image['id'] // 5}.png"
    write(file, content)
    assert split(str(file), "--val-share", "0.5")[0] == 0
    train, val = (names(file.with_name(f"all_{part}.json")) for part in ("train", "val"))
    assert len(train) == len(val) == 25 and not set(train) & set(val)


def test_panoptic_form(split: Program, tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)]
    annotations = [{"image_id": i, "file_name": f"{i}.png", "segments_info": []} for i in range(4)]
    file = write(tmp_path / "pan.json", {"images": images, "annotations": annotations, "categories": []})
    assert split(str(file), "--val-share", "0.25")[0] == 0
    part = json.loads((tmp_path / "pan_val.json").read_text())
    assert [a["image_id"] for a in part["annotations"]] == [i["id"] for i in part["images"]]
    assert len(part["images"]) == 1


def test_files_that_are_there_are_kept(split: Program, file: Path) -> None:
    val = file.with_name("all_val.json")
    val.write_text("mine")
    code, printed = split(str(file))
    assert code == 1 and f"{val} exist" in printed
    assert val.read_text() == "mine" and not file.with_name("all_train.json").exists()
    assert split(str(file), "--overwrite")[0] == 0
    assert len(names(val)) == 10


def test_mistakes(split: Program, file: Path, tmp_path: Path) -> None:
    whole = json.loads(file.read_text())

    def error(content: Any, *options: str) -> str:
        code, printed = split(str(write(file, content)), *options)
        assert code == 1 and "Traceback" not in printed and len(printed.splitlines()) == 1
        assert not file.with_name("all_train.json").exists()
        return printed

    assert "--val-share is 1.0, expected" in error(whole, "--val-share", "1")
    assert "a share of 0.001 of 50 pictures is 0" in error(whole, "--val-share", "0.001")
    assert "no list 'images' of records with file_name and id" in error([])
    assert "no list 'annotations'" in error({**whole, "annotations": [1]})
    assert "2 pictures with the id 7" in error({**whole, "images": [*whole["images"], {"id": 7, "file_name": "a"}]})
    assert "annotation 5 has image_id 99" in error({**whole, "annotations": [{"id": 5, "image_id": 99}]})
    code, printed = split(str(tmp_path / "nowhere.json"))
    assert code == 1 and "nowhere.json' does not exist" in printed
