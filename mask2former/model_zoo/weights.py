"""The published weights on this machine's disk."""

from pathlib import Path

from iopath.common.file_io import get_cache_dir

from .download import TIMEOUT, TRIES, download
from .table import Entry, find

__all__ = ["cached_file", "download_weights"]


def cached_file(entry: Entry) -> Path:
    """Where a model's weights are once they are downloaded.

    As for everything that Detectron2 downloads, the folder is ``FVCORE_CACHE``, or else ``~/.torch/iopath_cache``.
    """
    return Path(get_cache_dir(), "mask2former", entry.name, entry.file_name)


def download_weights(name: str, *, force: bool = False, timeout: float = TIMEOUT, tries: int = TRIES) -> Path:
    """The file of a model's weights, downloaded if it isn't there yet.

    A file that is there was checked when it came, and is trusted.

    Args:
        name: of a model; see :func:`table.find`.
        force: download it anew.
        timeout, tries: see :func:`download.download`.

    Raises:
        UserError: if the zoo has no such model, or its weights can't be downloaded.
    """
    entry = find(name)
    path = cached_file(entry)
    if force:
        path.unlink(missing_ok=True)
    if not path.is_file():
        download(entry.url, path, entry.hash_prefix, timeout=timeout, tries=tries)
    return path
