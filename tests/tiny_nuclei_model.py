"""The real model, made small, with random weights, as a recipe and a checkpoint on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from mask2former.checkpoint import write_safetensors
from mask2former.config import get_default_config

__all__ = ["build_tiny_model", "one_thread", "tiny_config", "write_tiny_model"]

RECIPE = """\
VERSION: 2
MODEL:
  META_ARCHITECTURE: MaskFormer
  DEVICE: cpu
  BACKBONE: {NAME: build_resnet_backbone, FREEZE_AT: 0}
  RESNETS:
    DEPTH: 50
    RES2_OUT_CHANNELS: 16
    WIDTH_PER_GROUP: 4
    STEM_OUT_CHANNELS: 16
    STRIDE_IN_1X1: False
    OUT_FEATURES: [res2, res3, res4, res5]
  SEM_SEG_HEAD:
    NAME: MaskFormerHead
    NUM_CLASSES: 2
    PIXEL_DECODER_NAME: MSDeformAttnPixelDecoder
    IN_FEATURES: [res2, res3, res4, res5]
    CONVS_DIM: 32
    MASK_DIM: 32
    NORM: GN
    TRANSFORMER_ENC_LAYERS: 1
  MASK_FORMER:
    TRANSFORMER_IN_FEATURE: multi_scale_pixel_decoder
    HIDDEN_DIM: 32
    NUM_OBJECT_QUERIES: 10
    DEC_LAYERS: 3
    DIM_FEEDFORWARD: 64
    TEST: {INSTANCE_ON: True, PANOPTIC_ON: True, SEMANTIC_ON: True}
INPUT: {FORMAT: RGB, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
DATASETS:
  TRAIN: [nuclei_train]
  TEST: [nuclei_val]
"""


def tiny_config() -> CfgNode:
    """The recipe as a config."""
    cfg = get_default_config()
    cfg.merge_from_other_cfg(CfgNode.load_cfg(RECIPE))
    return cfg


def build_tiny_model() -> nn.Module:
    """The recipe's model on the CPU, with the same random weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(tiny_config())


def write_tiny_model(folder: Path) -> tuple[Path, Path]:
    """Write ``recipe.yaml`` and ``model.safetensors``."""
    recipe, weights = folder / "recipe.yaml", folder / "model.safetensors"
    recipe.write_text(RECIPE, encoding="utf-8")
    write_safetensors(build_tiny_model().state_dict(), str(weights))
    return recipe, weights


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: for so small a model, threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
