"""Shared by the scripts here, in whichever environment they run: files, levels, and what a run used.

Needs NumPy alone. One .npz per (set, split) lies in WORKDIR; predictions lie in WORKDIR/pred, each as
NAME-SEED-PEER.npz with a JSON record of the same stem beside it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

LEVELS = np.array([k / 100 for k in range(1, 100)])
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS",
           "LOKY_MAX_CPU_COUNT")


@dataclass(frozen=True)
class Case:
    """One split of one set: standardised features and targets, plain arrays."""

    name: str
    seed: int
    arrays: dict[str, np.ndarray]

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """Return x and y of the training and validation rows together."""
        return (np.concatenate([self["x_train"], self["x_val"]]),
                np.concatenate([self["y_train"], self["y_val"]]))


def load_case(path: Path) -> Case:
    name, seed = path.stem.rsplit("-", 1)
    with np.load(path, allow_pickle=False) as data:
        return Case(name, int(seed), {key: data[key] for key in data.files})


def cases(workdir: Path, names: Iterable[str], seeds: Iterable[int]) -> list[Path]:
    """Return the paths of the splits, seeds outermost, so that one seed of all sets comes first."""
    chosen = list(names)
    return [workdir / f"{name}-{seed}.npz" for seed in seeds for name in chosen]


def prediction_path(workdir: Path, name: str, seed: int, peer: str) -> Path:
    return workdir / "pred" / f"{name}-{seed}-{peer}.npz"


def save(path: Path, raw: np.ndarray | None, record: dict[str, Any]) -> None:
    """Write the record and, unless the run failed, the quantiles: `raw` as given, `q` sorted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    if raw is not None:
        part = path.with_suffix(".part.npz")
        np.savez_compressed(part, q=np.sort(raw, axis=1), raw=raw)
        part.replace(path)


def done(path: Path) -> bool:
    """Say whether a run ended, well or badly: a recorded failure is not tried again."""
    return path.exists() or path.with_suffix(".json").exists()


class Meter:
    """Wall and CPU seconds since the start, and the peak memory of the process or its largest child."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), _cpu()
        self.rss = _rss()

    def record(self) -> dict[str, float]:
        return {
            "seconds": round(time.perf_counter() - self.wall, 3),
            "cpu_seconds": round(_cpu() - self.cpu, 3),
            "peak_rss_mib": round(_rss(), 1),
            "rss_before_mib": round(self.rss, 1),
            "load_average": round(os.getloadavg()[0], 2),
        }


def _cpu() -> float:
    both = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in both)


def _rss() -> float:
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(w).ru_maxrss for w in both) / 1024  # KiB on Linux


def versions(*packages: str) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def run_alone(arguments: list[str], timeout: float) -> str | None:
    """Run this interpreter on the arguments with one thread; return what went wrong, or None."""
    env = os.environ | dict.fromkeys(THREADS, "1")
    command = [sys.executable, "-W", "ignore", *arguments]
    try:
        ended = subprocess.run(command, env=env, timeout=timeout, capture_output=True, text=True,
                               check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {timeout:.0f} s"
    return None if ended.returncode == 0 else f"exit {ended.returncode}: {ended.stderr[-1500:]}"
