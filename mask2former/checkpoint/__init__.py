"""Checkpoints: safe reading, whole writing, and other projects' names turned into ours."""

from .checkpointer import Checkpointer, load_weights
from .files import read_checkpoint, write_safetensors

__all__ = ["Checkpointer", "load_weights", "read_checkpoint", "write_safetensors"]
