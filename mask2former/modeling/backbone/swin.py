"""Swin Transformer (Liu et al., 2021), a backbone of windowed self-attention.

Maps stay channels-last inside, (B, H, W, C), as layer norms and linear layers want them.
Letters: ``B`` batch, ``H`` and ``W`` rows and columns of a map, ``C`` channels, ``M`` heads, ``P`` patch size,
``D`` windows in a map, ``N`` cells in a window (the window size squared).
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ...errors import UserError
from ...ops import Linear
from ..checkpointing import LayerCheckpointing

__all__ = ["D2SwinTransformer"]

# Added to the attention logits of cells that may not see each other. Finite, as the published weights were trained.
BLOCKED = -100.0
INIT_STD = 0.02


@BACKBONE_REGISTRY.register()
class D2SwinTransformer(Backbone):
    """Feature maps of a Swin Transformer: "res2", "res3", ... of strides P, 2P, ..., each with its own layer norm.

    Pictures of any size are taken: they are padded with zeros at the bottom and the right. Stages after the last
    one in ``out_features`` are not built. The defaults are those of Swin-T.

    Args:
        in_channels: channels of the pictures.
        pretrain_img_size: height and width in pixels of the pictures that the absolute position embedding was
            trained for; read with ``ape`` only.
        patch_size: height and width in pixels of a cell of the first map.
        embed_dim: channels of the first map; each further stage doubles them.
        depths: number of blocks in each stage. Every second block shifts its windows by half a window.
        num_heads: attention heads in each stage.
        window_size: height and width of a window in cells.
        mlp_ratio: width of the MLPs' hidden layer, as a multiple of the channels.
        qkv_bias: whether queries, keys and values have biases.
        qk_scale: factor of the attention logits; None: one over the square root of a head's channels.
        drop_rate: dropout after the patch embedding, the attention's projection and the MLP's two layers.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        ape: add a trained absolute position embedding, resized (bicubic) to the map.
        patch_norm: layer norm after the patch embedding.
        out_features: the maps to return, of "res2", "res3", ...
        frozen_stages: -1: train everything. 0: the patch embedding stays as it is, in evaluation mode. 1: the
            position embedding too. From 2 on: the first ``frozen_stages - 1`` stages too.
        use_checkpoint: recompute each block in the backward pass instead of storing its activations.

    Raises:
        UserError: on a value out of range, or values that don't fit together.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int = 3,
        pretrain_img_size: int = 224,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.3,
        ape: bool = False,
        patch_norm: bool = True,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        frozen_stages: int = -1,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        _check_positive(
            PRETRAIN_IMG_SIZE=pretrain_img_size,
            PATCH_SIZE=patch_size,
            EMBED_DIM=embed_dim,
            WINDOW_SIZE=window_size,
            MLP_RATIO=mlp_ratio,
            QK_SCALE=1.0 if qk_scale is None else qk_scale,
        )
        _check_rates(DROP_RATE=drop_rate, ATTN_DROP_RATE=attn_drop_rate, DROP_PATH_RATE=drop_path_rate)
        channels = _stage_channels(embed_dim, depths, num_heads)
        self._stage_of = _stages_by_name(out_features, len(depths))
        num_built = max(self._stage_of.values()) + 1
        if not -1 <= frozen_stages <= len(depths) + 1:
            raise UserError(f"frozen_stages must be from -1 to {len(depths) + 1}, but is {frozen_stages}")
        self.frozen_stages = frozen_stages
        self._size_divisibility = patch_size * 2 ** (len(depths) - 1)
        self._shapes = {
            name: ShapeSpec(channels=channels[stage], stride=patch_size * 2**stage)
            for name, stage in self._stage_of.items()
        }

        self.patch_embed = PatchEmbedding(in_channels, embed_dim, patch_size, patch_norm)
        self.absolute_pos_embed = _position_embedding(embed_dim, pretrain_img_size, patch_size) if ape else None
        self.pos_drop = nn.Dropout(drop_rate)
        block = partial(
            SwinBlock,
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            dropout=drop_rate,
            attention_dropout=attn_drop_rate,
        )
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.layers = nn.ModuleList(
            SwinStage(
                [
                    block(channels[stage], num_heads[stage], shifted=index % 2 == 1, drop_path=rate)
                    for index, rate in enumerate(drop_paths[stage].tolist())
                ],
                window_size=window_size,
                downsample=PatchMerging(channels[stage]) if stage + 1 < num_built else nn.Identity(),
                use_checkpoint=use_checkpoint,
            )
            for stage in range(num_built)
        )
        for stage in sorted(self._stage_of.values()):
            self.add_module(f"norm{stage}", nn.LayerNorm(channels[stage]))
        self.apply(_initialize_linear)
        self._freeze()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        keys = cfg.MODEL.SWIN
        return {
            "in_channels": input_shape.channels,
            "pretrain_img_size": keys.PRETRAIN_IMG_SIZE,
            "patch_size": keys.PATCH_SIZE,
            "embed_dim": keys.EMBED_DIM,
            "depths": keys.DEPTHS,
            "num_heads": keys.NUM_HEADS,
            "window_size": keys.WINDOW_SIZE,
            "mlp_ratio": keys.MLP_RATIO,
            "qkv_bias": keys.QKV_BIAS,
            "qk_scale": keys.QK_SCALE,
            "drop_rate": keys.DROP_RATE,
            "attn_drop_rate": keys.ATTN_DROP_RATE,
            "drop_path_rate": keys.DROP_PATH_RATE,
            "ape": keys.APE,
            "patch_norm": keys.PATCH_NORM,
            "out_features": keys.OUT_FEATURES,
            "use_checkpoint": keys.USE_CHECKPOINT,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map normalised pictures (B, in_channels, height, width) to feature maps (B, C, H, W) by name.

        A map of stride s has ceil(height / s) rows and ceil(width / s) columns.
        """
        if x.dim() != 4:
            raise ValueError(f"a Swin Transformer takes pictures (B, C, height, width), but got {tuple(x.shape)}")
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            position = F.interpolate(self.absolute_pos_embed, size=x.shape[1:3], mode="bicubic")
            x = x + position.permute(0, 2, 3, 1)
        x = self.pos_drop(x)
        maps = []
        for layer in self.layers:
            output, x = layer(x)
            maps.append(output)
        return {
            name: getattr(self, f"norm{stage}")(maps[stage]).permute(0, 3, 1, 2).contiguous()
            for name, stage in self._stage_of.items()
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature map."""
        return dict(self._shapes)

    @property
    def size_divisibility(self) -> int:
        """The last stage's stride in pixels: every map of a picture with such sides is an exact fraction of it."""
        return self._size_divisibility

    def train(self, mode: bool = True) -> "D2SwinTransformer":
        """Switch to training; frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.requires_grad_(False)
            module.eval()
        if self.frozen_stages >= 1 and self.absolute_pos_embed is not None:
            self.absolute_pos_embed.requires_grad_(False)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        if self.frozen_stages < 2:
            return [self.patch_embed]
        return [self.patch_embed, self.pos_drop, *self.layers[: self.frozen_stages - 1]]


class PatchEmbedding(nn.Module):
    """Each P x P square of the picture becomes one cell of the first map."""

    def __init__(self, in_channels: int, channels: int, patch_size: int, norm: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, channels, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, in_channels, height, width) to (B, ceil(height / P), ceil(width / P), C)."""
        height, width = x.shape[-2:]
        right, bottom = (round_up(length, self.patch_size) - length for length in (width, height))
        x = F.pad(x, (0, right, 0, bottom))
        return self.norm(self.proj(x).permute(0, 2, 3, 1).contiguous())


class SwinStage(LayerCheckpointing):
    """Blocks on maps of one size, then what makes the next stage's maps of theirs."""

    def __init__(
        self, blocks: Sequence["SwinBlock"], window_size: int, downsample: nn.Module, use_checkpoint: bool
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.checkpointing = use_checkpoint

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, H, W, C) to this stage's output (B, H, W, C) and the next stage's input."""
        mask = shift_mask(x, self.window_size)
        for block in self.blocks:
            x = self.run_layer(block, x, mask)
        return x, self.downsample(x)


class PatchMerging(nn.Module):
    """Each 2 x 2 cells become one of twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2C)."""
        x = pad_to_multiple(x, 2)
        x = x.unflatten(2, (x.shape[2] // 2, 2)).unflatten(1, (x.shape[1] // 2, 2))  # (B, H/2, row, W/2, column, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H/2, W/2, 4C), the upper left cell first, then the lower left
        return self.reduction(self.norm(x))


class SwinBlock(nn.Module):
    """Self-attention inside windows, then an MLP; each norms its input and is added to it (paper, equation 3).

    ``shifted`` blocks move the windows by half a window down and right, so that cells on both sides of a border
    between two windows meet. The map is rolled for that: the windows at its end hold cells of its start as well,
    which don't see the others.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        window_size: int,
        shifted: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift = window_size // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, num_heads, window_size, qkv_bias, qk_scale, attention_dropout, dropout)
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.norm2 = nn.LayerNorm(channels)
        hidden = int(channels * mlp_ratio)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=Linear(channels, hidden),
                act=nn.GELU(),
                drop1=nn.Dropout(dropout),
                fc2=Linear(hidden, channels),
                drop2=nn.Dropout(dropout),
            )
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C); ``mask`` is the ``shift_mask`` of such maps."""
        x = x + self.drop_path(self._attend(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = pad_to_multiple(x, self.window_size)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = self.attn(split_windows(x, self.window_size), mask if self.shift else None)
        x = join_windows(windows, x.shape[1], x.shape[2], self.window_size)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return x[:, :height, :width]


class WindowAttention(nn.Module):
    """Multi-head self-attention of the cells of each window, with a trained bias for each relative position."""

    relative_position_index: Tensor

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: int,
        qkv_bias: bool,
        qk_scale: float | None,
        attention_dropout: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale
        self.attention_dropout = attention_dropout
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=INIT_STD)
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.qkv = Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = Linear(channels, channels)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map windows (B*D, N, C) to (B*D, N, C), with ``mask`` (D, N, N) added to the logits of all heads."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B*D, M, N, C/M)
        bias = self.relative_position_bias_table[self.relative_position_index]  # (N, N, M)
        bias = bias.permute(2, 0, 1)[None].contiguous()  # (1, M, N, N), contiguous: fused kernels ask for it
        if mask is not None:
            bias = bias + mask[:, None]  # (D, M, N, N)
            bias = bias.expand(len(x) // len(mask), -1, -1, -1, -1).flatten(0, 1)  # (B*D, M, N, N)
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bias.to(q.dtype),
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))


def relative_position_index(window_size: int) -> Tensor:
    """Row of the bias table for each pair of a window's cells, (N, N): by rows apart first, then by columns apart."""
    cell = torch.arange(window_size)
    apart = cell[:, None] - cell + window_size - 1  # from 0 to 2 * window_size - 2
    index = apart[:, None, :, None] * (2 * window_size - 1) + apart[:, None, :]  # (row, column, row, column)
    return index.flatten(2).flatten(0, 1)


def shift_mask(x: Tensor, window_size: int) -> Tensor:
    """What is added to the attention logits in the shifted windows of maps like ``x`` (B, H, W, C): (D, N, N).

    Maps padded to whole windows and rolled by half a window end with rows and columns that come from their start.
    Two cells of a window get ``BLOCKED`` where such a seam lies between them, else 0.
    """
    shift = window_size // 2
    height, width = (round_up(length, window_size) for length in x.shape[1:3])
    rolled_row = torch.arange(height, device=x.device) >= height - shift
    rolled_column = torch.arange(width, device=x.device) >= width - shift
    region = 2 * rolled_row[:, None].int() + rolled_column  # (H, W)
    region = split_windows(region[None, :, :, None], window_size).flatten(1)  # (D, N)
    apart = region[:, :, None] != region[:, None, :]
    return x.new_zeros(apart.shape).masked_fill(apart, BLOCKED)


def split_windows(x: Tensor, window_size: int) -> Tensor:
    """Cut maps (B, H, W, C) into windows (B*D, N, C), row by row."""
    rows, columns = (length // window_size for length in x.shape[1:3])
    x = x.unflatten(2, (columns, window_size)).unflatten(1, (rows, window_size))  # (B, rows, row, columns, column, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def join_windows(windows: Tensor, height: int, width: int, window_size: int) -> Tensor:
    """Put windows (B*D, N, C) together to maps (B, H, W, C): the inverse of ``split_windows``."""
    grid = (-1, height // window_size, width // window_size)
    x = windows.unflatten(1, (window_size, window_size)).unflatten(0, grid)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zeros at the bottom and right of (B, H, W, C), up to H and W that are multiples of ``multiple``."""
    bottom, right = (round_up(length, multiple) - length for length in x.shape[1:3])
    if torch.compiler.is_compiling() or bottom or right:  # compiled, it would be one graph with and one without
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    return x


def round_up(length: int, multiple: int) -> int:
    """The next multiple of ``multiple``. In this form torch.compile can simplify it where the length is a symbol."""
    return (length + multiple - 1) // multiple * multiple


def _position_embedding(channels: int, picture_size: int, patch_size: int) -> nn.Parameter:
    """Absolute position embedding (1, C, H, W) of square pictures."""
    if picture_size < patch_size:
        raise UserError(
            f"MODEL.SWIN.PRETRAIN_IMG_SIZE is {picture_size}, but must be at least MODEL.SWIN.PATCH_SIZE, {patch_size}"
        )
    grid = picture_size // patch_size
    embedding = nn.Parameter(torch.empty(1, channels, grid, grid))
    nn.init.trunc_normal_(embedding, std=INIT_STD)
    return embedding


def _initialize_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_positive(**values: float) -> None:
    for key, value in values.items():
        if not value > 0:
            raise UserError(f"MODEL.SWIN.{key} must be greater than 0, but is {value}")


def _check_rates(**rates: float) -> None:
    for key, rate in rates.items():
        if not 0 <= rate < 1:
            raise UserError(f"MODEL.SWIN.{key} is a probability and must be from 0 to below 1, but is {rate}")


def _stage_channels(embed_dim: int, depths: Sequence[int], num_heads: Sequence[int]) -> list[int]:
    """Channels of each stage's maps, once it is sure that the stages can be built."""
    if len(depths) != len(num_heads) or not depths:
        raise UserError(
            "MODEL.SWIN.DEPTHS and MODEL.SWIN.NUM_HEADS need one value for each stage, "
            f"but are {list(depths)} and {list(num_heads)}"
        )
    if min(*depths, *num_heads) < 1:
        raise UserError(
            "MODEL.SWIN.DEPTHS and MODEL.SWIN.NUM_HEADS must be at least 1, "
            f"but are {list(depths)} and {list(num_heads)}"
        )
    channels = [embed_dim * 2**stage for stage in range(len(depths))]
    for stage, (width, heads) in enumerate(zip(channels, num_heads, strict=True)):
        if width % heads:
            raise UserError(
                f"stage {stage} has {width} channels (MODEL.SWIN.EMBED_DIM is {embed_dim}), "
                f"which {heads} heads (MODEL.SWIN.NUM_HEADS) can't share evenly"
            )
    return channels


def _stages_by_name(out_features: Sequence[str], num_stages: int) -> dict[str, int]:
    """Stage of each feature in ``out_features``, in the stages' order."""
    names = [f"res{stage + 2}" for stage in range(num_stages)]
    if not out_features or not set(out_features) <= set(names):
        raise UserError(f"MODEL.SWIN.OUT_FEATURES must be some of {names}, but is {list(out_features)}")
    return {name: stage for stage, name in enumerate(names) if name in out_features}
