"""The models that ``model.py`` compares, what they are given, and what they do with it.

Letters: ``B`` batch, ``Q`` queries, ``N`` objects of a picture, ``K`` classes, ``L`` layers.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from full_mask_losses import FullMaskCriterion
from torch import Tensor, nn

from mask2former.checkpoint import write_hugging_face
from mask2former.engine import load_config
from mask2former.errors import UserError
from mask2former.modeling import Predictions
from mask2former.modeling.targets import Targets

__all__ = ["Task", "make_sides", "random_picture", "transformers", "work_of"]

RECIPE = Path(__file__).resolve().parent.parent / "configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
CLASSES, CHANNELS, LAYERS = 133, 256, 10

Objects = tuple[Tensor, Tensor]  # of a picture: classes (N), and masks (N, H, W) bool


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        work: "inference" (a picture's semantic, panoptic and instance results), "training" (forward, loss, backward,
            clipping, AdamW) or "loss" (matching, losses and their backward).
        size: height and width of pictures.
        objects: on each picture; for training and loss.
    """

    work: str
    size: tuple[int, int]
    objects: int = 10
    queries: int = 100
    batch: int = 1

    @property
    def name(self) -> str:
        """What tables call it."""
        parts = [self.work, f"{self.size[0]} x {self.size[1]}"]
        if self.work != "inference":
            parts.append(f"{self.objects} mask{'s'[: self.objects > 1]}")
        if self.queries != 100:
            parts.append(f"{self.queries} queries")
        if self.batch > 1:
            parts.append(f"batch of {self.batch}")
        return ", ".join(parts)

    def to_json(self) -> str:
        """For another process's :meth:`from_json`."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Task":
        """What :meth:`to_json` wrote."""
        values = json.loads(text)
        return Task(**{**values, "size": tuple(values["size"])})


# -------------------------------------------------------------------------------------------- the models


@functools.cache
def transformers() -> Any:
    """Hugging Face's library, told not to draw progress bars."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("there is nothing to compare with: pip install transformers") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def make_sides(names: Sequence[str], queries: int) -> dict[str, Any]:
    """Models with the same random weights."""
    torch.manual_seed(0)
    options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", str(queries)]
    model = build_model(load_config(str(RECIPE), options))
    makers: dict[str, Callable[[Any], Any]] = {
        "ours": Ours,
        "ours, scores": functools.partial(Ours, semantic_labels=False),
        "full masks": OursWithFullMasks,
        "huggingface": HuggingFace,
    }
    return {name: makers[name](model) for name in names}


class Side:
    """A model, and what trains it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameters = [x for x in model.parameters() if x.requires_grad]

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW at a rate of 0, so that all that is measured is measured with the same weights."""
        return torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.05, fused=True)

    def train(self) -> None:
        """Training mode."""
        self.model.train()
        for parameter in self.parameters:
            parameter.requires_grad_()

    def eval(self) -> None:
        """Evaluation mode, and no parameter that has a gradient: torch's counter of operations would look for it."""
        self.model.eval().requires_grad_(False)


class Ours(Side):
    """This project's model, whose semantic results are labels, as Hugging Face's are, or scores, its default."""

    def __init__(self, model: Any, semantic_labels: bool = True) -> None:
        super().__init__(model)
        self.semantic_labels = semantic_labels
        self.class_layer = model.sem_seg_head.predictor.class_embed

    def infer(self, picture: Tensor) -> Any:
        """All three results."""
        with self.model.other_inference(semantic_labels=self.semantic_labels):
            return self.model([{"image": picture}])

    def labels(self, results: Any) -> Tensor:
        """The semantic labels (H, W) of what ``infer`` gave."""
        return results[0]["sem_seg"]

    def logits(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Class and mask logits of the last layer."""
        images = self.model.preprocess([{"image": picture}])
        predictions = self.model.sem_seg_head(self.model.backbone(images.tensor))
        return predictions["pred_logits"], predictions["pred_masks"]

    def objects(self, objects: Sequence[Objects]) -> Any:
        """The objects of each picture in the form that the losses take."""
        return objects

    def predictions(self, class_logits: Tensor, mask_embeddings: Tensor, mask_features: Tensor) -> dict[str, Tensor]:
        """What the decoder gives to the losses; see ``Predictions``."""
        return {"class_logits": class_logits, "mask_embeddings": mask_embeddings, "mask_features": mask_features}

    def loss(self, pictures: Tensor, objects: Sequence[Objects]) -> Tensor:
        """The sum of all losses of pictures (B, 3, H, W)."""
        samples = []
        for picture, (classes, masks) in zip(pictures, objects, strict=True):
            size = (picture.shape[-2], picture.shape[-1])
            instances = Instances(size, gt_classes=classes, gt_masks=BitMasks(masks))
            samples.append({"image": picture, "instances": instances})
        return sum(self.model(samples).values())

    def loss_of(self, predictions: dict[str, Tensor], objects: Sequence[Objects]) -> Tensor:
        """The sum of all losses of predictions."""
        targets = [Targets(classes, masks) for classes, masks in objects]
        return sum(self.model.criterion(Predictions(**predictions), targets).values())


class OursWithFullMasks(Ours):
    """This project's model with losses on whole masks."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        model.criterion = FullMaskCriterion(model.criterion)


class HuggingFace(Side):
    """The port in transformers, with the weights of ours."""

    def __init__(self, ours: Any) -> None:
        kind = transformers().Mask2FormerForUniversalSegmentation
        with tempfile.TemporaryDirectory() as folder:
            write_hugging_face(ours.state_dict(), folder)
            try:
                model = kind.from_pretrained(folder, attn_implementation="sdpa")
            except ValueError:  # transformers 5.24 has no such attention for this model
                model = kind.from_pretrained(folder)
        self.norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in self.norms:  # the recipe freezes them
            norm.requires_grad_(False)
        super().__init__(model)
        self.class_layer = self.model.class_predictor
        self.mean, self.std = ours.pixel_mean.clone(), ours.pixel_std.clone()
        self.processor = transformers().Mask2FormerImageProcessor()

    def train(self) -> None:
        """Training mode, but for frozen norms."""
        super().train()
        for norm in self.norms:
            norm.eval()

    def infer(self, picture: Tensor) -> Any:
        """All three results."""
        outputs = self.model(pixel_values=self._normalized(picture[None]))
        size = [tuple(picture.shape[-2:])]
        return (
            self.processor.post_process_semantic_segmentation(outputs, target_sizes=size),
            self.processor.post_process_panoptic_segmentation(outputs, target_sizes=size, label_ids_to_fuse=set()),
            self.processor.post_process_instance_segmentation(outputs, target_sizes=size, return_binary_maps=True),
        )

    def labels(self, results: Any) -> Tensor:
        """The semantic labels (H, W) of what ``infer`` gave."""
        return results[0][0]

    def logits(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Class and mask logits of the last layer."""
        outputs = self.model(pixel_values=self._normalized(picture[None]))
        return outputs.class_queries_logits, outputs.masks_queries_logits

    def objects(self, objects: Sequence[Objects]) -> Any:
        """The objects of each picture in the form that the losses take: float masks, as its processor makes them."""
        return {
            "mask_labels": [masks.float() for _, masks in objects],
            "class_labels": [classes for classes, _ in objects],
        }

    def predictions(self, class_logits: Tensor, mask_embeddings: Tensor, mask_features: Tensor) -> dict[str, Tensor]:
        """What the decoder gives to the losses: class logits and whole masks (L, B, Q, H/4, W/4)."""
        masks = torch.einsum("lbqc,bchw->lbqhw", mask_embeddings, mask_features)
        return {"masks_queries_logits": masks, "class_queries_logits": class_logits}

    def loss(self, pictures: Tensor, objects: dict[str, list[Tensor]]) -> Tensor:
        """The sum of all losses of pictures (B, 3, H, W)."""
        return self.model(pixel_values=self._normalized(pictures), **objects).loss

    def loss_of(self, predictions: dict[str, Tensor], objects: dict[str, list[Tensor]]) -> Tensor:
        """The sum of all losses of predictions."""
        layers = zip(*(tensor.unbind() for tensor in predictions.values()), strict=True)
        *others, last = (dict(zip(predictions, layer, strict=True)) for layer in layers)
        losses = self.model.get_loss_dict(**last, **objects, auxiliary_predictions=others)
        return self.model.get_loss(losses)

    def _normalized(self, pictures: Tensor) -> Tensor:
        return (pictures - self.mean) / self.std


# -------------------------------------------------------------------------------------------- what they are given


def random_picture(size: tuple[int, int]) -> Tensor:
    """Smooth random colours (3, H, W): noise alone would be told apart by rounding."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, size[0] // 16, size[1] // 16, generator=generator)
    return 255 * F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)[0]


def _objects(task: Task) -> list[Objects]:
    """Ellipses on each picture."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[: task.size[0], : task.size[1]] / np.array(task.size).reshape(2, 1, 1)
    pictures = []
    for _ in range(task.batch):
        place, radius = random.uniform(0.1, 0.9, (2, task.objects)), random.uniform(0.05, 0.3, (2, task.objects))
        masks = [
            ((y - top) / height) ** 2 + ((x - left) / width) ** 2 < 1
            for top, left, height, width in zip(*place, *radius, strict=True)
        ]
        classes = torch.from_numpy(random.integers(0, CLASSES, task.objects))
        pictures.append((classes, torch.from_numpy(np.stack(masks))))
    return pictures


def _predictions(task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Class logits, mask embeddings and mask features, so that masks are smooth, as those of a model are."""
    generator = torch.Generator().manual_seed(0)
    logits, embeddings = (
        torch.randn(LAYERS, task.batch, task.queries, width, generator=generator) for width in (CLASSES + 1, CHANNELS)
    )
    coarse = torch.randn(task.batch, CHANNELS, task.size[0] // 32, task.size[1] // 32, generator=generator) / 4
    features = F.interpolate(coarse, scale_factor=8, mode="bicubic")
    features = features.contiguous(memory_format=torch.channels_last)  # as the pixel decoder makes them on a CPU
    return logits, embeddings, features


def _sure_logits(queries: int) -> Tensor:
    """Class logits (1, Q, K+1) of a model that finds an object with one query in four.

    Random weights find none, and would leave little to do for what makes results of masks.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, queries, CLASSES + 1, generator=generator)
    query = torch.arange(queries)
    classes = torch.randint(CLASSES, (queries,), generator=generator).where(query % 4 == 0, torch.tensor(CLASSES))
    logits[0, query, classes] = 8
    return logits


@contextmanager
def _giving(layer: nn.Module, output: Tensor) -> Iterator[None]:
    """In the block, ``layer`` computes in vain."""
    handle = layer.register_forward_hook(lambda *_: output)
    try:
        yield
    finally:
        handle.remove()


# -------------------------------------------------------------------------------------------- what they do


def work_of(side: Side, task: Task) -> Callable[[], Any]:
    """What is measured; losses are returned without gradients."""
    return {"inference": _inference, "training": _training_step, "loss": _loss}[task.work](side, task)


def _inference(side: Side, task: Task) -> Callable[[], Any]:
    side.eval()
    picture, classes = random_picture(task.size), _sure_logits(task.queries)

    def infer() -> Any:
        with torch.inference_mode(), _giving(side.class_layer, classes):
            return side.infer(picture)

    return infer


def _training_step(side: Side, task: Task) -> Callable[[], Tensor]:
    side.train()
    pictures = random_picture(task.size).repeat(task.batch, 1, 1, 1)
    objects = side.objects(_objects(task))

    def step() -> Tensor:
        loss = side.loss(pictures, objects)
        side.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(side.parameters, 0.01)
        side.optimizer.step()
        return loss.detach()

    return step


def _loss(side: Side, task: Task) -> Callable[[], Tensor]:
    side.train()
    objects = side.objects(_objects(task))
    predictions = {name: x.requires_grad_() for name, x in side.predictions(*_predictions(task)).items()}

    def loss() -> Tensor:
        for x in predictions.values():
            x.grad = None
        total = side.loss_of(predictions, objects)
        total.backward()
        return total.detach()

    return loss
