"""The training loop and evaluation of a recipe."""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, hooks
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format, verify_results
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter
from torch import nn

from ..checkpoint import Checkpointer
from ..errors import UserError
from ..evaluation import takes_labels
from ..modeling import MaskFormer
from .accumulation import AccumulatingTrainer
from .best_checkpoint import BestCheckpointer, EarlyStopping, StoppedEarly
from .curves import CurvesWriter, cut_off_half_line
from .ema import WeightAverage
from .evaluating import EvalHook, MetricsWriter, MissedEvaluation, finish
from .finite import FiniteSteps
from .hooks import ConsoleWriter, LossHistory, LRScheduler, PeriodicCheckpointer, SaveOnInterrupt
from .parallel import for_all_ranks, share_statistics
from .recipe import Recipe, TestSet
from .repeatable import Repeatable
from .run_checkpointer import RunCheckpointer
from .wandb_writer import WandbWriter, check_wandb

__all__ = ["evaluate", "evaluate_augmented", "evaluate_weights", "train"]

Results = dict[str, Any]


def train(recipe: Recipe, *, resume: bool = False) -> Results:
    """Train, saving checkpoints and evaluating on the way and at the end.

    Args:
        recipe: see :class:`Recipe`.
        resume: go on from the last checkpoint in the output folder, if there is one.

    Returns:
        The last evaluation's results, on the main process.

    Raises:
        UserError: if the recipe's numbers don't go together.
    """
    _check_selection(recipe)
    check_wandb(recipe.wandb_project)
    model = recipe.build_model()
    optimizer = recipe.build_optimizer(model)
    scheduler = recipe.build_scheduler(optimizer)
    loader = recipe.build_train_loader()
    _log_size(model)
    trainer = _trainer(recipe, for_all_ranks(model), loader, optimizer)
    average = _average(recipe, model)
    checkpointer = RunCheckpointer(
        model, recipe.output_dir, optimizer=optimizer, trainer=trainer, **_averaged_state(average)
    )
    save_on_interrupt = SaveOnInterrupt(checkpointer)
    results: Results = {}

    def evaluate_now() -> Results:
        evaluated = average.model if average else model
        share_statistics(evaluated)
        checkpointer.gather()  # what ends an evaluation may come to one process alone, which saves then
        with save_on_interrupt.evaluating():
            results.update(evaluate(recipe, evaluated))
        return results

    evaluating: list[HookBase] = [EvalHook(recipe.eval_period, evaluate_now)] if recipe.test_sets else []
    evaluating += _selection(recipe, average.state.module if average else model, checkpointer)
    main = comm.is_main_process()
    resumed = resume and checkpointer.has_checkpoint()
    writer = None
    if main:
        writer = MetricsWriter(_writers(recipe, resumed), recipe.log_period, eval_period=recipe.eval_period)
    trainer.register_hooks(
        [
            Repeatable(recipe.seed, loader),
            FiniteSteps(model, checkpointer, loader),
            hooks.IterationTimer(),
            LossHistory(),
            average,
            LRScheduler(optimizer, scheduler),
            PeriodicCheckpointer(checkpointer, recipe.checkpoint_period, keep=recipe.max_checkpoints),
            save_on_interrupt,
            *evaluating,
            MissedEvaluation(evaluating, writer, eval_period=recipe.eval_period, output_dir=recipe.output_dir),
            writer,
        ]
    )
    checkpointer.resume_or_load(recipe.weights, resume=resume)
    start_iter = trainer.iter + 1 if resumed else 0
    try:
        with save_on_interrupt:
            if start_iter < recipe.max_iter:
                trainer.train(start_iter, recipe.max_iter)
            else:
                logging.getLogger(__name__).info("the run is complete: %d of %d steps", start_iter, recipe.max_iter)
                finish(trainer, start_iter)
    except StoppedEarly as end:
        logging.getLogger(__name__).info(end)
    _verify(recipe, results)
    return results


def evaluate(recipe: Recipe, model: nn.Module) -> Results:
    """Evaluate on all test sets, one after the other.

    Returns:
        ``{task: {metric: value}}``, by the name of the test set first where there are several.
    """
    return _evaluate_on(recipe.test_sets, model)


def evaluate_augmented(recipe: Recipe, model: nn.Module) -> Results:
    """Evaluate with test-time augmentation, if the recipe asks for it.

    Returns:
        As :func:`evaluate`, with "_TTA" at the end of the first names: ``{"sem_seg_TTA": {metric: value}}``.
    """
    test = recipe.augmented_test
    if test is None:
        return {}
    logging.getLogger(__name__).info("evaluating again, with test-time augmentation")
    results = _evaluate_on(test.test_sets, test.wrap_model(model.eval()))
    return {f"{name}_TTA": result for name, result in results.items()}


def _evaluate_on(test_sets: Sequence[TestSet], model: nn.Module) -> Results:
    results: Results = OrderedDict()
    for test_set in test_sets:
        evaluator = test_set.build_evaluator()
        with _without_scores(model, evaluator):
            results[test_set.name] = inference_on_dataset(model, test_set.build_loader(), evaluator) or {}
        if comm.is_main_process():
            print_csv_format(results[test_set.name])
    return next(iter(results.values())) if len(results) == 1 else results


def _without_scores(model: nn.Module, evaluator: DatasetEvaluator) -> AbstractContextManager[None]:
    """In the block a ``MaskFormer`` gives semantic labels, for less memory, where the evaluator finds the same then."""
    if isinstance(model, MaskFormer) and takes_labels(evaluator):
        return model.other_inference(semantic_labels=True)
    return nullcontext()


def evaluate_weights(recipe: Recipe, *, resume: bool = False) -> Results:
    """Evaluate the recipe's weights, or the last checkpoint in the output folder where ``resume`` is set.

    With test-time augmentation too where the recipe asks for it, see :func:`evaluate_augmented`.
    """
    model = recipe.build_model()
    average = _average(recipe, model) if resume else None
    checkpointer = Checkpointer(model, recipe.output_dir, **_averaged_state(average))
    checkpointer.resume_or_load(recipe.weights, resume=resume)
    model = average.model if average else model
    results = evaluate(recipe, model)
    results.update(evaluate_augmented(recipe, model))
    _verify(recipe, results)
    return results


def _check_selection(recipe: Recipe) -> None:
    if recipe.max_checkpoints is not None and recipe.max_checkpoints < 1:
        raise UserError(f"SOLVER.CHECKPOINTS_TO_KEEP is {recipe.max_checkpoints}, expected 0 (all) or more")
    if not 0 <= recipe.ema_decay < 1:
        raise UserError(f"SOLVER.EMA_DECAY is {recipe.ema_decay}, expected 0 (off) or less than 1, such as 0.999")
    if recipe.best_metric and not recipe.test_sets:
        raise UserError(f"TEST.BEST_METRIC is '{recipe.best_metric}', but there is no test set: set DATASETS.TEST")
    if recipe.patience and not (recipe.best_metric and recipe.eval_period > 0):
        raise UserError(
            f"SOLVER.EARLY_STOPPING_PATIENCE is {recipe.patience}, which needs TEST.BEST_METRIC, now "
            f"'{recipe.best_metric}', and TEST.EVAL_PERIOD, now {recipe.eval_period}: set both"
        )


def _trainer(
    recipe: Recipe, model: nn.Module, loader: Iterable[Any], optimizer: torch.optim.Optimizer
) -> SimpleTrainer:
    amp = recipe.amp and torch.device(recipe.device).type == "cuda"
    if recipe.accumulation_steps != 1:
        return AccumulatingTrainer(model, loader, optimizer, parts=recipe.accumulation_steps, amp=amp)
    return (AMPTrainer if amp else SimpleTrainer)(model, loader, optimizer)


def _average(recipe: Recipe, model: nn.Module) -> WeightAverage | None:
    return WeightAverage(model, recipe.output_dir, decay=recipe.ema_decay) if recipe.ema_decay else None


def _averaged_state(average: WeightAverage | None) -> dict[str, Any]:
    """What checkpoints hold besides."""
    return {"ema": average.state} if average else {}


def _selection(recipe: Recipe, evaluated_model: nn.Module, checkpointer: Checkpointer) -> list[HookBase]:
    """Hooks that keep the best weights, and stop when there are no better ones any more."""
    if not recipe.best_metric:
        return []
    best = BestCheckpointer(
        evaluated_model, recipe.output_dir, metric=recipe.best_metric, eval_period=recipe.eval_period
    )
    if not recipe.patience:
        return [best]
    return [best, EarlyStopping(checkpointer, best, patience=recipe.patience, eval_period=recipe.eval_period)]


def _verify(recipe: Recipe, results: Results) -> None:
    if comm.is_main_process() and recipe.expected_results:
        unknown = {row[0] for row in recipe.expected_results} - results.keys()
        if unknown:
            raise UserError(
                f"TEST.EXPECTED_RESULTS has rows for {', '.join(sorted(unknown))}, but there are results for "
                f"{', '.join(results) or 'no task'}"
            )
        verify_results(CfgNode({"TEST": {"EXPECTED_RESULTS": recipe.expected_results}}), results)


def _writers(recipe: Recipe, resumed: bool) -> list[EventWriter]:
    cut_off_half_line(recipe.output_dir)
    writers = [
        ConsoleWriter(recipe.max_iter, recipe.log_period),
        JSONWriter(f"{recipe.output_dir}/metrics.json"),
        TensorboardXWriter(recipe.output_dir),
        CurvesWriter(recipe.output_dir),
    ]
    if recipe.wandb_project:
        writers.append(WandbWriter(recipe.wandb_project, recipe.output_dir, recipe.config, resumed=resumed))
    return writers


def _log_size(model: nn.Module) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logging.getLogger(__name__).info("%.1f M parameters, %.1f M of them trained", count / 1e6, trained / 1e6)
