"""ADE20K (SceneParsing benchmark, 150 classes): semantic, instance and panoptic, under its published names.

The semantic ones are Detectron2's own, which lack the colours.
"""

import os

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .catalog import read_classes, register
from .panoptic import panoptic_metadata, register_panoptic_by_name

__all__ = ["register_ade20k"]

_HINT = "get ADE20K and arrange it as datasets/README.md shows"


def register_ade20k(root: str) -> None:
    """Register ``ade20k_{instance,panoptic}_{train,val}`` with files under ``root/ADEChallengeData2016``."""
    folder = os.path.join(root, "ADEChallengeData2016")
    for split, subfolder in (("train", "training"), ("val", "validation")):
        image_root = os.path.join(folder, "images", subfolder)
        instances_json = os.path.join(folder, f"ade20k_instance_{split}.json")
        _add_colors(f"ade20k_sem_seg_{split}")
        _register_instances(f"ade20k_instance_{split}", image_root, instances_json)
        register_panoptic_by_name(
            f"ade20k_panoptic_{split}",
            panoptic_metadata(read_classes("ade20k"), things_first=False),
            image_root,
            panoptic_root=os.path.join(folder, f"ade20k_panoptic_{split}"),
            panoptic_json=os.path.join(folder, f"ade20k_panoptic_{split}.json"),
            sem_seg_root=os.path.join(folder, "annotations_detectron2", subfolder),
            hint=_HINT,
            json_file=instances_json,
            evaluator_type="ade20k_panoptic_seg",
            ignore_label=255,
        )


def _add_colors(name: str) -> None:
    metadata = MetadataCatalog.get(name)
    if metadata.get("stuff_colors") is None:
        metadata.set(stuff_colors=[category["color"] for category in read_classes("ade20k")])


def _register_instances(name: str, image_root: str, instances_json: str) -> None:
    classes = read_classes("ade20k_instance")
    register(
        name,
        lambda: load_coco_json(instances_json, image_root, name),
        json_file=instances_json,
        image_root=image_root,
        evaluator_type="coco",
        thing_dataset_id_to_contiguous_id={category["id"]: index for index, category in enumerate(classes)},
        thing_classes=[category["name"] for category in classes],
    )
