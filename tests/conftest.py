"""Fixtures shared by the tests."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from detectron2.utils import logger as detectron2_logger
from scripts import load_script
from tiny_nuclei_model import one_thread

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with ``coco/`` and ``nuclei/``: real pictures that are too large, or not free, to be committed."""
    folder = Path(os.environ.get("MASK2FORMER_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "coco" / "annotations").is_dir():
        pytest.skip("needs COCO and nuclei pictures: set MASK2FORMER_SHARED_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def convert_checkpoint() -> Callable[..., None]:
    """tools/convert_checkpoint.py, called with its arguments."""
    path = REPOSITORY / "tools" / "convert_checkpoint.py"
    module = load_script(path)

    def run(*arguments: str | Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [path.name, *map(str, arguments)])
            module.main()

    return run


@pytest.fixture(scope="session")
def hugging_face() -> ModuleType:
    """Hugging Face's module ``modeling_mask2former``, an implementation that no one here wrote."""
    transformers = pytest.importorskip("transformers", reason="needs transformers to compare with")
    if not transformers.utils.is_torch_available():
        pytest.skip(f"transformers {transformers.__version__} asks for a newer torch")
    from transformers.models.mask2former import modeling_mask2former

    return modeling_mask2former


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """For comparisons with published figures, which leave little room for rounding.

    The number of threads decides how sums are rounded, and now and then on which side of 0 a mask's logit lies.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread_and_seed() -> Iterator[None]:
    """For tests of the small model: the same random numbers each time, and no threads to wait for."""
    torch.manual_seed(0)
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def loggers_put_back() -> Iterator[None]:
    """A run sets up its log, whose handlers would outlive the streams and folders of the test."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "mask2former", "fvcore")]
    kept = [(logger, logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, handlers, propagate, level in kept:
        if logger.handlers != handlers:
            detectron2_logger.setup_logger.cache_clear()
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
