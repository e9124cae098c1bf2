"""Which evaluators a data set gets; all of them together, in one process and in two."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, inference_on_dataset
from perfect_outputs import make_instances, perfect_panoptic, perfect_semantic
from tiny_dataset import TinyNames, tiny_dataset
from torch import nn

from mask2former.data import build_test_loader
from mask2former.engine.parallel import share_statistics
from mask2former.errors import UserError
from mask2former.evaluation import (
    CityscapesInstanceSegEvaluator,
    CityscapesSemanticEvaluator,
    InstanceSegEvaluator,
    LVISInstanceEvaluator,
    PanopticEvaluator,
    SemanticEvaluator,
    build_evaluator,
)

ALL_ON = {"semantic_on": True, "panoptic_on": True, "instance_on": True}
ALL_OFF = dict.fromkeys(ALL_ON, False)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[TinyNames]:
    with tiny_dataset(tmp_path / "tiny") as names:
        yield names


def kinds(evaluator: DatasetEvaluator) -> list[type]:
    return [type(e) for e in (evaluator._evaluators if isinstance(evaluator, DatasetEvaluators) else [evaluator])]


# evaluator_type -> what semantic, panoptic and instance output is evaluated with; None: not at all.
EVALUATORS: dict[str, tuple[type | None, type | None, type | None]] = {
    "sem_seg": (SemanticEvaluator, None, None),
    "coco": (None, None, InstanceSegEvaluator),
    "lvis": (None, None, LVISInstanceEvaluator),
    "coco_panoptic_seg": (SemanticEvaluator, PanopticEvaluator, InstanceSegEvaluator),
    "ade20k_panoptic_seg": (SemanticEvaluator, PanopticEvaluator, InstanceSegEvaluator),
    "mapillary_vistas_panoptic_seg": (SemanticEvaluator, PanopticEvaluator, InstanceSegEvaluator),
    "cityscapes_instance": (None, None, CityscapesInstanceSegEvaluator),
    "cityscapes_sem_seg": (CityscapesSemanticEvaluator, None, None),
    "cityscapes_panoptic_seg": (CityscapesSemanticEvaluator, PanopticEvaluator, CityscapesInstanceSegEvaluator),
}


@pytest.mark.parametrize("evaluator_type", EVALUATORS)
@pytest.mark.parametrize("switches", itertools.product((False, True), repeat=3))
def test_evaluators_of_a_type(
    tiny: TinyNames, tmp_path: Path, evaluator_type: str, switches: tuple[bool, bool, bool]
) -> None:
    MetadataCatalog.get(tiny.panoptic).__dict__.update(evaluator_type=evaluator_type, gt_dir=str(tmp_path))
    on = dict(zip(("semantic_on", "panoptic_on", "instance_on"), switches, strict=True))
    expected = {kind for kind, switch in zip(EVALUATORS[evaluator_type], switches, strict=True) if switch and kind}
    if expected:
        built = kinds(build_evaluator(tiny.panoptic, str(tmp_path), **on))
        assert set(built) == expected and len(built) == len(expected)
    else:
        with pytest.raises(UserError, match="the model gives no output that it evaluates: set MODEL.MASK_FORMER.TEST"):
            build_evaluator(tiny.panoptic, str(tmp_path), **on)


def test_data_sets_that_do_not_fit(tiny: TinyNames) -> None:
    known = r"\(known: sem_seg, coco, .*cityscapes_panoptic_seg\)"
    with pytest.raises(UserError, match=r"'nowhere' is not registered: check DATASETS\.TEST"):
        build_evaluator("nowhere", None, **ALL_ON)
    with pytest.raises(UserError, match=rf"'tiny_instances' has evaluator_type 'coco' {known}.*INSTANCE_ON to True"):
        build_evaluator(tiny.instances, None, **ALL_ON | {"instance_on": False})
    MetadataCatalog.get(tiny.instances).__dict__["evaluator_type"] = "moon"
    with pytest.raises(UserError, match=rf"'tiny_instances' has evaluator_type 'moon' {known}"):
        build_evaluator(tiny.instances, None, **ALL_ON)
    del MetadataCatalog.get(tiny.instances).__dict__["evaluator_type"]
    with pytest.raises(UserError, match=rf"'tiny_instances' has evaluator_type None {known}"):
        build_evaluator(tiny.instances, None, **ALL_ON)
    for key, switch in (("json_file", "INSTANCE"), ("panoptic_root", "PANOPTIC"), ("stuff_classes", "SEMANTIC")):
        metadata = MetadataCatalog.get(tiny.panoptic).__dict__
        value = metadata.pop(key)
        with pytest.raises(UserError, match=rf"'tiny_panoptic' lacks {key}: .*{switch}_ON to False"):
            build_evaluator(tiny.panoptic, None, **ALL_ON)
        metadata[key] = value


def outputs_for(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Right everywhere but for one picture whose panoptic and semantic output is empty and one without instances."""
    outputs = []
    for index, record in enumerate(records):
        segment_ids, segments = perfect_panoptic(record)
        things = [s for s in segments if s["isthing"] and index != 2]
        masks = torch.stack([segment_ids == s["id"] for s in things]) if things else torch.zeros(0, 64, 64).bool()
        outputs.append(
            {
                "panoptic_seg": (segment_ids, segments) if index else (segment_ids * 0, []),
                "instances": make_instances(masks, [s["category_id"] for s in things], [0.9] * len(things)),
                "sem_seg": perfect_semantic(record, 3) * float(index > 0),
            }
        )
    return outputs


class Outputs(nn.Module):
    """Gives the pictures of a data set their outputs, if its batch norm has the main process's statistics."""

    def __init__(self, name: str, rank: int) -> None:
        super().__init__()
        records = DatasetCatalog.get(name)
        self._outputs = {r["file_name"]: output for r, output in zip(records, outputs_for(records), strict=True)}
        self.norm = nn.BatchNorm2d(1)
        self.norm.running_mean.fill_(rank)

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        assert self.norm.running_mean.item() == 0
        return [self._outputs[record["file_name"]] for record in batch]


def evaluate(name: str, output_dir: str, rank: int) -> Any:
    model = Outputs(name, rank)
    share_statistics(model)
    loader = build_test_loader(name, mapper=lambda record: record)
    return inference_on_dataset(model, loader, build_evaluator(name, output_dir, **ALL_ON))


def work(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{root}/rendezvous", rank=rank, world_size=2)
    with tiny_dataset(root / str(rank), num_images=3) as names:
        torch.save(evaluate(names.panoptic, str(root), rank), root / f"results{rank}.pth")
    torch.distributed.barrier()  # gloo can end a process whose peers leave while it works
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """Of three pictures, which are not twice as many."""
    with tiny_dataset(tmp_path / "alone", num_images=3) as names:
        alone = evaluate(names.panoptic, str(tmp_path / "out"), 0)
    assert list(alone) == ["panoptic_seg", "bbox", "segm", "sem_seg"]
    assert 50 < alone["panoptic_seg"]["PQ"] < 90
    assert 50 < alone["segm"]["AP"] < 90
    assert 10 < alone["sem_seg"]["mIoU"] < 90
    torch.multiprocessing.spawn(work, args=(tmp_path,), nprocs=2)
    both = torch.load(tmp_path / "results0.pth", weights_only=False)
    assert both.keys() == alone.keys()
    for task in alone:
        assert both[task] == pytest.approx(alone[task], rel=0, abs=0, nan_ok=True)
    assert not torch.load(tmp_path / "results1.pth", weights_only=False)
    assert not math.isnan(both["segm"]["AP"])
