"""Pixel decoders: from backbone features to mask features and the maps the transformer decoder attends to."""

from .build import build_pixel_decoder
from .msdeformattn import MSDeformAttnPixelDecoder

__all__ = ["MSDeformAttnPixelDecoder", "build_pixel_decoder"]
