"""A configuration is data: nothing that it names is imported, but Hydra's own launchers and sweepers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from poise.errors import ConfigError
from poise.registry import installed

# where Hydra looks for plugins; it refuses other classes as launchers and sweepers, but not as callbacks
_OWN = ("hydra._internal.core_plugins.", "hydra_plugins.")
_LOGGING = ("logging.", "colorlog.")
_KNOWN = ("hydra.conf", "poise_conf")


def refuse_code(whole: DictConfig) -> None:
    """Refuse a composed configuration that would have a class or module imported.

    Raises
    ------
    ConfigError
        Naming the key: a callback, a `_target_` that is not Hydra's own, a class of a logging handler, or a
        package on the search path that no plugin brings.
    """
    _refuse_odd(OmegaConf.to_container(whole.hydra, resolve=False))
    for key, value in leaves(OmegaConf.to_container(whole, resolve=False), ""):
        refuse_key(key, value)
    refuse_search_path(OmegaConf.to_container(whole.hydra.searchpath, resolve=False))


def _refuse_odd(hydra: Any) -> None:
    """Refuse values of Hydra's own node that it takes without a look, and trips over when jobs start."""
    for name in ("launcher", "sweeper"):
        if not isinstance(hydra[name], dict) or "_target_" not in hydra[name]:
            raise ConfigError(f"hydra.{name}={hydra[name]!r} is no {name}: write {name}=NAME, or options "
                              f"of it (hydra.{name}.KEY=VALUE)")
    if names := list(hydra["job"]["env_set"] or {}):
        raise ConfigError(f"hydra.job.env_set.{names[0]}: a configuration sets no variables of the "
                          f"environment: set {names[0]} in the shell")
    verbose = hydra["verbose"]
    if not isinstance(verbose, (bool, str)) and not (
            isinstance(verbose, list) and all(isinstance(name, str) for name in verbose)):
        raise ConfigError(f"hydra.verbose={verbose!r}: allowed is true, false, or names of loggers")


def refuse_key(key: str, value: Any) -> None:
    """Refuse one entry, by its whole dotted key, that would have something imported."""
    last = key.rpartition(".")[2]
    if key.startswith("hydra.callbacks."):
        raise ConfigError(f"{key}: callbacks run code that a configuration names, and are refused; a "
                          f"plugin may bring a tracker instead")
    if last == "_target_" and not _starts(value, _OWN):
        raise ConfigError(f"{key}={value}: a configuration names no code; components are chosen by `entry` "
                          f"(poise list), launchers in conf/launcher")
    if last in ("class", "()") and "_logging." in key and not _starts(value, _LOGGING):
        raise ConfigError(f"{key}={value}: only handlers and formatters of logging and colorlog are taken")


def refuse_search_path(paths: Any) -> None:
    """Refuse packages on the search path other than those that plugins have registered."""
    known = {f"pkg://{name}" for name in _KNOWN} | set(installed().conf_packages)
    for path in paths if isinstance(paths, (list, tuple)) else [paths]:
        if "pkg://" in str(path) and str(path) not in known:
            raise ConfigError(f"hydra.searchpath: {path} would be imported; give a folder, or let a plugin "
                              f"register its package (registry.add_conf)")
        folder = str(path).removeprefix("file://")
        if isinstance(path, str) and "://" not in folder and not os.path.isdir(folder):
            raise ConfigError(f"hydra.searchpath: no folder {folder}")


def _starts(value: Any, prefixes: tuple[str, ...]) -> bool:
    return isinstance(value, str) and value.startswith(prefixes)


def leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and value of every leaf below a node."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from leaves(value, f"{key}.{number}")
    else:
        yield key, node
