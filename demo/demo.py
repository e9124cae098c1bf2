#!/usr/bin/env python
"""Segment pictures, a video or a camera's picture, and draw the results: ``demo/demo.py --help``.

The work is done by ``mask2former.predictor``, ``mask2former.drawing`` and ``mask2former.results``.
"""

import argparse
import glob
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mask2former import model_zoo
from mask2former.data import read_image
from mask2former.data.panoptic_files import save_json, save_png
from mask2former.drawing import OUTPUT_KINDS, Palette, Picture, draw
from mask2former.errors import UserError, command
from mask2former.predictor import Predictor
from mask2former.results import to_json

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED_CONFIG = REPOSITORY / "configs" / "quick" / "nuclei.yaml"
SHIPPED_WEIGHTS = REPOSITORY / "demo" / "nuclei" / "model.safetensors"
SHIPPED_MODEL = "nuclei"
DEFAULT_MODEL = "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep"
# Seconds that a server may take to answer before the shipped model is used instead.
PATIENCE = 5.0
DEFAULT_OUTPUT = "output"

# What a video shows, where the model gives several outputs: the first of these.
VIDEO_PREFERENCE = ("panoptic_seg", "instances", "sem_seg")
ESCAPE = 27
WINDOW = "Mask2Former"

EPILOG = """examples:
  python demo/demo.py --input a.jpg b.png 'holiday/*.jpg' --output out/
      everyday pictures: things and background of COCO; the first time, the model is downloaded
  python demo/demo.py --input street.jpg --model cityscapes/panoptic-segmentation/maskformer2_R50_bs16_90k
      another published model; MODEL_ZOO.md lists them
  python demo/demo.py --input cells.png --model nuclei
      the shipped model, which finds cell nuclei in microscopy pictures
  python demo/demo.py --video-input street.mp4 --config-file F --weights F --output out/
      a model of your own

Each picture NAME gives NAME_instances.png, NAME_panoptic.png and NAME_semantic.png, as far as the model has these
outputs, and NAME.json with class, score, area, box and mask (run lengths, as COCO has them) of every segment.
"""


def main() -> int:
    """Run the command; 1 if a picture was skipped, else 0."""
    args = _parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    predictor = _make_predictor(args)
    show = args.output is None and _has_screen()
    output = Path(args.output or DEFAULT_OUTPUT)
    if args.output is None and not show:
        print(f"there is no screen to open a window on: writing to {output}{os.sep}")
    if args.input:
        return _segment_pictures(args, predictor, None if show else output)
    _segment_video(args, predictor, None if show else output)
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo/demo.py",
        description="Segment pictures, a video or a webcam's picture, and draw the results.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="pictures, folders of pictures, or quoted patterns")
    source.add_argument("--video-input", metavar="FILE", help="a video that OpenCV can read")
    source.add_argument("--webcam", action="store_true", help="the first camera; stop with Escape, q or Ctrl-C")
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        metavar="NAME",
        help=f"a model of the zoo, downloaded when it isn't there yet, or '{SHIPPED_MODEL}', which is shipped; "
        f"default: {DEFAULT_MODEL}, or the shipped one where that can't be had",
    )
    model.add_argument("--config-file", metavar="FILE", help="in place of a name: recipe, YAML or LazyConfig (.py)")
    parser.add_argument(
        "--weights", metavar="FILE", help="the trained model, also mask2former://NAME; default: those of the model"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="where results go; for a video also the name of an .mp4 file. "
        f"Default: a window is opened, or, where there is no screen, results go to {DEFAULT_OUTPUT}/",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="T",
        help="leave out instances and panoptic segments that score less, 0 to 1; default: %(default)s. "
        "Semantic output gives every pixel its best class",
    )
    parser.add_argument("--polygons", action="store_true", help="put outlines into the JSON too, as GeoJSON geometries")
    parser.add_argument("--no-labels", dest="labels", action="store_false", help="draw no class names and scores")
    parser.add_argument(
        "--device", help="cuda, cuda:1, cpu, ...; default: the recipe's, or the CPU if there is no CUDA"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="replace values of the recipe (last)"
    )
    return parser.parse_args()


def _make_predictor(args: argparse.Namespace) -> Predictor:
    config, weights = _find_model(args)
    return Predictor(
        config,
        weights,
        device=args.device,
        options=args.opts,
        confidence_threshold=args.confidence_threshold,
        semantic_labels=True,  # nothing here reads scores
    )


def _find_model(args: argparse.Namespace) -> tuple[str | Path, str | Path | None]:
    """The recipe, and the weights, if not the recipe's own, of the model that the command names."""
    if args.config_file is not None:
        return args.config_file, args.weights
    named = args.weights is not None or "MODEL.WEIGHTS" in args.opts
    if args.model == SHIPPED_MODEL or (args.model is None and named):
        return SHIPPED_CONFIG, args.weights if named else SHIPPED_WEIGHTS
    if args.model is not None:
        config = model_zoo.config_file(args.model)
        return config, args.weights if named else model_zoo.download_weights(args.model)
    return _choose_model()


def _choose_model() -> tuple[Path, Path]:
    """COCO's model where it can be had, else the shipped one; a line says which and why."""
    try:
        weights = model_zoo.download_weights(DEFAULT_MODEL, timeout=PATIENCE, tries=1)
    except UserError as error:
        print(
            f"no model named: using the shipped one, {os.path.relpath(SHIPPED_WEIGHTS)}, which segments cell nuclei in "
            f"microscopy pictures, since the model for everyday pictures can't be had: {error}"
        )
        return SHIPPED_CONFIG, SHIPPED_WEIGHTS
    print(
        f"no model named: using {DEFAULT_MODEL} of the model zoo ({weights}; licence: CC-BY-NC 4.0), which segments "
        "everyday pictures; others are in MODEL_ZOO.md"
    )
    return model_zoo.config_file(DEFAULT_MODEL), weights


# ---------------------------------------------------------------------------------------------- pictures


def _segment_pictures(args: argparse.Namespace, predictor: Predictor, output: Path | None) -> int:
    """Segment each picture into ``output``, or show it; 1 if some were skipped, else 0."""
    paths, skipped = _find_pictures(args.input)
    names = _output_names(paths)
    if output is not None:
        _check_inputs_survive(paths, names, output)
    start, done = time.perf_counter(), 0
    try:
        # On a terminal only: a log file gets the lines below.
        for path, name in zip(bar := tqdm(paths, unit="picture", disable=None), names, strict=True):
            bar.set_postfix_str(path.name)
            try:
                image, outputs = _segment_picture(path, predictor)
            except UserError as error:
                skipped.append(str(error))
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                continue
            drawings = draw(image, outputs, predictor.metadata, labels=args.labels)
            if output is None:
                if not all(_show(drawing, wait_ms=0) for _, drawing in drawings):
                    break
            else:
                for kind, drawing in drawings:
                    save_png(output / f"{name}_{kind}.png", drawing)
                document = to_json(outputs, predictor.metadata, file=str(path), polygons=args.polygons)
                save_json(output / f"{name}.json", document)
            done += 1
    finally:  # on Ctrl-C and a full disk too
        noun = "picture" if done == 1 else "pictures"
        where = f"; results are in {output}{os.sep}" if output is not None and done else ""
        print(f"{done} {noun} segmented in {time.perf_counter() - start:.1f} s, {len(skipped)} skipped{where}")
    return 1 if skipped else 0


def _segment_picture(path: Path, predictor: Predictor) -> tuple[Picture, dict[str, Any]]:
    """The picture, RGB, and what the model finds in it.

    Raises:
        UserError: naming the file, if it can't be read or resized, or needs more memory than there is.
    """
    image = read_image(path, "RGB")
    try:
        return image, predictor(image, image_format="RGB")
    except UserError as error:
        raise UserError(f"'{path}': {error}") from error
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        height, width = image.shape[:2]
        raise UserError(
            f"'{path}': {width} x {height} pixels need more memory than there is: resize the picture, or segment it in "
            "tiles (--opts MODEL.MASK_FORMER.TEST.TILE_SIZE 512)"
        ) from error


def _find_pictures(inputs: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The pictures that ``inputs`` name, each once, and a line for each input that names none."""
    found: dict[Path, None] = {}
    problems = []
    for item in inputs:
        path = Path(item).expanduser()
        if path.is_dir():
            matches = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in _readable_suffixes())
        elif path.exists() or not glob.has_magic(item):
            matches = [path]
        else:
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        if not matches:
            problems.append(f"no picture {'in folder' if path.is_dir() else 'matches'} '{item}'")
        found.update(dict.fromkeys(matches))
    if not found:
        raise UserError("; ".join(problems) + ": check --input")
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    return list(found), problems


def _readable_suffixes() -> set[str]:
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _output_names(paths: Sequence[Path]) -> list[str]:
    """The pictures' names without their endings, with a number where several would be the same."""
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        name, number = path.stem, 2
        # Some file systems don't tell capitals from small letters.
        while name.lower() in taken:
            name, number = f"{path.stem}_{number}", number + 1
        taken.add(name.lower())
        names.append(name)
    return names


def _check_inputs_survive(paths: Sequence[Path], names: Sequence[str], output: Path) -> None:
    inputs = {path.resolve() for path in paths}
    for name in names:
        for kind in OUTPUT_KINDS:
            result = (output / f"{name}_{kind}.png").resolve()
            if result in inputs:
                raise UserError(f"the results of '{name}' would replace the input {result}: choose another --output")


# ------------------------------------------------------------------------------------------------- video


def _segment_video(args: argparse.Namespace, predictor: Predictor, output: Path | None) -> None:
    """Segment a video's frames, or a camera's until a key stops it, into a video file or a window."""
    if args.video_input and not os.path.isfile(args.video_input):
        raise UserError(f"video '{args.video_input}' does not exist: check --video-input")
    name = "webcam" if args.webcam else args.video_input
    capture = cv2.VideoCapture(0 if args.webcam else args.video_input)
    if not capture.isOpened():
        raise UserError(f"OpenCV cannot read from {name}: check that it is {'a camera' if args.webcam else 'a video'}")
    target = None
    if output is not None:
        target = output if output.suffix.lower() == ".mp4" else output / f"{Path(name).stem}.mp4"
        if args.video_input and target.resolve() == Path(args.video_input).resolve():
            raise UserError(f"the result would replace the input {target}: choose another --output")
    palette = Palette()
    frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    total = frames if args.video_input and frames > 0 else None
    try:
        with VideoFile(target, capture.get(cv2.CAP_PROP_FPS)) if target else nullcontext() as video:
            for frame in tqdm(_read_frames(capture), total=total, unit="frame", disable=None):
                drawing = _draw_frame(frame, predictor, palette, args.labels)
                if video is not None:
                    video.write(drawing)
                elif not _show(drawing, wait_ms=1):
                    break
    finally:
        capture.release()
        if target is not None and target.is_file():
            print(f"the result is {target}")


def _read_frames(capture: cv2.VideoCapture) -> Iterator[Picture]:
    """Frames, RGB, until the video's end."""
    while True:
        there, frame = capture.read()
        if not there:
            return
        yield np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _draw_frame(frame: Picture, predictor: Predictor, palette: Palette, labels: bool) -> Picture:
    outputs = predictor(frame, image_format="RGB")
    key = next(key for key in VIDEO_PREFERENCE if key in outputs)
    ((_, drawing),) = draw(frame, {key: outputs[key]}, predictor.metadata, palette=palette, labels=labels)
    return drawing


class VideoFile:
    """An .mp4 file that gets its name when it is closed; what was written before an error or Ctrl-C is kept."""

    def __init__(self, path: Path, frames_per_second: float) -> None:
        self._path = path
        self._unfinished = path.with_name(f"{path.stem}.part.mp4")
        # Cameras may not say.
        self._frames_per_second = frames_per_second if frames_per_second > 0 else 25.0
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> "VideoFile":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.release()
            self._unfinished.replace(self._path)

    def write(self, frame: Picture) -> None:
        """Add a frame, RGB. All have the size of the first."""
        if self._writer is None:
            size = (frame.shape[1], frame.shape[0])
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(self._unfinished), codec, self._frames_per_second, size)
            if not writer.isOpened():
                raise UserError(f"OpenCV cannot write the video {self._path}: choose another --output")
            self._writer = writer
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))


# ------------------------------------------------------------------------------------------------ window


def _has_screen() -> bool:
    """Whether a window can be opened: there is a desktop, and OpenCV was built with windows."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    try:
        cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
    except cv2.error:
        return False
    return True


def _show(drawing: Picture, *, wait_ms: int) -> bool:
    """Show a picture for so long (0: until a key is pressed); False if the key was Escape or q."""
    cv2.imshow(WINDOW, cv2.cvtColor(drawing, cv2.COLOR_RGB2BGR))
    return cv2.waitKey(wait_ms) & 0xFF not in (ESCAPE, ord("q"))


if __name__ == "__main__":
    command(main)
