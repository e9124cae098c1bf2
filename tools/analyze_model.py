#!/usr/bin/env python
"""Show what a model is made of and what it costs.

tasks:
  flop        operations (multiply-adds) by operator and by module
  activation  values that convolutions and matrix products give
  parameter   weights by module
  structure   the modules
  time        milliseconds by part: backbone, pixel decoder, transformer decoder, post-processing

flop, activation and time depend on the pictures: means over those of the first test set, unless others are given.

examples:
  python tools/analyze_model.py --config-file F --tasks parameter structure
  python tools/analyze_model.py --config-file F --tasks flop --num-inputs 100
  python tools/analyze_model.py --config-file F --tasks flop time --input a.jpg b.jpg --num-inputs 2
  python tools/analyze_model.py --config-file configs/ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml \\
      --tasks flop --use-fixed-input-size
"""

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from fvcore.nn import flop_count_table, parameter_count_table
from omegaconf import OmegaConf
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from mask2former.analysis import PARTS, count_activations, count_flops, time_parts, whole_pictures
from mask2former.checkpoint import load_weights
from mask2former.data import build_mapper
from mask2former.engine import Recipe, load_recipe
from mask2former.errors import UserError, command

Batch = list[dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    recipe = load_recipe(args.config_file, args.opts)
    torch.manual_seed(0)
    model = recipe.build_model().eval()
    if _names_weights(args.opts):
        load_weights(model, recipe.weights)
    for task in args.tasks:
        TASKS[task](model, args, recipe)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="recipe, YAML or LazyConfig (.py)")
    parser.add_argument("--tasks", required=True, nargs="+", choices=TASKS, help="what to show, in this order")
    parser.add_argument(
        "-n", "--num-inputs", type=int, default=100, metavar="N", help="pictures at most; default: %(default)s"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--input", nargs="+", metavar="FILE", help="these pictures instead of the test set's")
    which.add_argument(
        "--use-fixed-input-size",
        action="store_true",
        help="one black square picture of the recipe's INPUT.CROP.SIZE, as published figures on ADE20K are for",
    )
    which.add_argument("--input-size", type=int, metavar="PIXELS", help="one black square picture of this side")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="runs of each picture for the time; default: %(default)s"
    )
    parser.add_argument(
        "--depth", type=int, default=4, metavar="N", help="levels of modules in tables; default: %(default)s"
    )
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="KEY VALUE",
        help="replace values of the recipe, last on the line after an option with one value; weights are loaded where "
        "they are named here (MODEL.WEIGHTS FILE), and are random otherwise, which changes post-processing alone",
    )
    args = parser.parse_args(arguments)
    for name in ("num_inputs", "repeats", "depth", "input_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    return args


def _names_weights(opts: Sequence[str]) -> bool:
    return any(option.partition("=")[0] in ("MODEL.WEIGHTS", "train.init_checkpoint") for option in opts)


# ------------------------------------------------------------------------------------------------ inputs


def _inputs(args: argparse.Namespace, recipe: Recipe) -> Iterator[Batch]:
    """Batches of one sample, with a progress bar."""
    if args.use_fixed_input_size or args.input_size:
        side = args.input_size or _crop_size(recipe)
        batches: Iterable[Batch] = [[{"image": torch.zeros(3, side, side)}]]
        total = 1
    elif args.input:
        batches, total = _samples(args.input, recipe), len(args.input)
    else:
        if not recipe.test_sets:
            raise UserError("the recipe has no test set to take pictures from: give --input or --input-size")
        batches = recipe.test_sets[0].build_loader()
        total = args.num_inputs
    total = min(total, args.num_inputs)
    yield from tqdm(itertools.islice(batches, total), total=total, unit="picture", disable=None)


def _crop_size(recipe: Recipe) -> int:
    if not isinstance(recipe.config, CfgNode):
        raise UserError("--use-fixed-input-size reads INPUT.CROP.SIZE, which a LazyConfig lacks: give --input-size")
    size = recipe.config.INPUT.CROP.SIZE[0]
    if size != int(size) or size <= 1:
        raise UserError(f"INPUT.CROP.SIZE is {size}, expected a number of pixels: give --input-size")
    return int(size)


def _samples(paths: Sequence[str], recipe: Recipe) -> Iterator[Batch]:
    """Pictures from files, resized as the recipe's test pictures are."""
    config = recipe.config
    if isinstance(config, CfgNode):
        mapper: Any = build_mapper(config, is_train=False)
    elif OmegaConf.select(config, "dataloader.test.mapper") is None:
        raise UserError("the LazyConfig has no dataloader.test.mapper, which says how pictures are resized: add it")
    else:
        mapper = instantiate(config.dataloader.test.mapper)
    for path in paths:
        yield [mapper({"file_name": path})]


# ------------------------------------------------------------------------------------------------- tasks


def show_flops(model: nn.Module, args: argparse.Namespace, recipe: Recipe) -> None:
    counts = []
    with whole_pictures(model) as otherwise_in_tiles:
        for batch in _inputs(args, recipe):
            analysis = count_flops(model, batch)
            counts.append(analysis.by_operator())
    print(f"Operations by module, for the last of {len(counts)} inputs:")
    print(flop_count_table(analysis, max_depth=args.depth, show_param_shapes=False))
    _show_counts("operations", counts, 1e9, "G", otherwise_in_tiles)
    print(f"not counted: {', '.join(sorted(analysis.unsupported_ops())) or 'nothing'}")


def show_activations(model: nn.Module, args: argparse.Namespace, recipe: Recipe) -> None:
    with whole_pictures(model) as otherwise_in_tiles:
        counts = [count_activations(model, batch).by_operator() for batch in _inputs(args, recipe)]
    _show_counts("activations", counts, 1e6, "M", otherwise_in_tiles)


def show_parameters(model: nn.Module, args: argparse.Namespace, recipe: Recipe) -> None:
    print(parameter_count_table(model, max_depth=args.depth))
    print(f"Total: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters")


def show_structure(model: nn.Module, args: argparse.Namespace, recipe: Recipe) -> None:
    print(model)


def show_times(model: nn.Module, args: argparse.Namespace, recipe: Recipe) -> None:
    runs: list[dict[str, float]] = []
    for batch in _inputs(args, recipe):
        if not runs:
            time_parts(model, batch)  # warm-up
        runs += [time_parts(model, batch) for _ in range(args.repeats)]
    whole = sum(run["total"] for run in runs)
    rows = [
        [part, np.mean(times) * 1e3, np.std(times) * 1e3, f"{sum(times) / whole:.0%}"]
        for part in PARTS
        if (times := [run[part] for run in runs if part in run])
    ]
    print(tabulate(rows, headers=["part", "ms", "± ms", "share"], tablefmt="github", floatfmt=".1f"))
    count = len(runs) // args.repeats
    print(f"{count} pictures x {args.repeats} runs on {recipe.device}, {torch.get_num_threads()} threads")


TASKS: dict[str, Callable[[nn.Module, argparse.Namespace, Recipe], None]] = {
    "flop": show_flops,
    "activation": show_activations,
    "parameter": show_parameters,
    "structure": show_structure,
    "time": show_times,
}


def _show_counts(
    what: str, counts: Sequence[dict[str, float]], scale: float, unit: str, otherwise_in_tiles: bool
) -> None:
    names = sorted({name for count in counts for name in count}, key=lambda name: -counts[0].get(name, 0))
    columns = {name: [count.get(name, 0.0) for count in counts] for name in names}
    columns["total"] = [sum(count.values()) for count in counts]
    rows = [[name, _mean_and_deviation(values, scale)] for name, values in columns.items()]
    if otherwise_in_tiles:
        print("The model takes pictures in tiles; these counts are for whole pictures.")
    print(f"Mean ± deviation over {len(counts)} inputs:")
    print(tabulate(rows, headers=["operator", f"{what} ({unit})"], tablefmt="github", disable_numparse=True))


def _mean_and_deviation(values: Sequence[float], scale: float) -> str:
    return f"{np.mean(values) / scale:.5g} ± {np.std(values) / scale:.2g}"


if __name__ == "__main__":
    command(main)
