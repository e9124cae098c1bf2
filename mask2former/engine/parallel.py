"""A model that trains on several processes."""

import inspect
import logging
from typing import Any

from detectron2.utils import comm
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

__all__ = ["for_all_ranks", "share_statistics"]


def for_all_ranks(model: nn.Module) -> nn.Module:
    """Average the model's gradients over the processes of the run, if there are several.

    On CPUs, for which torch has no ``SyncBatchNorm``, the model's are replaced in place by plain ones, with their
    parameters; and a resumed run gives an uninterrupted one's bits, with any number of processes.
    """
    if comm.get_world_size() == 1:
        return model
    on_cuda = next(model.parameters()).device.type == "cuda"
    if not on_cuda:
        _stop_synchronising_norms(model)
    return DistributedDataParallel(
        model,
        device_ids=[comm.get_local_rank()] if on_cuda else None,
        **_buffers_stay_apart(),
        # With this, gradients aren't laid out anew behind the first step. The sum of three numbers or more depends on
        # their order, and that on the layout. On GPUs it would cost time, and other sums vary there anyway.
        find_unused_parameters=not on_cuda and comm.get_world_size() > 2,
        gradient_as_bucket_view=True,  # else gradients are in memory twice
    )


def _buffers_stay_apart() -> dict[str, Any]:
    """The argument by which a forward pass leaves each process its buffers; from torch 2.14 on it has another name."""
    names = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


def share_statistics(model: nn.Module) -> None:
    """Let batch norms on all processes have the statistics of the main one, which are those that checkpoints hold.

    In training each process's are of its own pictures.
    """
    if comm.get_world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for buffer in module.buffers(recurse=False):
                distributed.broadcast(buffer, src=0)


def _stop_synchronising_norms(model: nn.Module) -> None:
    norms = [
        (parent, name, norm)
        for parent in model.modules()
        for name, norm in parent.named_children()
        if isinstance(norm, nn.SyncBatchNorm)
    ]
    for parent, name, norm in norms:
        setattr(parent, name, _plain_batch_norm(norm))
    if norms:
        logging.getLogger(__name__).warning(
            "SyncBN works on GPUs alone: %d norms are plain batch norms now, of each process's pictures", len(norms)
        )


def _plain_batch_norm(norm: nn.SyncBatchNorm) -> nn.BatchNorm2d:
    """A batch norm with the same parameters and buffers, which an optimizer may know already."""
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name, parameter in norm.named_parameters(recurse=False):
        plain.register_parameter(name, parameter)
    for name, buffer in norm.named_buffers(recurse=False):
        plain.register_buffer(name, buffer)
    return plain.train(norm.training)
