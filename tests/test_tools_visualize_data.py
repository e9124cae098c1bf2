"""Samples drawn as the loader gives them."""

import re
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Instances, PolygonMasks
from PIL import Image
from scripts import Program, load_script, program
from tiny_dataset import TinyNames, tiny_dataset

FACTOR = 4  # pictures of 64 to 128 pixels are drawn four times as large
RECIPE = """\
VERSION: 2
MODEL: {{DEVICE: cpu, SEM_SEG_HEAD: {{NUM_CLASSES: 3}}}}
DATASETS: {{TRAIN: [tiny_panoptic], TEST: [tiny_panoptic]}}
INPUT:
  FORMAT: {format}
  DATASET_MAPPER_NAME: {mapper}
  IMAGE_SIZE: 128
  MIN_SCALE: 0.5
  MAX_SCALE: 0.5
  RANDOM_FLIP: none
  MIN_SIZE_TRAIN: [64]
  MIN_SIZE_TEST: 80
  SIZE_DIVISIBILITY: 96
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[TinyNames]:
    with tiny_dataset(tmp_path / "tiny", num_images=2) as names:
        yield names


@pytest.fixture
def visualize(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    return program(repository / "tools" / "visualize_data.py", monkeypatch, capsys)


def write_recipe(tmp_path: Path, mapper: str = "coco_panoptic_lsj", image_format: str = "RGB") -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(mapper=mapper, format=image_format))
    return path


def read(folder: Path, number: int) -> np.ndarray:
    return np.asarray(Image.open(next(folder.glob(f"{number:03d}_*.png")))).astype(int)


def test_training_samples(tiny: TinyNames, visualize: Program, tmp_path: Path) -> None:
    """Left the picture as it is fed, right its masks and the padding."""
    out = tmp_path / "drawn"
    options = ("--num", "3", "--output", str(out))
    code, printed = visualize("--config-file", str(write_recipe(tmp_path)), *options)
    assert code == 0, printed
    assert f"3 pictures in {out}" in printed  # of 2 that there are: the loader is endless
    assert re.search(r"64 x 64 -> 128 x 128  padding 75%  [12] disc, [12] square, 1 ground", printed)
    side = 128 * FACTOR
    drawn = read(out, 0)
    assert drawn.shape == (side, 2 * side, 3)
    name = next(out.glob("000_*.png")).stem.removeprefix("000_")
    original = next(d["file_name"] for d in DatasetCatalog.get(tiny.panoptic) if Path(d["file_name"]).stem == name)
    plain = cv2.resize(cv2.imread(original)[:, :, ::-1], (64 * FACTOR,) * 2, interpolation=cv2.INTER_CUBIC)
    fed, masks = drawn[:, :side], drawn[:, side:]
    inside = slice(0, 62 * FACTOR)  # the border is mixed with the padding
    assert np.abs(fed[inside, inside] - plain[inside, inside]).max() <= 1
    assert (fed[80 * FACTOR :, 80 * FACTOR :] == 128).all()
    assert (np.abs(masks[inside, inside] - plain[inside, inside]).max(axis=2) > 3).mean() > 0.9
    stripes = (masks[80 * FACTOR :, 80 * FACTOR :] == (255, 0, 200)).all(axis=2)
    assert 0.2 < stripes.mean() < 0.5  # without their edges, which are mixed too


def test_label_maps_and_channel_order(tiny: TinyNames, visualize: Program, tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    recipe = write_recipe(tmp_path, "mask_former_semantic", "BGR")
    code, printed = visualize("--config-file", str(recipe), "--num", "1", "--output", str(out))
    assert code == 0, printed
    assert "-> 96 x 96  padding 56%  1 disc, 1 square, 1 ground" in printed
    side = 96 * FACTOR
    drawn = read(out, 0)
    assert drawn.shape == (side, 3 * side, 3)
    ground = drawn[: 4 * FACTOR, : 60 * FACTOR].reshape(-1, 3)  # (90, 140, 80) and the noise
    assert np.median(ground, axis=0) == pytest.approx((90, 140, 80), abs=12)
    assert (drawn[70 * FACTOR :, 2 * side + 70 * FACTOR :] == (255, 0, 200)).all(axis=2).any()  # no label is painted


def test_test_samples(tiny: TinyNames, visualize: Program, tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    recipe = str(write_recipe(tmp_path))
    code, printed = visualize("--config-file", recipe, "--split", "test", "--output", str(out))
    assert code == 0, printed
    assert "64 x 64 -> 80 x 80" in printed and f"2 pictures in {out}" in printed
    assert read(out, 1).shape == (80 * FACTOR, 80 * FACTOR, 3)


def test_lazy_config(tiny: TinyNames, visualize: Program, repository: Path, tmp_path: Path) -> None:
    recipe = repository / "configs" / "lazy" / "coco" / "panoptic-segmentation" / "maskformer2_R50_bs16_50ep.py"
    options = {
        "model.sem_seg_head.num_classes": 3,
        "dataloader.train.dataset": tiny.panoptic,
        "dataloader.train.mapper.augmentations.image_size": 64,
        "train.device": "cpu",
    }
    drawn = tmp_path / "drawn"
    changes = [f"{key}={value}" for key, value in options.items()]
    code, printed = visualize("--config-file", str(recipe), "--num", "1", "--output", str(drawn), *changes)
    assert code == 0, printed
    assert "-> 64 x 64" in printed
    assert read(drawn, 0).shape == (64 * FACTOR, 2 * 64 * FACTOR, 3)


def test_a_seed_repeats_the_samples(tiny: TinyNames, visualize: Program, tmp_path: Path) -> None:
    options = ("--num", "2", "--seed", "3", "INPUT.MIN_SCALE", "0.1", "INPUT.MAX_SCALE", "2.0")
    for name in ("a", "b"):
        output = ("--output", str(tmp_path / name))
        assert visualize("--config-file", str(write_recipe(tmp_path)), *output, *options)[0] == 0
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("a", "b"))
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_masks_of_detectron2s_mapper(tiny: TinyNames, visualize: Program, tmp_path: Path) -> None:
    """A mapper name that is not known stands for it; its masks are polygons."""
    recipe = write_recipe(tmp_path, "other")
    options = ("DATASETS.TRAIN", f"('{tiny.instances}',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2")
    mask_format = ("MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT", "bitmask")
    out = tmp_path / "drawn"
    code, printed = visualize("--config-file", str(recipe), "--num", "1", "--output", str(out), *options, *mask_format)
    assert code == 0, printed
    assert "disc" in printed
    drawn = read(out, 0)
    half = drawn.shape[1] // 2
    assert 0.05 < (np.abs(drawn[:, :half] - drawn[:, half:]).max(axis=2) > 3).mean() < 0.9


def test_mistakes(tiny: TinyNames, visualize: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = str(write_recipe(tmp_path))

    def error(*options: str) -> str:
        code, printed = visualize("--config-file", recipe, *options)
        assert code == 1 and "Traceback" not in printed
        return printed.splitlines()[-1]

    assert "--num is 0, expected at least 1" in error("--num", "0")
    assert "no test set" in error("--split", "test", "--output", str(tmp_path), "DATASETS.TEST", "()")

    def no_window(*_: object) -> None:
        raise cv2.error("not built with windows")

    monkeypatch.setattr(cv2, "imshow", no_window)
    assert "give --output FOLDER" in error("--num", "1")


def test_a_key_stops_the_window(
    tiny: TinyNames, visualize: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = iter([ord(" "), ord("q")])
    shown: list[np.ndarray] = []
    monkeypatch.setattr(cv2, "imshow", lambda _, picture: shown.append(picture))
    monkeypatch.setattr(cv2, "waitKey", lambda: next(keys))
    assert visualize("--config-file", str(write_recipe(tmp_path)))[0] == 0
    assert len(shown) == 2


def test_polygons_become_masks(repository: Path) -> None:
    script = load_script(repository / "tools" / "visualize_data.py")
    polygon = np.array([2.0, 2.0, 6.0, 2.0, 6.0, 6.0, 2.0, 6.0])
    masks = script._as_tensor(Instances((8, 8), gt_masks=PolygonMasks([[polygon]])))
    expected = torch.zeros(1, 8, 8, dtype=torch.bool)
    expected[:, 2:6, 2:6] = True
    assert torch.equal(masks, expected)
