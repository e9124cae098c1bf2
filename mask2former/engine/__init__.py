"""Training and evaluation: one loop, whichever kind of config names the parts."""

from .launch import add_launch_options, launch
from .optimizer import build_optimizer
from .own_data import DataPaths, add_data_options
from .recipe import Recipe, load_config, load_recipe
from .setup import available_device, setup_run
from .trainer import evaluate, evaluate_weights, train

__all__ = [
    "DataPaths",
    "Recipe",
    "add_data_options",
    "add_launch_options",
    "available_device",
    "build_optimizer",
    "evaluate",
    "evaluate_weights",
    "launch",
    "load_config",
    "load_recipe",
    "setup_run",
    "train",
]
