"""Swin backbones in the ResNet's place, with the ImageNet weights that the published recipes start from.

``use_swin_tiny(model, train)`` and so on change the ``model`` and ``train`` of a recipe.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from mask2former.modeling import D2SwinTransformer


def use_swin_tiny(model, train):
    """Swin-T, learned on ImageNet-1k."""
    _use_swin(model, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24])
    train.init_checkpoint = "swin_tiny_patch4_window7_224.pkl"


def use_swin_small(model, train):
    """Swin-S, learned on ImageNet-1k."""
    _use_swin(model, embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24])
    train.init_checkpoint = "swin_small_patch4_window7_224.pkl"


def use_swin_base_384(model, train):
    """Swin-B with windows of 12, learned on ImageNet-1k at 384 pixels."""
    _use_swin(
        model,
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=12,
        pretrain_img_size=384,
    )
    train.init_checkpoint = "swin_base_patch4_window12_384.pkl"


def use_swin_base_in21k_384(model, train):
    """Swin-B with windows of 12, learned on ImageNet-21k at 384 pixels."""
    use_swin_base_384(model, train)
    train.init_checkpoint = "swin_base_patch4_window12_384_22k.pkl"


def use_swin_large_in21k_384(model, train):
    """Swin-L with windows of 12, learned on ImageNet-21k at 384 pixels."""
    _use_swin(
        model,
        embed_dim=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        pretrain_img_size=384,
    )
    train.init_checkpoint = "swin_large_patch4_window12_384_22k.pkl"


def _use_swin(model, *, embed_dim, depths, num_heads, window_size=7, pretrain_img_size=224):
    model.backbone = L(D2SwinTransformer)(
        pretrain_img_size=pretrain_img_size,
        patch_size=4,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        window_size=window_size,
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_scale=None,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.3,
        ape=False,
        patch_norm=True,
        out_features=["res2", "res3", "res4", "res5"],
        use_checkpoint=False,
    )
    model.sem_seg_head.pixel_decoder.input_shape = {
        f"res{2 + stage}": L(ShapeSpec)(channels=embed_dim * 2**stage, stride=4 * 2**stage) for stage in range(4)
    }
