"""The checkpointer of a run on several processes."""

from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpointer

__all__ = ["RunCheckpointer"]


class RunCheckpointer(Checkpointer):
    """Saves on the main process what all of them have, the state of a ``ShardedOptimizer`` too.

    All processes call ``save`` together. Where they can't, for example in an evaluation that a signal ends on one of
    them, ``gather`` has to come before, since the last step.

    Args:
        model, save_dir, checkpointables: see ``Checkpointer``.
        optimizer: one whose state is in ``checkpointables``.
    """

    def __init__(
        self, model: nn.Module, save_dir: str, *, optimizer: torch.optim.Optimizer, **checkpointables: Any
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._optimizer = optimizer

    def gather(self) -> None:
        """Bring what the processes share out among them to the main one."""
        if hasattr(self._optimizer, "gather"):
            self._optimizer.gather()

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model and everything that belongs to the run, see ``Checkpointer``."""
        self.gather()
        super().save(name, **kwargs)
