"""Activation checkpointing: what is inside layers is computed once more in the backward pass, not kept for it.

Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from .backbone.frozen_norm import keep_scaled_weights
from .made_again import forget_how

__all__ = ["PARTS", "LayerCheckpointing", "checkpoint_activations"]

# Parts of a model by the names that the config has for them, and where they are.
PARTS = {
    "backbone": "backbone",
    "pixel_decoder": "sem_seg_head.pixel_decoder",
    "transformer_decoder": "sem_seg_head.predictor",
}


class LayerCheckpointing(nn.Module):
    """A module that can compute its layers once more in the backward pass instead of keeping what is inside them.

    Random numbers are the same the second time, and statistics of batch norms are updated the first time alone.

    Attributes:
        checkpointing: whether it does.
    """

    checkpointing: bool = False

    def run_layer(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """What ``layer``, of this module, gives for ``inputs``."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return layer(*inputs)
        norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        options: dict[str, Any] = {}
        if norms and not torch.compiler.is_compiling():  # the compiler doesn't repeat changes of buffers
            options["context_fn"] = lambda: (nullcontext(), _Unchanged(norms))
        result = checkpoint(layer, *inputs, use_reentrant=False, **options)
        forget_how(result)  # it is kept for the next layer
        return result


class _Unchanged(AbstractContextManager[None]):
    """In the block, batch norms have copies of their running statistics, and change those."""

    def __init__(self, norms: Sequence[nn.Module]) -> None:
        self._norms = norms
        self._buffers: list[dict[str, Tensor]] = []

    def __enter__(self) -> None:
        self._buffers = [dict(norm.named_buffers(recurse=False)) for norm in self._norms]
        self._set([{name: value.clone() for name, value in buffers.items()} for buffers in self._buffers])

    def __exit__(self, *_: Any) -> None:
        self._set(self._buffers)

    def _set(self, buffers_of_norms: Sequence[dict[str, Tensor]]) -> None:
        for norm, buffers in zip(self._norms, buffers_of_norms, strict=True):
            for name, value in buffers.items():
                setattr(norm, name, value)


class _CheckpointedStage(LayerCheckpointing, nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = self.run_layer(block, x)
        return x


def checkpoint_activations(model: nn.Module, parts: Sequence[str]) -> None:
    """Compute the layers of some ``PARTS`` of a model once more in the backward pass.

    These are the blocks of a backbone, the encoder layers and the pyramid's steps of a pixel decoder, and the layers of
    a transformer decoder. Backbones that know nothing of it, such as Detectron2's ResNets and timm's models, have their
    blocks in ``nn.Sequential``.

    Raises:
        UserError: if there is no such part, or nothing in it that can be computed once more.
    """
    for name in parts:
        if name not in PARTS:
            raise UserError(
                f"MODEL.MASK_FORMER.ACTIVATION_CHECKPOINTING is {list(parts)}, expected some of {', '.join(PARTS)}"
            )
        part = model.get_submodule(PARTS[name])
        stacks = [module for module in part.modules() if isinstance(module, LayerCheckpointing)]
        if name == "backbone" and not stacks:
            stacks = [_to_checkpointed(stage) for stage in _stages(part)]
        if not stacks:
            raise UserError(
                f"{type(part).__name__} has no layers for activation checkpointing: take '{name}' out of "
                "MODEL.MASK_FORMER.ACTIVATION_CHECKPOINTING"
            )
        for stack in stacks:
            stack.checkpointing = True


def _stages(module: nn.Module) -> Iterator[nn.Sequential]:
    """The outermost sequences of modules that have parts, and so are blocks and not single operations."""
    for child in module.children():
        if type(child) is nn.Sequential and all(_is_block(grandchild) for grandchild in child):
            yield child
        else:
            yield from _stages(child)


def _is_block(module: nn.Module) -> bool:
    return type(module) is not nn.Sequential and any(True for _ in module.children())


def _to_checkpointed(stage: nn.Sequential) -> LayerCheckpointing:
    stage.__class__ = _CheckpointedStage  # it keeps its blocks, hooks and places in the model
    assert isinstance(stage, _CheckpointedStage)
    keep_scaled_weights(stage)
    return stage
