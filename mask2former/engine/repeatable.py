"""Steps that depend on the seed alone, so that an interrupted run goes on as if it had not been interrupted."""

import logging
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from ..checkpoint import WrongState, check_state
from ..seeds import STEP, seed_generators

__all__ = ["Repeatable"]


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
        check_state(state_dict, {"seed": 0}, "trainer.hooks.Repeatable")
        self._seed = state_dict["seed"]
        if self._loader and "loader" in state_dict:
            self._check_position(state_dict["loader"], self._loader.state_dict())
            self._loader.load_state_dict(state_dict["loader"])
            self._resumed = True

    def _check_position(self, position: Any, own: dict[str, Any]) -> None:
        name = "trainer.hooks.Repeatable.loader"
        check_state(position, own, name)
        batches, steps = position.get("batches", 0), self.trainer.iter + 1
        if batches > steps:  # to skip very many would take forever
            raise WrongState(f"{name}.batches is {batches}, expected at most the {steps} steps of the run")
