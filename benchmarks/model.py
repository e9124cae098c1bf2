#!/usr/bin/env python
"""How long the whole model takes and what memory it needs, beside Hugging Face's Mask2Former.

Both have the R50 of COCO panoptic with the same weights, threads, dtype and picture, and take turns in one process.
Class and mask logits are compared first (inference), or the losses (training), and a difference is an error. A training
step is forward, loss, backward, clipping and AdamW. "loss" is matching, the losses of ten layers and their backward
alone. Memory is measured in a process of its own for each.

The floor is what the model's matrix products and convolutions take at the speed of this machine's best large matrix
product, measured in the same run.

examples:
  python benchmarks/model.py
  python benchmarks/model.py --work inference --rounds 7 --json model.json
  python benchmarks/model.py --work training --sizes 256 512 --threads 1
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from machine import describe, peak_memory, processors
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mask2former.checkpoint import write_hugging_face
from mask2former.engine import load_config
from mask2former.errors import UserError, command
from mask2former.modeling import Predictions, meta_arch
from mask2former.modeling.targets import Targets

RECIPE = "configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
ROOT = Path(__file__).resolve().parent.parent
INFERENCE_SIZE = (800, 1088)
OBJECTS = 10
LOSS_OBJECTS = 50
WORK = ("inference", "training", "loss")
SIDES = ("ours", "huggingface")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(_added_memory(args)))
        return
    machine = describe([args.threads], transformers=_transformers().__version__)
    results: list[Result] = []
    try:
        for task in _tasks(args):
            results.append(_measure(task, args))
    finally:  # Ctrl-C keeps what was measured before
        if results:
            _report(results, machine, args)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", nargs="+", choices=WORK, default=list(WORK), help="default: all")
    add("--sizes", nargs="+", type=int, default=[512, 1024], metavar="N", help="sides of training pictures; 512 1024")
    add("--threads", type=int, default=processors(), metavar="N", help="default: the number of processors")
    add("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    add("--memory-of", choices=SIDES, metavar="NAME", help="only say what memory the work adds, in this process")
    args = parser.parse_args(arguments)
    for option in ("threads", "rounds"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} is {getattr(args, option)}, expected at least 1")
    if min(args.sizes) < 64:
        raise UserError(f"--sizes has {min(args.sizes)}, expected at least 64")
    return args


# -------------------------------------------------------------------------------------------- the two models


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("there is nothing to compare with: pip install transformers") from error
    return transformers


def _our_model() -> Any:
    torch.manual_seed(0)
    test = [f"MODEL.MASK_FORMER.TEST.{name}_ON" for name in ("SEMANTIC", "PANOPTIC", "INSTANCE")]
    options = [word for name in test for word in (name, "True")]
    cfg = load_config(str(ROOT / RECIPE), [*options, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    return build_model(cfg)


class Ours:
    """This project's model."""

    def __init__(self) -> None:
        self.model = _our_model()

    def train(self) -> None:
        """Training mode."""
        self.model.train()

    def infer(self, picture: Tensor) -> Any:
        """All three results."""
        return self.model([{"image": picture}])

    def logits(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Class and mask logits."""
        images = self.model.preprocess([{"image": picture}])
        predictions = self.model.sem_seg_head(self.model.backbone(images.tensor))
        return predictions["pred_logits"], predictions["pred_masks"]

    def loss(self, picture: Tensor, classes: Tensor, masks: Tensor) -> Tensor:
        """The sum of all losses."""
        instances = Instances((picture.shape[-2], picture.shape[-1]), gt_classes=classes, gt_masks=BitMasks(masks))
        return sum(self.model([{"image": picture, "instances": instances}]).values())

    def loss_of(self, predictions: Predictions, classes: Tensor, masks: Tensor) -> Tensor:
        """The sum of all losses of given predictions."""
        return sum(self.model.criterion(predictions, [Targets(classes, masks)]).values())


class HuggingFace:
    """The port in transformers, with the weights of ``ours``."""

    def __init__(self, ours: nn.Module) -> None:
        transformers = _transformers()
        with tempfile.TemporaryDirectory() as folder:
            write_hugging_face(ours.state_dict(), folder)
            kind = transformers.Mask2FormerForUniversalSegmentation
            self.model = kind.from_pretrained(folder)
        self.normalize = functools.partial(
            lambda mean, std, x: ((x - mean) / std)[None], ours.pixel_mean, ours.pixel_std
        )
        self.processor = transformers.Mask2FormerImageProcessor()

    def train(self) -> None:
        """Training mode, but for the backbone's norms, which the recipe freezes."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def infer(self, picture: Tensor) -> Any:
        """All three results."""
        outputs = self.model(pixel_values=self.normalize(picture))
        size = [tuple(picture.shape[-2:])]
        return (
            self.processor.post_process_semantic_segmentation(outputs, target_sizes=size),
            self.processor.post_process_panoptic_segmentation(outputs, target_sizes=size, label_ids_to_fuse=set()),
            self.processor.post_process_instance_segmentation(outputs, target_sizes=size, return_binary_maps=True),
        )

    def logits(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Class and mask logits."""
        outputs = self.model(pixel_values=self.normalize(picture))
        return outputs.class_queries_logits, outputs.masks_queries_logits

    def loss(self, picture: Tensor, classes: Tensor, masks: Tensor) -> Tensor:
        """The sum of all losses."""
        normal = self.normalize(picture)
        return self.model(pixel_values=normal, mask_labels=[masks.float()], class_labels=[classes]).loss

    def loss_of(self, predictions: Predictions, classes: Tensor, masks: Tensor) -> Tensor:
        """The sum of all losses of given predictions, whose masks it is given whole, as its decoder makes them."""
        whole = torch.einsum(
            "lbqc,bchw->lbqhw", predictions.mask_embeddings.detach(), predictions.mask_features.detach()
        )
        *others, last = zip(whole.requires_grad_(), predictions.class_logits, strict=True)
        names = ("masks_queries_logits", "class_queries_logits")
        auxiliary = [dict(zip(names, layer, strict=True)) for layer in others]
        losses = self.model.get_loss_dict(*last, [masks.float()], [classes], auxiliary)
        return self.model.get_loss(losses)


# -------------------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Task:
    """``inference``, ``training`` or ``loss`` for pictures of one size."""

    work: str
    size: tuple[int, int]

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.work}, {self.size[0]} x {self.size[1]}"


@dataclass
class Result:
    """Seconds of each side and round; bytes that the work adds; what the floor is made of."""

    task: Task
    seconds: dict[str, list[float]]
    memory: dict[str, float]
    parts: dict[str, float]
    gigaflop: float
    sgemm: float

    def ratios(self) -> list[float]:
        """How many times as long the other takes, in each round."""
        return [theirs / ours for ours, theirs in zip(self.seconds["ours"], self.seconds["huggingface"], strict=True)]


def _tasks(args: argparse.Namespace) -> Iterator[Task]:
    if "inference" in args.work:
        yield Task("inference", INFERENCE_SIZE)
    if "training" in args.work:
        yield from (Task("training", (size, size)) for size in args.sizes)
    if "loss" in args.work:
        yield Task("loss", (max(args.sizes), max(args.sizes)))


def _picture(size: tuple[int, int]) -> Tensor:
    """Smooth random colours: noise alone would be told apart by rounding."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, size[0] // 16, size[1] // 16, generator=generator)
    return 255 * nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)[0]


def _objects(size: tuple[int, int], count: int = OBJECTS) -> tuple[Tensor, Tensor]:
    """Classes (N) and masks (N, H, W) of ellipses."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[: size[0], : size[1]] / np.array(size).reshape(2, 1, 1)
    place, radius = random.uniform(0.1, 0.9, (2, count, 1, 1)), random.uniform(0.05, 0.3, (2, count, 1, 1))
    masks = ((y - place[0]) / radius[0]) ** 2 + ((x - place[1]) / radius[1]) ** 2 < 1
    return torch.from_numpy(random.integers(0, 133, count)), torch.from_numpy(masks)


def _predictions(size: tuple[int, int]) -> Predictions:
    """Of ten layers, with gradients: masks that are smooth, as those of a model are."""
    generator = torch.Generator().manual_seed(0)
    logits, embeddings = (torch.randn(10, 1, 100, width, generator=generator) for width in (134, 256))
    coarse = torch.randn(1, 256, size[0] // 32, size[1] // 32, generator=generator) / 4
    features = nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic")
    features = features.contiguous(memory_format=torch.channels_last)  # as the pixel decoder makes them on a CPU
    return Predictions(logits.requires_grad_(), embeddings.requires_grad_(), features.requires_grad_())


def _work(side: Any, task: Task) -> Callable[[], Any]:
    """What is timed. A training step changes the model, by little."""
    picture = _picture(task.size)
    if task.work == "inference":
        side.model.eval()

        def infer() -> Any:
            with torch.inference_mode():
                return side.infer(picture)

        return infer

    side.train()
    if task.work == "loss":
        predictions, objects = _predictions(task.size), _objects(task.size, LOSS_OBJECTS)

        def loss() -> Tensor:
            total = side.loss_of(predictions, *objects)
            total.backward()
            return total.detach()

        return loss

    objects = _objects(task.size)
    parameters = [x for x in side.model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.05, fused=True)

    def step() -> Tensor:
        loss = side.loss(picture, *objects)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.01)
        optimizer.step()
        return loss.detach()

    return step


def _measure(task: Task, args: argparse.Namespace) -> Result:
    ours = Ours()
    sides = {"ours": ours, "huggingface": HuggingFace(ours.model)}
    work = {name: _work(side, task) for name, side in sides.items()}
    _compare(task, sides)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(args.rounds):
        for name in SIDES if round_number % 2 else reversed(SIDES):
            seconds[name].append(_time(work[name]))
    medians = ", ".join(f"{name} {statistics.median(spent):.2f} s" for name, spent in seconds.items())
    print(f"{task.name}: {medians}", file=sys.stderr, flush=True)
    with FlopCounterMode(display=False) as counter:
        _count(ours, task)
    parts = _parts(ours, work["ours"], statistics.median(seconds["ours"]))
    del sides, work, ours
    memory = {name: _memory_in_another_process(name, task, args) for name in SIDES}
    return Result(task, seconds, memory, parts, counter.get_total_flops() / 1e9, _sgemm())


def _count(ours: Ours, task: Task) -> None:
    """The work for torch's counter, which can't count without gradients and doesn't count an optimizer."""
    if task.work == "inference":
        ours.infer(_picture(task.size))
    elif task.work == "training":
        ours.loss(_picture(task.size), *_objects(task.size)).backward()
    else:
        _work(ours, task)()


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _compare(task: Task, sides: dict[str, Any]) -> None:
    """Errors where the two don't compute the same. It warms up, too."""
    picture = _picture(task.size)
    if task.work == "inference":
        with torch.inference_mode():
            for name, ours, theirs in zip(
                ("class", "mask"), *(side.logits(picture) for side in sides.values()), strict=True
            ):
                agree = ((ours - theirs).abs() <= 1e-3).float().mean().item()
                if agree < 0.99:
                    raise RuntimeError(f"only {agree:.1%} of the {name} logits are within 1e-3 of Hugging Face's")
                print(f"{task.name}: {agree:.3%} of the {name} logits agree within 1e-3", file=sys.stderr)
        return
    losses = []
    for side in sides.values():
        torch.manual_seed(0)
        losses.append(_work(side, task)().item())
    if abs(losses[0] - losses[1]) > 0.05 * losses[1]:  # points are drawn at random
        raise RuntimeError(f"the sum of losses is {losses[0]}, and {losses[1]} in Hugging Face's")
    print(f"{task.name}: losses {losses[0]:.3f} and {losses[1]:.3f}", file=sys.stderr)


def _sgemm() -> float:
    """GFLOP/s of the best of some large float32 products."""
    a = torch.randn(2048, 2048)
    torch.mm(a, a)
    return 2 * 2048**3 / 1e9 / min(_time(lambda: torch.mm(a, a)) for _ in range(10))


def _parts(ours: Ours, work: Callable[[], object], total: float) -> dict[str, float]:
    """Seconds of the parts of a forward pass in one more run, and the rest of ``total``."""
    head = ours.model.sem_seg_head
    seconds: dict[str, float] = {}
    places = [
        (ours.model.backbone, "forward", "backbone"),
        (head.pixel_decoder, "forward_features", "pixel decoder"),
        (head.predictor, "forward", "transformer decoder"),
        (ours.model.criterion, "forward", "loss"),
        (meta_arch, "postprocess", "post-processing"),
    ]
    with _timed(places, seconds):
        work()
    rest = "rest" if "post-processing" in seconds else "backward, clipping, optimizer"
    return {**seconds, rest: total - sum(seconds.values())}


@contextmanager
def _timed(places: Sequence[tuple[Any, str, str]], seconds: dict[str, float]) -> Iterator[None]:
    """Functions of ``places`` add what they take to ``seconds``."""
    with_timer: list[tuple[Any, str, Any]] = []
    for owner, attribute, name in places:
        function = getattr(owner, attribute)

        def timed(*args: Any, function: Any = function, name: str = name, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        with_timer.append((owner, attribute, function))
        setattr(owner, attribute, timed)
    try:
        yield
    finally:
        for owner, attribute, function in with_timer:
            setattr(owner, attribute, function)


# -------------------------------------------------------------------------------------------- memory


def _memory_in_another_process(name: str, task: Task, args: argparse.Namespace) -> float:
    options = ["--work", task.work, "--sizes", str(task.size[0]), "--threads", str(args.threads)]
    warnings = [f"-W{option}" for option in sys.warnoptions]
    child = [sys.executable, *warnings, __file__, "--memory-of", name, *options]
    # So that glibc gives back whatever is freed, and peaks are those of tensors.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(child, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    added = float(json.loads(done.stdout.splitlines()[-1]))
    print(f"{task.name}: {name} adds {added / 2**20:.0f} MiB", file=sys.stderr, flush=True)
    return added


def _added_memory(args: argparse.Namespace) -> int:
    """Bytes that inference, or the second training step, adds to the model's weights (and the optimizer's state)."""
    (task,) = _tasks(args)
    ours = Ours()
    side = ours if args.memory_of == "ours" else HuggingFace(ours.model)
    del ours
    work = _work(side, task)
    work()
    for parameter in side.model.parameters():
        parameter.grad = None
    before = peak_memory("cpu", reset=True)
    work()
    return peak_memory("cpu") - before


# -------------------------------------------------------------------------------------------- report


def _report(results: Sequence[Result], machine: dict[str, Any], args: argparse.Namespace) -> None:
    rows = []
    for result in results:
        ours, theirs = (statistics.median(result.seconds[name]) for name in SIDES)
        ratios = result.ratios()
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        memory = [result.memory[name] / 2**20 for name in SIDES]
        floor = result.gigaflop / result.sgemm
        rows.append(
            [result.task.name, f"{ours:.2f}", f"{theirs:.2f}", spread, f"{memory[0]:.0f}", f"{memory[1]:.0f}"]
            + [f"{memory[0] / memory[1]:.0%}", f"{floor:.2f}", f"{ours / floor:.2f}"]
        )
    headers = ["", "ours, s", "Hugging Face, s", "times as fast", "ours, MiB", "Hugging Face, MiB", "of it", "floor, s"]
    print(f"\nMedian (min to max) of {args.rounds} rounds; memory added at the peak")
    print(tabulate(rows, headers=[*headers, "times the floor"], disable_numparse=True))
    for result in results:
        print(f"\n{result.task.name}: {result.gigaflop:.0f} GFLOP at {result.sgemm:.0f} GFLOP/s; of one run of ours:")
        print(tabulate([[name, f"{spent:.2f} s"] for name, spent in result.parts.items()], tablefmt="plain"))
    print()
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    if args.json:
        content = {"machine": machine, "results": [asdict(result) for result in results]}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    command(main)
