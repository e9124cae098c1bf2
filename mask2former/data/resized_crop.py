"""Resizing and cropping at once, so that what the crop leaves out costs nothing."""

import cv2
import numpy as np
from detectron2.data import transforms as T
from PIL import Image

from ..errors import UserError

__all__ = ["RandomCropOfClasses", "ResizeAndCrop", "ResizedCrop", "in_order"]


class RandomCropOfClasses(T.RandomCrop_CategoryAreaConstraint):
    """A random crop in which no class takes more than a share of the labelled pixels, if ten attempts find one.

    Detectron2's, draw by draw, which needs semantic labels where the share is below 1, with an error that says so. The
    pixels of each class are counted, which takes a fraction of the time that sorting them takes.
    """

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray | None) -> T.Transform:
        if self.single_category_max_area >= 1:
            return self.crop_aug.get_transform(image)
        if sem_seg is None:
            raise UserError(
                f"INPUT.CROP.SINGLE_CATEGORY_MAX_AREA is {self.single_category_max_area}, which needs semantic labels, "
                "but the pictures have none (no 'sem_seg_file_name'): set it to 1.0"
            )
        for _ in range(10):
            crop = self.crop_aug.get_transform(sem_seg)
            if self._is_mixed(crop.apply_segmentation(sem_seg)):
                break
        return crop

    def _is_mixed(self, labels: np.ndarray) -> bool:
        counts = np.bincount(labels.astype(np.intp).ravel())
        if self.ignored_category is not None:
            counts[self.ignored_category : self.ignored_category + 1] = 0
        return bool(np.count_nonzero(counts) > 1 and counts.max() < counts.sum() * self.single_category_max_area)


class ResizedCrop(T.Transform):
    """Resize, crop, pad as Detectron2's transforms in turn do it, but only the pixels that the crop keeps are computed.

    Labels are the same ones. Of a picture, which Pillow resizes from a window given with 24 bits of precision, some
    pixels on the brink of rounding differ by one grey level. What Pillow can't resize takes the steps in turn.
    """

    def __init__(self, resize: T.ResizeTransform, crop: T.CropTransform, pad: T.PadTransform | None = None) -> None:
        super().__init__()
        self.resize = resize
        self.crop = crop
        self.pad = T.PadTransform(0, 0, 0, 0) if pad is None else pad

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        if img.dtype != np.uint8 or img.shape[2:] != (3,):
            return self.pad.apply_image(self.crop.apply_image(self.resize.apply_image(img)))
        pad, (rows, columns) = self.pad, self._kept()
        height, width = rows.stop - rows.start, columns.stop - columns.start
        # Channels apart, as samples have them, are also what Pillow takes and gives with the fewest copies.
        padded = np.full((3, pad.y0 + height + pad.y1, pad.x0 + width + pad.x1), pad.pad_value, dtype=np.uint8)
        inside = padded[:, pad.y0 : pad.y0 + height, pad.x0 : pad.x0 + width]
        window = self._source(rows, columns)
        for resized, channel in zip(inside, cv2.split(in_order(img)), strict=True):
            resized[:] = np.asarray(Image.fromarray(channel).resize((width, height), self.resize.interp, box=window))
        return padded.transpose(1, 2, 0)

    def _source(self, rows: slice, columns: slice) -> tuple[float, float, float, float]:
        """Where in the picture (x0, y0, x1, y1, in pixels) rows and columns of the resized picture come from."""
        resize = self.resize
        x_step, y_step = resize.w / resize.new_w, resize.h / resize.new_h
        x1, y1 = min(columns.stop * x_step, resize.w), min(rows.stop * y_step, resize.h)
        return columns.start * x_step, rows.start * y_step, x1, y1

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Nearest neighbours along one axis don't depend on the other, so they are looked up for each alone."""
        kept_rows, kept_columns = self._kept()
        nearest = _nearest_of_pillow if segmentation.dtype == np.uint8 else _nearest_of_torch
        rows = nearest(self.resize.h, self.resize.new_h)[kept_rows]
        columns = nearest(self.resize.w, self.resize.new_w)[kept_columns]
        segmentation = in_order(segmentation)
        if len(rows) < self.resize.h:
            kept = segmentation.take(rows, axis=0).take(columns, axis=1)
        else:
            kept = segmentation.take(columns, axis=1).take(rows, axis=0)
        pad = self.pad
        return pad.apply_segmentation(kept) if any((pad.x0, pad.y0, pad.x1, pad.y1)) else kept

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return self.pad.apply_coords(self.crop.apply_coords(self.resize.apply_coords(coords)))

    def _kept(self) -> tuple[slice, slice]:
        """Rows and columns of the resized picture: a crop may be larger than that."""
        crop, resize = self.crop, self.resize
        return (
            slice(int(crop.y0), min(int(crop.y0 + crop.h), resize.new_h)),
            slice(int(crop.x0), min(int(crop.x0 + crop.w), resize.new_w)),
        )


def in_order(image: np.ndarray) -> np.ndarray:
    """The array in the usual order in memory, where OpenCV makes it several times as fast as NumPy."""
    if image.dtype == np.uint8 and image.ndim == 3 and image.transpose(2, 0, 1).flags.c_contiguous:
        return cv2.merge(list(image.transpose(2, 0, 1))).reshape(image.shape)
    mirrored = image[:, ::-1]
    if image.dtype == np.uint8 and image.size and mirrored.flags.c_contiguous:
        return cv2.flip(mirrored, 1)
    return np.ascontiguousarray(image)


def _nearest_of_pillow(length: int, new_length: int) -> np.ndarray:
    """For each pixel of a line that Pillow resized: the one it was copied from."""
    line = Image.fromarray(np.arange(length, dtype=np.int32)[np.newaxis])
    return np.asarray(line.resize((new_length, 1), Image.Resampling.NEAREST))[0]


def _nearest_of_torch(length: int, new_length: int) -> np.ndarray:
    """Likewise for what Detectron2 resizes by torch, by another rule: everything but uint8."""
    line = np.arange(length, dtype=np.float64)[np.newaxis]
    return T.ResizeTransform(1, length, 1, new_length).apply_segmentation(line)[0].astype(np.intp)


class ResizeAndCrop(T.Augmentation):
    """An augmentation that resizes, then one that crops, with the same draws as one after the other; see ResizedCrop.

    The crop may look at the resized picture's size and labels, but not at its pixels.
    """

    input_args = ("image", "sem_seg")

    def __init__(self, resize: T.Augmentation, crop: T.Augmentation) -> None:
        super().__init__()
        self.resize = resize
        self.crop = crop

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray | None) -> T.Transform:
        resize = self.resize.get_transform(image)
        if not isinstance(resize, T.ResizeTransform):  # it may keep the size
            return T.TransformList([resize, self._get_crop(image, sem_seg)])
        resized = np.broadcast_to(np.uint8(0), (resize.new_h, resize.new_w, 3))
        if sem_seg is not None:
            whole = T.CropTransform(0, 0, resize.new_w, resize.new_h)
            if sem_seg.dtype != np.uint8:  # half of the bytes of float64 has room for all labels
                sem_seg = sem_seg.astype(np.int32)
            sem_seg = ResizedCrop(resize, whole).apply_segmentation(sem_seg)
        crop = self._get_crop(resized, sem_seg)  # and a pad
        return ResizedCrop(resize, *(crop.transforms if isinstance(crop, T.TransformList) else [crop]))

    def _get_crop(self, image: np.ndarray, sem_seg: np.ndarray | None) -> T.Transform:
        if isinstance(self.crop, RandomCropOfClasses):
            return self.crop.get_transform(image, sem_seg)
        return self.crop.get_transform(image)
