"""Masks kept as crops behave as the whole masks they stand for."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from mask2former.structures import CroppedMasks, mask_boxes


@pytest.fixture
def masks() -> Tensor:
    masks = torch.zeros(4, 20, 30, dtype=torch.bool)
    masks[0, 3:9, 5:11] = True
    masks[1, 19, 29] = True
    masks[2] = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) < 0.2
    return masks  # the last is empty


def test_boxes_enclose_masks(masks: Tensor) -> None:
    boxes = mask_boxes(masks).tolist()
    assert boxes[0] == [5, 3, 11, 9]
    assert boxes[1] == [29, 19, 30, 20]
    assert boxes[3] == [0, 0, 0, 0]
    y, x = torch.nonzero(masks[2], as_tuple=True)
    assert boxes[2] == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_same_masks_as_a_sequence(masks: Tensor) -> None:
    cropped = CroppedMasks.from_masks(masks)
    assert len(cropped) == 4
    assert all(torch.equal(ours, mask) for ours, mask in zip(cropped, masks, strict=True))
    assert torch.equal(cropped[-1], masks[-1])
    assert np.array_equal(np.asarray(cropped), masks.numpy())
    for index in (slice(1, 3), torch.tensor([2, 0]), torch.tensor([True, False, False, True])):
        assert np.array_equal(np.asarray(cropped[index]), masks[index].numpy())
    joined = CroppedMasks.cat([cropped[:1], cropped[1:]])
    assert np.array_equal(np.asarray(joined), masks.numpy())
    with pytest.raises(IndexError):
        cropped[4]


def test_areas_boxes_and_run_lengths(masks: Tensor) -> None:
    cropped = CroppedMasks.from_masks(masks)
    assert cropped.areas().tolist() == masks.flatten(1).sum(1).tolist()
    assert torch.equal(cropped.boxes().tensor, mask_boxes(masks).float())
    for rle, mask in zip(cropped.rle(), masks, strict=True):
        assert np.array_equal(coco_mask.decode(rle).astype(bool), mask.numpy())


def test_crops_hold_no_more_than_their_boxes(masks: Tensor) -> None:
    cropped = CroppedMasks.from_masks(masks)
    assert [tuple(crop.shape) for crop in cropped.crops[:2]] == [(6, 6), (1, 1)]
    assert cropped.crops[1].untyped_storage().nbytes() == 1
