"""Any of timm's backbones in Detectron2's form."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ...errors import UserError

__all__ = ["TimmBackbone"]

STRIDES = {"stem": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 32}
NORMS = ("BN", "FrozenBN", "folded")


@BACKBONE_REGISTRY.register()
class TimmBackbone(Backbone):
    """Feature maps of a model of the timm library, named by stride as Detectron2's ResNets name them.

    Args:
        name: the model's name in timm, such as ``efficientnet_lite0``.
        out_features: of "stem", "res2", "res3", "res4", "res5": strides 2, 4, 8, 16, 32.
        norm: what becomes of batch norms: "BN" (trained), "FrozenBN" (neither statistics nor affine
            change), or "folded" (part of the convolutions, which then have biases and are trained). A state dict
            with batch norms loads into a folded model: it is folded on the way.
        bn_eps: the batch norms' epsilon; None: timm's.

    Raises:
        UserError: if timm is not installed, has no such model, or the model has no map of a stride asked for.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        norm: str = "FrozenBN",
        bn_eps: float | None = None,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise UserError(f"MODEL.TIMM.NORM must be one of {', '.join(NORMS)}, but is {norm!r}")
        self.norm = norm
        self.body = _create(name).to(memory_format=torch.channels_last)
        if bn_eps is not None:
            for module in self._batch_norms():
                module.eps = bn_eps
        by_stride = {stride: index for index, stride in enumerate(self.body.feature_info.reduction())}
        missing = [feature for feature in out_features if STRIDES.get(feature) not in by_stride]
        if missing:
            raise UserError(f"timm's {name} has feature maps of strides {sorted(by_stride)}, so none for {missing}")
        channels = self.body.feature_info.channels()
        self._indices = {feature: by_stride[STRIDES[feature]] for feature in out_features}
        self._shapes = {
            feature: ShapeSpec(channels=channels[index], stride=STRIDES[feature])
            for feature, index in self._indices.items()
        }
        if norm == "FrozenBN":
            for module in self._batch_norms():
                module.requires_grad_(False)
        if norm == "folded":
            self._folded = _fold_batch_norms(self.body)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        keys = cfg.MODEL.TIMM
        return {"name": keys.NAME, "out_features": keys.OUT_FEATURES, "norm": keys.NORM, "bn_eps": keys.BN_EPS}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map normalised pictures (B, 3, H, W) to feature maps by name."""
        maps = self.body(x.contiguous(memory_format=torch.channels_last))  # depthwise: 2 to 5 times as fast on a CPU
        return {feature: maps[index] for feature, index in self._indices.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature map."""
        return self._shapes

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride, in pixels."""
        return max(STRIDES[feature] for feature in self._indices)

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Switch to training; frozen batch norms stay as they are."""
        super().train(mode)
        if self.norm == "FrozenBN":
            for module in self._batch_norms():
                module.eval()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if self.norm == "folded":
            _fold_state_dict(self._folded, state_dict, f"{prefix}body.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _batch_norms(self) -> list[nn.BatchNorm2d]:
        return [module for module in self.body.modules() if isinstance(module, nn.BatchNorm2d)]


def _create(name: str) -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(f"backbone {name} comes from the timm library: pip install timm") from error
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8])
        raise UserError(f"timm has no model {name!r}" + (f"; similar names: {similar}" if similar else ""))
    return timm.create_model(name, features_only=True)


def _fold_batch_norms(body: nn.Module) -> list[tuple[str, str, float]]:
    """Take the batch norms out of ``body``; names of each convolution and its former norm, and the norm's epsilon."""
    folded: list[tuple[str, str, float]] = []
    conv_name = ""
    for name, module in list(body.named_modules()):
        if isinstance(module, nn.Conv2d):
            conv_name = name
        elif isinstance(module, nn.BatchNorm2d):
            conv = body.get_submodule(conv_name)
            if conv.out_channels != module.num_features or conv.bias is not None:
                raise UserError(f"batch norm {name} does not follow a convolution: MODEL.TIMM.NORM can't be folded")
            conv.bias = nn.Parameter(torch.zeros(conv.out_channels))
            parent, _, child = name.rpartition(".")
            setattr(body.get_submodule(parent), child, getattr(module, "act", nn.Identity()))
            folded.append((conv_name, name, module.eps))
    return folded


def _fold_state_dict(folded: Sequence[tuple[str, str, float]], state_dict: dict[str, Tensor], prefix: str) -> None:
    """Turn batch norms in ``state_dict`` into weights and biases of their convolutions."""
    for conv, norm, eps in folded:
        conv_key, norm_key = f"{prefix}{conv}", f"{prefix}{norm}"
        if f"{norm_key}.running_var" not in state_dict:
            continue
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, shift = (state_dict.pop(f"{norm_key}.{name}") for name in names)
        state_dict.pop(f"{norm_key}.num_batches_tracked", None)
        weight, bias = fuse_conv_bn_weights(state_dict[f"{conv_key}.weight"], None, mean, variance, eps, scale, shift)
        state_dict[f"{conv_key}.weight"], state_dict[f"{conv_key}.bias"] = weight.detach(), bias.detach()
