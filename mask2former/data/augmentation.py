"""Augmentations: Detectron2's, put together for each mapper, and the few that it lacks.

The functions that return lists take a config (``large_scale_jitter(cfg)``) or plain keyword values.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform

from ..errors import UserError
from .resized_crop import RandomCropOfClasses, ResizeAndCrop, in_order

__all__ = [
    "ColorAugSSD",
    "PadToMultiple",
    "RandomColorCurve",
    "RandomScaledCrop",
    "ScaleImage",
    "build_test_augmentations",
    "large_scale_jitter",
    "microscopy",
    "resize_and_crop",
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


class PadToMultiple(T.Augmentation):
    """Pad on the right and at the bottom with grey (label 255) until both sides are multiples of ``divisor`` pixels."""

    def __init__(self, divisor: int) -> None:
        super().__init__()
        if divisor < 1:
            raise ValueError(f"expected a divisor of at least 1 pixel, got {divisor}")
        self.divisor = divisor

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        if height % self.divisor == width % self.divisor == 0:
            return T.NoOpTransform()
        return T.PadTransform(
            x0=0,
            y0=0,
            x1=-width % self.divisor,
            y1=-height % self.divisor,
            orig_w=width,
            orig_h=height,
            pad_value=_PADDING_GREY,
            seg_pad_value=_PADDING_LABEL,
        )


class ColorAugSSD(ColorAugSSDTransform):
    """Detectron2's random colours, the same to the bit: curves from grey value to grey value are looked up in tables.

    256 values go through Detectron2's arithmetic in place of each pixel, and channels are kept in the usual order in
    memory, which everything after this goes through faster.
    """

    def __init__(self, image_format: str) -> None:
        """``image_format`` is "RGB" or "BGR"."""
        super().__init__("BGR")
        self.image_format = image_format

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        if self.image_format == "BGR":
            return super().apply_image(in_order(img))
        blue_first = super().apply_image(cv2.cvtColor(in_order(img), cv2.COLOR_RGB2BGR))
        return cv2.cvtColor(blue_first, cv2.COLOR_BGR2RGB)

    def convert(self, img: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        return cv2.LUT(img, super().convert(np.arange(256, dtype=np.uint8), alpha, beta))

    def saturation(self, img: np.ndarray) -> np.ndarray:
        if not random.randrange(2):
            return img
        factor = random.uniform(self.saturation_low, self.saturation_high)
        hue, saturation, value = cv2.split(cv2.cvtColor(img, cv2.COLOR_BGR2HSV))
        return cv2.cvtColor(cv2.merge([hue, self.convert(saturation, alpha=factor), value]), cv2.COLOR_HSV2BGR)

    def hue(self, img: np.ndarray) -> np.ndarray:
        if not random.randrange(2):
            return img
        shift = random.randint(-self.hue_delta, self.hue_delta)
        hue, saturation, value = cv2.split(cv2.cvtColor(img, cv2.COLOR_BGR2HSV))
        turned = cv2.LUT(hue, ((np.arange(256) + shift) % 180).astype(np.uint8))
        return cv2.cvtColor(cv2.merge([turned, saturation, value]), cv2.COLOR_HSV2BGR)


def _flips(flip: str) -> list[T.Augmentation]:
    """A flip of every other picture: "horizontal", "vertical" or "none"."""
    if flip not in ("horizontal", "vertical", "none"):
        raise UserError(f"INPUT.RANDOM_FLIP is '{flip}', expected horizontal, vertical or none")
    return [] if flip == "none" else [T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")]


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
    return [
        *_flips(flip),
        ResizeAndCrop(
            T.ResizeScale(min_scale, max_scale, target_height=image_size, target_width=image_size),
            T.FixedSizeCrop((image_size, image_size), pad_value=_PADDING_GREY, seg_pad_value=_PADDING_LABEL),
        ),
    ]


def _resize_and_crop_from_config(cfg: CfgNode) -> dict[str, Any]:
    crop = cfg.INPUT.CROP
    return {
        "min_size": cfg.INPUT.MIN_SIZE_TRAIN,
        "max_size": cfg.INPUT.MAX_SIZE_TRAIN,
        "min_size_sampling": cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
        "crop_type": crop.TYPE if crop.ENABLED else None,
        "crop_size": crop.SIZE,
        "single_category_max_area": crop.SINGLE_CATEGORY_MAX_AREA,
        "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        "color_aug_ssd": cfg.INPUT.COLOR_AUG_SSD,
        "image_format": cfg.INPUT.FORMAT,
        "flip": cfg.INPUT.RANDOM_FLIP,
    }


@configurable(from_config=_resize_and_crop_from_config)
def resize_and_crop(
    *,
    min_size: int | Sequence[int],
    max_size: int,
    min_size_sampling: str = "choice",
    crop_type: str | None = None,
    crop_size: Sequence[float] | None = None,
    single_category_max_area: float = 1.0,
    ignore_label: int = 255,
    color_aug_ssd: bool = False,
    image_format: str = "RGB",
    flip: str = "horizontal",
) -> list[T.Augmentation | T.Transform]:
    """What the mask_former_* mappers run: resize, crop, change colours, flip.

    Args:
        min_size: lengths of the shorter side to draw from, in pixels (a range if ``min_size_sampling`` is "range").
        max_size: the longer side is at most this, in pixels.
        crop_type, crop_size: as in ``detectron2.data.transforms.RandomCrop``; a ``crop_type`` of None: no crop.
        single_category_max_area: crop again while one class takes more than this share of the labelled pixels, up to
            ten times (1.0: any crop will do). Less than 1.0 needs semantic labels, in which ``ignore_label`` is none.
        color_aug_ssd: random brightness, contrast, saturation and hue ("SSD", Liu et al., 2016); ``image_format`` is
            "RGB" or "BGR".
        flip: "horizontal", "vertical" or "none".
    """
    resize = T.ResizeShortestEdge(min_size, max_size, min_size_sampling)
    augmentations: list[T.Augmentation | T.Transform] = [resize]
    if crop_type is not None:
        crop = RandomCropOfClasses(crop_type, crop_size, single_category_max_area, ignore_label)
        augmentations = [ResizeAndCrop(resize, crop)]
    if color_aug_ssd:
        augmentations.append(ColorAugSSD(image_format))
    return [*augmentations, *_flips(flip)]


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
