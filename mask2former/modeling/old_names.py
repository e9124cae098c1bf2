"""Checkpoints of the published code's first version, in which some weights had other names."""

import logging
from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar

from torch import Tensor, nn

__all__ = ["RenamesOldWeights", "rename_old_weights"]


class RenamesOldWeights(nn.Module):
    """A module that loads weights by the names that they had before version 2.

    torch saves ``_version`` with a state dict. Files of other formats don't have it, whatever their names are: there a
    name that begins with a part that this module has is up to date.
    """

    _version = 2
    # What old names begin with, and what they begin with now; the first that fits counts.
    renamed: ClassVar[Mapping[str, str]] = {}

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        self.rename(state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def rename(self, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: Mapping[str, Any]) -> None:
        """Rename, in place, this module's weights in a state dict in which they begin with ``prefix``.

        ``local_metadata`` is what the state dict says about this module: "version", if anything.
        """
        if local_metadata.get("version", 1) >= self._version:
            return
        count = 0
        for name in [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]:
            new_name = self._new_name(name)
            if new_name != name:
                state_dict[prefix + new_name] = state_dict.pop(prefix + name)
                count += 1
        if count:
            logging.getLogger(__name__).warning(
                f"{count} weights of {type(self).__name__} have names of an old version: they are renamed on loading"
            )

    def _new_name(self, name: str) -> str:
        if hasattr(self, name.partition(".")[0]):
            return name
        for old, new in self.renamed.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


def rename_old_weights(model: nn.Module, state_dict: MutableMapping[str, Any]) -> None:
    """Give the weights of ``model`` in a state dict their names of today, in place.

    Loading does so too. This is for what compares names or shapes before, to skip those that don't fit.
    """
    metadata = getattr(state_dict, "_metadata", {})
    for name, module in model.named_modules():
        if isinstance(module, RenamesOldWeights):
            module.rename(state_dict, f"{name}." if name else "", metadata.get(name, {}))
