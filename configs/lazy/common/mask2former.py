"""The model of the paper on a ResNet-50: deformable pixel decoder, nine layers of masked attention.

A recipe says ``model.sem_seg_head.num_classes``, which every other part takes from there, and what inference makes.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet

from mask2former.modeling import (
    HungarianMatcher,
    InferenceSettings,
    MaskFormer,
    MaskFormerHead,
    MSDeformAttnPixelDecoder,
    MultiScaleMaskedTransformerDecoder,
    SetCriterion,
)

num_classes = "${model.sem_seg_head.num_classes}"

model = L(MaskFormer)(
    backbone=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
        out_features=["res2", "res3", "res4", "res5"],
    ),
    sem_seg_head=L(MaskFormerHead)(
        pixel_decoder=L(MSDeformAttnPixelDecoder)(
            input_shape={
                "res2": L(ShapeSpec)(channels=256, stride=4),
                "res3": L(ShapeSpec)(channels=512, stride=8),
                "res4": L(ShapeSpec)(channels=1024, stride=16),
                "res5": L(ShapeSpec)(channels=2048, stride=32),
            },
            transformer_in_features=["res3", "res4", "res5"],
            conv_dim=256,
            mask_dim=256,
            norm="GN",
            transformer_dropout=0.0,
            transformer_nheads=8,
            transformer_dim_feedforward=1024,
            transformer_enc_layers=6,
            transformer_n_points=4,
            common_stride=4,
        ),
        transformer_predictor=L(MultiScaleMaskedTransformerDecoder)(
            in_channels=256,
            mask_classification=True,
            num_classes=num_classes,
            hidden_dim=256,
            num_queries=100,
            nheads=8,
            dim_feedforward=2048,
            dec_layers=9,
            pre_norm=False,
            mask_dim=256,
            enforce_input_project=False,
        ),
        transformer_in_feature="multi_scale_pixel_decoder",
        num_classes="???",
    ),
    criterion=L(SetCriterion)(
        num_classes=num_classes,
        matcher=L(HungarianMatcher)(cost_class=2.0, cost_mask=5.0, cost_dice=5.0, num_points=12544),
        class_weight=2.0,
        mask_weight=5.0,
        dice_weight=5.0,
        no_object_weight=0.1,
        num_points=12544,
        oversample_ratio=3.0,
        importance_sample_ratio=0.75,
        deep_supervision=True,
    ),
    inference=L(InferenceSettings)(
        semantic_on=False,
        panoptic_on=False,
        instance_on=False,
        thing_classes=None,
        object_mask_threshold=0.8,
        overlap_threshold=0.8,
        max_instances=100,
    ),
    size_divisibility=32,
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    activation_checkpointing=[],
)
