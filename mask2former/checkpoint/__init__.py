"""Checkpoints: safe reading, whole writing, and other projects' names turned into ours."""

from .checkpointer import Checkpointer, load_weights, read_model
from .files import read_checkpoint, replace_file, write_safetensors
from .huggingface_folder import write_hugging_face
from .run_state import WrongState, check_state

__all__ = [
    "Checkpointer",
    "WrongState",
    "check_state",
    "load_weights",
    "read_checkpoint",
    "read_model",
    "replace_file",
    "write_hugging_face",
    "write_safetensors",
]
