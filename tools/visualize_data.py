#!/usr/bin/env python
"""Draw what a recipe's loader really feeds the model: pictures after augmentation, masks, classes and padding.

Each training sample gives one picture: left what the network sees; right its masks by class, with the padding striped;
and, where the recipe reads label maps, the labels of the pixels. Test samples have no masks.

examples:
  python tools/visualize_data.py --config-file configs/quick/nuclei.yaml --output drawn/
  python tools/visualize_data.py --config-file configs/lazy/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.py \\
      --num 20 --output drawn/ dataloader.train.mapper.augmentations.image_size=512
  python tools/visualize_data.py --config-file configs/quick/nuclei.yaml --split test
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.structures import BitMasks, Instances, PolygonMasks
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig

from mask2former.data.panoptic_files import save_png
from mask2former.drawing import Picture, draw_instances, draw_panoptic, draw_semantic
from mask2former.engine import Recipe, load_recipe
from mask2former.errors import UserError, command
from mask2former.results import Classes

Sample = dict[str, Any]

# Samples come one by one, in this process: no more of them are made than are drawn.
ONE_BY_ONE = ("DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "1")
ONE_BY_ONE_LAZY = (
    "dataloader.train.num_workers=0",
    "dataloader.train.total_batch_size=1",
    "dataloader.test.num_workers=0",
)
WINDOW = "samples: any key for the next, q to stop"
STRIPE = 12  # pixels
STRIPE_COLOR = (255, 0, 200)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    one_by_one = ONE_BY_ONE_LAZY if args.config_file.endswith(".py") else ONE_BY_ONE
    recipe = load_recipe(args.config_file, [*args.opts, *one_by_one])
    if args.seed is not None:
        seed_all_rng(args.seed)
    drawer = _SampleDrawer(recipe.config)
    count = 0
    for sample, metadata in itertools.islice(_samples(recipe, args.split), args.num):
        print(f"{count}: {drawer.describe(sample, metadata)}")
        drawing = drawer.draw(sample, metadata)
        if args.output is not None:
            save_png(args.output / f"{count:03d}_{Path(sample['file_name']).stem}.png", drawing)
        elif not _show(drawing):
            break
        count += 1
    if args.output is not None:
        print(f"{count} pictures in {args.output}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="recipe: YAML, or a LazyConfig (.py)")
    parser.add_argument("--num", type=int, default=8, metavar="N", help="samples to draw; default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for the pictures; default: show them")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="of the augmentations; default: others each time")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the recipe, at the end")
    args = parser.parse_args(arguments)
    if args.num < 1:
        raise UserError(f"--num is {args.num}, expected at least 1")
    return args


def _samples(recipe: Recipe, split: str) -> Iterator[tuple[Sample, Metadata]]:
    """Samples as the model gets them, with the metadata of their data set."""
    if split == "test":
        if not recipe.test_sets:
            raise UserError("the recipe has no test set to draw samples of: leave out --split test")
        for test_set in recipe.test_sets:
            yield from _with_metadata(test_set.build_loader(), test_set.name)
    else:
        yield from _with_metadata(recipe.build_train_loader(), _training_set(recipe.config))


def _with_metadata(loader: Iterable[list[Sample]], name: str) -> Iterator[tuple[Sample, Metadata]]:
    for batch in loader:
        for sample in batch:
            yield sample, MetadataCatalog.get(name)


def _training_set(config: CfgNode | DictConfig) -> str:
    """The first training set: its classes are those of all."""
    names = config.DATASETS.TRAIN if isinstance(config, CfgNode) else config.dataloader.train.dataset
    return names if isinstance(names, str) else names[0]


def _show(drawing: Picture) -> bool:
    """Show a picture until a key is pressed; False if the key was q or Escape."""
    try:
        cv2.imshow(WINDOW, cv2.cvtColor(drawing, cv2.COLOR_RGB2BGR))
        return cv2.waitKey() & 0xFF not in (27, ord("q"))
    except cv2.error as error:
        raise UserError("no window can be opened here: give --output FOLDER") from error


class _SampleDrawer:
    """Draws samples of a recipe, whose config says the order of their colours."""

    def __init__(self, config: CfgNode | DictConfig) -> None:
        if isinstance(config, CfgNode):
            self._image_format = config.INPUT.FORMAT
        else:
            self._image_format = config.dataloader.train.mapper.get("image_format", "RGB")

    def describe(self, sample: Sample, metadata: Metadata) -> str:
        """One line: the file, its size before and after, the share of padding, how many masks of each class."""
        height, width = sample["image"].shape[1:]
        before = f"{sample.get('width', '?')} x {sample.get('height', '?')}"
        parts = [f"{sample['file_name']}  {before} -> {width} x {height}"]
        if "padding_mask" in sample:
            parts.append(f"padding {float(sample['padding_mask'].float().mean()):.0%}")
        if "instances" in sample:
            names = Classes.of(metadata)
            counts = Counter(sample["instances"].gt_classes.tolist())
            parts.append(", ".join(f"{count} {names.name(i)}" for i, count in sorted(counts.items())) or "no masks")
        return "  ".join(parts)

    def draw(self, sample: Sample, metadata: Metadata) -> Picture:
        """The panels of a sample, side by side."""
        image = sample["image"].numpy().transpose(1, 2, 0)
        image = np.ascontiguousarray(image[:, :, ::-1] if self._image_format == "BGR" else image)
        nothing = Instances(image.shape[:2], pred_masks=torch.zeros(0, *image.shape[:2], dtype=torch.bool))
        panels = [draw_instances(image, nothing, metadata)]  # as large as the other panels
        if "instances" in sample:
            striped = _stripe(image, sample["padding_mask"].numpy()) if "padding_mask" in sample else image
            panels.append(_draw_masks(striped, sample["instances"], metadata))
            if "sem_seg" in sample:
                ignore_label = metadata.get("ignore_label", 255)
                panels.append(draw_semantic(striped, sample["sem_seg"].numpy(), metadata, ignore_label=ignore_label))
        return np.concatenate(panels, axis=1)


def _stripe(image: Picture, padding: np.ndarray) -> Picture:
    """The picture with stripes where it is padded."""
    y, x = np.ogrid[: image.shape[0], : image.shape[1]]
    striped = image.copy()
    striped[padding & ((x + y) // STRIPE % 2 == 0)] = STRIPE_COLOR
    return striped


def _draw_masks(image: Picture, targets: Instances, metadata: Metadata) -> Picture:
    """Objects in a colour of their own, and stuff in its class's, where masks don't overlap and some are stuff."""
    things = set(metadata.get("thing_dataset_id_to_contiguous_id", {}).values())
    masks = _as_tensor(targets)
    classes = targets.gt_classes.tolist()
    if metadata.get("stuff_classes") and len(masks) and int(masks.sum(dim=0).max()) <= 1:
        ids = (masks * torch.arange(1, len(masks) + 1)[:, None, None]).sum(dim=0)
        segments = [{"id": i, "category_id": c, "isthing": c in things} for i, c in enumerate(classes, start=1)]
        return draw_panoptic(image, ids, segments, metadata)
    drawn = Instances(targets.image_size, pred_masks=masks, pred_classes=targets.gt_classes)
    return draw_instances(image, drawn, metadata)


def _as_tensor(targets: Instances) -> torch.Tensor:
    """The masks, (N, H, W) bool, of this package's mappers and of Detectron2's."""
    masks = targets.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *targets.image_size)
    return masks.tensor if isinstance(masks, BitMasks) else masks


if __name__ == "__main__":
    command(main)
