"""What a run is made of, named by a YAML file or by a LazyConfig."""

import copy
import difflib
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.utils.registry import locate
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..config import get_default_config
from ..data import build_test_loader, build_train_loader
from ..data.own import register_rows
from ..errors import UserError
from ..evaluation import build_evaluator, can_evaluate
from ..modeling import SemanticSegmentorWithTTA
from .batch_scaling import scale_lazy_to_batch, scale_to_batch
from .optimizer import build_optimizer
from .own_data import DataPaths, use_own_data
from .setup import available_device
from .yaml_lists import TAG, construct_list

__all__ = ["Recipe", "load_config", "load_recipe"]

Batch = list[dict[str, Any]]

yaml.SafeLoader.add_constructor(TAG, construct_list)

# Where results with test-time augmentation go in the output folder, and the outputs that they have.
TTA_FOLDER = "inference_TTA"
SEMANTIC_ALONE = {"semantic_on": True, "panoptic_on": False, "instance_on": False}


@dataclass
class TestSet:
    """A data set to evaluate on: its name, its pictures and what judges the results."""

    name: str
    build_loader: Callable[[], Iterable[Batch]]
    build_evaluator: Callable[[], DatasetEvaluator]


@dataclass
class AugmentedTest:
    """Evaluation with test-time augmentation: what puts it around a model, and what judges the semantic results."""

    wrap_model: Callable[[nn.Module], nn.Module]
    test_sets: list[TestSet]


@dataclass
class Recipe:
    """The parts of a run, each built when it is asked for, and the numbers of its loop.

    Attributes:
        config: the CfgNode or DictConfig that all of it comes from.
        output_dir: where checkpoints, logs and results go.
        device: where the model runs.
        weights: what training or evaluation starts from: a file, an address, or "" for none.
        max_iter: training steps.
        amp: automatic mixed precision, on CUDA devices.
        eval_period, checkpoint_period, log_period: in steps; an eval_period of 0 evaluates at the end alone.
        max_checkpoints: how many checkpoints are kept; None: all.
        expected_results: rows of Detectron2's ``TEST.EXPECTED_RESULTS``.
        build_model: the model, on its device.
        build_optimizer: from the model; build_scheduler: from the optimizer; build_train_loader: endless batches.
        test_sets: what is evaluated.
        augmented_test: what is evaluated besides by ``--eval-only``, with test-time augmentation; None: nothing.
        best_metric: the weights that are best by it are kept, for example "segm/AP"; "": they are not.
        patience: evaluations that are no better than the best, after which the run ends; 0: it goes on.
        ema_decay: of the moving average of the weights, which is then what is evaluated; 0: no average.
        accumulation_steps: parts of each process's batch that go through the model one after the other.
        seed: of all random numbers of the steps; less than 0: a random one.
        wandb_project: project of Weights & Biases that gets the run's figures; "": none.
    """

    config: CfgNode | DictConfig
    output_dir: str
    device: str
    weights: str
    max_iter: int
    amp: bool
    eval_period: int
    checkpoint_period: int
    log_period: int
    max_checkpoints: int | None
    expected_results: Any
    build_model: Callable[[], nn.Module]
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    build_scheduler: Callable[[torch.optim.Optimizer], Any]
    build_train_loader: Callable[[], Iterable[Batch]]
    test_sets: list[TestSet]
    augmented_test: AugmentedTest | None = None
    best_metric: str = ""
    patience: int = 0
    ema_decay: float = 0.0
    accumulation_steps: int = 1
    seed: int = -1
    wandb_project: str = ""


def load_config(path: str, overrides: Sequence[str] = (), data: DataPaths | None = None) -> CfgNode | DictConfig:
    """Load a YAML file over Detectron2's and this package's defaults, or a LazyConfig file (``.py``).

    The user's own data sets that the file describes (``DATASETS.OWN``) are registered.

    Args:
        overrides: ``KEY VALUE`` pairs, or ``key=value`` for a LazyConfig.
        data: the user's own data, which a YAML file's data sets, classes, mapper and outputs are set to.

    Raises:
        UserError: if the file is missing or broken, a key or a value's type is unknown, or the data are broken.
    """
    if not os.path.isfile(path):
        raise UserError(f"config file {path or '(none)'} does not exist: give one with --config-file")
    if not path.endswith(".py"):
        return _load_yaml(path, overrides, data)
    if data is not None:
        raise UserError(f"{path} is a LazyConfig, but --train-data and --val-data need a YAML recipe: give one")
    return _load_lazy(path, overrides)


def load_recipe(path: str, overrides: Sequence[str] = (), data: DataPaths | None = None) -> Recipe:
    """The recipe in a config file, with its numbers scaled to the batch size if it asks for that.

    See :func:`load_config` and :func:`scale_to_batch`. Where the number of processes counts, they have to have started.
    """
    config = load_config(path, overrides, data)
    if isinstance(config, CfgNode):
        return _from_yaml(scale_to_batch(config))
    scale_lazy_to_batch(config)
    return _from_lazy(config)


def _load_yaml(path: str, overrides: Sequence[str], data: DataPaths | None) -> CfgNode:
    cfg = get_default_config()
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
        cfg.merge_from_list(list(overrides))
    except (KeyError, AssertionError, OSError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(_explain(cfg, path, overrides, error)) from error
    if data is not None:
        use_own_data(cfg, data)
        cfg.merge_from_list(list(overrides))  # these have the last word
    register_rows(cfg.DATASETS.OWN)
    cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
    cfg.freeze()
    return cfg


def _explain(cfg: CfgNode, path: str, overrides: Sequence[str], error: Exception) -> str:
    message = _one_line(error)
    unknown = re.search(r"[Nn]on-existent (?:config )?key: (\S+)", message)
    if unknown:
        return _unknown_key(unknown[1], path, _keys(cfg))
    if len(overrides) % 2:
        return f"options must be KEY VALUE pairs, but are: {' '.join(overrides)}"
    return f"config {path} with options {list(overrides)} can't be read: {message}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).strip("\"'")


def _unknown_key(key: str, path: str, known: Iterable[str]) -> str:
    similar = difflib.get_close_matches(key, list(known), n=3)
    hint = f": did you mean {' or '.join(similar)}?" if similar else ""
    return f"unknown config key {key} in {path} or in the options{hint}"


def _keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys, and of the arguments that a LazyConfig's callables have besides."""
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")
    target = config.get("_target_")
    if target is not None:
        target = locate(target) if isinstance(target, str) else target  # LazyCall keeps a dataclass by its name
        yield from (prefix + argument for argument in inspect.signature(target).parameters)


def _build_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
    try:
        return build_lr_scheduler(cfg, optimizer)
    except ValueError as error:  # an unknown name, or a step at the very end
        solver = cfg.SOLVER
        raise UserError(
            f"the schedule of SOLVER.LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME}, MAX_ITER {solver.MAX_ITER} and "
            f"STEPS {tuple(solver.STEPS)} can't be made: {_one_line(error)}"
        ) from error


def _from_yaml(cfg: CfgNode) -> Recipe:
    test = cfg.MODEL.MASK_FORMER.TEST

    def test_sets(folder: str, outputs: dict[str, bool]) -> list[TestSet]:
        output_dir = os.path.join(cfg.OUTPUT_DIR, folder)
        return [
            TestSet(
                name,
                functools.partial(build_test_loader, cfg, name),
                functools.partial(build_evaluator, name, output_dir, **outputs),
            )
            for name in cfg.DATASETS.TEST
        ]

    augmented_test = None
    if cfg.TEST.AUG.ENABLED:
        _check_semantic("TEST.AUG.ENABLED", "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", test.SEMANTIC_ON, cfg.DATASETS.TEST)
        augmented_test = AugmentedTest(
            lambda model: SemanticSegmentorWithTTA(cfg, model), test_sets(TTA_FOLDER, SEMANTIC_ALONE)
        )
    return Recipe(
        config=cfg,
        output_dir=cfg.OUTPUT_DIR,
        device=cfg.MODEL.DEVICE,
        weights=cfg.MODEL.WEIGHTS,
        max_iter=cfg.SOLVER.MAX_ITER,
        amp=cfg.SOLVER.AMP.ENABLED,
        eval_period=cfg.TEST.EVAL_PERIOD,
        checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
        log_period=20,
        max_checkpoints=cfg.SOLVER.CHECKPOINTS_TO_KEEP or None,
        expected_results=cfg.TEST.EXPECTED_RESULTS,
        build_model=lambda: build_model(cfg),
        build_optimizer=lambda model: build_optimizer(cfg, model),
        build_scheduler=lambda optimizer: _build_scheduler(cfg, optimizer),
        build_train_loader=lambda: build_train_loader(cfg),
        test_sets=test_sets(
            "inference",
            {"semantic_on": test.SEMANTIC_ON, "panoptic_on": test.PANOPTIC_ON, "instance_on": test.INSTANCE_ON},
        ),
        augmented_test=augmented_test,
        best_metric=cfg.TEST.BEST_METRIC,
        patience=cfg.SOLVER.EARLY_STOPPING_PATIENCE,
        ema_decay=cfg.SOLVER.EMA_DECAY,
        accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
        seed=cfg.SEED,
        wandb_project=cfg.WANDB_PROJECT,
    )


def _check_semantic(wish: str, switch: str, semantic_on: bool, dataset_names: Sequence[str]) -> None:
    """Say before anything runs that test-time augmentation, of semantic results alone, has nothing to evaluate."""
    problem = None if semantic_on else f"{switch} is False: set it to True"
    for name in dataset_names:
        if not can_evaluate(name, "SEMANTIC"):
            problem = f"data set '{name}' has no semantic ground truth: take it out of the test sets"
    if problem:
        raise UserError(
            f"{wish} evaluates the mean of augmented semantic results, but {problem}, or leave out test-time "
            "augmentation"
        )


def _load_lazy(path: str, overrides: Sequence[str]) -> DictConfig:
    assignments = _as_assignments(overrides)
    try:
        cfg = LazyConfig.load(path)
        _check_lazy_keys(cfg, path, assignments)
        LazyConfig.apply_overrides(cfg, assignments)
        device = cfg.train.device
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, SyntaxError, ImportError, KeyError, ValueError) as error:
        raise UserError(f"config {path} with options {list(overrides)} can't be read: {_one_line(error)}") from error
    cfg.train.device = available_device(device)
    return cfg


def _as_assignments(overrides: Sequence[str]) -> list[str]:
    if all("=" in override for override in overrides):
        return list(overrides)
    if len(overrides) % 2:
        raise UserError(f"options must be KEY VALUE pairs, or KEY=VALUE each, but are: {' '.join(overrides)}")
    return [f"{key}={value}" for key, value in zip(overrides[::2], overrides[1::2], strict=True)]


def _check_lazy_keys(cfg: DictConfig, path: str, assignments: Sequence[str]) -> None:
    content: Any = OmegaConf.to_container(cfg, resolve=False)
    known = set(_keys(content))
    for assignment in assignments:
        key = assignment.partition("=")[0].lstrip("+")
        if key not in known and OmegaConf.select(cfg, key) is None:  # items of lists are found by select
            raise UserError(_unknown_key(key, path, known))


def _from_lazy(cfg: DictConfig) -> Recipe:
    train = cfg.train

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        cfg.optimizer.model = model
        return instantiate(cfg.optimizer)

    def scheduler_of(optimizer: torch.optim.Optimizer) -> Any:
        cfg.lr_scheduler.optimizer = optimizer
        return instantiate(cfg.lr_scheduler)

    def test_set(evaluator: DictConfig) -> TestSet:
        return TestSet(evaluator.dataset_name, lambda: instantiate(cfg.dataloader.test), lambda: instantiate(evaluator))

    def augmented_of(model: nn.Module) -> nn.Module:
        cfg.test_time_augmentation.model = model
        return instantiate(cfg.test_time_augmentation)

    test_sets = [test_set(cfg.dataloader.evaluator)] if "test" in cfg.dataloader else []
    augmented_test = None
    if test_sets and cfg.get("test_time_augmentation") is not None:
        augmented_test = AugmentedTest(augmented_of, [test_set(_semantic_evaluator(cfg))])
    return Recipe(
        config=cfg,
        output_dir=train.output_dir,
        device=train.device,
        weights=train.init_checkpoint,
        max_iter=train.max_iter,
        amp=train.amp.enabled,
        eval_period=train.eval_period,
        checkpoint_period=train.checkpointer.period,
        log_period=train.log_period,
        max_checkpoints=train.checkpointer.max_to_keep or None,
        expected_results=OmegaConf.to_object(train.expected_results),
        build_model=lambda: instantiate(cfg.model).to(train.device),
        build_optimizer=optimizer_of,
        build_scheduler=scheduler_of,
        build_train_loader=lambda: instantiate(cfg.dataloader.train),
        test_sets=test_sets,
        augmented_test=augmented_test,
        best_metric=train.get("best_metric", ""),
        patience=train.get("early_stopping_patience", 0),
        ema_decay=train.get("ema_decay", 0.0),
        accumulation_steps=train.get("accumulation_steps", 1),
        seed=train.get("seed", -1),
        wandb_project=train.get("wandb_project", ""),
    )


def _semantic_evaluator(cfg: DictConfig) -> DictConfig:
    """The evaluator of semantic results alone, which go to a folder of their own."""
    evaluator = copy.deepcopy(cfg.dataloader.evaluator)
    semantic_on = evaluator.get("semantic_on", True)
    _check_semantic("test_time_augmentation", "dataloader.evaluator.semantic_on", semantic_on, [evaluator.dataset_name])
    values = {"output_dir": os.path.join(cfg.train.output_dir, TTA_FOLDER), **SEMANTIC_ALONE}
    evaluator.update({key: value for key, value in values.items() if key in evaluator})
    return evaluator
