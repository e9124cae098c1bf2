"""Augmentations: Detectron2's, put together for each mapper, and the few that it lacks.

The functions that return lists take a config (``large_scale_jitter(cfg)``) or plain keyword values.
"""

import math
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T

__all__ = [
    "RandomColorCurve",
    "RandomScaledCrop",
    "ScaleImage",
    "build_test_augmentations",
    "large_scale_jitter",
    "microscopy",
]

# Fill of padded picture pixels, as Detectron2's FixedSizeCrop has it: mid-grey.
_PADDING_GREY = 128
# Fill of padded label pixels: "ignore".
_PADDING_LABEL = 255


def _scaled(length: int, factor: float) -> int:
    return max(1, round(length * factor))


class ScaleImage(T.Augmentation):
    """Resize by a fixed factor, whatever the picture's size: for pictures whose pixels have a physical size."""

    def __init__(self, factor: float) -> None:
        """``factor`` > 1 enlarges."""
        super().__init__()
        self.factor = factor

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        return T.ResizeTransform(height, width, _scaled(height, self.factor), _scaled(width, self.factor))


class RandomScaledCrop(T.Augmentation):
    """A random square window of the picture, enlarged by a random factor to ``crop_size`` x ``crop_size`` pixels.

    The factor is drawn log-uniformly from [``min_scale``, ``max_scale``] and is relative to the picture's own
    size. The window is cut before it is resized, so the rest of the picture costs nothing. Where the enlarged
    picture is smaller than ``crop_size`` it is padded on the right and at the bottom with grey (label 255).
    """

    def __init__(self, crop_size: int, min_scale: float, max_scale: float) -> None:
        super().__init__()
        if not 0 < min_scale <= max_scale:
            raise ValueError(f"expected 0 < min_scale <= max_scale, got {min_scale} and {max_scale}")
        self.crop_size = crop_size
        self.min_scale = min_scale
        self.max_scale = max_scale

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        scale = math.exp(np.random.uniform(math.log(self.min_scale), math.log(self.max_scale)))
        y0, window_height, new_height = self._place(height, scale)
        x0, window_width, new_width = self._place(width, scale)
        size = self.crop_size
        return T.TransformList(
            [
                T.CropTransform(x0, y0, window_width, window_height, width, height),
                T.ResizeTransform(window_height, window_width, new_height, new_width),
                T.PadTransform(
                    x0=0,
                    y0=0,
                    x1=size - new_width,
                    y1=size - new_height,
                    orig_w=new_width,
                    orig_h=new_height,
                    pad_value=_PADDING_GREY,
                    seg_pad_value=_PADDING_LABEL,
                ),
            ]
        )

    def _place(self, length: int, scale: float) -> tuple[int, int, int]:
        """The window's start and length in the picture, and its length after resizing, along one axis."""
        window = _scaled(self.crop_size, 1 / scale)
        if window <= length:
            return np.random.randint(length - window + 1), window, self.crop_size
        return 0, length, min(_scaled(length, scale), self.crop_size)


class RandomColorCurve(T.Augmentation):
    """Random tone of an 8-bit picture: gamma, contrast, brightness, a gain for each channel, inversion.

    All are curves from grey value to grey value, so they are one look-up table for each channel.
    """

    def __init__(
        self,
        gamma: float = 1.5,
        contrast: float = 0.3,
        brightness: float = 0.3,
        channel_gain: float = 0.15,
        invert_probability: float = 0.1,
    ) -> None:
        """Each range is symmetric about "no change", and none pushes dark objects on a black ground below zero.

        ``gamma``: exponents from 1 / gamma to gamma, log-uniformly, of grey relative to the picture's brightest.
        ``contrast``: factors about the mean grey from 1 - contrast to 1 + contrast. ``brightness``: factors from
        1 - brightness to 1 + brightness. ``channel_gain``: likewise, for each channel on its own.
        """
        super().__init__()
        self.gamma = gamma
        self.contrast = contrast
        self.brightness = brightness
        self.channel_gain = channel_gain
        self.invert_probability = invert_probability

    def get_transform(self, image: np.ndarray) -> T.Transform:
        gamma = self.gamma ** np.random.uniform(-1, 1)
        contrast = 1 + np.random.uniform(-self.contrast, self.contrast)
        brightness = 1 + np.random.uniform(-self.brightness, self.brightness)
        gains = 1 + np.random.uniform(-self.channel_gain, self.channel_gain, size=image.shape[2])
        invert = np.random.uniform() < self.invert_probability

        brightest, mean = max(1, int(image.max())), image.mean()
        curve = brightest * (np.arange(256) / brightest) ** gamma
        curve = (curve - mean) * contrast + mean
        curves = curve[:, np.newaxis] * brightness * gains  # (256, C)
        if invert:
            curves = 255 - curves
        table = np.round(np.clip(curves, 0, 255)).astype(np.uint8)[np.newaxis]
        return T.ColorTransform(lambda picture: cv2.LUT(np.ascontiguousarray(picture), table).reshape(picture.shape))


def _large_scale_jitter_from_config(cfg: CfgNode) -> dict[str, Any]:
    return {
        "image_size": cfg.INPUT.IMAGE_SIZE,
        "min_scale": cfg.INPUT.MIN_SCALE,
        "max_scale": cfg.INPUT.MAX_SCALE,
        "flip": cfg.INPUT.RANDOM_FLIP,
    }


@configurable(from_config=_large_scale_jitter_from_config)
def large_scale_jitter(
    *, image_size: int = 1024, min_scale: float = 0.1, max_scale: float = 2.0, flip: str = "horizontal"
) -> list[T.Augmentation]:
    """Large-scale jitter: flip, resize to a random scale, crop or pad to a square of ``image_size`` pixels.

    The scale is uniform in [``min_scale``, ``max_scale``], relative to the picture that just fits the square.
    ``flip`` is "horizontal", "vertical" or "none". Source: "Simple Copy-Paste", Ghiasi et al., 2021.
    """
    flips = [T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")] if flip != "none" else []
    return [
        *flips,
        T.ResizeScale(min_scale, max_scale, target_height=image_size, target_width=image_size),
        T.FixedSizeCrop((image_size, image_size), pad_value=_PADDING_GREY, seg_pad_value=_PADDING_LABEL),
    ]


def _microscopy_from_config(cfg: CfgNode) -> dict[str, Any]:
    return {
        "image_size": cfg.INPUT.IMAGE_SIZE,
        "min_scale": cfg.INPUT.MIN_SCALE,
        "max_scale": cfg.INPUT.MAX_SCALE,
    }


@configurable(from_config=_microscopy_from_config)
def microscopy(*, image_size: int = 256, min_scale: float = 1.5, max_scale: float = 3.0) -> list[T.Augmentation]:
    """Scaled square crops with the symmetries of pictures that have no up and down, and random tone.

    ``min_scale`` and ``max_scale`` are relative to the picture's own size; see ``RandomScaledCrop``.
    """
    return [
        RandomScaledCrop(image_size, min_scale, max_scale),
        T.RandomFlip(horizontal=True, vertical=False),
        T.RandomFlip(horizontal=False, vertical=True),
        T.RandomRotation([0, 90, 180, 270], sample_style="choice"),
        RandomColorCurve(),
    ]


def build_test_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """How a picture is resized before inference: by ``INPUT.SCALE_TEST`` if that is set, else as Detectron2 does."""
    if cfg.INPUT.SCALE_TEST > 0:
        return [ScaleImage(cfg.INPUT.SCALE_TEST)]
    return detection_utils.build_augmentation(cfg, False)
