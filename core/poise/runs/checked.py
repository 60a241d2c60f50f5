"""Records as they are read: of a bounded size and of the shape that Poise writes, or refused in a line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from poise.config import PARTS
from poise.errors import FileError
from poise.files import read_json, read_regular

STATES = ("running", "done", "failed", "interrupted")
MOST_CONFIG = 1 << 18  # bytes; a configuration takes some 2,000
MOST_ROWS = 1 << 28  # bytes of metrics
_PROCESS = {"host": str, "boot": str, "namespace": str, "pid": int, "began": str}
_DEEPEST = 32  # levels of a configuration
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NOT_FINITE = ("nan", "inf", "-inf")  # as `poise.files.plain` writes them


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping; empty when there is none.

    Raises
    ------
    FileError
    """
    if not path.exists() and not path.is_symlink():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise FileError(f"{path} is damaged: it holds no mapping")
    return value


def read_status(path: Path) -> dict[str, Any]:
    """Read a status: one of `STATES`, a reason, a process.

    Raises
    ------
    FileError
    """
    value = read_mapping(path)
    if not value:
        return value
    if (state := value.get("state")) not in STATES:
        raise FileError(f"{path} is damaged: its state is {str(state)[:40]}, none of {', '.join(STATES)}")
    if not isinstance(value.get("reason", ""), str):
        raise FileError(f"{path} is damaged: its reason is no text")
    process = value.get("process", {})
    if not isinstance(process, dict) or (process and _types(process) != _PROCESS):
        raise FileError(f"{path} is damaged: its process is not of {', '.join(_PROCESS)}")
    return value


def _types(values: Mapping[str, Any]) -> dict[str, type]:
    return {key: type(value) for key, value in values.items()}


def read_summary(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Read final metrics, and notes.

    Raises
    ------
    FileError
    """
    value = read_mapping(path)
    metrics, notes = value.get("metrics", {}), value.get("notes", {})
    for name, part in (("metrics", metrics), ("notes", notes)):
        if not isinstance(part, dict):
            raise FileError(f"{path} is damaged: its {name} are no mapping")
    for name, found in metrics.items():
        if not _is_number(found):
            raise FileError(f"{path} is damaged: its metric {name} is {str(found)[:40]}, no number")
    return {name: float(found) for name, found in metrics.items()}, notes


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read metric rows; a last line torn by a kill is left out.

    Raises
    ------
    FileError
        Naming the first line that is no metric row.
    """
    if not path.exists():
        return []
    rows = []
    lines = read_regular(path, MOST_ROWS).splitlines(keepends=True)
    for n, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif n < len(lines) or line.endswith(b"\n"):
            raise FileError(f"{path} is damaged: line {n} is no metric row")
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fits = isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("name"), str)
    return {**row, "value": float(row["value"])} if fits and _is_number(row.get("value")) else None


def _is_number(value: Any) -> bool:
    """Tell whether a value is a number as Poise writes one: finite, or the name of one that is not."""
    if isinstance(value, str):
        return value in _NOT_FINITE
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration: plain values of YAML, without aliases, dates or tags.

    Raises
    ------
    FileError
    """
    raw = read_regular(path, MOST_CONFIG)
    try:
        text = raw.decode()
        _check_events(path, text)
        config = yaml.load(text, _LOADER)
    except (yaml.YAMLError, ValueError) as error:
        raise FileError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(config, dict):
        raise FileError(f"{path} is damaged: it holds no mapping")
    _check_plain(path, config)
    for kind in PARTS:
        part = config.get(kind, {"entry": "none"})
        if not isinstance(part, dict) or not isinstance(part.get("entry"), str):
            raise FileError(f"{path} is damaged: {kind} is no component")
    if type(config.get("seed", 0)) is not int:
        raise FileError(f"{path} is damaged: seed is no whole number")
    return config


def _check_events(path: Path, text: str) -> None:
    """Refuse aliases, which may grow without bound or end in themselves, and deep nesting, in advance."""
    depth = 0
    for event in yaml.parse(text, _LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise FileError(f"{path} is damaged: it repeats values by aliases, which Poise does not write")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise FileError(f"{path} is damaged: it is nested more than {_DEEPEST} levels deep")


def _check_plain(path: Path, value: Any, key: str = "") -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise FileError(f"{path} is damaged: {key or 'it'} has the key {name!r}, which is no text")
            _check_plain(path, inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(path, inner, key)
    elif value is not None and not isinstance(value, (str, int, float)):
        raise FileError(f"{path} is damaged: {key} is a {type(value).__name__}, which Poise does not write")
