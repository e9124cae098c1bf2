"""A run's figures in Weights & Biases (https://wandb.ai), where a recipe asks for it."""

import json
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage
from omegaconf import DictConfig, OmegaConf

from ..data.datasets.coco_format import load_json
from ..data.panoptic_files import save_json
from ..errors import UserError

__all__ = ["WandbWriter", "check_wandb"]

RUN_FILE = "wandb_run.json"
STEP = "iteration"


def check_wandb(project: str) -> None:
    """Raise ``UserError`` if a project is named, but Weights & Biases isn't installed."""
    if project and find_spec("wandb") is None:
        raise UserError(
            f"WANDB_PROJECT is '{project}', but Weights & Biases isn't installed: pip install wandb, or leave it ''"
        )


class WandbWriter(EventWriter):
    """Sends all scalars to a run of Weights & Biases. Its own variables hold: ``WANDB_MODE=offline``, ``WANDB_ENTITY``.

    Which run it is stands in the output folder, so that a resumed run goes on with it. Figures are by ``iteration``:
    the service's own steps can't go back to the last checkpoint.

    Args:
        project: where the run appears.
        output_dir: of the run, also what it is called.
        config: of the run, for display.
        resumed: whether the run goes on with what is in the output folder.
        window: steps over which values are smoothed by their median.

    Raises:
        UserError: if Weights & Biases doesn't let the run begin, for example without an account.
    """

    def __init__(
        self, project: str, output_dir: str, config: CfgNode | DictConfig, *, resumed: bool, window: int = 20
    ) -> None:
        import wandb

        self._window = window
        self._last_write = -1
        file = Path(output_dir, RUN_FILE)
        known = load_json(file)["id"] if resumed and file.is_file() else None
        try:
            self._run = wandb.init(
                project=project,
                dir=output_dir,
                id=known,
                resume="allow",
                name=Path(output_dir).name,
                config=_plain(config),
            )
        except wandb.Error as error:
            problem = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"Weights & Biases: {problem}: call 'wandb login', or set WANDB_MODE=offline in the environment"
            ) from error
        save_json(file, {"id": self._run.id})
        self._run.define_metric("*", step_metric=STEP)

    def write(self) -> None:
        values: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, step) in get_event_storage().latest_with_smoothing_hint(self._window).items():
            if step > self._last_write:
                values[step][name] = value
        for step in sorted(values):
            self._run.log({STEP: step, **values[step]})
            self._last_write = step

    def close(self) -> None:
        self._run.finish()


def _plain(config: CfgNode | DictConfig) -> Any:
    """Plain values; callables by their names."""
    content = config if isinstance(config, CfgNode) else OmegaConf.to_container(config)
    return json.loads(json.dumps(content, default=str))
