"""The published models: where their weights are and what was measured with them.

``model_zoo.json`` holds the rows of the published model zoo (https://github.com/facebookresearch/Mask2Former).
"""

import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import UserError

__all__ = ["PREFIX", "Entry", "entries", "find"]

PREFIX = "mask2former://"
PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """A published model.

    Attributes:
        name: path of its recipe under ``configs/`` without ``.yaml``, as the published table has it.
        url: of its weights; the file's name ends in the first digits of the file's MD5 hash.
        data_set, task, backbone: as a reader names them: "COCO", "Panoptic segmentation", "Swin-B (IN21k)".
        training: how long it was trained, such as ``{"epochs": "50"}`` or ``{"iterations": "90k"}``.
        figures: what was measured when it was published, in percent: ``{"PQ": "51.9"}``.
        model_id: the publishers' name of the training run.
        recipe: ``name``, but for the one model whose recipe is called otherwise than the published table says.
    """

    name: str
    url: str
    data_set: str
    task: str
    backbone: str
    training: dict[str, str]
    figures: dict[str, str]
    model_id: str
    recipe: str

    @property
    def file_name(self) -> str:
        """Name of the file of weights."""
        return self.url.rpartition("/")[2]

    @property
    def hash_prefix(self) -> str:
        """The first digits, hexadecimal, of the weights' MD5 hash."""
        return Path(self.file_name).stem.rpartition("_")[2]

    @property
    def is_video(self) -> bool:
        """Whether it segments videos, not pictures."""
        return self.name.startswith("youtubevis_")

    @property
    def config_file(self) -> Path:
        """The recipe's file: one that was installed with the package, or the repository's."""
        installed = PACKAGE / "configs"
        folder = installed if installed.is_dir() else PACKAGE.parent.parent / "configs"
        return folder / f"{self.recipe}.yaml"


@cache
def entries() -> tuple[Entry, ...]:
    """All models, in the published order."""
    rows = json.loads((PACKAGE / "model_zoo.json").read_text(encoding="utf-8"))
    return tuple(Entry(**{"recipe": row["name"], **row}) for row in rows)


def find(name: str) -> Entry:
    """The model of a name, with or without ``mask2former://`` before it and ``.yaml`` behind it.

    Raises:
        UserError: if there is none; the message has the nearest names.
    """
    wanted = name.removeprefix(PREFIX).strip("/").removesuffix(".yaml")
    for entry in entries():
        if wanted in (entry.name, entry.recipe):
            return entry
    near = difflib.get_close_matches(wanted, [entry.name for entry in entries()], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "MODEL_ZOO.md lists them"
    raise UserError(f"the model zoo has no model '{wanted}': {hint}")
