"""``mask2former://`` addresses, for everything that reads through Detectron2's ``PathManager``."""

from typing import IO, Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from .table import PREFIX
from .weights import download_weights

__all__ = ["ModelZooHandler"]


class ModelZooHandler(PathHandler):
    """``mask2former://name``: a published model's weights, downloaded when they are first asked for."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return str(download_weights(path, force=force))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if "r" not in mode:
            raise ValueError(f"{path} can only be read, got mode {mode!r}")
        return open(self._get_local_path(path), mode, buffering)


PathManager.register_handler(ModelZooHandler(), allow_override=True)
