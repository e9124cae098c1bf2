"""Training pictures with rare classes drawn more often."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data.samplers import RepeatFactorTrainingSampler

from ..errors import UserError

__all__ = ["RepeatRareClasses"]


@dataclass(frozen=True)
class RepeatRareClasses:
    """Repeat-factor sampling ("LVIS", Gupta et al., CVPR 2019, appendix B.2) for instance and panoptic data sets.

    A picture comes max(1, sqrt(threshold / f)) times in every round, where f is the share of the pictures that have
    its rarest class. Called with dataset dicts it makes Detectron2's sampler.

    Attributes:
        threshold: share of the pictures; classes in fewer of them are repeated.
        sqrt: take the root, as in the paper; False repeats more.
        seed: of the order; None: another one each run.
    """

    threshold: float
    sqrt: bool = True
    seed: int | None = None

    def __call__(self, dataset_dicts: Sequence[dict[str, Any]]) -> RepeatFactorTrainingSampler:
        """Raises ``UserError`` if a picture has neither instance annotations nor panoptic segments."""
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            [{"annotations": _objects(dataset_dict)} for dataset_dict in dataset_dicts],
            self.threshold,
            sqrt=self.sqrt,
        )
        return RepeatFactorTrainingSampler(factors, seed=self.seed)


def _objects(dataset_dict: dict[str, Any]) -> list[dict[str, Any]]:
    for key in ("annotations", "segments_info"):
        if key in dataset_dict:
            return dataset_dict[key]
    raise UserError(
        "repeat-factor sampling needs instance annotations or panoptic segments, but picture "
        f"'{dataset_dict['file_name']}' has neither: set DATALOADER.SAMPLER_TRAIN to TrainingSampler"
    )
