"""Pictures with rare classes come more often."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog
from tiny_dataset import TinyNames, tiny_dataset

from mask2former.config import get_default_config
from mask2former.data import build_train_loader
from mask2former.data.sampling import RepeatRareClasses
from mask2former.errors import UserError

RARE, COMMON = 0, 1


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[TinyNames]:
    with tiny_dataset(tmp_path / "tiny", num_images=3) as names:
        yield names


def dataset_dicts(key: str) -> list[dict[str, Any]]:
    """100 pictures, of which the first has a rare class."""
    return [{"file_name": str(i), key: [{"category_id": RARE if i == 0 else COMMON}]} for i in range(100)]


@pytest.mark.parametrize("key", ["annotations", "segments_info"])
@pytest.mark.parametrize(("sqrt", "factor"), [(True, 3.0), (False, 9.0)])
def test_repeat_factors(key: str, sqrt: bool, factor: float) -> None:
    """The class is in 1 % of the pictures, and the threshold is 9 %: sqrt(9) or 9 times as often."""
    sampler = RepeatRareClasses(0.09, sqrt=sqrt, seed=1)(dataset_dicts(key))
    drawn = Counter(index for index, _ in zip(sampler, range(1080), strict=False))
    assert drawn[0] == pytest.approx(1080 * factor / (99 + factor), rel=0.1)
    assert drawn[50] == pytest.approx(1080 / (99 + factor), abs=1)


def test_pictures_without_objects() -> None:
    with pytest.raises(UserError, match=r"repeat-factor sampling needs .* '7.png' has neither"):
        RepeatRareClasses(0.1)([{"file_name": "7.png", "sem_seg_file_name": "7.png"}])


def make_rare(name: str) -> tuple[str, int]:
    """The file of the first picture, and how often it should come: its class is nowhere else."""
    dicts = DatasetCatalog.get(name)
    for index, dataset_dict in enumerate(dicts):
        for segment in dataset_dict["segments_info"]:
            segment["category_id"] = 0 if index == 0 else 1
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, lambda: dicts)
    return dicts[0]["file_name"], len(dicts)


def test_panoptic_data_sets_by_the_key(tiny: TinyNames) -> None:
    """Rare is what less than all have: sqrt(3) as often, here; with threshold 0 as often as the others."""
    first, count = make_rare(tiny.panoptic)
    cfg = get_default_config()
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", (tiny.panoptic,), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "SOLVER.IMS_PER_BATCH", 1),
            *("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.NUM_WORKERS", 0, "SEED", 1),
        ]
    )

    def share(threshold: float) -> float:
        cfg.DATALOADER.REPEAT_THRESHOLD = threshold
        loader = build_train_loader(cfg, mapper=lambda dataset_dict: {**dataset_dict, "height": 1, "width": 1})
        drawn = [batch[0]["file_name"] for batch, _ in zip(loader, range(600), strict=False)]
        return drawn.count(first) / len(drawn)

    assert share(0.0) == pytest.approx(1 / count, abs=0.01)
    assert share(1.0) == pytest.approx(math.sqrt(3) / (math.sqrt(3) + 2 * math.sqrt(1.5)), abs=0.02)


def test_by_keyword_values(tiny: TinyNames) -> None:
    """As a LazyConfig has them."""
    first, _ = make_rare(tiny.panoptic)
    loader = build_train_loader(
        tiny.panoptic,
        mapper=lambda dataset_dict: {**dataset_dict, "height": 1, "width": 1},
        total_batch_size=1,
        sampler=RepeatRareClasses(0.7, sqrt=False, seed=1),
    )
    drawn = [batch[0]["file_name"] for batch, _ in zip(loader, range(600), strict=False)]
    assert drawn.count(first) / len(drawn) == pytest.approx(2.1 / (2.1 + 2 * 1.05), abs=0.04)
