"""No key is without a test: those that this package adds to Detectron2's, and those that a published recipe sets."""

import gzip
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config_keys import TESTED
from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config

from mask2former.config import get_default_config

# Keys that the published code defines or sets and that none of its image models reads.
READ_BY_NOTHING = {
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS",
    # Of Detectron2's DeepLab head, which the recipes have values for.
    "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS",
    "MODEL.SEM_SEG_HEAD.ASPP_DILATIONS",
    "MODEL.SEM_SEG_HEAD.ASPP_DROPOUT",
    "MODEL.SEM_SEG_HEAD.LOSS_TYPE",
    "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS",
    "MODEL.SEM_SEG_HEAD.PROJECT_FEATURES",
    "MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV",
}
# Keys in the recipes that Detectron2's own code reads, and no code here.
DETECTRON2S = {
    "MODEL.BACKBONE.FREEZE_AT",
    "MODEL.META_ARCHITECTURE",
    "MODEL.RESNETS.DEPTH",
    "MODEL.RESNETS.NORM",
    "MODEL.RESNETS.OUT_FEATURES",
    "MODEL.RESNETS.RES4_DILATION",
    "MODEL.RESNETS.RES5_MULTI_GRID",
    "MODEL.RESNETS.STEM_TYPE",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "SOLVER.LR_SCHEDULER_NAME",
    "SOLVER.MAX_ITER",
    "SOLVER.POLY_LR_CONSTANT_ENDING",
    "SOLVER.POLY_LR_POWER",
    "SOLVER.STEPS",
    "SOLVER.WARMUP_FACTOR",
    "SOLVER.WARMUP_ITERS",
}
# Keys whose tests are in other files, which need more than a small model.
TESTED_ELSEWHERE = {
    "DATALOADER.NUM_WORKERS": "test_engine_train.py",
    "DATASETS.TEST": "test_engine_train.py",
    "DATASETS.TRAIN": "test_engine_train.py",
    "MODEL.WEIGHTS": "test_engine_train.py",
    "TEST.AUG.MAX_SIZE": "test_tta.py",
    "TEST.AUG.MIN_SIZES": "test_tta.py",
    "TEST.EVAL_PERIOD": "test_engine_train.py",
    # Ours, off by default.
    "INPUT.COPY_PASTE_PROBABILITY": "test_data_copy_paste.py",
    "SOLVER.CHECKPOINTS_TO_KEEP": "test_engine_resume.py",
    "SOLVER.EARLY_STOPPING_PATIENCE": "test_engine_selection.py",
    "SOLVER.EMA_DECAY": "test_engine_selection.py",
    "TEST.BEST_METRIC": "test_engine_selection.py",
    "DATASETS.OWN": "test_own_data.py",
    "INPUT.SCALE_TEST": "test_data_mapper.py",
    "MODEL.MASK_FORMER.TEST.INSTANCE_SCORE_THRESHOLD": "test_modeling_inference.py",
    "MODEL.MASK_FORMER.TEST.MASK_NMS_THRESHOLD": "test_modeling_inference.py",
    "MODEL.MASK_FORMER.TEST.TILE_BATCH_SIZE": "test_modeling_inference.py",
    "MODEL.MASK_FORMER.TEST.TILE_OVERLAP": "test_modeling_inference.py",
    "MODEL.MASK_FORMER.TEST.TILE_SIZE": "test_modeling_inference.py",
    "WANDB_PROJECT": "test_engine_writers.py",
    "MODEL.TIMM.BN_EPS": "test_modeling_backbone.py",
    "MODEL.TIMM.NAME": "test_modeling_backbone.py",
    "MODEL.TIMM.NORM": "test_modeling_backbone.py",
    "MODEL.TIMM.OUT_FEATURES": "test_modeling_backbone.py",
}


def keys_of(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_key_has_a_test() -> None:
    """Those that this package adds to Detectron2's, and those that a published recipe sets."""
    for name in ("test_keys_model", "test_keys_swin", "test_keys_training"):
        importlib.import_module(name)
    detectron2s = get_cfg()
    add_deeplab_config(detectron2s)
    added = set(keys_of(get_default_config())) - set(keys_of(detectron2s))
    with gzip.open(Path(__file__).parent / "data" / "published_recipes.json.gz", "rt") as file:
        recipes = {name: keys for name, keys in json.load(file).items() if not name.startswith("youtubevis")}
    defaults = get_default_config()
    set_by_recipes = {
        key for keys in recipes.values() for key, value in keys.items() if value != listed(value_of(defaults, key))
    }
    known = TESTED | READ_BY_NOTHING | DETECTRON2S | TESTED_ELSEWHERE.keys()
    assert (added | set_by_recipes) - known == set()
    assert not READ_BY_NOTHING & TESTED
    folder = Path(__file__).parent
    for key, file_name in TESTED_ELSEWHERE.items():
        assert key.rpartition(".")[2] in (folder / file_name).read_text(encoding="utf-8"), key


def value_of(cfg: CfgNode, dotted_key: str) -> Any:
    for part in dotted_key.split("."):
        cfg = cfg[part]
    return cfg


def listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
