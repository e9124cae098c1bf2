"""A run whose losses or gradients are no longer finite ends before they change the weights, and says why."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, distributed, nn

from ..checkpoint import Checkpointer
from ..errors import UserError

__all__ = ["FiniteSteps"]

LISTED = 5  # pictures or gradients that a message names

logger = logging.getLogger(__name__)


class FiniteSteps(HookBase):
    """Ends the run, by ``UserError``, instead of a step of which a loss or a gradient is not finite, on any rank.

    The log then has the losses and the files of all pictures of the step, and the largest gradients, of the step before
    too. The weights, which are those from before the step, are saved with all that ``--resume`` needs, unless they are
    not finite themselves. With a gradient scaler losses alone count: it leaves out steps of infinite gradients.

    All ranks end together. In each step this takes a pass over the gradients, and one number that the CPU waits for; it
    then has nothing left to wait for when Detectron2 reads the losses.

    Args:
        model: the trained one, without a wrapper for several processes.
        checkpointer: of the run.
        loader: has ``state_dict`` and ``load_state_dict``, as ``BatchStream``; another starts anew in a resumed run.
    """

    def __init__(self, model: nn.Module, checkpointer: Checkpointer, loader: Any) -> None:
        self._model = model
        self._checkpointer = checkpointer
        self._loader = loader if hasattr(loader, "load_state_dict") else None
        self._position: Any = None
        self._passes: list[tuple[list[str], dict[str, Tensor]]] = []  # files and losses of the step's forward passes
        self._norms: tuple[list[str], Tensor] | None = None  # of the last step's gradients, by name
        self._hook: Any = None

    def before_train(self) -> None:
        self._hook = self._model.register_forward_hook(self._remember)

    def before_step(self) -> None:
        self._passes = []
        if self._loader:
            self._position = self._loader.state_dict()

    def after_backward(self) -> None:
        values = torch.stack([loss.float() for _, losses in self._passes for loss in losses.values()])
        found = _not_finite(values)
        norms = None if self._is_scaled() else _norms(self._gradients())
        if norms is not None:
            found |= _not_finite(norms[1])
        if _any_rank(found):
            self._end()
        self._norms = norms

    def after_train(self) -> None:
        self._passes = []
        self._hook.remove()

    def _remember(self, model: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        if model.training:
            files = [_file_name(sample) for sample in inputs[0]]
            losses = outputs if isinstance(outputs, Mapping) else {"total_loss": outputs}
            self._passes.append((files, {name: loss.detach() for name, loss in losses.items()}))

    def _is_scaled(self) -> bool:
        scaler = getattr(self.trainer, "grad_scaler", None)
        return scaler is not None and scaler.is_enabled()

    def _gradients(self) -> dict[str, Tensor]:
        gradients = {name: _local(p.grad) for name, p in self._model.named_parameters() if p.grad is not None}
        return {name: gradient for name, gradient in gradients.items() if gradient.numel()}

    def _end(self) -> None:
        step = self.trainer.iter + 1
        own = [_Pass(files, {k: v.item() for k, v in losses.items()}) for files, losses in self._passes]
        passes = [each for of_rank in comm.all_gather(own) for each in of_rank]
        names, norms = _norms(self._gradients())
        scale = self.trainer.grad_scaler.get_scale() if self._is_scaled() else 1
        gradients = _by_name(names, norms / scale)
        cause = _cause(passes, gradients)
        logger.error("step %d is not taken; not finite: %s", step, cause)
        for line in [*map(str, passes), *_describe(gradients)]:
            logger.error(line)
        if self._norms is not None:
            logger.error("in the step before: %s", _largest(_by_name(*self._norms)))
        raise UserError(
            f"step {step} is not taken; not finite: {cause}; {self._keep_weights()}. The log has all losses and the "
            "largest gradients: look at the pictures, or lower SOLVER.BASE_LR"
        )

    def _keep_weights(self) -> str:
        """Save the run as it was before this step, if its weights are finite; where it can go on, for all ranks."""
        first = self.trainer.iter == self.trainer.start_iter
        self.trainer.iter -= 1  # the step that was done last
        if self.trainer.iter < 0:
            return "nothing has been trained before"
        broken = _distinct([name for name, value in self._model.state_dict().items() if not _is_finite(value)])
        if not (first or broken):
            if self._loader:
                self._loader.load_state_dict(self._position)
            self._checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        path = comm.all_gather(self._checkpointer.get_checkpoint_file())[0]
        where = f"--resume goes on from {path}" if path else "there is no checkpoint to go on from"
        return f"nor is {_shortened(broken)} of the model; {where}" if broken else where


def _file_name(sample: Any) -> str:
    name = sample.get("file_name") if isinstance(sample, Mapping) else None
    return name or "a picture without a file name"


@dataclass
class _Pass:
    """A forward pass: files of its pictures, and its losses."""

    files: list[str]
    losses: dict[str, float]

    def not_finite(self) -> list[str]:
        return [name for name, loss in self.losses.items() if not math.isfinite(loss)]

    def __str__(self) -> str:
        losses = ", ".join(f"{name} {loss:.4g}" for name, loss in self.losses.items())
        return f"{', '.join(self.files)}: {losses}"


def _cause(passes: Sequence[_Pass], gradients: Mapping[str, float]) -> str:
    names = sorted({name for each in passes for name in each.not_finite()}, key=lambda name: (len(name), name))
    if names:
        files = [file for each in passes if each.not_finite() for file in each.files]
        return f"{_shortened(names)} of {_shortened(files)}"
    names = [name for name, norm in gradients.items() if not math.isfinite(norm)]
    files = [file for each in passes for file in each.files]
    return f"the gradient of {_shortened(names)}, with {_shortened(files)}"


def _describe(gradients: Mapping[str, float]) -> Iterator[str]:
    broken = [name for name, norm in gradients.items() if not math.isfinite(norm)]
    if broken:
        yield f"{len(broken)} of {len(gradients)} gradients are not finite: {_shortened(broken)}"
    if len(broken) < len(gradients):
        yield _largest({name: norm for name, norm in gradients.items() if name not in broken})


def _largest(gradients: Mapping[str, float]) -> str:
    names = sorted(gradients, key=lambda name: -gradients[name])[:LISTED]
    return "largest gradients: " + ", ".join(f"{name} {gradients[name]:.4g}" for name in names)


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _distinct(own: Sequence[str]) -> list[str]:
    """What the ranks have, each once."""
    return list(dict.fromkeys(name for names in comm.all_gather(own) for name in names))


def _any_rank(found: Tensor) -> bool:
    if comm.get_world_size() > 1:
        found = found.float()
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return bool(found)


def _norms(gradients: Mapping[str, Tensor]) -> tuple[list[str], Tensor]:
    """Names, and their gradients' norms, which are still on the device."""
    return list(gradients), torch.stack(torch._foreach_norm(list(gradients.values()))).float()


def _by_name(names: Sequence[str], norms: Tensor) -> dict[str, float]:
    return dict(zip(names, norms.tolist(), strict=True))


def _not_finite(values: Tensor) -> Tensor:
    return ~values.isfinite().all()


def _is_finite(value: Tensor) -> bool:
    return bool(_local(value).isfinite().all())


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that the ranks share."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
