"""Exponential moving average of the weights."""

from detectron2.engine import HookBase
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .best_checkpoint import WeightsFile

__all__ = ["AVERAGE", "WeightAverage"]

AVERAGE = "model_ema"


class WeightAverage(HookBase):
    """Averages the weights after every step: ``average = decay * average + (1 - decay) * weights``.

    The first step's weights start it. Buffers, such as statistics of batch norm, are those of the last step. At the
    end of the run the average becomes ``model_ema.pth``; to resume, ``state`` goes into the run's checkpoints. The hook
    comes before those that save and evaluate.

    Args:
        model: the trained one, without a wrapper for several processes; it is copied.
        decay: in [0, 1), for example 0.999.
    """

    def __init__(self, model: nn.Module, output_dir: str, *, decay: float) -> None:
        self._model = model
        self._output_dir = output_dir
        self.state = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def model(self) -> nn.Module:
        """The model with averaged weights, or the trained one before the first step."""
        return self.state.module if int(self.state.n_averaged) else self._model

    def after_step(self) -> None:
        self.state.update_parameters(self._model)

    def after_train(self) -> None:
        if int(self.state.n_averaged):
            WeightsFile(self.state.module, self._output_dir).save(AVERAGE)
