"""ResNet's stem, which keeps little of its first and largest map for gradients on a CPU.

Letters: ``B`` batch, ``C`` channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BasicStem
from torch import Tensor, nn

from ...ops import is_followed

__all__ = ["keep_little_of_stems"]

WINDOW, STRIDE, PADDING = (3, 3), (2, 2), (1, 1)
WIDEST = torch.iinfo(torch.int16).max - 1  # rows of a map, for places within a window to fit


def keep_little_of_stems(module: nn.Module) -> None:
    """Let every stem of Detectron2's ResNets in ``module`` keep less for gradients, which stay the same."""
    for part in module.modules():
        if type(part) is BasicStem:
            part.__class__ = _Stem  # it keeps its parameters, hooks and places in the model


class _Stem(BasicStem):
    def forward(self, x: Tensor) -> Tensor:
        """As the class it is derived from."""
        x = self.conv1(x)
        if torch.is_grad_enabled() and x.device.type == "cpu" and x.shape[-1] <= WIDEST and not is_followed():
            pooled: Tensor = _PooledRelu.apply(x)
            return pooled
        return F.max_pool2d(F.relu_(x), WINDOW, STRIDE, PADDING)


class _PooledRelu(torch.autograd.Function):
    """What a ReLU leaves of the largest values, (B, C, H, W) to (B, C, h, w).

    They are the largest that the ReLU leaves, and their gradients need no map of its size, where modules keep two.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result, indices = F.max_pool2d_with_indices(x, WINDOW, STRIDE, PADDING)
        result.relu_()
        ctx.layout = x.shape, x.stride()
        ctx.save_for_backward(result, indices.sub_(_centres(result, x.shape[-1])).to(torch.int16))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        result, places = ctx.saved_tensors
        shape, strides = ctx.layout
        grad = torch.ops.aten.threshold_backward(grad, result, 0)
        indices = places.long().add_(_centres(result, shape[-1]))
        # Of what was pooled the size and layout count alone, and memory that nothing touches is none.
        pooled = torch.empty_strided(shape, strides, dtype=grad.dtype)
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        grad_x: Tensor = backward(grad, pooled, WINDOW, STRIDE, PADDING, (1, 1), False, indices)
        return grad_x


def _centres(result: Tensor, width: int) -> Tensor:
    """Indices (h, w) of the windows' centres in a map of that width."""
    rows, columns = (torch.arange(size) * 2 for size in result.shape[-2:])
    return rows[:, None] * width + columns
