"""The commands that make data sets: what they write, and what happens when they are stopped or files are broken."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from PIL import Image
from scripts import load_script

from mask2former.data import panoptic_files
from mask2former.data.annotations import ids_from_rgb, rgb_from_ids
from mask2former.data.datasets import load_panoptic, panoptic_metadata, read_classes
from mask2former.data.panoptic_files import instances_to_panoptic, panoptic_from_instances, semantic_from_panoptic
from mask2former.errors import UserError


@pytest.fixture(scope="module")
def prepare_coco(repository: Path) -> ModuleType:
    return load_script(repository / "datasets" / "prepare_coco_semantic_annos_from_panoptic_annos.py")


@pytest.fixture(scope="module")
def prepare_nuclei(repository: Path) -> ModuleType:
    return load_script(repository / "datasets" / "prepare_nuclei.py")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --------------------------------------------------------------------------------------------------- COCO


def fake_coco(root: Path, pictures: int = 6, side: int = 20) -> np.ndarray:
    """COCO's val2017 in its layout; the expected semantic labels of the pictures, all the same."""
    ids = np.zeros((side, side), dtype=np.uint32)
    ids[:8], ids[8:16, :10], ids[8:16, 10:] = 70000, 5, 300
    categories = {70000: 1, 5: 90, 300: 200}  # person, toothbrush, rug-merged
    segments = [{"id": i, "category_id": c, "iscrowd": int(i == 5)} for i, c in categories.items()]
    folder = root / "panoptic_val2017"
    folder.mkdir(parents=True)
    names = [f"{number:012d}.png" for number in range(1, pictures + 1)]
    for name in names:
        Image.fromarray(rgb_from_ids(ids)).save(folder / name)
    annotations = [{"image_id": i, "file_name": n, "segments_info": segments} for i, n in enumerate(names, 1)]
    (root / "annotations").mkdir()
    (root / "annotations/panoptic_val2017.json").write_text(json.dumps({"images": [], "annotations": annotations}))
    labels = np.full((side, side), 255, dtype=np.uint8)
    labels[:8], labels[8:16, :10], labels[8:16, 10:] = 0, 79, 132
    return labels


def test_coco_semantic_pngs(prepare_coco: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = fake_coco(tmp_path / "coco")
    output = tmp_path / "elsewhere"
    arguments = ["--root", str(tmp_path / "coco"), "--output", str(output), "--splits", "val2017"]
    assert prepare_coco.main(arguments) == 0
    made = sorted((output / "panoptic_semseg_val2017").iterdir())
    assert [path.name for path in made] == [f"{number:012d}.png" for number in range(1, 7)]
    for path in made:
        assert np.array_equal(np.asarray(Image.open(path)), labels)
    assert not (tmp_path / "coco/panoptic_semseg_val2017").exists()
    assert "complete" in capsys.readouterr().out

    # A second start makes what is missing, or older than its source, and leaves the rest alone.
    os.unlink(made[0])
    os.utime(made[1], (1, 1))
    times = [path.stat().st_mtime_ns for path in made[2:]]
    assert prepare_coco.main(arguments) == 0
    assert all(np.array_equal(np.asarray(Image.open(path)), labels) for path in made)
    assert made[1].stat().st_mtime > 1
    assert [path.stat().st_mtime_ns for path in made[2:]] == times


def test_coco_broken_and_missing_files_are_named(
    prepare_coco: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_coco(tmp_path)
    (tmp_path / "panoptic_val2017/000000000002.png").unlink()
    (tmp_path / "panoptic_val2017/000000000004.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    path = tmp_path / "annotations/panoptic_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][4]["segments_info"] = [{"id": 5, "category_id": 12, "iscrowd": 0}]
    path.write_text(json.dumps(content))

    assert prepare_coco.main(["--root", str(tmp_path), "--splits", "val2017"]) == 1
    errors = sorted(capsys.readouterr().err.splitlines())
    assert len([line for line in errors if line.startswith("error: ")]) == 3
    assert any("000000000002.png' does not exist" in line for line in errors)
    assert any("cannot read picture" in line and "000000000004.png" in line for line in errors)
    assert any("000000000005.png': segment 5 has category_id 12" in line for line in errors)
    made = sorted(path.name for path in (tmp_path / "panoptic_semseg_val2017").iterdir())
    assert made == ["000000000001.png", "000000000003.png", "000000000006.png"]


def test_coco_absent_split_stops_before_anything_is_made(prepare_coco: ModuleType, tmp_path: Path) -> None:
    fake_coco(tmp_path)
    with pytest.raises(UserError, match=r"panoptic_train2017\.json' does not exist"):
        prepare_coco.main(["--root", str(tmp_path)])
    assert not (tmp_path / "panoptic_semseg_val2017").exists()


def test_coco_subset_against_a_loop_over_pixels(prepare_coco: ModuleType, shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "coco"
    arguments = ["--root", str(root), "--output", str(tmp_path), "--splits", "val2017", "--workers", "2"]
    assert prepare_coco.main(arguments) == 0
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    labels = {category["id"]: index for index, category in enumerate(COCO_CATEGORIES)}
    annotations = json.loads((root / "annotations/panoptic_val2017.json").read_text())["annotations"]
    assert len(list((tmp_path / "panoptic_semseg_val2017").iterdir())) == len(annotations) == 100
    for annotation in annotations[:3]:
        of_id = {s["id"]: labels[s["category_id"]] for s in annotation["segments_info"]}
        pixels = np.asarray(Image.open(root / "panoptic_val2017" / annotation["file_name"])).astype(int)
        made = np.asarray(Image.open(tmp_path / "panoptic_semseg_val2017" / annotation["file_name"]))
        expected = [of_id.get(r + 256 * g + 65536 * b, 255) for r, g, b in pixels.reshape(-1, 3)[::7]]
        assert made.reshape(-1)[::7].tolist() == expected


def heed_interrupts() -> None:
    """In a child: tests that a shell started in the background would hand on that interrupts are ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_stopped_half_way_and_started_again(repository: Path, prepare_coco: ModuleType, tmp_path: Path) -> None:
    if os.name == "nt":
        pytest.skip("signals of POSIX")
    fake_coco(tmp_path / "coco", pictures=300, side=400)
    script = repository / "datasets/prepare_coco_semantic_annos_from_panoptic_annos.py"
    arguments = ["--root", str(tmp_path / "coco"), "--splits", "val2017", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    output = tmp_path / "coco/panoptic_semseg_val2017"

    command = [sys.executable, str(script), *arguments]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts
    ) as process:
        while process.poll() is None and (not output.exists() or len(list(output.iterdir())) < 5):
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.decode().splitlines()[-1] == "interrupted"
    assert not list(output.glob("*.part"))
    finished = list(output.glob("*.png"))
    assert 0 < len(finished) < 300
    assert all(Image.open(path).load() for path in finished)

    # What a process that was killed outright may leave.
    (output / "000000000150.png.part").write_bytes(b"half")
    assert prepare_coco.main(arguments) == 0
    made = contents(output)
    assert len(made) == 300 and len(set(made.values())) == 1


# -------------------------------------------------------------------------------------------------- nuclei


def disc(x: int, y: int, radius: int, side: int = 40) -> np.ndarray:
    rows, columns = np.mgrid[:side, :side]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def fake_nuclei(root: Path, pictures: int = 3) -> list[np.ndarray]:
    """Input of prepare_nuclei; the masks of its nuclei, the same in each picture. The second lies on the first."""
    masks = [disc(15, 15, 10), disc(18, 15, 4), disc(33, 33, 5)]
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        images = [
            {"id": number, "file_name": f"{split}{number}.png", "height": 40, "width": 40} for number in range(pictures)
        ]
        annotations = []
        for image in images:
            Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8)).save(root / split / image["file_name"])
            for mask in masks:
                rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
                rle["counts"] = rle["counts"].decode()
                number = len(annotations) + 1
                annotations.append(
                    {"id": number, "image_id": image["id"], "category_id": 1, "iscrowd": 0, "segmentation": rle}
                )
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "nucleus"}]}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return masks


@pytest.mark.parametrize("how", ["--link", "--copy"])
def test_nuclei(how: str, prepare_nuclei: ModuleType, tmp_path: Path) -> None:
    masks = fake_nuclei(tmp_path / "raw")
    before = contents(tmp_path / "raw")
    output = tmp_path / "nuclei"
    arguments = ["--input", str(tmp_path / "raw"), "--output", str(output), how]
    assert prepare_nuclei.main(arguments) == 0
    assert contents(tmp_path / "raw") == before
    assert (output / "train").is_symlink() == (how == "--link")
    assert contents(output / "train") == contents(tmp_path / "raw/train")

    dicts = load_panoptic(
        str(output / "annotations/panoptic_val.json"),
        str(output / "val"),
        str(output / "panoptic_val"),
        str(output / "panoptic_semseg_val"),
        panoptic_metadata(read_classes("nuclei")),
    )
    assert [Path(d["file_name"]).name for d in dicts] == ["val0.png", "val1.png", "val2.png"]
    visible = [masks[0] & ~masks[1], masks[1], masks[2]]
    for dataset_dict in dicts:
        ids = ids_from_rgb(np.asarray(Image.open(dataset_dict["pan_seg_file_name"])))
        semantic = np.asarray(Image.open(dataset_dict["sem_seg_file_name"]))
        assert np.array_equal(semantic, np.where(np.any(masks, axis=0), 0, 1))
        nuclei = [s for s in dataset_dict["segments_info"] if s["isthing"]]
        (background,) = [s for s in dataset_dict["segments_info"] if not s["isthing"]]
        for segment, mask in zip(nuclei, visible, strict=True):
            assert segment["category_id"] == 0
            assert np.array_equal(ids == segment["id"], mask)
            assert segment["area"] == mask.sum()
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            assert segment["bbox"] == coco_mask.toBbox(rle).tolist()
        assert background["category_id"] == 1
        assert background["area"] == (semantic == 1).sum()

    made = contents(output)
    shutil.rmtree(output / "panoptic_train")
    assert prepare_nuclei.main(arguments) == 0
    assert contents(output) == made


def test_nuclei_broken_input_is_named(
    prepare_nuclei: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, output = tmp_path / "raw", tmp_path / "nuclei"
    arguments = ["--input", str(raw), "--output", str(output)]
    with pytest.raises(UserError, match=r"annotations/train\.json' does not exist: .*--input"):
        prepare_nuclei.main(arguments)
    fake_nuclei(raw)
    path = raw / "annotations/val.json"
    content = json.loads(path.read_text())

    content["annotations"][4]["segmentation"]["size"] = [40, 41]
    path.write_text(json.dumps(content))
    assert prepare_nuclei.main(arguments) == 1
    assert "annotation 5 of picture 'val1.png': its run-length encoding has size" in capsys.readouterr().err
    assert not (output / "annotations/panoptic_val.json").exists()
    assert (output / "annotations/panoptic_train.json").exists()

    content["annotations"][4]["category_id"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"val\.json': annotation 5 .*has category_id 3, .*2 classes"):
        prepare_nuclei.main(arguments)

    (raw / "train/train1.png").unlink()
    with pytest.raises(UserError, match=r"1 of the 3 pictures in '.*train\.json' are missing, .*'train1\.png'"):
        prepare_nuclei.main(arguments)


def test_nuclei_other_files_in_the_way_are_left_alone(prepare_nuclei: ModuleType, tmp_path: Path) -> None:
    fake_nuclei(tmp_path / "raw")
    (tmp_path / "nuclei/train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"nuclei/train' exists and is not '.*raw/train'"):
        prepare_nuclei.main(["--input", str(tmp_path / "raw"), "--output", str(tmp_path / "nuclei")])


def test_nuclei_in_place(prepare_nuclei: ModuleType, tmp_path: Path) -> None:
    fake_nuclei(tmp_path)
    assert prepare_nuclei.main(["--input", str(tmp_path), "--output", str(tmp_path), "--splits", "val"]) == 0
    assert not (tmp_path / "val").is_symlink()
    assert len(list((tmp_path / "panoptic_val").iterdir())) == 3


# --------------------------------------------------------------------------------------------- their parts


def test_panoptic_from_polygons_and_crowds() -> None:
    small, large = [[2, 2, 6, 2, 6, 6, 2, 6]], [[0, 0, 12, 0, 12, 8, 0, 8]]
    crowd = coco_mask.encode(np.asfortranarray(np.ones((10, 20), dtype=np.uint8)))
    annotations: list[dict[str, Any]] = [
        {"id": 1, "category_id": 3, "segmentation": small},
        {"id": 2, "category_id": 4, "segmentation": large},
        {"id": 3, "category_id": 4, "segmentation": crowd, "iscrowd": 1},
        {"id": 4, "category_id": 4, "segmentation": small},  # hidden: as large as the first, but drawn later
    ]
    ids, segments = panoptic_from_instances(annotations, 10, 20)
    assert [(s["id"], s["category_id"], s["iscrowd"], s["area"]) for s in segments] == [
        (2, 4, 0, 96 - 16),
        (3, 4, 1, 200 - 96),
        (4, 4, 0, 16),
    ]
    assert segments[2]["bbox"] == [2, 2, 4, 4]
    assert set(np.unique(ids)) == {2, 3, 4}

    ids, segments = panoptic_from_instances([], 10, 20)
    assert not ids.any() and segments == []
    ids, segments = panoptic_from_instances([], 10, 20, background=9)
    assert segments == [{"id": 1, "category_id": 9, "iscrowd": 0, "area": 200, "bbox": [0, 0, 20, 10]}]


def test_semantic_label_of_an_unknown_category() -> None:
    with pytest.raises(UserError, match="file 'a': segment 4 has category_id 8, which is not among the 1 classes"):
        semantic_from_panoptic(np.zeros((2, 2), dtype=np.uint32), [{"id": 4, "category_id": 8}], {1: 0}, "file 'a'")


def test_pictures_that_would_share_a_png(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": name, "height": 4, "width": 4} for i, name in enumerate(["a.jpg", "a.png"])]
    source = tmp_path / "instances.json"
    source.write_text(json.dumps({"images": images, "annotations": []}))
    with pytest.raises(UserError, match=r"two pictures would have the annotation file 'a\.png'"):
        instances_to_panoptic(source, read_classes("nuclei"), tmp_path / "p.json", tmp_path / "p", tmp_path / "s")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(UserError, match=r"cannot write '.*a\.png': no space left"):
        panoptic_files.write_whole(tmp_path / "a.png", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_defect_in_a_job_is_not_hidden() -> None:
    def defect() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        panoptic_files.run_jobs([defect], workers=2, description="")
