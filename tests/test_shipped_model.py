"""The weights in demo/nuclei are those whose figures are recorded beside them."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from safetensors.torch import load_file

from mask2former.data import load_dataset
from mask2former.errors import UserError
from mask2former.evaluation import InstanceSegEvaluator
from mask2former.modeling.precision import require_bfloat16
from mask2former.predictor import Predictor


@pytest.fixture
def pictures(repository: Path) -> str:
    folder = repository / "demo" / "nuclei"
    name = "nuclei_shipped_test"
    register_coco_instances(name, {}, str(folder / "annotations" / "instances.json"), str(folder / "images"))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.slow
@pytest.mark.parametrize("bfloat16", [False, True])
def test_average_precision_on_the_six_pictures_is_the_recorded_one(
    repository: Path, pictures: str, bfloat16: bool
) -> None:
    if bfloat16:
        try:
            require_bfloat16(torch.device("cpu"))
        except UserError as error:
            pytest.skip(str(error))
    folder = repository / "demo" / "nuclei"
    recorded = json.loads((folder / "metrics.json").read_text())["six"]
    predictor = Predictor(
        repository / "configs" / "quick" / "nuclei.yaml",
        folder / "model.safetensors",
        options=["MODEL.MASK_FORMER.TEST.BFLOAT16", str(bfloat16)],
    )
    dataset = load_dataset(pictures)
    assert len(dataset) == 6
    evaluator = InstanceSegEvaluator(pictures)
    evaluator.reset()
    for picture in dataset:
        evaluator.process([picture], [predictor(picture["file_name"])])
    found = evaluator.evaluate()["segm"]
    for metric in ("AP", "AP50", "AP75"):
        assert found[metric] == pytest.approx(recorded[metric], abs=1.5 if bfloat16 else 0.3)


def test_weights_are_small_and_half_precision(repository: Path) -> None:
    path = repository / "demo" / "nuclei" / "model.safetensors"
    assert path.stat().st_size <= 12 * 2**20
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
