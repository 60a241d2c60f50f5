"""Options of a component: a default, a range, a unit and a sentence, written once.

A component is a frozen dataclass whose fields are declared with `option` and whose
`__post_init__` calls `check_options`. Nothing here imports more than the standard library.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

from poise.errors import ConfigError, nearest

_REQUIRED = dataclasses.MISSING


def option(
    default: Any = _REQUIRED,
    help: str = "",
    *,
    choices: tuple[Any, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    unit: str = "",
) -> Any:
    """Declare one field of a component.

    Parameters
    ----------
    default : value, list or dict
        Used when nothing is given. A list or dict is copied for each instance. Leave it out for
        an option that must be given (such options come first in the class).
    help : str
        One sentence, shown by `poise describe`.
    choices : tuple, optional
        The allowed values.
    low, high : float, optional
        Inclusive bounds; `above`, `below` are the exclusive ones. For a list, of every item.
    unit : str
        Unit of the value ("bits", "seconds").
    """
    metadata = {
        "help": help, "choices": choices, "low": low, "high": high,
        "above": above, "below": below, "unit": unit,
    }
    if default is _REQUIRED:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_of(field: dataclasses.Field) -> Any:
    """Return the default of a dataclass field, or `dataclasses.MISSING`."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def option_fields(component: Any) -> list[dataclasses.Field]:
    """Return the fields of a component that are options; those with init=False are its own state."""
    return [f for f in dataclasses.fields(component) if f.init]


def options_of(component: Any) -> dict[str, Any]:
    """Return the options of a component by name, as a component hands them to its worker."""
    return {f.name: getattr(component, f.name) for f in option_fields(component)}


def allowed(field: dataclasses.Field) -> str:
    """Say in words which values an option takes; empty when any value of its type will do."""
    meta = field.metadata
    if meta.get("choices"):
        return "one of " + ", ".join(map(str, meta["choices"]))
    bounds = [
        f"{sign} {meta[key]:g}"
        for key, sign in (("low", ">="), ("above", ">"), ("high", "<="), ("below", "<"))
        if meta.get(key) is not None
    ]
    return " and ".join(bounds)


def check_options(component: Any) -> None:
    """Check types, choices and ranges of every field of a component.

    Raises
    ------
    ConfigError
        Naming the option, the value and what is allowed.
    """
    hints = typing.get_type_hints(type(component))
    for field in option_fields(component):
        value = getattr(component, field.name)
        where = f"{type(component).__name__}.{field.name}"
        if not fits(value, hints[field.name]):
            raise ConfigError(
                f"{where}={value!r} has the wrong type: allowed is {type_name(hints[field.name])}"
            )
        items = value if isinstance(value, list) else [value]
        for item in items:
            if item is not None and not _in_range(item, field.metadata):
                raise ConfigError(f"{where}={value!r} is not allowed: it must be {allowed(field)}")


def _in_range(value: Any, meta: typing.Mapping[str, Any]) -> bool:
    if meta.get("choices") is not None:
        return value in meta["choices"]
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return True
    if math.isnan(value):
        return all(meta.get(k) is None for k in ("low", "high", "above", "below"))
    return (
        (meta.get("low") is None or value >= meta["low"])
        and (meta.get("high") is None or value <= meta["high"])
        and (meta.get("above") is None or value > meta["above"])
        and (meta.get("below") is None or value < meta["below"])
    )


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a plain value has the annotated type (an int passes for a float)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is list:
        return isinstance(value, list) and all(fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(k, args[0]) and fits(v, args[1]) for k, v in value.items()
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is type(None):
        return value is None
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """Write an annotation the way a person would."""
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in typing.get_args(hint))
    if typing.get_origin(hint):
        inner = ", ".join(type_name(a) for a in typing.get_args(hint))
        return f"{typing.get_origin(hint).__name__}[{inner}]"
    return getattr(hint, "__name__", str(hint))


def make(component: type, options: typing.Mapping[str, Any], where: str) -> Any:
    """Build a component from plain options; unknown and missing ones are named.

    Parameters
    ----------
    component : type
        A component dataclass.
    options : mapping
        Plain values by option name.
    where : str
        Shown in messages, for example "adapter=bone".

    Raises
    ------
    ConfigError
        For an unknown or missing option, a wrong type or a value out of range.
    """
    fields = {f.name: f for f in option_fields(component)}
    for key in options:
        if key not in fields:
            have = ", ".join(sorted(fields)) or "none"
            raise ConfigError(
                f"{where} has no option {key!r}{nearest(key, list(fields))} (options: {have})"
            )
    for name, field in fields.items():
        if name not in options and default_of(field) is dataclasses.MISSING:
            raise ConfigError(f"{where} needs the option {name!r}: {field.metadata.get('help')}")
    try:
        return component(**options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
