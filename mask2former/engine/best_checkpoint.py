"""The weights that were best in an evaluation, kept in a file of their own; a run ends when none get better."""

from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn

from ..checkpoint import Checkpointer, WrongState, check_state
from ..data.datasets.coco_format import load_json
from ..data.panoptic_files import save_json
from ..errors import UserError

__all__ = ["BEST", "BestCheckpointer", "EarlyStopping", "StoppedEarly", "WeightsFile"]

BEST = "model_best"


class WeightsFile(Checkpointer):
    """Saves weights alone, for use. ``--resume`` goes on from the run's checkpoints, not from these."""

    def __init__(self, model: nn.Module, save_dir: str) -> None:
        super().__init__(model, save_dir)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


class BestCheckpointer(hooks.BestCheckpointer):
    """Saves ``model_best.pth`` when ``metric`` rises, and how good it is in ``model_best.json``.

    A resumed run goes on from that. The hook comes after the one that evaluates.

    Args:
        model: as it is evaluated.
        metric: as in ``metrics.json``, for example "segm/AP"; higher is better.
        eval_period: steps between evaluations; 0: at the end alone.

    Raises:
        UserError: on the first evaluation, if it doesn't give that metric.
    """

    def __init__(self, model: nn.Module, output_dir: str, *, metric: str, eval_period: int) -> None:
        super().__init__(eval_period, WeightsFile(model, output_dir), metric, file_prefix=BEST)
        self._metric = metric
        self._record = Path(output_dir) / f"{BEST}.json"

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 and self._record.is_file():
            record = self._read_record()
            if record["metric"] == self._metric:
                self.best_metric, self.best_iter = record["value"], record["iteration"]

    def _read_record(self) -> dict[str, Any]:
        record = load_json(self._record)
        try:
            check_state(record, {"metric": "", "value": 0.0, "iteration": 0}, "record")
        except WrongState as error:
            raise UserError(f"'{self._record}': {error}: remove it, then the next evaluation is the best") from error
        return record

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # not where the last step failed
            super().after_train()

    def _best_checking(self) -> None:
        if not comm.is_main_process():  # which alone has the results
            return
        latest = self.trainer.storage.latest()
        if self._metric not in latest:
            known = ", ".join(sorted(name for name in latest if "/" in name and "-" not in name))
            raise UserError(
                f"TEST.BEST_METRIC is '{self._metric}', which the evaluation lacks: it gives {known or 'nothing'}"
            )
        before = self.best_iter
        super()._best_checking()
        if self.best_iter != before:
            record = {"metric": self._metric, "value": self.best_metric, "iteration": self.best_iter}
            save_json(self._record, record)


class StoppedEarly(Exception):
    """Ends the loop of a run that no longer gets better."""


class EarlyStopping(HookBase):
    """Saves and ends the run, by ``StoppedEarly``, when ``patience`` evaluations in a row were no better than the best.

    The hook comes after ``best``.

    Args:
        checkpointer: has a method ``save(name, **kwargs)``.
        best: knows which evaluation was the best.
        patience: evaluations, at least 1.
        eval_period: steps between them, at least 1.
    """

    def __init__(self, checkpointer: Any, best: BestCheckpointer, *, patience: int, eval_period: int) -> None:
        self._checkpointer = checkpointer
        self._best = best
        self._wait = patience * eval_period
        self._eval_period = eval_period

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if (iteration + 1) % self._eval_period or iteration + 1 >= self.trainer.max_iter:
            return
        best_iter = self._best.best_iter
        ends = best_iter is not None and iteration - best_iter >= self._wait
        if any(comm.all_gather(ends)):  # the main process alone knows, and all must stop together
            self._checkpointer.save("model_final", iteration=iteration)
            raise StoppedEarly(f"stopped after step {iteration + 1}: the best weights are in {BEST}.pth")
