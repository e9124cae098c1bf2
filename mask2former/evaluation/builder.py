"""Which evaluators a data set gets."""

from collections.abc import Callable
from dataclasses import dataclass

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from ..errors import UserError
from .cityscapes import CityscapesInstanceSegEvaluator, CityscapesSemanticEvaluator
from .instance import InstanceSegEvaluator
from .lvis import LVISInstanceEvaluator
from .panoptic import PanopticEvaluator
from .semantic import SemanticEvaluator

__all__ = ["build_evaluator", "can_evaluate", "takes_labels"]


@dataclass(frozen=True)
class Task:
    """One kind of model output: what evaluates it, and what that reads from the data set's metadata."""

    key: str  # of the output: MODEL.MASK_FORMER.TEST.<key>_ON
    evaluator: Callable[[str, str | None], DatasetEvaluator]
    needs: tuple[str, ...]


SEMANTIC = Task("SEMANTIC", SemanticEvaluator, ("stuff_classes", "ignore_label"))
INSTANCE = Task("INSTANCE", InstanceSegEvaluator, ())
# A panoptic data set's dicts hold no instances that could be converted: they are in a file of their own.
INSTANCE_OF_PANOPTIC = Task("INSTANCE", InstanceSegEvaluator, ("json_file", "thing_dataset_id_to_contiguous_id"))
PANOPTIC = Task(
    "PANOPTIC",
    PanopticEvaluator,
    (
        "panoptic_json",
        "panoptic_root",
        "thing_dataset_id_to_contiguous_id",
        "stuff_dataset_id_to_contiguous_id",
    ),
)
INSTANCE_OF_LVIS = Task("INSTANCE", LVISInstanceEvaluator, ("json_file",))
# Cityscapes' tools judge files in a temporary folder of their own; nothing is kept.
INSTANCE_OF_CITYSCAPES = Task(
    "INSTANCE", lambda name, _: CityscapesInstanceSegEvaluator(name), ("thing_classes", "gt_dir")
)
SEMANTIC_OF_CITYSCAPES = Task("SEMANTIC", lambda name, _: CityscapesSemanticEvaluator(name), ("gt_dir",))

# The metadata's evaluator_type -> the tasks that the data set has ground truth for.
EVALUATOR_TYPES: dict[str, tuple[Task, ...]] = {
    "sem_seg": (SEMANTIC,),
    "coco": (INSTANCE,),
    "lvis": (INSTANCE_OF_LVIS,),
    "coco_panoptic_seg": (PANOPTIC, INSTANCE_OF_PANOPTIC, SEMANTIC),
    "ade20k_panoptic_seg": (SEMANTIC, PANOPTIC, INSTANCE_OF_PANOPTIC),
    "mapillary_vistas_panoptic_seg": (PANOPTIC, INSTANCE_OF_PANOPTIC, SEMANTIC),
    "cityscapes_instance": (INSTANCE_OF_CITYSCAPES,),
    "cityscapes_sem_seg": (SEMANTIC_OF_CITYSCAPES,),
    "cityscapes_panoptic_seg": (PANOPTIC, SEMANTIC_OF_CITYSCAPES, INSTANCE_OF_CITYSCAPES),
}


# Those that read the classes of pixels as well as their scores, or nothing of the two.
TAKE_LABELS = (
    CityscapesInstanceSegEvaluator,
    CityscapesSemanticEvaluator,
    InstanceSegEvaluator,
    LVISInstanceEvaluator,
    PanopticEvaluator,
    SemanticEvaluator,
)


def takes_labels(evaluator: DatasetEvaluator) -> bool:
    """Whether an evaluator does with classes of pixels in place of their scores; of the user's own no one knows."""
    if isinstance(evaluator, DatasetEvaluators):
        return all(takes_labels(part) for part in evaluator._evaluators)
    return type(evaluator) in TAKE_LABELS


def can_evaluate(dataset_name: str, output: str) -> bool:
    """Whether a data set has ground truth for a kind of output: "SEMANTIC", "PANOPTIC" or "INSTANCE".

    True too where its ``evaluator_type`` is not known, of which :func:`build_evaluator` says more.
    """
    tasks = EVALUATOR_TYPES.get(MetadataCatalog.get(dataset_name).get("evaluator_type"))
    return tasks is None or any(task.key == output for task in tasks)


def build_evaluator(
    dataset_name: str,
    output_dir: str | None,
    *,
    semantic_on: bool,
    panoptic_on: bool,
    instance_on: bool,
) -> DatasetEvaluator:
    """The evaluator for what a model gives and a registered data set has ground truth for.

    Args:
        dataset_name: chooses by its metadata's ``evaluator_type``.
        output_dir: gets the predictions in COCO's formats; None: not kept.
        semantic_on: the model gives ``sem_seg``.
        panoptic_on: the model gives ``panoptic_seg``.
        instance_on: the model gives ``instances``.

    Returns:
        One evaluator, or Detectron2's ``DatasetEvaluators`` of several. ``evaluate()`` returns
        ``{"panoptic_seg" | "segm" | "bbox" | "sem_seg": {metric: percent}}``.

    Raises:
        UserError: the data set is not registered, its ``evaluator_type`` is not known, none of the
            model's outputs can be evaluated on it, or its metadata or files don't fit.
    """
    if dataset_name not in DatasetCatalog.list():
        raise UserError(f"data set '{dataset_name}' is not registered: check DATASETS.TEST")
    metadata = MetadataCatalog.get(dataset_name)
    on = {"SEMANTIC": semantic_on, "PANOPTIC": panoptic_on, "INSTANCE": instance_on}
    tasks = _choose_tasks(dataset_name, metadata, {key for key in on if on[key]})
    for task in tasks:
        _check_metadata(dataset_name, metadata, task)
    evaluators = [task.evaluator(dataset_name, output_dir) for task in tasks]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _choose_tasks(dataset_name: str, metadata: Metadata, outputs: set[str]) -> list[Task]:
    """The tasks of the data set's ``evaluator_type`` that are in the model's ``outputs``."""
    evaluator_type = metadata.get("evaluator_type")
    found = f"data set '{dataset_name}' has evaluator_type {evaluator_type!r} (known: {', '.join(EVALUATOR_TYPES)})"
    if evaluator_type not in EVALUATOR_TYPES:
        raise UserError(f"{found}: set it in the data set's metadata to one that is known")
    possible = EVALUATOR_TYPES[evaluator_type]
    tasks = [task for task in possible if task.key in outputs]
    if not tasks:
        switches = " or ".join(f"MODEL.MASK_FORMER.TEST.{task.key}_ON" for task in possible)
        raise UserError(f"{found}, and the model gives no output that it evaluates: set {switches} to True")
    return tasks


def _check_metadata(dataset_name: str, metadata: Metadata, task: Task) -> None:
    missing = [key for key in task.needs if metadata.get(key) is None]
    if missing:
        raise UserError(
            f"the metadata of data set '{dataset_name}' lacks {', '.join(missing)}: set it, "
            f"or set MODEL.MASK_FORMER.TEST.{task.key}_ON to False"
        )
