"""Loaders and evaluator of every recipe.

A recipe says the data sets, ``dataloader.train.mapper.annotation_reader`` and both mappers' augmentations.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from mask2former.data import MaskFormerDatasetMapper, build_test_loader, build_train_loader
from mask2former.evaluation import build_evaluator

dataloader = dict(
    train=L(build_train_loader)(
        dataset="???",
        mapper=L(MaskFormerDatasetMapper)(
            is_train=True,
            augmentations="???",
            image_format="RGB",
            annotation_reader="???",
        ),
        total_batch_size=16,
        num_workers=4,
        seed="${train.seed}",
        num_classes="${model.sem_seg_head.num_classes}",
    ),
    test=L(build_test_loader)(
        dataset="???",
        mapper=L(MaskFormerDatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333, sample_style="choice")],
            image_format="RGB",
        ),
        num_workers=4,
        num_classes="${model.sem_seg_head.num_classes}",
    ),
    evaluator=L(build_evaluator)(
        dataset_name="${dataloader.test.dataset}",
        output_dir="${train.output_dir}/inference",
        semantic_on="${model.inference.semantic_on}",
        panoptic_on="${model.inference.panoptic_on}",
        instance_on="${model.inference.instance_on}",
    ),
)
