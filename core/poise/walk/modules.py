"""Modules by their paths."""

from __future__ import annotations

from torch import nn

from poise.errors import ConfigError


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put a module in the place of the one at a dotted path.

    Raises
    ------
    ConfigError
        For the empty path: the model itself has no parent to hold another module.
    """
    if not path:
        kind = type(model).__name__
        raise ConfigError(f"the model itself is the layer ({kind}): wrap it, nn.Sequential(model)")
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def path_of(model: nn.Module, module: nn.Module) -> str:
    """Return the first dotted path of a module inside a model."""
    return next(path for path, m in model.named_modules() if m is module)
