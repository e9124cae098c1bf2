#!/usr/bin/env python
"""Write the weights of a checkpoint as a safetensors file.

Example:
    python tools/convert_checkpoint.py output/nuclei/model_final.pth model.safetensors --dtype float16
"""

import argparse
import os

import numpy as np
import torch

from mask2former.checkpoint import read_checkpoint, write_safetensors
from mask2former.errors import UserError, command

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="checkpoint: .pth, .pkl or .safetensors")
    parser.add_argument("output", help="file to write, .safetensors")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; default: %(default)s")
    args = parser.parse_args()
    if not args.output.endswith(".safetensors"):
        raise UserError(f"the output must be a .safetensors file, but is {args.output}")
    content = read_checkpoint(args.input)
    weights = content.get("model", content)
    state = {
        name: torch.as_tensor(value) for name, value in weights.items() if isinstance(value, torch.Tensor | np.ndarray)
    }
    if not state:
        raise UserError(f"{args.input} holds no weights")
    write_safetensors(state, args.output, DTYPES[args.dtype])
    count = sum(value.numel() for value in state.values())
    size = os.path.getsize(args.output) / 2**20
    print(f"{args.output}: {len(state)} tensors, {count / 1e6:.1f} M values, {size:.1f} MiB")


if __name__ == "__main__":
    command(main)
