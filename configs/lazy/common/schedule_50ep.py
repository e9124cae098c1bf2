"""50 epochs of COCO in batches of 16: AdamW, the learning rate falling tenfold at 0.89 and 0.96 of the run."""

from detectron2.config import LazyCall as L
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from mask2former.engine import build_optimizer

max_iter = 368750

# The model and the optimizer are filled in once they are built.
optimizer = L(build_optimizer)(
    name="ADAMW",
    base_lr=1e-4,
    weight_decay=0.05,
    weight_decay_norm=0.0,
    weight_decay_embed=0.0,
    backbone_multiplier=0.1,
    clip_type="full_model",
    clip_value=0.01,
)
lr_scheduler = L(LRMultiplier)(
    multiplier=L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[1.0, 0.1, 0.01], milestones=[327778, 355092], num_updates=max_iter
        ),
        warmup_factor=1.0,
        warmup_length=10 / max_iter,
        warmup_method="linear",
    ),
    max_iter="${train.max_iter}",
)
train = dict(
    output_dir="./output",
    init_checkpoint="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    max_iter=max_iter,
    amp=dict(enabled=True),
    seed=-1,
    device="cuda",
    checkpointer=dict(period=5000, max_to_keep=None),
    eval_period=5000,
    log_period=20,
    expected_results=[],
)
