"""Convolutions that do the work of the frozen batch norm behind them."""

import math

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from ...ops import conv2d, is_followed
from ..made_again import made_again_for_backward

__all__ = ["fold_frozen_norms", "keep_scaled_weights"]


def fold_frozen_norms(module: nn.Module) -> None:
    """Let every convolution in ``module`` whose norm is frozen scale its weights instead of its result.

    A frozen norm multiplies and shifts each channel, and so does a convolution whose weights and bias were multiplied
    and shifted: one pass over weights in place of two over a feature map, the same but for rounding. Weights are
    scaled when they are used, so that parameters, buffers, gradients and state dict stay what they were. On a CPU the
    results of small maps are scaled and shifted all the same, in one pass, since weights are more.
    """
    for part in module.modules():
        if type(part) is Conv2d and isinstance(part.norm, FrozenBatchNorm2d):
            part.__class__ = _ConvWithFrozenNorm  # it keeps its parameters, hooks and places in the model


def keep_scaled_weights(module: nn.Module) -> None:
    """Let convolutions in ``module`` keep their scaled weights for gradients.

    For what is computed once more in the backward pass, scaled weights too. Nothing of it is kept till then, but what
    other functions than that of activation checkpointing pack.
    """
    for part in module.modules():
        if isinstance(part, _ConvWithFrozenNorm):
            part.keeps_scaled_weights = True


class _ConvWithFrozenNorm(Conv2d):
    keeps_scaled_weights = False

    def forward(self, x: Tensor) -> Tensor:
        """As the class it is derived from."""
        norm = self.norm
        if not isinstance(norm, FrozenBatchNorm2d) or norm._forward_hooks or norm._forward_pre_hooks:
            return super().forward(x)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        mean = norm.running_mean if self.bias is None else norm.running_mean - self.bias
        bias = norm.bias - mean * scale
        computed_as_it_is = x.device.type == "cpu" and not (torch.is_autocast_enabled("cpu") or is_followed())
        if computed_as_it_is and self._has_more_weights_than_results(x):
            x = self._convolve(x, self.weight, None)
            x = torch.addcmul(bias[:, None, None], x, scale[:, None, None])
        elif self.keeps_scaled_weights or torch.compiler.is_compiling():
            x = self._convolve(x, self._scaled_by(scale), bias)
        else:
            weight = self._scaled_by(scale)  # all of them would take as much memory as the backbone's own
            with made_again_for_backward(weight, lambda: self._scaled_by(scale)):
                x = self._convolve(x, weight, bias)
        return x if self.activation is None else self.activation(x)

    def _has_more_weights_than_results(self, x: Tensor) -> bool:
        """As many at least: in training weights are scaled twice, and their gradients once."""
        cells = x.shape[0] * x.shape[2] * x.shape[3] // math.prod(self.stride)  # of the result
        return cells <= math.prod(self.weight.shape[1:])

    def _scaled_by(self, scale: Tensor) -> Tensor:
        return self.weight * scale[:, None, None, None]

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
