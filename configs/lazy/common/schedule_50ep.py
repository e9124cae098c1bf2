"""50 epochs of COCO in batches of 16, the learning rate falling tenfold at 0.89 and 0.96 of the run."""

from detectron2.config import LazyCall as L
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from .training import optimizer, train

__all__ = ["lr_scheduler", "optimizer", "train"]

train.max_iter = 368750
# The optimizer is filled in once it is built.
lr_scheduler = L(LRMultiplier)(
    multiplier=L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[1.0, 0.1, 0.01], milestones=[327778, 355092], num_updates=train.max_iter
        ),
        warmup_factor=1.0,
        warmup_length=10 / train.max_iter,
        warmup_method="linear",
    ),
    max_iter="${train.max_iter}",
)
