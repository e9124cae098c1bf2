"""Objects of another sample pasted on this one; INPUT.COPY_PASTE_PROBABILITY."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import BitMasks, Boxes, Instances
from tiny_dataset import TinyNames, tiny_dataset

from mask2former.config import get_default_config
from mask2former.data import build_mapper, build_train_loader
from mask2former.data.copy_paste import CopyPaste, paste
from mask2former.errors import UserError

Box = tuple[int, int, int, int]  # x0, y0, x1, y1


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[TinyNames]:
    with tiny_dataset(tmp_path / "tiny", num_images=3) as names:
        yield names


def sample(grey: int, boxes: dict[Box, int], height: int = 8, width: int = 10) -> dict[str, Any]:
    """A grey picture with a mask of a class in every box, and padding in its last two columns."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    padding = torch.zeros(height, width, dtype=torch.bool)
    padding[:, -2:] = True
    instances = Instances(
        (height, width),
        gt_classes=torch.tensor(list(boxes.values()), dtype=torch.int64),
        gt_masks=masks,
        gt_boxes=Boxes(torch.tensor(list(boxes), dtype=torch.float32).reshape(-1, 4)),
    )
    image = torch.full((3, height, width), grey, dtype=torch.uint8)
    return {"image": image, "padding_mask": padding, "instances": instances, "file_name": f"{grey}.png"}


def test_paste() -> None:
    """One object is hidden, one half hidden, one free; the pasted one lies on padding too."""
    below = sample(10, {(1, 1, 3, 3): 0, (4, 0, 8, 4): 1, (0, 6, 4, 8): 2})
    below["sem_seg"] = torch.full((8, 10), 5)
    above = sample(20, {(0, 0, 3, 4): 3, (6, 0, 9, 4): 4})
    kept = below["image"].clone(), below["instances"].gt_masks.clone(), below["sem_seg"].clone()
    result = paste(above["image"], above["instances"], below)

    instances = result["instances"]
    assert instances.gt_classes.tolist() == [1, 2, 3, 4]
    assert instances.gt_boxes.tensor.tolist() == [[4, 0, 6, 4], [0, 6, 4, 8], [0, 0, 3, 4], [6, 0, 9, 4]]
    assert instances.gt_boxes.tensor.equal(BitMasks(instances.gt_masks).get_bounding_boxes().tensor)
    assert int(instances.gt_masks.sum(dim=0).max()) == 1
    covered = above["instances"].gt_masks.any(dim=0)
    assert (result["image"][:, covered] == 20).all() and (result["image"][:, ~covered] == 10).all()
    assert result["padding_mask"][:4, 8].sum() == 0 and result["padding_mask"][4:, 8].all()
    assert result["sem_seg"][0, 0] == 3 and result["sem_seg"][0, 6] == 4 and (result["sem_seg"][~covered] == 5).all()
    assert result["file_name"] == "10.png"
    assert all(map(torch.equal, kept, (below["image"], below["instances"].gt_masks, below["sem_seg"])))


@pytest.mark.parametrize(("height", "width"), [(4, 20), (20, 4)])
def test_pictures_of_other_sizes(height: int, width: int) -> None:
    """Objects are cut at the sample's edge, or gone."""
    above = sample(20, {(0, 0, 3, 3): 3, (min(width, 12) - 2, min(height, 12) - 1, width, height): 4}, height, width)
    result = paste(above["image"], above["instances"], sample(10, {}))
    assert result["image"].shape == (3, 8, 10)
    assert result["instances"].gt_classes.tolist() == [3]
    assert (result["image"] == 20).sum() == 3 * 9


def test_nothing_to_paste() -> None:
    below = sample(10, {(1, 1, 3, 3): 0})
    result = paste(below["image"], sample(0, {})["instances"], below)
    assert torch.equal(result["image"], below["image"])
    assert torch.equal(result["instances"].gt_masks, below["instances"].gt_masks)


SAMPLES = {
    "below": sample(10, {(0, 0, 2, 2): 0}),
    "above": sample(20, {(x, 4, x + 1, 8): c for x, c in enumerate([1, 2, 1, 2, 1, 2])}),
}


def mapper(dataset_dict: dict[str, Any]) -> dict[str, Any]:
    return SAMPLES[dataset_dict["file_name"]]


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_share_of_samples_and_of_objects(probability: float) -> None:
    np.random.seed(0)
    copy_paste = CopyPaste(mapper, [{"file_name": "above"}], probability=probability)
    counts = [len(copy_paste({"file_name": "below"})["instances"]) - 1 for _ in range(400)]
    assert sum(count > 0 for count in counts) / 400 == pytest.approx(probability * (1 - 2**-6), abs=0.06)
    assert np.mean(counts) == pytest.approx(3 * probability, abs=0.25)


def test_stuff_is_not_pasted() -> None:
    np.random.seed(0)
    segments = [{"category_id": 1, "isthing": True}, {"category_id": 2, "isthing": False}]
    copy_paste = CopyPaste(mapper, [{"file_name": "above", "segments_info": segments}], probability=1.0)
    classes = {c for _ in range(50) for c in copy_paste({"file_name": "below"})["instances"].gt_classes.tolist()}
    assert classes == {0, 1}


def config(tiny: TinyNames, mapper_name: str, probability: float) -> CfgNode:
    cfg = get_default_config()
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", (tiny.panoptic,), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "SEED", 1),
            *("INPUT.DATASET_MAPPER_NAME", mapper_name, "INPUT.IMAGE_SIZE", 64, "INPUT.MIN_SIZE_TRAIN", (64,)),
            *("INPUT.COPY_PASTE_PROBABILITY", probability, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0),
        ]
    )
    return cfg


def things(cfg: CfgNode, count: int) -> int:
    batches = (batch for batch, _ in zip(build_train_loader(cfg), range(count), strict=False))
    return sum(int((s["instances"].gt_classes < 2).sum()) for batch in batches for s in batch)


@pytest.mark.parametrize("mapper_name", ["coco_panoptic_lsj", "mask_former_panoptic"])
def test_the_key(tiny: TinyNames, mapper_name: str) -> None:
    """Real samples, whose masks stay apart from one another; without the key there are fewer objects."""
    cfg = config(tiny, mapper_name, 1.0)
    cfg.INPUT.SIZE_DIVISIBILITY = 80
    for batch, _ in zip(build_train_loader(cfg), range(5), strict=False):
        for found in batch:
            masks = found["instances"].gt_masks
            assert masks.any(dim=(1, 2)).all() and int(masks.sum(dim=0).max()) == 1
            assert not (masks.any(dim=0) & found["padding_mask"]).any()
            if "sem_seg" in found:
                for mask, class_id in zip(masks, found["instances"].gt_classes, strict=True):
                    assert (found["sem_seg"][mask] == class_id).all()
    assert things(cfg, 10) > things(config(tiny, mapper_name, 0.0), 10)


@pytest.mark.parametrize(
    ("mapper_name", "probability", "message"),
    [
        ("mask_former_semantic", 0.5, "is 0.5, but only instance and panoptic mappers"),
        ("coco_panoptic_lsj", 1.5, "is 1.5, expected 0 to 1"),
        ("coco_panoptic_lsj", -1.0, "is -1.0, expected 0 to 1"),
    ],
)
def test_mistakes(tiny: TinyNames, mapper_name: str, probability: float, message: str) -> None:
    with pytest.raises(UserError, match=f"INPUT.COPY_PASTE_PROBABILITY {message}"):
        build_train_loader(config(tiny, mapper_name, probability))


def test_keyword_values(tiny: TinyNames) -> None:
    """As a LazyConfig has them."""
    single: Callable[[dict[str, Any]], dict[str, Any]] = build_mapper(config(tiny, "coco_panoptic_lsj", 0.0))
    loader = build_train_loader(tiny.panoptic, mapper=single, total_batch_size=1, copy_paste_probability=1.0, seed=1)
    largest = max(len(d["segments_info"]) for d in DatasetCatalog.get(tiny.panoptic))
    counts = [len(batch[0]["instances"]) for batch, _ in zip(loader, range(20), strict=False)]
    assert max(counts) > largest
