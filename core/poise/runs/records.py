"""What a run leaves behind, whatever else happens: metrics, status, summary, environment.

| file | content |
|---|---|
| `resolved.yaml` | the whole configuration, as plain data |
| `origin.json` | the run's number, and the files of others that it reads (`origin.py`) |
| `metrics.jsonl` | one line per value: step, name, value, wall time |
| `status.json` | running, done, failed or interrupted, with the reason, and by which process |
| `summary.json` | final metrics, and notes such as provenance and tables |
| `environment.json` | versions, threads, machine |

Reports read these and nothing else.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from poise.errors import FileError, RunError
from poise.files import plain, read_regular, still_there, sync_folder, write_bytes, write_json
from poise.runs.checked import (
    MOST_ROWS,
    read_config,
    read_mapping,
    read_rows,
    read_status,
    read_summary,
)
from poise.runs.liveness import fate, this_process

SWEEP = "sweep.json"  # in the directory of a sweep: its jobs, also those that left no record
PACKAGES = (
    "poise", "torch", "numpy", "hydra-core", "omegaconf", "safetensors", "transformers",
    "scikit-learn", "scipy", "lightgbm", "catboost", "xgboost-cpu", "quantile-forest",
)


@dataclass(frozen=True)
class Run:
    """A run as read from its directory.

    `state` is one of `checked.STATES`; of a run that says it is running but has no live process, it is
    killed, or unknown where that process may live on another machine.
    """

    directory: Path
    state: str
    config: dict[str, Any]
    status: dict[str, Any]
    metrics: dict[str, float]
    notes: dict[str, Any]
    rows: list[dict[str, Any]] = field(repr=False)
    environment: dict[str, Any] = field(repr=False)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and values of one metric."""
        rows = [r for r in self.rows if r["name"] == name]
        return [r["step"] for r in rows], [r["value"] for r in rows]


class Records:
    """Writes the records of one run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.notes: dict[str, Any] = {}
        self.rows = 0
        self._file = None
        self._started = time.time()

    def begin(self, config: Mapping[str, Any]) -> None:
        """Claim the directory and write the configuration; only one run can.

        Raises
        ------
        RunError
            When the directory already holds a run.
        FileError
            When it cannot be written.
        """
        text = yaml.safe_dump(plain(config), sort_keys=False).encode()
        target = self.directory / "resolved.yaml"
        draft = self.directory / f".resolved.{os.getpid()}"
        write_bytes(draft, text)
        try:
            os.link(draft, target)  # unlike a rename, a link never replaces what is there
        except FileExistsError:
            raise RunError(
                f"{self.directory} already holds a run: choose another hydra.run.dir, or continue "
                f"it with resume={self.directory}"
            ) from None
        finally:
            draft.unlink()
        sync_folder(self.directory)
        self.open()

    def open(self, keep_rows: int | None = None) -> None:
        """Open for appending, after cutting all but the first `keep_rows` metric rows."""
        path = self.directory / "metrics.jsonl"
        lines = read_regular(path, MOST_ROWS).splitlines(keepends=True) if path.exists() else []
        if keep_rows is not None:
            if len(lines) < keep_rows:
                raise FileError(f"{path} holds {len(lines)} rows, the checkpoint expects {keep_rows}")
            lines = lines[:keep_rows]
            write_bytes(path, b"".join(lines))
        self.rows = len(lines)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in `close`

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row per value."""
        now = round(time.time() - self._started, 3)
        rows = [
            json.dumps({"step": step, "name": k, "value": plain(float(v)), "time": now})
            for k, v in values.items()
        ]
        if rows and self._file:
            try:
                self._file.write(("\n".join(rows) + "\n").encode())
            except OSError as error:
                raise FileError(
                    f"cannot write {self.directory}/metrics.jsonl: {error.strerror}"
                ) from error
        self.rows += len(rows)

    def status(self, state: str, reason: str = "") -> None:
        """Write the status file."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        body = {"state": state, "reason": reason, "time": now, "process": this_process(),
                "seconds": round(time.time() - self._started, 2)}
        self._write("status.json", body)

    def put_back(self, status: Mapping[str, Any]) -> None:
        """Write a status as it was read before."""
        self._write("status.json", status)

    def environment(self, threads: int, device: str) -> None:
        """Write versions, thread counts and the machine."""
        self._write("environment.json", environment(threads, device))

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Write final metrics and notes."""
        self._write("summary.json", {"metrics": metrics, "notes": self.notes})

    def _write(self, name: str, value: Any) -> None:
        still_there(self.directory)
        write_json(self.directory / name, value)

    def close(self) -> None:
        """Close the metrics file."""
        if self._file:
            self._file.close()
            self._file = None


def environment(threads: int, device: str) -> dict[str, Any]:
    """Return versions, thread counts and the machine as plain values."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(), "platform": platform.platform(),
        "machine": platform.machine(), "cores": os.cpu_count(), "threads": threads,
        "device": device, "versions": versions,
    }


def load_run(directory: Path | str) -> Run:
    """Read a run's records.

    Raises
    ------
    FileError
        When the directory holds no run or its records are damaged.
    """
    directory = Path(directory)
    config, status = load_config(directory), load_status(directory)
    metrics, notes = read_summary(directory / "summary.json")
    return Run(
        directory=directory, state=_state(directory, status), config=config, status=status,
        metrics=metrics, notes=notes, rows=read_rows(directory / "metrics.jsonl"),
        environment=read_mapping(directory / "environment.json"),
    )


def load_status(directory: Path) -> dict[str, Any]:
    """Read a run's status; empty when it was stopped before it had one."""
    return read_status(directory / "status.json")


def load_config(directory: Path | str) -> dict[str, Any]:
    """Read a run's resolved configuration as plain values."""
    path = Path(directory) / "resolved.yaml"
    if not path.exists():
        inner = sorted(p.parent.name for p in Path(directory).glob("*/resolved.yaml"))
        hint = f"; the runs of this sweep: {', '.join(inner)}" if inner else ""
        raise FileError(f"{directory} holds no run: there is no {path.name}{hint}")
    return read_config(path)


def find_runs(paths: Iterable[Path | str]) -> list[Path]:
    """Return the run directories at or below the given paths, in natural order.

    Raises
    ------
    FileError
        For a path that does not exist, or holds neither a run nor a sweep.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileError(f"no directory {path}")
        here = sorted((p.parent for p in path.rglob("resolved.yaml")), key=_natural)
        if not here and not any(path.rglob(SWEEP)):
            raise FileError(f"{path} holds no run (no resolved.yaml at or below it)")
        found += [p for p in here if p not in found]
    return found


def _natural(path: Path) -> list[Any]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.parts]


def _state(directory: Path, status: Mapping[str, Any]) -> str:
    state = status.get("state", "running")
    return fate(directory, status.get("process", {})) if state == "running" else state
