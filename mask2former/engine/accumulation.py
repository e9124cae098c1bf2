"""Steps whose batch goes through the model in parts, for less memory."""

import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.engine import AMPTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError
from ..modeling.loss_in_parts import LossInParts

__all__ = ["AccumulatingTrainer"]

Batch = list[dict[str, Any]]


class AccumulatingTrainer(AMPTrainer):
    """Detectron2's loop, but a process's share of the batch goes through the model in parts, one after the other.

    The gradients are those of the whole share: losses are divided by what all of it holds (``LossInParts``), and
    processes average their gradients, clip and step once, after the last part. Only what a part can't know differs:
    batch norm's statistics are a part's, and a part is padded to its own largest picture.

    Args:
        model: one that has a ``LossInParts``, in ``DistributedDataParallel`` if there are several processes.
        data_loader: endless batches.
        optimizer: takes a step for each batch.
        parts: how many there are, of as many pictures each as is possible; at least 1.
        amp: automatic mixed precision.

    Raises:
        UserError: if there are no parts, or the model has no ``LossInParts``; in a step, if there are fewer pictures
            than parts.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Batch],
        optimizer: torch.optim.Optimizer,
        *,
        parts: int,
        amp: bool = False,
    ) -> None:
        if parts < 1:
            raise UserError(f"SOLVER.ACCUMULATION_STEPS is {parts}, expected 1 or more")
        super().__init__(model, data_loader, optimizer, grad_scaler=torch.amp.GradScaler("cuda", enabled=amp))
        losses = [module for module in model.modules() if isinstance(module, LossInParts)]
        if not losses:
            raise UserError(
                "SOLVER.ACCUMULATION_STEPS needs MaskFormer or a per-pixel head of this package, whose losses know of "
                "parts of a batch: set it to 1"
            )
        (self._loss,) = losses
        self._parts = parts
        self._amp = amp

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        losses = self._accumulate(batch)
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _accumulate(self, batch: Batch) -> dict[str, Tensor]:
        """Add the batch's gradients to the parameters', and return its losses."""
        *first, last = _split(batch, self._parts)
        totals: dict[str, Tensor] = {}
        with self._loss.parts_of(batch):
            with self._without_averaging():
                for part in first:
                    _add(totals, self._backward(part))
            _add(totals, self._backward(last))
        return totals

    def _without_averaging(self) -> Any:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def _backward(self, part: Batch) -> dict[str, Tensor]:
        with torch.autocast("cuda", self.precision, enabled=self._amp):
            losses = self.model(part)
        self.grad_scaler.scale(sum(losses.values())).backward()
        return losses


def _split(batch: Batch, parts: int) -> list[Batch]:
    if len(batch) < parts:
        raise UserError(
            f"SOLVER.ACCUMULATION_STEPS is {parts}, but each process has {len(batch)} of the SOLVER.IMS_PER_BATCH "
            f"pictures: set it to {len(batch)} or less"
        )
    bounds = [index * len(batch) // parts for index in range(parts + 1)]
    return [batch[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def _add(totals: dict[str, Tensor], losses: dict[str, Tensor]) -> None:
    for name, loss in losses.items():
        totals[name] = totals[name] + loss.detach() if name in totals else loss.detach()
