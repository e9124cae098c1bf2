"""The whole way on a tiny data set: train, evaluate, go on, evaluate the file, and run the demo on it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_dataset import TinyNames, tiny_dataset
from tiny_nuclei_model import RECIPE, one_thread

from mask2former.engine import evaluate_weights, load_recipe, train

OPTIONS = [
    *("DATASETS.TRAIN", "('tiny_panoptic',)", "DATASETS.TEST", "('tiny_panoptic',)"),
    *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "256"),
    *("MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", "0.3", "MODEL.MASK_FORMER.CLASS_WEIGHT", "2.0"),
    *("MODEL.MASK_FORMER.MASK_WEIGHT", "5.0", "MODEL.MASK_FORMER.DICE_WEIGHT", "5.0"),
    *("MODEL.MASK_FORMER.DROPOUT", "0.0", "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS", "2"),
    *("INPUT.DATASET_MAPPER_NAME", "coco_panoptic_lsj", "INPUT.IMAGE_SIZE", "64"),
    *("INPUT.MIN_SCALE", "1.0", "INPUT.MAX_SCALE", "1.0", "INPUT.RANDOM_FLIP", "none"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.002", "SOLVER.BACKBONE_MULTIPLIER", "1.0"),
    *("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
    *("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.WARMUP_ITERS", "10"),
    *("MODEL.BACKBONE.NAME", "TimmBackbone", "MODEL.TIMM.NAME", "resnet10t", "MODEL.TIMM.NORM", "BN"),
    *("DATALOADER.NUM_WORKERS", "0", "SEED", "3"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyNames]:
    pytest.importorskip("timm", reason="needs timm")
    with one_thread(), tiny_dataset(tmp_path_factory.mktemp("tiny")) as names:
        yield names


@pytest.mark.slow
def test_train_evaluate_resume_and_demo(data: TinyNames, tmp_path: Path, repository: Path) -> None:
    recipe_file, output = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe_file.write_text(RECIPE)
    output.mkdir()

    def recipe(steps: int, *options: str):
        return load_recipe(
            str(recipe_file), [*OPTIONS, "OUTPUT_DIR", str(output), "SOLVER.MAX_ITER", str(steps), *options]
        )

    first = train(recipe(60))
    assert set(first) == {"panoptic_seg", "bbox", "segm", "sem_seg"}
    second = train(recipe(120), resume=True)
    steps = [json.loads(line)["iteration"] for line in (output / "metrics.json").read_text().splitlines()]
    assert steps == sorted(steps)
    assert {59, 119} <= set(steps)
    # It has learned the four pictures: a model that has not gets a PQ of about 0.
    assert second["panoptic_seg"]["PQ"] > 30
    assert second["sem_seg"]["mIoU"] > 60

    weights = output / "model_final.pth"
    again = evaluate_weights(recipe(120, "MODEL.WEIGHTS", str(weights)))
    for task in ("panoptic_seg", "segm", "sem_seg"):
        np.testing.assert_equal(dict(again[task]), dict(second[task]))

    picture = sorted((Path(data_folder(data)) / "images").glob("*"))[0]
    results = tmp_path / "demo"
    command = [sys.executable, "-W", "ignore", str(repository / "demo" / "demo.py"), "--input", str(picture)]
    command += ["--output", str(results), "--config-file", str(recipe_file), "--weights", str(weights)]
    command += ["--confidence-threshold", "0.3", "--opts", *OPTIONS]
    subprocess.run(command, check=True, capture_output=True, text=True)
    document = json.loads((results / f"{picture.stem}.json").read_text())
    assert document["panoptic"]
    for kind in ("instances", "panoptic", "semantic"):
        with Image.open(results / f"{picture.stem}_{kind}.png") as drawing:
            assert drawing.size[0] >= 64


def data_folder(names: TinyNames) -> str:
    from detectron2.data import MetadataCatalog

    return str(Path(MetadataCatalog.get(names.panoptic).panoptic_json).parent)
