"""The user's own data: recognised, checked, told in a summary, registered, and a recipe set to them.

Read in this order: ``forms`` (which files belong together), then a reader for each form (``instances``,
``object_masks``, ``label_maps``, ``panoptic``), then ``register``.
"""

from .forms import FORMS
from .register import OwnData, register_data, register_rows

__all__ = ["FORMS", "OwnData", "register_data", "register_rows"]
