"""What every recipe trains with: AdamW on a backbone with ImageNet weights, and the numbers of the loop.

``train.max_iter`` and the schedule are those of a data set: ``schedule_50ep.py``, ``schedule_polynomial.py``.
"""

from detectron2.config import LazyCall as L

from mask2former.engine import build_optimizer

# The model is filled in once it is built.
optimizer = L(build_optimizer)(
    name="ADAMW",
    base_lr=1e-4,
    weight_decay=0.05,
    weight_decay_norm=0.0,
    weight_decay_embed=0.0,
    backbone_multiplier=0.1,
    clip_type="full_model",
    clip_value=0.01,
    shard=False,
)
train = dict(
    output_dir="./output",
    init_checkpoint="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    max_iter="???",
    amp=dict(enabled=True),
    seed=-1,
    device="cuda",
    checkpointer=dict(period=5000, max_to_keep=None),
    eval_period=5000,
    log_period=20,
    expected_results=[],
    best_metric="",
    early_stopping_patience=0,
    ema_decay=0.0,
    accumulation_steps=1,
    reference_batch_size=0,
    wandb_project="",
)
