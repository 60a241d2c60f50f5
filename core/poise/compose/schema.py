"""What Hydra is told: where the YAML lives, the shape of the top level, a node for every component."""

from __future__ import annotations

import dataclasses
import os
import sys
import typing
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir, initialize_config_module
from hydra.conf import HydraConf
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING

from poise.compose.sources import install_sources
from poise.config import PARTS, RunConfig, Train
from poise.errors import ConfigError, nearest
from poise.options import default_of, option_fields
from poise.registry import installed

HYDRA_VERSION_BASE = "1.3"
CONF = "POISE_CONF"
OPTION_GROUPS = (*PARTS, "train")  # groups whose choice brings the options below its key
GROUPS = (*OPTION_GROUPS, "experiment")  # groups that have a `none` or a default, and no null


def conf_root() -> str:
    """Return where the YAML lives: `POISE_CONF`, the clone's `conf/`, or the wheel's `poise_conf`."""
    if os.environ.get(CONF):
        return str(Path(os.environ[CONF]).resolve())
    clone = Path(__file__).parents[3] / "conf"
    return str(clone) if (clone / "config.yaml").is_file() else "pkg://poise_conf"


class _PoiseSearchPath(SearchPathPlugin):
    """Keeps core's own groups on the path whatever --config-path says, and adds plugins' ones."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        root = conf_root()
        root = root if root.startswith("pkg://") else f"file://{root}"
        have = {item.path for item in search_path.get_path()}
        for provider, path in [("poise", root), *_plugin_conf()]:
            if path not in have:
                search_path.append(provider=provider, path=path)


def _plugin_conf() -> list[tuple[str, str]]:
    return [("poise-plugin", p) for p in sorted(installed().conf_packages)]


@dataclass
class _Nothing:
    """No key."""


@dataclass
class _Hydra(HydraConf):
    env: _Nothing = field(default_factory=_Nothing)  # Hydra composes it, and has no shape for it


@dataclass
class _Paths:
    out: str = "runs"


def _root() -> type:
    """Return the shape of `conf/config.yaml`; anything else at the top level is refused."""
    hints = typing.get_type_hints(RunConfig)
    fields = [_top(f, hints[f.name]) for f in dataclasses.fields(RunConfig)]
    fields.append(("paths", _Paths, field(default_factory=_Paths)))
    # named as it is found in this module, so that a launcher's processes import it: a copy loses defaults
    return make_dataclass("_Root", fields, namespace={"__module__": __name__})


def _top(of: dataclasses.Field, hint: Any) -> tuple[str, Any, Any]:
    if of.name in OPTION_GROUPS:
        return of.name, Any, field(default=MISSING)
    if of.name == "threads":  # null until it is asked how many cores there are
        return of.name, int | None, field(default=None)
    return of.name, hint, field(default=of.default)


_Root = _root()
BESIDE = {"hydra": _Hydra, "paths": _Paths}  # nodes of the composed file that are no part of a RunConfig
TOP = tuple(f.name for f in dataclasses.fields(_Root))  # keys of the composed file


def refuse_unknown(node: Any, kind: type, key: str) -> None:
    """Refuse a key that a node of a known shape does not have; Hydra lets `+` add any, which nobody reads.

    Raises
    ------
    ConfigError
        With the keys that there are.
    """
    hints = typing.get_type_hints(kind)
    for name, value in node.items():
        if name not in hints:
            raise ConfigError(f"{key}.{name}={str(value)[:40]}: {key} has no key {name!r}"
                              f"{nearest(str(name), list(hints))} (keys: {', '.join(hints)})")
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            refuse_unknown(value, hints[name], f"{key}.{name}")


def install() -> None:
    """Make the search path and a node for every registered component known to Hydra; idempotent."""
    Plugins.instance().register(_PoiseSearchPath)
    install_sources()
    store = ConfigStore.instance()
    store.store(name="poise_schema", node=_Root)
    store.store(group="train", name="default", node=_node("Train", Train, entry=None))
    for kind in PARTS:
        for entry in installed().entries(kind):
            try:
                component = entry.load()
            except ConfigError as error:
                print(f"poise: {error}", file=sys.stderr)
                continue
            node = _node(f"{kind}_{entry.name}", component, entry.name)
            store.store(group=kind, name=entry.name, node=node)


def _node(label: str, component: type, entry: str | None) -> type:
    """Return a typed, mutable twin of a component for Hydra to override."""
    hints = typing.get_type_hints(component)
    fields: list[Any] = [("entry", str, field(default=entry))] if entry else []
    for f in option_fields(component):
        default = default_of(f)
        if default is dataclasses.MISSING:
            fields.append((f.name, hints[f.name], field(default=MISSING)))
        elif isinstance(default, (list, dict)):
            fields.append((f.name, hints[f.name], field(default_factory=lambda d=default: type(d)(d))))
        else:
            fields.append((f.name, hints[f.name], field(default=default)))
    return make_dataclass(label, fields)


def initialized() -> AbstractContextManager[None]:
    """Return a context in which Hydra composes from `conf_root()`.

    Raises
    ------
    ConfigError
        When the working directory was removed, which Hydra asks for.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the working directory was removed: change to one that is there") from None
    if GlobalHydra.instance().is_initialized():
        GlobalHydra.instance().clear()
    root = conf_root()
    if root.startswith("pkg://"):
        return initialize_config_module(root[len("pkg://"):], version_base=HYDRA_VERSION_BASE)
    return initialize_config_dir(root, version_base=HYDRA_VERSION_BASE)
