"""The learning rate falls to zero as (1 - step / train.max_iter) ** 0.9; a recipe says how many steps."""

from detectron2.config import LazyCall as L
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler

from .training import optimizer, train

__all__ = ["lr_scheduler", "optimizer", "train"]

# The optimizer is filled in once it is built.
lr_scheduler = L(LRMultiplier)(
    multiplier=L(PolynomialDecayParamScheduler)(base_value=1.0, power=0.9),
    max_iter="${train.max_iter}",
)
