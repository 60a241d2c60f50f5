"""Where implementations are found: by kind and name, from installed plugins.

A plugin's `register(registry)` adds `Entry`s; the distribution names that function under the
entry-point group `poise.plugins`. Installed means registered. Components are loaded when first
used, so listing stays fast; this module imports neither torch nor Hydra.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import typing
from dataclasses import dataclass, field
from typing import Any

from poise.errors import ConfigError, NameClash, nearest
from poise.options import allowed, default_of, make, option_fields, type_name

# what can be registered, in the order of `poise list`; every other list of kinds comes from this one
KINDS = ("model", "quantizer", "adapter", "aggregator", "data", "recipe", "tracker", "command")
GROUP = "poise.plugins"
STRICT = "POISE_STRICT"


@dataclass(frozen=True)
class Entry:
    """One implementation: what it is called, where it lives, what it is for.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    name : str
        Lower snake case, unique within its kind.
    component : str
        "module:attribute" of the component dataclass; empty for a command.
    summary : str
        One line for `poise list`.
    tasks : tuple of str
        What it can be used for ("classification", "causal_lm", "quantile", "serving"); empty: anything.
    example : dict
        Options with which the contract kits build it in about a second.
    paper : str
        Where the method comes from, if anywhere.
    plugin : str
        Filled in by the registry: the plugin that brought it.
    verbs : dict
        Of a command: "module:attribute" of a component with `run() -> int`, by verb.
    """

    kind: str
    name: str
    component: str
    summary: str = ""
    tasks: tuple[str, ...] = ()
    example: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    plugin: str = ""
    verbs: dict[str, str] = field(default_factory=dict)

    def load(self, verb: str = "") -> Any:
        """Import and return the component, of a command that of a verb."""
        component = self.verbs[verb] if verb else self.component
        module, _, attribute = component.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{self.kind}={self.name} of plugin {self.plugin!r} does not load "
                f"({component}): {error}"
            ) from error


class Registry:
    """Entries by kind and name, and the configuration packages that plugins bring.

    Parameters
    ----------
    plugin : str
        Whose entries are added.
    """

    def __init__(self, plugin: str = "unknown") -> None:
        self._entries: dict[tuple[str, str], Entry] = {}
        self._plugin = plugin
        self.conf_packages: list[str] = []
        self.findings: dict[str, str] = {}

    def add(
        self,
        kind: str,
        name: str,
        component: str | dict[str, str],
        summary: str = "",
        *,
        tasks: tuple[str, ...] = (),
        example: dict[str, Any] | None = None,
        paper: str = "",
    ) -> None:
        """Add one entry; see `Entry` for the parameters. A command's `component` is its verbs.

        Raises
        ------
        ConfigError
            For an unknown kind, an ill-formed name, or (`NameClash`) a (kind, name) that is taken.
        """
        _check_kind(kind)
        if not (name.isidentifier() and name == name.lower()):
            raise ConfigError(f"{kind} {name!r}: a name is lower snake case")
        one, verbs = ("", component) if isinstance(component, dict) else (component, {})
        if (kind == "command") != bool(verbs):
            raise ConfigError(f"{kind} {name!r}: a command names its verbs, {{verb: 'module:Class'}}, and "
                              f"nothing else does")
        entry = Entry(kind, name, one, summary, tasks, example or {}, paper, self._plugin, verbs)
        self._refuse_taken(entry)
        self._entries[kind, name] = entry

    def _refuse_taken(self, entry: Entry) -> None:
        other = self._entries.get((entry.kind, entry.name))
        if other is None:
            return
        what = f"{entry.kind}={entry.name}"
        if other.plugin == entry.plugin:
            raise NameClash(f"{what} is added twice by plugin {entry.plugin!r}: rename one or remove one")
        raise NameClash(
            f"{what} is claimed by two plugins, {other.plugin!r} and {entry.plugin!r}: "
            f"rename one or uninstall one"
        )

    def add_conf(self, package: str) -> None:
        """Add a package of YAML files ("my_plugin.conf") to Hydra's search path."""
        self.conf_packages.append(f"pkg://{package}")

    def add_finding(self, what: str, function: str) -> None:
        """Add a line to `poise doctor`: "module:function", called without arguments, returns one line."""
        self.findings[what] = function

    def merge(self, other: Registry) -> None:
        """Take over everything another registry holds, or, when a name is taken, nothing.

        Raises
        ------
        NameClash
            When both hold a (kind, name).
        """
        for entry in other._entries.values():
            self._refuse_taken(entry)
        self._entries |= other._entries
        self.conf_packages += other.conf_packages
        self.findings |= other.findings

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Return the entries of one kind, or all, sorted by kind and name."""
        if kind is not None:
            _check_kind(kind)
        order = {k: i for i, k in enumerate(KINDS)}
        found = [e for e in self._entries.values() if kind in (None, e.kind)]
        return sorted(found, key=lambda e: (order[e.kind], e.name))

    def get(self, kind: str, name: str) -> Entry:
        """Return one entry.

        Raises
        ------
        ConfigError
            For an unknown kind or name, with what exists and the nearest name.
        """
        names = [e.name for e in self.entries(kind)]
        if (kind, name) not in self._entries:
            raise ConfigError(
                f"no {kind} named {name!r}{nearest(name, names)} (have: {', '.join(names)})"
            )
        return self._entries[kind, name]

    def build(self, kind: str, name: str, /, **options: Any) -> Any:
        """Return a component: options checked, nothing heavy loaded."""
        return make(self.get(kind, name).load(), options, f"{kind}={name}")

    def build_from(self, kind: str, config: dict[str, Any]) -> Any:
        """Build from a plain mapping with an `entry` key, as a run's configuration has it."""
        options = dict(config)
        name = options.pop("entry")
        return make(self.get(kind, name).load(), options, f"{kind}={name}")

    def load_plugins(self) -> None:
        """Register every installed plugin, in the order of their names.

        Each one registers into a registry of its own, so of a plugin that raises nothing is left: it
        is named on stderr and skipped. Set POISE_STRICT=1 to see its traceback.

        Raises
        ------
        NameClash
            When two plugins claim one name: leaving out either would be a guess.
        """
        from importlib.metadata import entry_points

        for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name != "core", p.name)):
            own = Registry(point.name)
            try:
                point.load()(own)
                self.merge(own)
            except NameClash:
                raise
            except (Exception, SystemExit) as error:
                if os.environ.get(STRICT):
                    raise
                print(
                    f"poise: plugin {point.name!r} ({point.value}) is skipped: "
                    f"{type(error).__name__}: {error} (set {STRICT}=1 for the traceback)",
                    file=sys.stderr,
                )


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"no kind {kind!r}{nearest(kind, list(KINDS))}; kinds: {', '.join(KINDS)}")


_installed: Registry | None = None


def installed() -> Registry:
    """Return the registry of all installed plugins, read once per process."""
    global _installed
    if _installed is None:
        registry = Registry()
        registry.load_plugins()
        _installed = registry
    return _installed


def entries(kind: str | None = None) -> list[Entry]:
    """Return all registered entries, or those of one kind."""
    return installed().entries(kind)


def build(kind: str, name: str, /, **options: Any) -> Any:
    """Return a component by kind and name, for example `build("adapter", "bone", r=32)`."""
    return installed().build(kind, name, **options)


def describe(kind: str, name: str) -> str:
    """Return what an entry is, its options, defaults, ranges and units, as text."""
    entry = installed().get(kind, name)
    lines = [f"{kind}={name}: {entry.summary}", f"  plugin: {entry.plugin}   {entry.component}".rstrip()]
    if entry.paper:
        lines.append(f"  paper:  {entry.paper}")
    for verb, component in entry.verbs.items():
        lines += [f"  poise {name} {verb}   {component}", *_options(entry.load(verb))]
    if not entry.verbs:
        lines += [f"  tasks:  {', '.join(entry.tasks) or 'any'}", *_options(entry.load())]
    return "\n".join(lines)


def _options(component: Any) -> list[str]:
    if not dataclasses.is_dataclass(component):
        return []
    hints = typing.get_type_hints(component)
    fields = option_fields(component)
    lines = ["  options:" if fields else "  options: none"]
    for f in fields:
        default = default_of(f)
        shown = "required" if default is dataclasses.MISSING else repr(default)
        extra = "; ".join(x for x in (allowed(f), f.metadata.get("unit", "")) if x)
        lines.append(f"    {f.name}: {type_name(hints[f.name])} = {shown}")
        text = f.metadata.get("help", "")
        if text or extra:
            lines.append(f"        {text}{f' [{extra}]' if extra else ''}")
    return lines
