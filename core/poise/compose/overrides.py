"""Overrides as they are typed: what the grammar makes of one, what is refused before Hydra is asked."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException

from poise.compose.code import leaves, refuse_key, refuse_search_path
from poise.compose.schema import GROUPS
from poise.config import PARTS
from poise.errors import ConfigError
from poise.registry import installed

CHOSEN = (*GROUPS, "launcher")  # groups of which one is chosen by name
_USUAL = {"train": "default", "launcher": "basic"}  # the choice of a group that has no `none`


def check_overrides(overrides: list[str]) -> None:
    """Refuse what Hydra answers poorly, before it is asked.

    Raises
    ------
    ConfigError
        For `group=null`, a value that needs quotes, a word that is no override.
    """
    parser = OverridesParser.create()
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
        except HydraException:
            raise ConfigError(_grammar_help(text)) from None
        except RecursionError:
            raise ConfigError(f"{text[:40]}...: the value is nested too deeply") from None
        key = parsed.key_or_group
        if not key:
            raise ConfigError(_grammar_help(text))
        _refuse_code(key, parsed)
        if key in CHOSEN:
            for value in _values(parsed):
                _check_choice(text, key, value, parsed.is_delete())


def _refuse_code(key: str, parsed: Override) -> None:
    """Refuse what would be imported before Hydra has a look; the composed whole is looked at again."""
    for value in _values(parsed):
        if key == "hydra.searchpath":
            refuse_search_path(value)
        for inner, leaf in leaves(value, key):
            refuse_key(inner, leaf)


def _values(parsed: Override) -> list[Any]:
    """Return the one value of an override, or those of a sweep."""
    value = parsed.value()
    return list(value.list) if isinstance(value, ChoiceSweep) else [value]


def _check_choice(text: str, key: str, value: Any, taken_away: bool) -> None:
    """Refuse what is not the name of one choice of a group, nor options of the present one."""
    if value is None and not taken_away:
        raise ConfigError(f"{text}: a group has no null; write {key}={_USUAL.get(key, 'none')}")
    named = (str, QuotedString, type(None))
    if not isinstance(value, named if key in ("experiment", "launcher") else (*named, dict)):
        hint = f" (see: poise list {key})" if key in PARTS else ""
        raise ConfigError(f"{text}: {key} takes the name of one choice, not {str(value)[:40]}{hint}")


def _grammar_help(text: str) -> str:
    key, has, value = text.partition("=")
    if not has:
        return f"{text!r} is not an override: write KEY=VALUE (flags such as --multirun start with --)"
    value = value.replace("\\", "\\\\").replace('"', '\\"')
    return (
        f"{text}: the value holds a character of Hydra's grammar; quote it twice, "
        f"once for Hydra and once for the shell: '{key}=\"{value}\"'"
    )


def open_key(text: str) -> str:
    """Let an override add keys to an option that is a free mapping, as if it were written with ++.

    `recipe.base_options.lightgbm.grid=11` is what a person writes; Hydra knows only the keys that are
    there already.
    """
    kind, _, rest = text.partition("=")[0].partition(".")
    if kind not in PARTS or not rest:
        return text
    return f"++{text}" if rest.partition(".")[0] in _mappings(kind) else text


def _mappings(kind: str) -> set[str]:
    """Return the names of the options of a kind's components that are mappings."""
    found = set()
    for entry in installed().entries(kind):
        try:
            component = entry.load()
        except ConfigError:
            continue
        hints = typing.get_type_hints(component)
        found |= {name for name, hint in hints.items() if typing.get_origin(hint) is dict}
    return found


def is_sweep(text: str) -> bool:
    """Tell whether an override gives several values, as a sweep takes them."""
    try:
        return OverridesParser.create().parse_override(text).is_sweep_override()
    except (HydraException, RecursionError):
        return False


def refuse_sweeps(overrides: list[str]) -> None:
    """Refuse overrides that ask for a sweep where --multirun does not.

    Raises
    ------
    ConfigError
        What to write instead.
    """
    several = next((o for o in overrides if is_sweep(o)), None)
    if several is not None:
        check_overrides(overrides)
        raise ConfigError(several_values(several))


def several_values(text: str) -> str:
    """Say what to do about an override with several values where there can be one."""
    key, _, value = text.partition("=")
    return (
        f"{text}: several values; to sweep over them add --multirun, for one list write "
        f"'{key}=[{value}]', for one string quote it"
    )


def parse_changes(overrides: list[str]) -> Mapping[str, Any]:
    """Parse plain `key=value` overrides of a resume."""
    check_overrides(overrides)
    parser = OverridesParser.create()
    for text in overrides:
        if is_sweep(text):
            raise ConfigError(f"{text}: a run is resumed with one value, not several")
    parsed = [parser.parse_override(o) for o in overrides]
    return {p.key_or_group: p.value() for p in parsed}
