"""Test-time augmentation of semantic segmentation: the mean over resized and mirrored pictures."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.modeling import DatasetMapperTTA
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..batches import batches_of_equal_size
from ..data import read_image
from ..errors import UserError
from ..ops import best_classes
from .meta_arch import MaskFormer

__all__ = ["SemanticSegmentorWithTTA"]

Sample = dict[str, Any]


class SemanticSegmentorWithTTA(nn.Module):
    """A model that segments each picture several times, resized and mirrored, and gives the mean class scores.

    Takes the place of the model in evaluation. It augments the samples that it is given, so with a data loader
    pictures have been resized once before, as in the published code.

    Built from a config, ``SemanticSegmentorWithTTA(cfg, model)``, it augments as ``TEST.AUG`` says; or from values,
    ``SemanticSegmentorWithTTA(model=model, tta_mapper=DatasetMapperTTA(min_sizes=..., max_size=..., flip=...))``.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        tta_mapper: Callable[[Sample], list[Sample]],
        batch_size: int = 1,
        image_format: str = "RGB",
    ) -> None:
        """
        Args:
            model: in evaluation mode gives ``sem_seg``, scores (K, height, width), for samples with ``image``,
                ``height`` and ``width``: ``MaskFormer``, or Detectron2's ``SemanticSegmentor``. Of a
                ``MaskFormer`` the semantic result alone is made.
            tta_mapper: from a sample to its augmented versions, each with what was done to it in ``transforms``.
            batch_size: augmented pictures of equal size that go through the model together.
            image_format: channel order in which pictures given by their file alone are read.
        """
        super().__init__()
        self.model: Any = model.module if isinstance(model, DistributedDataParallel) else model
        self.tta_mapper = tta_mapper
        self.batch_size = batch_size
        self.image_format = image_format
        self.training = self.model.training

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        tta_mapper: Callable[[Sample], list[Sample]] | None = None,
        batch_size: int = 1,
    ) -> dict[str, Any]:
        return {
            "model": model,
            "tta_mapper": tta_mapper or DatasetMapperTTA(cfg),
            "batch_size": batch_size,
            "image_format": cfg.INPUT.FORMAT,
        }

    def forward(self, batched_inputs: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """Segment pictures, one after the other.

        Args:
            batched_inputs: samples with ``image`` (3, h, w), or with ``file_name``, which is read where there is no
                ``image``; ``height`` and ``width``, the size of the results, are by default the picture's own.

        Returns:
            For each ``{"sem_seg": mean scores (K, height, width)}``, and nothing else; of a ``MaskFormer`` that gives
            labels in place of scores, their best classes (height, width).

        Raises:
            UserError: the model gives no semantic scores.
        """
        labels = isinstance(self.model, MaskFormer) and self.model.inference.semantic_labels
        with torch.no_grad(), _semantic_alone(self.model):
            scores = (self._mean_scores(self._complete(sample)) for sample in batched_inputs)
            return [{"sem_seg": best_classes(mean) if labels else mean} for mean in scores]

    def _complete(self, sample: Sample) -> Sample:
        """The sample with ``image``, ``height`` and ``width``."""
        sample = dict(sample)
        if "image" not in sample:
            pixels = read_image(sample["file_name"], self.image_format)
            sample["image"] = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        sample.setdefault("height", sample["image"].shape[1])
        sample.setdefault("width", sample["image"].shape[2])
        return sample

    def _mean_scores(self, sample: Sample) -> Tensor:
        """The mean over all versions; only the sum is kept while the model runs, however many they are."""
        versions = self.tta_mapper(sample)
        total: Tensor | None = None
        for batch in batches_of_equal_size(versions, self.batch_size):
            total = self._add_scores(batch, total)
        if total is None:
            raise UserError("test-time augmentation got no version of the picture: TEST.AUG.MIN_SIZES is empty")
        return total.div_(len(versions))

    def _add_scores(self, batch: list[Sample], total: Tensor | None) -> Tensor:
        """``total`` and the scores of a batch of versions, turned back where they are mirrored."""
        mirrored = [_is_mirrored(version.pop("transforms")) for version in batch]
        for output, flip in zip(self.model(batch), mirrored, strict=True):
            if "sem_seg" not in output:
                raise UserError(
                    "test-time augmentation needs semantic scores ('sem_seg'), but the model gives "
                    f"{', '.join(output) or 'nothing'}"
                )
            scores = output["sem_seg"].flip(2) if flip else output["sem_seg"]
            total = scores if total is None else total.add_(scores)
        assert total is not None  # batches are not empty
        return total


def _semantic_alone(model: nn.Module) -> AbstractContextManager[None]:
    """Let a ``MaskFormer`` make semantic scores alone in the block, the same as it would with other results."""
    if not isinstance(model, MaskFormer):
        return nullcontext()
    settings = model.inference
    others = settings.panoptic_on or settings.instance_on
    return model.other_inference(
        panoptic_on=False,
        instance_on=False,
        resize_before_inference=settings.resize_before_inference or others,
        semantic_labels=False,
    )


def _is_mirrored(transforms: T.TransformList) -> bool:
    return any(isinstance(transform, T.HFlipTransform) for transform in transforms.transforms)
