"""What a component may have besides its contract: one Protocol each, asked for by `isinstance`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from poise.interfaces import Parts


@dataclass(frozen=True)
class Input:
    """A file that a component reads, or those files of a folder that match one of the patterns."""

    path: Path
    patterns: tuple[str, ...] = ()


@runtime_checkable
class Reads(Protocol):
    """A component that reads files which are not part of the run."""

    def inputs(self) -> dict[str, Input]:
        """Return what it reads, by the option that says where it is; also where a default says so.

        With each of these options set to that path, the component reads the same.
        """
        ...


@runtime_checkable
class Cached(Protocol):
    """An attached adapter that wants to be evaluated within a context of its own."""

    def cached(self) -> contextlib.AbstractContextManager:
        """Return the context, in which what it derives from its parameters is computed once."""
        ...


@runtime_checkable
class Observed(Protocol):
    """An attached adapter that has something recorded at each evaluation."""

    def metrics(self) -> dict[str, float]:
        """Return metrics by name."""
        ...


@runtime_checkable
class Drawn(Protocol):
    """An attached adapter that makes figures of what was recorded, at a run's end."""

    def draw(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Draw into a folder, from metric rows with `step`, `name` and `value`."""
        ...


@runtime_checkable
class Checked(Protocol):
    """A recipe that refuses parts which do not fit, before anything is loaded."""

    def check(self, parts: Parts) -> None:
        """Raise `ConfigError` in words."""
        ...


@runtime_checkable
class Reported(Protocol):
    """A recipe (its class) that says more about all of its runs than one table of metrics."""

    @staticmethod
    def report(runs: Sequence[Any]) -> tuple[list[tuple], list[tuple[str, bytes]]]:
        """Return tables as (title, columns, rows), and pictures as (title, PNG)."""
        ...


@runtime_checkable
class Located(Protocol):
    """A training task that can say which rows of the training data a batch is made of."""

    def rows(self, step: int, part: int) -> Any:
        """Return their numbers, as a tensor or list."""
        ...


@runtime_checkable
class Stops(Protocol):
    """A training task that may have enough before its last step."""

    def done(self) -> bool:
        """Say so; asked after each evaluation."""
        ...


@runtime_checkable
class Preparable(Protocol):
    """A quantized tensor that several kernels multiply."""

    def prepared(self, kernel: str = "auto") -> Any:
        """Return one of the same values on a kernel; raises `ConfigError` for one that does not take it."""
        ...
