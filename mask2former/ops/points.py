"""Masks at points: compiled kernels where there are some for float32 tensors of a device, else plain PyTorch.

They draw points, read and write maps there, find where maps are nearest to zero, and sum up losses. What has gradients
says so. Points are (x, y) from (-1, -1), the top left corner of a map's first cell, to (1, 1), as ``grid_sample`` takes
them.

Letters: ``N`` maps, ``R`` rows of points, ``P`` points of each; ``H`` and ``W`` are the size of a map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import extension

__all__ = [
    "draw_nearest_to_zero",
    "has_kernels",
    "loss_sums",
    "loss_sums_backward",
    "loss_sums_reference",
    "random_points",
    "sample_points",
    "spread_points",
    "to_probabilities",
]


def random_points(*shape: int, device: torch.device) -> Tensor:
    """Uniform points (*shape, 2) of torch's random numbers, or, from a kernel, of numbers that one of these names."""
    if not has_kernels(device):
        return torch.empty(*shape, 2, device=device).uniform_(-1, 1)
    return torch.ops.mask2former.random_points((*shape, 2), _random_seed())


def _random_seed() -> int:
    """One of torch's random numbers."""
    return int(torch.empty((), dtype=torch.int64).random_())


def sample_points(maps: Tensor, points: Tensor, index: Tensor | None = None) -> Tensor:
    """Values of maps at points, bilinear, zero outside.

    Args:
        maps: (N, H, W), of bool too.
        points: (R, P, 2).
        index: the map (R) that each row of points is on; without, the rows are those of the maps.

    Returns:
        (R, P) in float32, or in the type of maps of other floats.
    """
    if has_kernels(maps.device) and _fits(maps) and points.dtype == torch.float32:
        return torch.ops.mask2former.sample_points(maps, points.contiguous(), index)
    here = maps if index is None else maps[index]
    here = here if here.is_floating_point() else here.float()
    return F.grid_sample(here[:, None], points[:, None], align_corners=False)[:, 0, 0] if len(here) else points[..., 0]


def spread_points(values: Tensor, points: Tensor, maps: Tensor) -> None:
    """Make ``maps`` the gradient of maps whose values at points have the gradient ``values``.

    Args:
        values: (N, P).
        points: (N, P, 2).
        maps: (N, H, W), which may lie apart in memory.
    """
    if has_kernels(maps.device) and _fits(maps) and points.dtype == torch.float32:
        torch.ops.mask2former.spread_points(values.contiguous(), points.contiguous(), maps)
        return
    like = values.new_zeros(1).expand(maps.shape)  # the maps' values don't count
    backward = torch.ops.aten.grid_sampler_2d_backward
    bilinear, zeros = 0, 0
    gradient = backward(values[:, None, None], like[:, None], points[:, None], bilinear, zeros, False, [True, False])[0]
    maps.copy_(gradient[:, 0])


def draw_nearest_to_zero(maps: Tensor, drawn: int, points: Tensor, values: Tensor) -> None:
    """Draw random points for each map and write those where it is nearest to zero, in any order, and its values there.

    Args:
        maps: (N, H, W).
        drawn: how many ``random_points`` each map gets.
        points: are made (N, P, 2).
        values: are made (N, P).
    """
    if has_kernels(maps.device) and _fits(maps) and values.dtype == points.dtype == torch.float32:
        torch.ops.mask2former.draw_nearest_to_zero(maps, drawn, _random_seed(), points, values)
        return
    all_points = random_points(len(maps), drawn, device=maps.device).to(points.dtype)
    all_values = sample_points(maps, all_points)
    # Sorting takes longest of all.
    nearest = all_values.abs().topk(values.shape[1], dim=1, largest=False, sorted=False).indices
    points.copy_(all_points.gather(1, nearest[..., None].expand(-1, -1, 2)))
    values.copy_(all_values.gather(1, nearest))


def loss_sums_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """``loss_sums`` in plain PyTorch, with gradients."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    probabilities = logits.sigmoid()
    return torch.stack([x.sum(-1) for x in (cross_entropy, probabilities, labels, probabilities * labels)], dim=-1)


def loss_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over points of what mask losses are made of: cross-entropy, probability, label, and the latter's product.

    Args:
        logits: (N, P).
        labels: (N, P) in [0, 1].

    Returns:
        (N, 4).
    """
    if has_kernels(logits.device) and logits.dtype == labels.dtype == torch.float32:
        return torch.ops.mask2former.loss_sums(logits.contiguous(), labels.contiguous())
    return loss_sums_reference(logits, labels)


def loss_sums_backward(grad: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient (N, P) of logits whose ``loss_sums`` have the gradient ``grad`` (N, 4)."""
    if has_kernels(logits.device) and logits.dtype == labels.dtype == torch.float32:
        return torch.ops.mask2former.loss_sums_backward(grad.contiguous(), logits.contiguous(), labels.contiguous())
    cross_entropy, probability, _, product = grad[..., None].unbind(1)
    probabilities = logits.sigmoid()
    slope = probabilities * (1 - probabilities)
    return cross_entropy * (probabilities - labels) + slope * (probability + product * labels)


def to_probabilities(logits: Tensor) -> Tensor:
    """Replace logits (N, P), of which no gradient is asked for, by their sigmoid.

    Returns:
        sums (N, 2) over points of softplus(x) of the logits, their cross-entropy with labels that are all 0, and of
        their sigmoid.
    """
    if has_kernels(logits.device) and logits.dtype == torch.float32 and logits[:1].is_contiguous():
        return torch.ops.mask2former.to_probabilities(logits)
    # softplus(x) = max(x, 0) - log(sigmoid(|x|)), of which each step is several times as fast as softplus itself.
    softplus = logits.relu().sub_(logits.abs().sigmoid_().log_()).sum(-1)
    return torch.stack([softplus, logits.sigmoid_().sum(-1)], dim=-1)


def has_kernels(device: torch.device) -> bool:
    """Whether there are kernels for float32 tensors on a device, where they can be called."""
    if device.type != "cpu" or "cpu" not in extension.KERNELS:
        return False
    return not extension.is_followed()


def _fits(maps: Tensor) -> bool:
    """Whether kernels take these maps."""
    return maps.dtype in (torch.float32, torch.bool) and min(maps.shape[1:]) >= 2 and maps[:1].is_contiguous()
