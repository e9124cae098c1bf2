"""Names of other projects' state dicts, turned into those of this model: a file for each project."""

from .efficientnet import EFFICIENTNET
from .format import Format, Names, Weights
from .huggingface import HUGGING_FACE, HUGGING_FACE_BACKBONE, to_hugging_face
from .swin import SWIN
from .torchvision import TORCHVISION_RESNET

__all__ = ["Format", "Weights", "find_format", "to_hugging_face"]

FORMATS = (HUGGING_FACE, HUGGING_FACE_BACKBONE, SWIN, TORCHVISION_RESNET, EFFICIENTNET)


def find_format(names: Names) -> Format | None:
    """Whose names these are; None for ours, Detectron2's, and unknown ones."""
    return next((known for known in FORMATS if known.fits(names)), None)
