"""A configuration is data: nothing that it names is imported, but Hydra's own launchers and sweepers.

What is refused is all that is not known to be harmless: a list of what harms would miss the next way in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

from poise.errors import ConfigError
from poise.registry import installed

_PLUGINS = {"hydra.launcher._target_": Launcher, "hydra.sweeper._target_": Sweeper}
# Hydra's job_logging=none and =disabled. Of any other, logging.config would import what its handlers and
# formatters name, and each value that begins with ext://; handlers would write files.
_LOGGING = ({"version": 1, "root": None, "disable_existing_loggers": False},
            {"version": 1, "root": {"level": "ERROR"}, "disable_existing_loggers": True})
_KNOWN = ("hydra.conf", "poise_conf")


def refuse_code(whole: DictConfig) -> None:
    """Refuse a composed configuration that would have a class or module imported.

    Raises
    ------
    ConfigError
        Naming the key: a callback, a `_target_` that is no launcher or sweeper of Hydra's, logging of one's
        own, or what is no folder on the search path, nor a package that a plugin brings.
    """
    hydra = OmegaConf.to_container(whole.hydra, resolve=False)
    _refuse_logging(hydra)
    _refuse_odd(hydra)
    for key, value in leaves(OmegaConf.to_container(whole, resolve=False), ""):
        refuse_key(key, value)
    refuse_search_path(OmegaConf.to_container(whole.hydra.searchpath, resolve=False))


def _refuse_logging(hydra: Any) -> None:
    for name in ("job_logging", "hydra_logging"):
        if hydra[name] not in _LOGGING:
            raise ConfigError(f"hydra.{name}: logging names classes and files, and is refused; what a run "
                              f"tells is in its records (hydra/{name}=none and =disabled are allowed)")


def _refuse_odd(hydra: Any) -> None:
    """Refuse values of Hydra's own node that it takes without a look, and trips over when jobs start."""
    for name in ("launcher", "sweeper"):
        if not isinstance(hydra[name], dict) or "_target_" not in hydra[name]:
            raise ConfigError(f"hydra.{name}={hydra[name]!r} is no {name}: write {name}=NAME, or options "
                              f"of it (hydra.{name}.KEY=VALUE)")
    if (most := hydra["sweeper"].get("max_batch_size")) is not None and (type(most) is not int or most < 1):
        raise ConfigError(f"hydra.sweeper.max_batch_size={most!r}: allowed is 1 or more, or null")
    ahead = hydra["launcher"].get("pre_dispatch", "all")  # an expression, which joblib evaluates
    if not re.fullmatch(r"all|[1-9]\d*(\s*\*\s*n_jobs)?", str(ahead), re.ASCII):
        raise ConfigError(f"hydra.launcher.pre_dispatch={ahead}: allowed is all, NUMBER or NUMBER*n_jobs")
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
    if last == "_target_" and value not in _plugins(key):
        raise ConfigError(f"{key}={value}: a configuration names no code; components are chosen by `entry` "
                          f"(poise list), launchers in conf/launcher")


def _plugins(key: str) -> list[str]:
    """Return the classes that a `_target_` may be: by their whole names, those that Hydra found itself."""
    kind = _PLUGINS.get(key.lstrip("+"))
    found = Plugins.instance().discover(kind) if kind else ()
    return [f"{plugin.__module__}.{plugin.__qualname__}" for plugin in found]


def refuse_search_path(paths: Any) -> None:
    """Refuse what is neither a folder nor a package that a plugin has registered on the search path."""
    known = {f"pkg://{name}" for name in _KNOWN} | set(installed().conf_packages)
    for path in paths if isinstance(paths, (list, tuple)) else [paths]:
        folder = str(path).removeprefix("file://")
        if "://" in folder and str(path) not in known:
            raise ConfigError(f"hydra.searchpath: {path} would be imported; give a folder, or let a plugin "
                              f"register its package (registry.add_conf)")
        if isinstance(path, str) and "://" not in folder and not os.path.isdir(folder):
            raise ConfigError(f"hydra.searchpath: no folder {folder}")


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
