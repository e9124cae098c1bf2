"""The one way from a picture to results outside training."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.modeling import SemanticSegmentor, build_model
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageOps
from torch import nn

from .batches import batches_of_equal_size
from .checkpoint import load_weights
from .data import build_mapper, read_image
from .data.own import register_rows
from .engine import available_device, load_config
from .errors import UserError
from .modeling import MaskFormer

__all__ = ["Picture", "Predictor"]

Picture: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | torch.Tensor
Outputs: TypeAlias = dict[str, Any]
RGB: TypeAlias = npt.NDArray[np.uint8]


class Predictor:
    """Segments pictures: ``Predictor("recipe.yaml", "model.safetensors")("picture.jpg")``.

    Attributes:
        model: the model, in evaluation mode.
        metadata: of the data set that the recipe is for: names and colours of the classes.
        weights: the file that the model's weights came from.
    """

    def __init__(
        self,
        config: CfgNode | DictConfig | str | os.PathLike[str],
        weights: str | os.PathLike[str] | None = None,
        *,
        device: str | None = None,
        options: Sequence[str] = (),
        confidence_threshold: float | None = None,
        semantic_labels: bool = False,
        batch_size: int = 4,
    ) -> None:
        """Build the model and load its weights.

        Args:
            config: a config, or the path of one: a YAML file, or a LazyConfig (``.py``) with ``model``,
                ``dataloader`` and ``train``, as those of ``configs/lazy`` have.
            weights: file of weights; by default the one that the config names.
            device: such as "cuda:1" or "cpu"; by default the config's. Without CUDA it is the CPU.
            options: KEY, VALUE, KEY, VALUE, ... that replace values of the config.
            confidence_threshold: instances and panoptic segments that score less are left out; by default the
                config's thresholds hold. Semantic output always gives every pixel a class.
            semantic_labels: of a ``MaskFormer`` make ``sem_seg`` the class of each pixel, int32 (H, W), in place of
                scores (K, H, W), which for large pictures are most of the memory; False: as the config says.
            batch_size: how many pictures of equal size go through the model together. Others go one by one,
                since the padding that they would need changes results.

        Raises:
            UserError: the config or the weights can't be read or don't fit, or a value is out of range.
        """
        if confidence_threshold is not None and not 0 <= confidence_threshold <= 1:
            raise UserError(f"expected a confidence threshold from 0 to 1, got {confidence_threshold}")
        if batch_size < 1:
            raise UserError(f"expected a batch size of at least 1, got {batch_size}")
        parts = _build(config, options, device, confidence_threshold)
        self.model = parts.model.eval()
        if semantic_labels and isinstance(self.model, MaskFormer):
            self.model.inference = dataclasses.replace(self.model.inference, semantic_labels=True)
        self.metadata = parts.metadata
        self.weights = os.fspath(weights or parts.weights)
        self._augmentations = parts.mapper.augmentations
        self._image_format = parts.mapper.image_format
        self._batch_size = batch_size
        if not self.weights:
            raise UserError("no weights are given: name the file of a trained model, or set MODEL.WEIGHTS to it")
        load_weights(self.model, self.weights)

    @overload
    def __call__(self, pictures: Picture, *, image_format: str = ...) -> Outputs: ...
    @overload
    def __call__(self, pictures: list[Any] | tuple[Any, ...], *, image_format: str = ...) -> list[Outputs]: ...

    def __call__(self, pictures: Any, *, image_format: str = "BGR") -> Any:
        """Segment a picture, or a list of pictures.

        Args:
            pictures: each the path of a file, a PIL picture of any mode (both upright as their EXIF data say), an
                array (H, W, 3) or, grey, (H, W), or a tensor (3, H, W). Arrays and tensors hold 8 bits a channel,
                0 to 255; grey ones may hold 16 bits, 0 to 65535.
            image_format: order of the channels of arrays and tensors, "BGR" or "RGB". As OpenCV reads them, and as
                Detectron2's ``DefaultPredictor`` takes them, arrays are BGR.

        Returns:
            For each picture a dict with what the config switches on: ``sem_seg``, ``panoptic_seg`` and ``instances``,
            at the picture's own size, on the model's device. ``mask2former.results`` makes plain data of it and
            ``mask2former.drawing`` pictures.

        Raises:
            UserError: a picture can't be read or resized, or isn't one of these.
        """
        if image_format not in ("BGR", "RGB"):
            raise UserError(f"expected image_format 'BGR' or 'RGB', got {image_format!r}")
        if isinstance(pictures, list | tuple):
            return list(self._segment(pictures, image_format))
        return next(self._segment([pictures], image_format))

    def _segment(self, pictures: Iterable[Picture], image_format: str) -> Iterator[Outputs]:
        samples = (self._make_sample(picture, image_format) for picture in pictures)
        for batch in batches_of_equal_size(samples, self._batch_size):
            with torch.inference_mode():
                outputs = self.model(batch)
            yield from outputs

    def _make_sample(self, picture: Picture, image_format: str) -> dict[str, Any]:
        image = _as_rgb(picture, image_format)
        height, width = image.shape[:2]
        augmented = T.AugInput(image if self._image_format == "RGB" else np.ascontiguousarray(image[:, :, ::-1]))
        try:
            self._augmentations(augmented)
        except ValueError as error:
            raise UserError(
                f"a picture of {width} x {height} pixels can't be resized as the recipe has it (INPUT.MIN_SIZE_TEST, "
                f"MAX_SIZE_TEST or SCALE_TEST): {error}"
            ) from error
        tensor = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}


# ---------------------------------------------------------------------------------------------- pictures


def _as_rgb(picture: Picture, image_format: str) -> RGB:
    """The picture as a contiguous (H, W, 3) array in RGB order."""
    if isinstance(picture, str | os.PathLike):
        return read_image(picture, "RGB")
    if isinstance(picture, Image.Image):
        return _pil_as_rgb(picture)
    if isinstance(picture, torch.Tensor):
        if picture.ndim != 3 or picture.shape[0] != 3:
            raise UserError(f"expected a tensor of shape (3, H, W), got {tuple(picture.shape)}")
        return _array_as_rgb(picture.detach().cpu().permute(1, 2, 0).numpy(), image_format)
    if isinstance(picture, np.ndarray):
        return _array_as_rgb(picture, image_format)
    raise UserError(f"expected a path, a PIL picture, an array or a tensor, got {type(picture).__name__}")


def _pil_as_rgb(picture: Image.Image) -> RGB:
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):  # 16 bits, which older versions of Pillow open as 32
        values = np.asarray(upright)
        if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
            raise UserError(f"expected a PIL picture with values from 0 to 65535, got {values.min()} to {values.max()}")
        return _array_as_rgb(values.astype(np.uint16), "RGB")
    if upright.mode == "F":
        raise UserError("got a PIL picture of floating-point numbers, whose range is unknown: convert it to mode 'L'")
    return np.ascontiguousarray(convert_PIL_to_numpy(upright, "RGB"))


def _array_as_rgb(array: np.ndarray, image_format: str) -> RGB:
    if array.ndim == 2 and array.dtype == np.uint16:
        array = np.round(array * (255 / 65535)).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UserError(f"expected a picture of 8 bits a channel (uint8, 0 to 255), got {array.dtype}: convert it")
    if array.ndim == 2:
        array = np.stack([array] * 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise UserError(f"expected an array of shape (H, W, 3) or (H, W), got {array.shape}")
    return np.ascontiguousarray(array if image_format == "RGB" else array[:, :, ::-1])


# ----------------------------------------------------------------------------------------------- configs


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a config of either kind is made into."""

    model: nn.Module
    # The data set's mapper for inference: how pictures are resized, and the order of their channels.
    mapper: Any
    metadata: Metadata
    weights: str


def _build(
    config: CfgNode | DictConfig | str | os.PathLike[str],
    options: Sequence[str],
    device: str | None,
    threshold: float | None,
) -> _Parts:
    if isinstance(config, str | os.PathLike):
        path = os.fspath(config)
        if device and not path.endswith(".py"):
            options, device = [*options, "MODEL.DEVICE", device], None
        config, options = load_config(path, options), ()
    if isinstance(config, CfgNode):
        return _build_from_config(config, options, device, threshold)
    return _build_from_lazy_config(config, options, device, threshold)


def _build_from_config(config: CfgNode, options: Sequence[str], device: str | None, threshold: float | None) -> _Parts:
    cfg = config.clone()
    cfg.defrost()
    try:
        cfg.merge_from_list(list(options))
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(f"options {' '.join(options)}: {error.args[0]}") from error
    if threshold is not None:
        cfg.MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD = float(threshold)
        cfg.MODEL.MASK_FORMER.TEST.INSTANCE_SCORE_THRESHOLD = float(threshold)
    cfg.MODEL.DEVICE = available_device(device or cfg.MODEL.DEVICE)
    register_rows(cfg.DATASETS.OWN)
    names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    return _Parts(
        model=build_model(cfg),
        mapper=build_mapper(cfg, is_train=False),
        metadata=MetadataCatalog.get(names[0]) if names else Metadata(),
        weights=cfg.MODEL.WEIGHTS,
    )


def _build_from_lazy_config(
    config: DictConfig, options: Sequence[str], device: str | None, threshold: float | None
) -> _Parts:
    if options:
        raise UserError("options go with the path of a LazyConfig: change the values of one that is loaded already")
    if OmegaConf.select(config, "dataloader.test.mapper") is None:
        raise UserError("the LazyConfig has no dataloader.test.mapper, which says how pictures are resized: add it")
    model = instantiate(config.model)
    if threshold is not None and not isinstance(model, SemanticSegmentor):  # which gives no scores to compare
        if not isinstance(model, MaskFormer):
            raise UserError(f"a confidence threshold needs the model MaskFormer, got {type(model).__name__}")
        model.inference = dataclasses.replace(
            model.inference, object_mask_threshold=threshold, instance_score_threshold=threshold
        )
    name = OmegaConf.select(config, "dataloader.evaluator.dataset_name")
    return _Parts(
        model=model.to(available_device(device or config.train.device)),
        mapper=instantiate(config.dataloader.test.mapper),
        metadata=MetadataCatalog.get(name) if name else Metadata(),
        weights=config.train.init_checkpoint,
    )
