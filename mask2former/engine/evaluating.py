"""When a run evaluates and what it writes then, in a resumed run too."""

import logging
from collections.abc import Sequence

from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter

from ..errors import UserError
from .curves import read_metrics

__all__ = ["EvalHook", "MetricsWriter", "MissedEvaluation", "finish"]


class EvalHook(hooks.EvalHook):
    """Detectron2's hook, which doesn't evaluate where an error or a signal ended the run in its last step."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class MetricsWriter(hooks.PeriodicWriter):
    """Detectron2's hook, which writes behind each evaluation too, before another step can be interrupted.

    The hook comes behind those that evaluate.

    Args:
        writers: of scalars.
        period: steps between lines.
        eval_period: steps between evaluations; 0: at the end alone.
    """

    def __init__(self, writers: Sequence[EventWriter], period: int, *, eval_period: int) -> None:
        super().__init__(writers, period)
        self._eval_period = eval_period

    def after_step(self) -> None:
        if self._eval_period > 0 and (self.trainer.iter + 1) % self._eval_period == 0:
            for writer in self._writers:
                writer.write()
        else:
            super().after_step()


class MissedEvaluation(HookBase):
    """A resumed run first does what an interruption left undone behind the checkpoint: evaluation and line of metrics.

    The hook comes before ``writer``.

    Args:
        evaluating: the hooks that evaluate and that use the results.
        writer: the hook that writes metrics; None on all but the main process.
        eval_period: steps between evaluations; 0: at the end alone.
        output_dir: has the ``metrics.json`` that says which evaluations there were.
    """

    def __init__(
        self, evaluating: Sequence[HookBase], writer: MetricsWriter | None, *, eval_period: int, output_dir: str
    ) -> None:
        self._evaluating = evaluating
        self._writer = writer
        self._eval_period = eval_period
        self._output_dir = output_dir

    def before_train(self) -> None:
        steps = self.trainer.start_iter
        if steps == 0:
            return
        found = comm.all_gather(self._has_metrics_of(steps))
        evaluated, written = found[0]  # by the main process, which writes them
        due = self._eval_period > 0 and steps % self._eval_period == 0 and steps < self.trainer.max_iter
        missed = bool(self._evaluating) and due and not evaluated
        self.trainer.iter = self.trainer.storage.iter = steps - 1
        if missed:
            logging.getLogger(__name__).info("evaluating after step %d, which was not done before", steps)
            for hook in self._evaluating:
                hook.after_step()
        if self._writer and (missed or not written):
            self._writer.after_step()
        self.trainer.iter = self.trainer.storage.iter = steps

    def _has_metrics_of(self, steps: int) -> tuple[bool, bool]:
        """Whether the file has results of an evaluation behind so many steps, and losses of the last of them."""
        try:
            curves = read_metrics(self._output_dir)
        except UserError:
            return False, False
        # Detectron2 gives results of the step that it has just done, but at the end of the run of the one behind.
        names = [name for name, values in curves.items() if not values.keys().isdisjoint((steps - 1, steps))]
        return any("/" in name for name in names), steps - 1 in curves.get("total_loss", {})


def finish(trainer: TrainerBase, steps: int) -> None:
    """Do what comes behind the last step, the last evaluation above all, for a run that has had all its ``steps``.

    An interruption may have come between them.
    """
    trainer.iter = trainer.start_iter = trainer.max_iter = steps
    with EventStorage(steps) as trainer.storage:
        trainer.before_train()
        trainer.after_train()
