"""Recognising in which form the user's own data are, and which files belong to them."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import UserError
from ..datasets.coco_format import load_json
from ..images import picture_size
from .classes import CLASS_FILES, find_beside
from .files import list_files

__all__ = ["FORMS", "LABEL_SUFFIXES", "OBJECT_FILES", "Source", "recognise"]

FORMS = {
    "coco": "a JSON file in COCO's instance format, and pictures",
    "panoptic": "a JSON file in COCO's panoptic format, a folder of PNGs, and pictures",
    "semantic": "pictures, and PNGs of the same names whose values are classes",
    "instance-maps": "pictures, and PNGs of the same names whose values number the objects, 0 being background",
    "object-masks": "pictures, and a PNG for each object",
}
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
# Which class each object has, in a folder of instance-maps or object-masks, or beside it.
OBJECT_FILES = ("objects.json", "objects.csv")

_PICTURE_FOLDERS = ("images", "image", "imgs", "pictures", "JPEGImages")
_LABEL_FOLDERS = (
    "labels", "masks", "annotations", "instances", "objects", "label", "mask", "gt", "SegmentationClass",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One split's files: ``annotations`` is a JSON file or a folder, ``segments`` the folder of panoptic PNGs."""

    form: str
    pictures: Path
    annotations: Path
    segments: Path | None = None
    note: str = ""  # what the user should know about how the form was recognised


def recognise(paths: Sequence[str], form: str = "") -> Source:
    """The form of the data at ``paths``: a JSON file, and folders, first that of the pictures, then of the PNGs.

    A JSON file's pictures and PNGs are looked for where they usually are, and so are the parts of a single folder.
    ``form``, a key of ``FORMS``, is taken as it is.

    Raises ``UserError`` if a path is missing, or the files are in none of the forms.
    """
    if form and form not in FORMS:
        raise UserError(f"the data form is '{form}', expected one of {', '.join(FORMS)}")
    found = [Path(path).expanduser().absolute() for path in paths]
    for path in found:
        if not path.exists():
            raise UserError(f"'{path}' does not exist: give a JSON file or folders")
    files, folders = [path for path in found if path.is_file()], [path for path in found if path.is_dir()]
    if len(files) > 1 or len(folders) > 2 or (not files and not folders):
        raise UserError(f"expected at most one JSON file and two folders, got {' '.join(paths) or 'nothing'}")
    if files:
        return _from_json(files[0], folders, form)
    if len(folders) == 2:
        return _from_folders(folders[0], folders[1], form)
    return _from_one_folder(folders[0], form)


# ------------------------------------------------------------------------------------------------- JSON files


def _from_json(path: Path, folders: Sequence[Path], form: str) -> Source:
    content = load_json(path)
    kind = _json_form(content)
    if not kind or form not in ("", kind):
        expected = FORMS[form or "coco"]
        raise UserError(
            f"'{path}' is not in {'the form ' + form if form else 'COCO format'}: expected {expected} ('images', "
            "'annotations' and 'categories' in the file)"
        )
    # Names such as instances_train2017.json, beside or above train2017/.
    split = path.stem.replace("instances_", "").replace("panoptic_", "")
    names = [split, f"images/{split}", *_PICTURE_FOLDERS, "."]
    pictures = folders[0] if folders else _find_folder(path, content["images"], "pictures", names)
    if kind == "coco":
        return Source(kind, pictures, path)
    names = [path.stem, "panoptic", "annotations", "masks", "labels"]
    segments = folders[1] if len(folders) == 2 else _find_folder(path, content["annotations"], "PNGs", names)
    return Source(kind, pictures, path, segments)


def _json_form(content: Any) -> str:
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        return ""
    panoptic = any(isinstance(record, dict) and "segments_info" in record for record in content["annotations"])
    return "panoptic" if panoptic else "coco"


def _find_folder(path: Path, records: Sequence[dict[str, Any]], noun: str, names: Sequence[str]) -> Path:
    """The folder near the JSON file with the files of ``records``: one of ``names``, or else the only one there."""
    # Who reads the file says what is wrong with a record.
    first = str(records[0].get("file_name", "")) if records and isinstance(records[0], dict) else ""
    bases = (path.parent, path.parent.parent)
    named = [base / name for base in bases for name in names]
    others = sorted(entry for base in bases for entry in base.iterdir() if entry.is_dir())
    having = [place for place in (*named, *others) if first and os.path.isfile(place / first)]
    if having and (having[0] in named or len(set(having)) == 1):
        return having[0]
    raise UserError(f"'{path}': no folder near it has its {noun}, such as '{first}': give their folder too")


# ---------------------------------------------------------------------------------------------------- folders


def _from_one_folder(folder: Path, form: str) -> Source:
    if form in ("", "object-masks") and any(_is_bowl_folder(entry) for entry in folder.iterdir()):
        return Source("object-masks", folder, folder)
    if form in ("", "coco", "panoptic"):
        own = (*CLASS_FILES, *OBJECT_FILES)
        candidates = [
            p for place in (folder, folder / "annotations") for p in place.glob("*.json") if p.name not in own
        ]
        usable = sorted(path for path in candidates if _json_form(load_json(path)))
        if len(usable) > 1:
            raise UserError(f"'{folder}' has several annotation files ({', '.join(p.name for p in usable)}): name one")
        if usable:
            return _from_json(usable[0], [], form)
    pictures, labels = (_child(folder, names) for names in (_PICTURE_FOLDERS, _LABEL_FOLDERS))
    if pictures is None or labels is None:
        known = "; ".join(f"{name}: {meaning}" for name, meaning in FORMS.items())
        raise UserError(
            f"'{folder}' has neither a COCO JSON file, nor folders 'images' and 'labels', nor a folder for each "
            f"picture with 'images' and 'masks' in it: give a path for each part ({known})"
        )
    return _from_folders(pictures, labels, form)


def _is_bowl_folder(folder: Path) -> bool:
    """Whether a folder is one picture of the Data Science Bowl: ``images/`` with the picture, ``masks/`` with PNGs."""
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def _child(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _from_folders(pictures: Path, labels: Path, form: str) -> Source:
    stems = list_files(pictures)
    pngs = list_files(labels, LABEL_SUFFIXES)
    if not stems or not pngs:
        raise UserError(f"'{labels if stems else pictures}' has no {'PNGs' if stems else 'pictures'}: check the path")
    if form:
        return Source(form, pictures, labels)
    if stems.keys() & pngs.keys():
        return _label_maps(pictures, labels, list(pngs.values()))
    first = next(iter(pngs))
    if any(first.startswith((f"{stem}_", f"{stem}/")) for stem in stems):
        return Source("object-masks", pictures, labels)
    raise UserError(
        f"no PNG in '{labels}' has the name of a picture in '{pictures}': the first are '{pngs[first].name}' and "
        f"'{next(iter(stems.values())).name}', expected NAME.png or, with a PNG for each object, NAME_*.png"
    )


def _label_maps(pictures: Path, labels: Path, pngs: Sequence[Path]) -> Source:
    """Whether PNGs with the pictures' names hold classes or numbers of objects: nothing in a single one tells."""
    if find_beside(labels, OBJECT_FILES) or "instance" in labels.name.lower() or _has_16_bits(pngs[0]):
        other, meaning, form = "semantic", "classes", "instance-maps"
    else:
        other, meaning, form = "instance-maps", "numbers of objects", "semantic"
    note = f"read as {form}: {FORMS[form]}. If their values are {meaning}, say --data-form {other}"
    return Source(form, pictures, labels, note=note)


def _has_16_bits(path: Path) -> bool:
    picture_size(path)  # for the error
    with Image.open(path) as image:
        return image.mode.startswith("I")
