"""What is painted where. How it looks was judged by eye."""

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Instances

from mask2former.drawing import CROWD, OUTPUT_KINDS, Palette, draw, draw_instances, draw_panoptic, draw_semantic
from mask2former.results import Region
from mask2former.structures import CroppedMasks

METADATA = Metadata(thing_classes=["cell"], stuff_classes=["cell", "ground"], stuff_colors=[[200, 0, 0], [0, 0, 200]])
GREY = 100


def grey_picture(height=600, width=900):
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def make_instances(masks):
    instances = Instances(tuple(masks.shape[1:]))
    instances.pred_masks = masks
    instances.pred_boxes = CroppedMasks.from_masks(masks).boxes()
    instances.scores = torch.linspace(0.5, 1, len(masks))
    instances.pred_classes = torch.zeros(len(masks), dtype=torch.int64)
    return instances


def squares(count, side=30, height=600, width=900):
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for index, mask in enumerate(masks):
        row, column = divmod(index, width // (side + 5))
        mask[row * (side + 5) :, column * (side + 5) :][:side, :side] = True
    return masks


def painted(picture, original):
    return (picture != original).any(axis=2)


@pytest.mark.parametrize("cropped", [False, True])
def test_an_instance_is_painted_where_it_is_and_its_hole_is_not(cropped):
    mask = torch.zeros(1, 600, 900, dtype=torch.bool)
    mask[0, 100:300, 200:500] = True
    mask[0, 150:200, 250:300] = False
    instances = make_instances(mask)
    if cropped:
        instances.pred_masks = CroppedMasks.from_masks(mask)
    picture = draw_instances(grey_picture(), instances, METADATA, labels=False)
    np.testing.assert_array_equal(painted(picture, grey_picture()), mask[0].numpy())


def test_a_label_is_written_inside_or_beside():
    instances = make_instances(squares(1, side=200))
    with_label = draw_instances(grey_picture(), instances, METADATA)
    without = draw_instances(grey_picture(), instances, METADATA, labels=False)
    different = painted(with_label, without)
    assert different.any()
    assert not different[200:].any() and not different[:, 200:].any()

    instances = make_instances(squares(1, side=10))
    with_label = draw_instances(grey_picture(), instances, METADATA)
    different = painted(with_label, draw_instances(grey_picture(), instances, METADATA, labels=False))
    assert different.any()
    assert not different[:10, :10].any()


def test_a_crowd_is_counted_instead_of_labelled():
    instances = make_instances(squares(CROWD + 1, side=30))
    with_labels = draw_instances(grey_picture(), instances, METADATA)
    different = painted(with_labels, draw_instances(grey_picture(), instances, METADATA, labels=False))
    # The note in the corner, and nothing else.
    assert different[:30, :100].any()
    different[:30, :100] = False
    assert not different.any()


def test_segments():
    segment_ids = torch.zeros(600, 900, dtype=torch.int32)
    segment_ids[100:500, 100:800] = 1
    segment_ids[200:400, 300:600] = 2
    segments = [
        {"id": 1, "isthing": False, "category_id": 1, "score": 0.9},
        {"id": 2, "isthing": True, "category_id": 0, "score": 0.9},
    ]
    picture = draw_panoptic(grey_picture(), segment_ids, segments, METADATA, labels=False)
    np.testing.assert_array_equal(painted(picture, grey_picture()), segment_ids.numpy() > 0)
    red, green, blue = picture[110, 110].astype(int)
    assert blue > GREY > red == green
    assert (picture[300, 400] != picture[110, 110]).any()


def test_classes_have_their_colours():
    class_ids = np.zeros((600, 900), dtype=np.int64)
    class_ids[:, 450:] = 1
    picture = draw_semantic(grey_picture(), class_ids, METADATA, labels=False).astype(int)
    assert picture[300, 200, 0] > GREY > picture[300, 200, 2]
    assert picture[300, 700, 2] > GREY > picture[300, 700, 0]
    # With names, and with a class that the metadata doesn't know.
    assert draw_semantic(grey_picture(), class_ids + 1, METADATA).shape == (600, 900, 3)


@pytest.mark.parametrize(("side", "factor"), [(800, 1), (401, 1), (400, 2), (256, 3), (64, 4), (1, 4)])
def test_small_pictures_are_drawn_larger(side, factor):
    picture = grey_picture(side, side)
    masks = torch.ones(1, side, side, dtype=torch.bool)
    class_ids = np.zeros((side, side), dtype=np.int64)
    for drawing in (
        draw_instances(picture, make_instances(masks), METADATA),
        draw_semantic(picture, class_ids, METADATA),
    ):
        assert drawing.shape == (side * factor, side * factor, 3)
        assert drawing.dtype == np.uint8


def test_nothing_found():
    instances = make_instances(torch.zeros(0, 600, 900, dtype=torch.bool))
    np.testing.assert_array_equal(draw_instances(grey_picture(), instances, METADATA), grey_picture())
    empty = make_instances(torch.zeros(2, 600, 900, dtype=torch.bool))
    np.testing.assert_array_equal(draw_instances(grey_picture(), empty, METADATA), grey_picture())
    nothing = torch.zeros(600, 900, dtype=torch.int32)
    np.testing.assert_array_equal(draw_panoptic(grey_picture(), nothing, [], METADATA), grey_picture())


def test_draw_gives_what_is_there_and_leaves_the_picture():
    picture, class_ids = grey_picture(), torch.zeros(600, 900, dtype=torch.int32)
    outputs = {
        "sem_seg": torch.rand(2, 600, 900),
        "panoptic_seg": (class_ids, []),
        "instances": make_instances(squares(2)),
    }
    assert tuple(kind for kind, _ in draw(picture, outputs, METADATA)) == OUTPUT_KINDS
    del outputs["panoptic_seg"]
    assert [kind for kind, _ in draw(picture, outputs, METADATA)] == ["instances", "semantic"]
    np.testing.assert_array_equal(picture, grey_picture())


def test_drawing_is_repeatable_and_leaves_random_numbers_alone():
    instances = make_instances(squares(5))
    state = np.random.get_state()[1].copy()
    first = draw_instances(grey_picture(), instances, METADATA)
    np.testing.assert_array_equal(draw_instances(grey_picture(), instances, METADATA), first)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_an_object_of_a_video_keeps_its_colour():
    def square_at(x):
        return Region(np.ones((20, 20), dtype=bool), x, 0)

    palette = Palette()
    first, second = palette.for_objects([square_at(0), square_at(100)])
    assert first != second
    new, moved_second, moved_first = palette.for_objects([square_at(200), square_at(103), square_at(2)])
    assert (moved_first, moved_second) == (first, second)
    assert new not in (first, second)
    # Two objects on one: one of them keeps the colour.
    colors = palette.for_objects([square_at(2), square_at(3)])
    assert colors.count(first) == 1
    assert palette.for_objects([]) == []
