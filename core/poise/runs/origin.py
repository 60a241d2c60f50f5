"""Where a run comes from: its number, and the files of others that it reads, by path and checksum.

`origin.json` is written when the run begins. A resume looks the files up there, wherever it is started
from, and goes on only with the very same ones.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from poise.errors import DataError, FileError
from poise.files import checksum, read_json, write_json
from poise.hooks import Input, Reads

NAME = "origin.json"
WHOLE = 1_000_000_000  # bytes; of a larger file the beginning, size and time of change are compared
_HEAD = 1 << 20

Seen = dict[str, dict[str, str]]  # by "data.path": the absolute path, and a checksum


@dataclass(frozen=True)
class Origin:
    """What `origin.json` holds."""

    run: str
    inputs: Seen = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write it to a run's directory."""
        write_json(directory / NAME, {"run": self.run, "inputs": self.inputs})


def load_origin(directory: Path) -> Origin | None:
    """Read a run's origin; None when the run was stopped before it had one.

    Raises
    ------
    FileError
        When it is damaged.
    """
    path = directory / NAME
    if not path.exists():
        return None
    value = read_json(path)
    run, inputs = (value.get("run"), value.get("inputs")) if isinstance(value, dict) else (None, None)
    if not isinstance(run, str) or not _is_seen(inputs):
        raise FileError(f"{path} is damaged: it does not hold the run's number and inputs")
    return Origin(run, inputs)


def _is_seen(inputs: Any) -> TypeGuard[Seen]:
    return isinstance(inputs, dict) and all(
        isinstance(one, dict) and isinstance(one.get("path"), str) and isinstance(one.get("checksum"), str)
        for one in inputs.values()
    )


def inputs_of(components: Mapping[str, Any]) -> dict[str, Input]:
    """Return what the components of a run read, by key of its configuration: "data.path"."""
    return {
        f"{kind}.{name}": one for kind, component in components.items() if isinstance(component, Reads)
        for name, one in component.inputs().items()
    }


def look_at(inputs: Mapping[str, Input]) -> Seen:
    """Return absolute path and checksum of each input; of one that does not exist the checksum is empty.

    Raises
    ------
    DataError
        For what cannot be read.
    """
    return {
        key: {"path": str(one.path.absolute()),
              "checksum": _fingerprint(key, one.path, one.patterns) if one.path.exists() else ""}
        for key, one in inputs.items()
    }


def _fingerprint(key: str, path: Path, patterns: tuple[str, ...]) -> str:
    try:
        if not path.is_dir():
            return _of_file(path)
        files = {p.relative_to(path).as_posix(): p for pattern in patterns for p in path.glob(pattern)}
        lines = [f"{name}\0{_of_file(files[name])}\n" for name in sorted(files) if files[name].is_file()]
    except OSError as error:
        raise DataError(f"{key}: cannot read {error.filename or path}: {error.strerror}") from None
    return f"sha256 of {len(lines)} files:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def _of_file(path: Path) -> str:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path} is no regular file: a run reads files that it can read again")
    if found.st_size <= WHOLE:
        return "sha256:" + checksum(path)
    with open(path, "rb") as f:
        head = hashlib.sha256(f.read(_HEAD)).hexdigest()
    return f"beginning, size and time:{head}:{found.st_size}:{found.st_mtime_ns}"


def same_inputs(directory: Path, before: Seen, inputs: Mapping[str, Input]) -> Seen:
    """Look at the inputs of a resume, and refuse data and models other than those the run began with.

    Raises
    ------
    DataError
        Naming what is missing and how to say where it is, or what has changed and both checksums.
    """
    now = look_at(inputs)
    for key, one in now.items():
        was = before.get(key, {}).get("checksum")  # empty when the run began without it, and failed
        where = f"{key}={one['path']}"
        if not one["checksum"]:
            raise DataError(f"{where} does not exist, which {directory} reads: if it was moved, write "
                            f"resume={directory} {key}=NEW")
        if was and was != one["checksum"]:
            raise DataError(f"{where} is not what {directory} began with: its checksum was {was} and is "
                            f"{one['checksum']}; bring back what it was, or begin a new run")
    return now
