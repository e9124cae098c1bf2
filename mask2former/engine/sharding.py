"""An optimizer whose state is spread over the processes of a run.

The first stage of ZeRO (Rajbhandari et al., *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*,
2020, section 5.1). Weights and gradients stay whole on every process, which so average gradients, clip and save as
without it.
"""

from collections.abc import Iterable
from typing import Any

from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

__all__ = ["ShardedOptimizer"]


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """Each process steps its share of the parameters, keeps the state of these alone, and sends them to the others.

    Its state dict is that of the optimizer without sharding, and each of the two loads the other's, with any number of
    processes. Steps are the same to the bit.

    Args:
        groups: parameter groups.
        optimizer_class: whose steps depend on nothing but a parameter and its gradient, such as AdamW.
        options: of the optimizer.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], optimizer_class: type[Optimizer], **options: Any) -> None:
        super().__init__(groups, optimizer_class, **options)
        self._gathered = False
        self.register_step_post_hook(lambda *_: self._forget())

    def gather(self) -> None:
        """Bring the state of all processes to the main one, for its ``state_dict``; until the next step.

        All processes call it together, but for calls between two steps after the first, which do nothing.
        """
        if not self._gathered:
            self.consolidate_state_dict(to=0)
            self._gathered = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a process's share out of the state of all parameters."""
        super().load_state_dict({**state_dict, "state": dict(state_dict["state"])})  # whose entries it overwrites
        self.state.clear()  # the share is in the optimizer inside; this would be a second one
        self._forget()

    def _forget(self) -> None:
        self._gathered = False
        self._all_state_dicts: list[dict[str, Any]] = []
