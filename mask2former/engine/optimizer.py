"""The optimizer with the published parameter groups and gradient clipping."""

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.solver.build import maybe_add_gradient_clipping, reduce_param_groups
from detectron2.utils import comm
from torch import nn

from ..errors import UserError

__all__ = ["build_optimizer", "clip_full_model_gradients", "parameter_groups"]

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
UNDECAYED = ("relative_position_bias_table", "absolute_pos_embed")  # of Swin backbones


def parameter_groups(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float,
    weight_decay_embed: float,
    backbone_multiplier: float,
) -> list[dict[str, Any]]:
    """The trained parameters, grouped by the learning rate and decay that the published recipes give them.

    The backbone's learning rate is ``base_lr * backbone_multiplier``. Norms and embeddings have decays of their own;
    Swin's position tables have none.
    """
    groups = []
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            decay = weight_decay
            if any(key in name for key in UNDECAYED):
                decay = 0.0
            if isinstance(module, NORMS):
                decay = weight_decay_norm
            if isinstance(module, nn.Embedding):
                decay = weight_decay_embed
            lr = base_lr * backbone_multiplier if "backbone" in module_name else base_lr
            groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    return reduce_param_groups(groups)


def clip_full_model_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Scale all gradients together to a norm of at most ``max_norm`` before every step."""

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters: Iterable[torch.Tensor] = (p for group in optimizer.param_groups for p in group["params"])
        nn.utils.clip_grad_norm_(parameters, max_norm)

    optimizer.register_step_pre_hook(clip)


def _from_config(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    solver = cfg.SOLVER
    return {
        "model": model,
        "name": solver.OPTIMIZER,
        "base_lr": solver.BASE_LR,
        "weight_decay": solver.WEIGHT_DECAY,
        "weight_decay_norm": solver.WEIGHT_DECAY_NORM,
        "weight_decay_embed": solver.WEIGHT_DECAY_EMBED,
        "backbone_multiplier": solver.BACKBONE_MULTIPLIER,
        "momentum": solver.MOMENTUM,
        "clip_type": solver.CLIP_GRADIENTS.CLIP_TYPE if solver.CLIP_GRADIENTS.ENABLED else None,
        "clip_value": solver.CLIP_GRADIENTS.CLIP_VALUE,
        "clip_norm_type": solver.CLIP_GRADIENTS.NORM_TYPE,
        "shard": solver.SHARD_OPTIMIZER,
    }


@configurable(from_config=_from_config)
def build_optimizer(
    model: nn.Module,
    *,
    name: str = "ADAMW",
    base_lr: float = 1e-4,
    weight_decay: float = 0.05,
    weight_decay_norm: float = 0.0,
    weight_decay_embed: float = 0.0,
    backbone_multiplier: float = 0.1,
    momentum: float = 0.9,
    clip_type: str | None = "full_model",
    clip_value: float = 0.01,
    clip_norm_type: float = 2.0,
    shard: bool = False,
) -> torch.optim.Optimizer:
    """Build the optimizer from keyword values, or ``build_optimizer(cfg, model)`` from ``SOLVER``.

    Args:
        model: whose parameters are optimized; see :func:`parameter_groups` for the rates and decays.
        name: "ADAMW" or "SGD".
        momentum: of SGD.
        clip_type: "full_model" (the norm of all gradients together), "value" or "norm" (of each parameter,
            Detectron2's), or None.
        clip_value: the largest norm, or value.
        clip_norm_type: p of the norm where ``clip_type`` is "norm".
        shard: spread the optimizer's state over the processes of the run, see ``ShardedOptimizer``.

    Raises:
        UserError: if ``name`` or ``clip_type`` is unknown.
    """
    optimizers: dict[str, Any] = {"ADAMW": torch.optim.AdamW, "SGD": torch.optim.SGD}
    if name not in optimizers:
        raise UserError(f"SOLVER.OPTIMIZER must be one of {', '.join(optimizers)}, but is {name!r}")
    if clip_type not in (None, "full_model", "value", "norm"):
        raise UserError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE must be full_model, value or norm, but is {clip_type!r}")
    groups = parameter_groups(
        model,
        base_lr=base_lr,
        weight_decay=weight_decay,
        weight_decay_norm=weight_decay_norm,
        weight_decay_embed=weight_decay_embed,
        backbone_multiplier=backbone_multiplier,
    )
    if name == "ADAMW":
        groups = [_fused_on_cpu(group) for group in groups]
    options = {"lr": base_lr, **({"momentum": momentum} if name == "SGD" else {})}
    optimizer_class = optimizers[name]
    if clip_type in ("value", "norm"):
        optimizer_class = _with_parameter_clipping(optimizer_class, clip_type, clip_value, clip_norm_type)
    if shard and comm.get_world_size() > 1:
        from .sharding import ShardedOptimizer  # not every build of torch can load it

        optimizer: torch.optim.Optimizer = ShardedOptimizer(groups, optimizer_class, **options)
    else:
        optimizer = optimizer_class(groups, **options)
    if clip_type == "full_model" and clip_value > 0:
        clip_full_model_gradients(optimizer, clip_value)
    return optimizer


def _fused_on_cpu(group: dict[str, Any]) -> dict[str, Any]:
    """Parameters on a CPU with the option of AdamW's compiled step there: one pass over memory in place of many.

    The optimizer's own option would give it the gradients that a ``GradScaler`` has scaled, which must not be clipped.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in group["params"])
    return {**group, "fused": True} if on_cpu else group


def _with_parameter_clipping(optimizer_class: Any, clip_type: str, clip_value: float, norm_type: float) -> Any:
    clipping = {"ENABLED": True, "CLIP_TYPE": clip_type, "CLIP_VALUE": clip_value, "NORM_TYPE": norm_type}
    cfg = CfgNode({"SOLVER": {"CLIP_GRADIENTS": clipping}})
    return maybe_add_gradient_clipping(cfg, optimizer_class)
