"""Steps that depend on the seed alone, so that an interrupted run goes on as if it had not been interrupted."""

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from ..errors import UserError
from ..seeds import STEP, seed_generators
from .curves import read_metrics

__all__ = ["MissedEvaluation", "Repeatable"]


class Repeatable(HookBase):
    """Each step depends on the seed, the rank and its number alone: a resumed run gives an uninterrupted one's bits.

    The generators of Python, NumPy and torch are seeded before each step, and the loader goes on behind the batches
    that were taken. So a checkpoint, which the main process writes alone, holds what all ranks need: a seed and a
    number. Generators' own states would have to be gathered from all ranks, would only fit as many as before, and an
    evaluation or a worker more would change them.

    The hook comes first.

    Args:
        seed: of the run; less than 0: a random one.
        loader: has ``state_dict`` and ``load_state_dict``, as ``BatchStream``; another starts anew in a resumed run.
    """

    def __init__(self, seed: int, loader: Any) -> None:
        self._seed = comm.shared_random_seed() if seed < 0 else seed
        self._loader = loader if hasattr(loader, "load_state_dict") else None
        self._resumed = False

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 and not (self._resumed and self._loader):
            logging.getLogger(__name__).warning(
                "the checkpoint or the data loader lacks a position in the data: from here on pictures and random "
                "numbers are others than those of an uninterrupted run"
            )

    def before_step(self) -> None:
        seed_generators(STEP, self._seed, comm.get_rank(), self.trainer.iter)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed, **({"loader": self._loader.state_dict()} if self._loader else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seed = state_dict["seed"]
        if self._loader and "loader" in state_dict:
            self._loader.load_state_dict(state_dict["loader"])
            self._resumed = True


class MissedEvaluation(HookBase):
    """A resumed run first evaluates the step before, where an interruption came between its checkpoint and that.

    The hook comes behind ``evaluating``.

    Args:
        evaluating: the hooks that evaluate and that use the results.
        eval_period: steps between evaluations; 0: at the end alone.
        output_dir: has the ``metrics.json`` that says which evaluations there were.
    """

    def __init__(self, evaluating: Sequence[HookBase], *, eval_period: int, output_dir: str) -> None:
        self._evaluating = evaluating
        self._eval_period = eval_period
        self._output_dir = output_dir

    def before_train(self) -> None:
        steps = self.trainer.start_iter
        if self._eval_period < 1 or steps == 0 or steps % self._eval_period:
            return
        if comm.all_gather(self._has_results_of(steps))[0]:  # as the main process has it, which writes the file
            return
        logging.getLogger(__name__).info("evaluating after step %d, which was not done before", steps)
        self.trainer.iter = self.trainer.storage.iter = steps - 1
        for hook in self._evaluating:
            hook.after_step()

    def _has_results_of(self, steps: int) -> bool:
        try:
            curves = read_metrics(self._output_dir)
        except UserError:
            return False
        # Detectron2 gives results of the step that it has just done, but at the end of the run of the one behind.
        return any("/" in name and not values.keys().isdisjoint((steps - 1, steps)) for name, values in curves.items())
