"""What the tests of the config's keys share: the small model with other values, and which keys have been tested."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances
from test_modeling_criterion import boxes
from tiny_nuclei_model import tiny_config
from torch import nn

TESTED: set[str] = set()

M, H, S = "MODEL.MASK_FORMER.", "MODEL.SEM_SEG_HEAD.", "MODEL.SWIN."

# A small Swin in the small model.
SWIN = {
    "MODEL.BACKBONE.NAME": "D2SwinTransformer",
    f"{S}EMBED_DIM": 16,
    f"{S}DEPTHS": [2, 2, 2, 1],
    f"{S}NUM_HEADS": [1, 2, 4, 8],
    f"{S}WINDOW_SIZE": 4,
}


def effect_of(*keys: str) -> Callable[[Any], Any]:
    """Say which keys a test is about."""
    TESTED.update(keys)
    return lambda test: test


def config(**values: Any) -> CfgNode:
    """The small recipe with values by dotted key, ``__`` for the dots."""
    return with_values({key.replace("__", "."): value for key, value in values.items()})


def with_values(values: dict[str, Any]) -> CfgNode:
    cfg = tiny_config()
    cfg.merge_from_list([item for pair in values.items() for item in pair])
    return cfg


def build(values: dict[str, Any] | None = None) -> nn.Module:
    """The small model with values by dotted key, and the same random weights at every call."""
    torch.manual_seed(0)
    return build_model(with_values(values or {}))


def names(model: nn.Module, part: str = "") -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in model.state_dict().items() if part in name}


def picture(height: int = 64, width: int = 96) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)}


def predict(model: nn.Module, **sizes: int) -> Any:
    with torch.no_grad():
        model.eval()
        images = model.preprocess([picture(**sizes)])
        return model.sem_seg_head(model.backbone(images.tensor))


def train_sample() -> dict[str, Any]:
    instances = Instances((64, 96))
    instances.gt_classes = torch.tensor([0, 1])
    instances.gt_masks = boxes((0, 0, 32, 40), (20, 50, 60, 90), size=(64, 96))
    return {**picture(), "instances": instances}


def losses(model: nn.Module) -> dict[str, float]:
    torch.manual_seed(0)
    with torch.no_grad():
        return {name: loss.item() for name, loss in model.train()([train_sample()]).items()}
