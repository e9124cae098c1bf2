"""Data loaders: checked data sets, a mapper and a sampler put together.

Both functions take a config (``build_train_loader(cfg)``) or plain keyword values, as a LazyConfig gives them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.samplers import RandomSubsetTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Sampler

from ..errors import UserError
from .checks import DatasetDicts, check_dataset
from .copy_paste import CopyPaste
from .mapper import build_mapper
from .sampling import RepeatRareClasses
from .stream import BatchStream, Mapper
from .workers import leaves_with_parent

__all__ = ["build_test_loader", "build_train_loader", "load_training_dicts"]

SamplerBuilder = Callable[[Sequence[dict[str, Any]]], Sampler[int]]


def load_training_dicts(
    names: str | Sequence[str],
    *,
    num_classes: int | None = None,
    filter_empty: bool = True,
    semantic_files: bool = False,
) -> DatasetDicts:
    """The checked dataset dicts of one or several data sets, one after the other.

    ``filter_empty`` leaves out pictures whose instance annotations are all crowd regions, or that have none. Data
    sets without instance annotations, panoptic ones for example, keep all their pictures. ``semantic_files``: their
    label maps, where they have any, are needed too.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError("no data set to train on: set DATASETS.TRAIN")
    dicts = [
        dataset_dict
        for name in names
        for dataset_dict in check_dataset(name, num_classes, semantic_files=semantic_files)
    ]
    if filter_empty and all("annotations" in dataset_dict for dataset_dict in dicts):
        dicts = filter_images_with_only_crowd_annotations(dicts)
    if not dicts:
        raise UserError(
            f"no picture of {', '.join(names)} has an object that is not a crowd region: check the annotations "
            f"({', '.join(str(MetadataCatalog.get(name).get('json_file')) for name in names)}), or set "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS to False"
        )
    return dicts


def _train_loader_from_config(cfg: CfgNode, mapper: Mapper | None = None) -> dict[str, Any]:
    mapper = build_mapper(cfg, True) if mapper is None else mapper
    dicts = load_training_dicts(
        cfg.DATASETS.TRAIN,
        num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        semantic_files=_reads_label_maps(mapper),
    )
    return {
        "dataset": dicts,
        "mapper": mapper,
        "sampler": _sampler_builder(cfg),
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "seed": cfg.SEED,
        "copy_paste_probability": cfg.INPUT.COPY_PASTE_PROBABILITY,
    }


def _reads_label_maps(mapper: Mapper) -> bool:
    """Whether the mapper reads label maps in training, as ``MaskFormerDatasetMapper`` says of itself."""
    return getattr(mapper, "label_map", False)


def _sampler_builder(cfg: CfgNode) -> SamplerBuilder:
    """What makes the sampler of ``DATALOADER.SAMPLER_TRAIN``."""
    loading = cfg.DATALOADER
    builders: dict[str, SamplerBuilder] = {
        "TrainingSampler": _shuffle,
        "RepeatFactorTrainingSampler": RepeatRareClasses(loading.REPEAT_THRESHOLD, loading.REPEAT_SQRT),
        "RandomSubsetTrainingSampler": lambda dicts: RandomSubsetTrainingSampler(
            len(dicts), loading.RANDOM_SUBSET_RATIO
        ),
    }
    if loading.SAMPLER_TRAIN not in builders:
        raise UserError(f"DATALOADER.SAMPLER_TRAIN is '{loading.SAMPLER_TRAIN}', expected {' or '.join(builders)}")
    return builders[loading.SAMPLER_TRAIN]


def _shuffle(dicts: Sequence[dict[str, Any]]) -> Sampler[int]:
    return TrainingSampler(len(dicts))


@configurable(from_config=_train_loader_from_config)
def build_train_loader(
    dataset: str | Sequence[str] | DatasetDicts,
    *,
    mapper: Mapper,
    total_batch_size: int,
    sampler: Sampler[int] | SamplerBuilder | None = None,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    seed: int | None = None,
    num_classes: int | None = None,
    filter_empty: bool = True,
    copy_paste_probability: float = 0.0,
) -> BatchStream:
    """Endless iterable of batches, each a list of samples (see ``MaskFormerDatasetMapper``).

    ``dataset`` is one or several names of data sets, which are checked against ``num_classes`` and filtered as
    ``load_training_dicts`` says, or dataset dicts. Label maps are looked for where the ``mapper`` reads them (its
    ``label_map`` is true). ``total_batch_size`` counts the pictures of all processes.
    With a ``seed`` >= 0 the samples repeat, whatever the number of workers; see ``BatchStream``. ``sampler`` may be
    what makes one of the dataset dicts, such as ``RepeatRareClasses``; None: a shuffle. ``copy_paste_probability`` is
    that of ``CopyPaste``.

    ``build_train_loader(cfg)``, or ``build_train_loader(cfg, mapper=...)``, reads all of this from a config.

    Raises ``UserError`` for what ``load_training_dicts`` does.
    """
    dicts = _as_dicts(
        dataset, num_classes=num_classes, filter_empty=filter_empty, semantic_files=_reads_label_maps(mapper)
    )
    if copy_paste_probability != 0:
        mapper = CopyPaste(mapper, dicts, probability=copy_paste_probability)
    return BatchStream(
        dicts,
        mapper=mapper,
        sampler=_shuffle if sampler is None else sampler,
        batch_size=_batch_size_of_a_rank(total_batch_size),
        group_by_shape=aspect_ratio_grouping,
        num_workers=num_workers,
        seed=None if seed is None or seed < 0 else seed,
    )


def _batch_size_of_a_rank(total: int) -> int:
    ranks = comm.get_world_size()
    if total < 1 or total % ranks:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {total}, expected a multiple of the number of processes, {ranks}: set it so"
        )
    return total // ranks


def _as_dicts(dataset: str | Sequence[str] | DatasetDicts, **checks: Any) -> DatasetDicts:
    items = [dataset] if isinstance(dataset, str) else dataset
    names = [item for item in items if isinstance(item, str)]
    if names or not items:
        return load_training_dicts(names, **checks)
    return [item for item in items if isinstance(item, dict)]


def _test_loader_from_config(cfg: CfgNode, dataset_name: str, mapper: Mapper | None = None) -> dict[str, Any]:
    return {
        "dataset": dataset_name,
        "mapper": build_mapper(cfg, False) if mapper is None else mapper,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
    }


@configurable(from_config=_test_loader_from_config)
def build_test_loader(
    dataset: str,
    *,
    mapper: Mapper,
    batch_size: int = 1,
    num_workers: int = 0,
    num_classes: int | None = None,
) -> DataLoader[dict[str, Any]]:
    """Loader of every picture of the data set named ``dataset`` once, shared out between the processes.

    ``build_test_loader(cfg, name)`` reads the other values from a config.

    Raises ``UserError`` for what ``check_dataset`` does.
    """
    loader = build_detection_test_loader(
        check_dataset(dataset, num_classes), mapper=mapper, batch_size=batch_size, num_workers=num_workers
    )
    loader.worker_init_fn = leaves_with_parent()
    return loader
