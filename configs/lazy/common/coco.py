"""COCO: large-scale jitter in training, the shortest side at 800 pixels in evaluation."""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from mask2former.data import MaskFormerDatasetMapper, build_test_loader, build_train_loader
from mask2former.data.annotations import read_panoptic
from mask2former.data.augmentation import large_scale_jitter
from mask2former.evaluation import build_evaluator

dataloader = dict(
    train=L(build_train_loader)(
        dataset="coco_2017_train_panoptic",
        mapper=L(MaskFormerDatasetMapper)(
            is_train=True,
            augmentations=L(large_scale_jitter)(image_size=1024, min_scale=0.1, max_scale=2.0),
            image_format="RGB",
            annotation_reader=read_panoptic,
        ),
        total_batch_size=16,
        num_workers=4,
        seed="${train.seed}",
        num_classes=133,
    ),
    test=L(build_test_loader)(
        dataset="coco_2017_val_panoptic_with_sem_seg",
        mapper=L(MaskFormerDatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333, sample_style="choice")],
            image_format="RGB",
        ),
        num_workers=4,
        num_classes=133,
    ),
    evaluator=L(build_evaluator)(
        dataset_name="${dataloader.test.dataset}",
        output_dir="${train.output_dir}/inference",
        semantic_on="${model.inference.semantic_on}",
        panoptic_on="${model.inference.panoptic_on}",
        instance_on="${model.inference.instance_on}",
    ),
)
