#!/usr/bin/env python
"""Write the weights of a checkpoint of any kind as a file of this package, or as a folder for Hugging Face.

Examples:
    python tools/convert_checkpoint.py output/nuclei/model_final.pth model.safetensors --dtype float16
    python tools/convert_checkpoint.py mask2former-swin-tiny-coco-instance/ swin_tiny.pth
    python tools/convert_checkpoint.py model_final.pth huggingface_model/ --to huggingface \\
        --config-file configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml
"""

import argparse
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from mask2former.checkpoint import read_model, replace_file, write_hugging_face, write_safetensors
from mask2former.engine import load_config
from mask2former.errors import UserError, command

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ENDINGS = (".safetensors", ".pth")
BACKBONE = "backbone."
CLASSES = "sem_seg_head.predictor.class_embed.bias"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="checkpoint: .pth, .pkl, .safetensors, or a folder of Hugging Face's")
    parser.add_argument("output", help="file to write, .safetensors or .pth; or a folder with --to huggingface")
    parser.add_argument("--to", choices=("mask2former", "huggingface"), default="mask2former", help="whose names")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; default: %(default)s")
    parser.add_argument(
        "--config-file",
        help="the model's recipe, YAML: --to huggingface takes the names of its classes and how pictures are resized",
    )
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    if args.to == "mask2former" and not args.output.endswith(ENDINGS):
        raise UserError(f"the output must end in {' or '.join(ENDINGS)}, but is {args.output}")
    weights = _read(args.input)
    try:
        if args.to == "huggingface":
            settings = _settings(args.config_file, len(weights.get(CLASSES, ())) - 1)
            weights = write_hugging_face(weights, args.output, dtype=dtype, **settings)
        else:
            _write(weights, args.output, dtype)
    except OSError as error:
        raise UserError(f"{args.output} can't be written: {error}") from error
    count = sum(value.numel() for value in weights.values())
    print(f"{args.output}: {len(weights)} tensors, {count / 1e6:.1f} M values, {_size(args.output) / 2**20:.1f} MiB")


def _read(path: str) -> dict[str, torch.Tensor]:
    """Weights in this package's names; what has no place among them is printed."""
    content = read_model(path)
    if content.get("__author__") == "Caffe2":
        raise UserError(
            f"{path} has Detectron's names, which Detectron2 converts while loading: set MODEL.WEIGHTS to it"
        )
    if content["left_out"]:
        print(f"left out of {path}: {', '.join(content['left_out'])}")
    prefix = BACKBONE if content.get("matching_heuristics") else ""
    return {
        name if name.startswith(prefix) else prefix + name: torch.as_tensor(value)
        for name, value in content["model"].items()
    }


def _write(weights: dict[str, torch.Tensor], path: str, dtype: torch.dtype) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if path.endswith(".safetensors"):
        write_safetensors(weights, path, dtype)
        return
    state = {"model": {name: _cast(value, dtype) for name, value in weights.items()}}
    replace_file(path, lambda temporary: torch.save(state, temporary))


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _size(path: str) -> int:
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(entry.stat().st_size for entry in os.scandir(path))


def _settings(config_file: str | None, num_classes: int) -> dict[str, Any]:
    """What a recipe says of the model that its weights don't."""
    if config_file is None:
        return {}
    cfg = load_config(config_file)
    if not isinstance(cfg, CfgNode):
        raise UserError(f"--config-file must be a YAML recipe, but is {config_file}")
    if cfg.INPUT.FORMAT != "RGB":
        raise UserError(
            f"Hugging Face's models take RGB pictures, but INPUT.FORMAT of {config_file} is {cfg.INPUT.FORMAT}"
        )
    return {
        "class_names": _class_names(cfg, num_classes),
        "stride_in_1x1": cfg.MODEL.RESNETS.STRIDE_IN_1X1,
        "shortest_edge": cfg.INPUT.MIN_SIZE_TEST,
        "longest_edge": cfg.INPUT.MAX_SIZE_TEST,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
    }


def _class_names(cfg: CfgNode, num_classes: int) -> list[str] | None:
    """Names of the classes in the recipe's data set, which lists things alone, or things and stuff as "stuff"."""
    for dataset in cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(dataset)
        for names in (metadata.get("stuff_classes"), metadata.get("thing_classes")):
            if names is not None and len(names) == num_classes:
                return list(names)
    print(f"no data set of the recipe has {num_classes} classes: they are called LABEL_0 and so on")
    return None


if __name__ == "__main__":
    command(main)
