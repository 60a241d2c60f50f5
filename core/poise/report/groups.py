"""Runs by choice and seed: one value for each, however often a run was repeated."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from poise.runs.records import Run
from poise.runs.trackers import flat

_NOT_A_CHOICE = ("version", "tag", "seed")


@dataclass(frozen=True)
class Clash:
    """Two runs of one choice and seed that differ in some metrics."""

    seed: Any
    metrics: list[str]
    a: Run
    b: Run


@dataclass(frozen=True)
class Group:
    """The runs of one choice.

    Parameters
    ----------
    runs : list of Run
        One per seed; of metrics on which its repeats differ it has none.
    clashes : list of Clash
    """

    runs: list[Run]
    clashes: list[Clash]

    def values(self, metric: str) -> dict[Any, float]:
        """Return a metric by seed; nothing where repeats of a seed differ, as no mean is right then."""
        if any(metric in c.metrics for c in self.clashes):
            return {}
        return {r.config.get("seed"): r.metrics[metric] for r in self.runs if metric in r.metrics}

    @property
    def agreed(self) -> list[Run]:
        """The runs of seeds whose repeats agree."""
        torn = [c.seed for c in self.clashes]
        return [r for r in self.runs if r.config.get("seed") not in torn]


def group(runs: Sequence[Run], varied: Sequence[str]) -> dict[str, Group]:
    """Group runs that differ only in their seed, by their choices."""
    found: dict[str, dict[Any, list[Run]]] = {}
    for run in runs:
        found.setdefault(label(run, varied), {}).setdefault(run.config.get("seed"), []).append(run)
    return {name: _merged(by_seed) for name, by_seed in found.items()}


def _merged(by_seed: Mapping[Any, list[Run]]) -> Group:
    runs, clashes = [], []
    for seed, (first, *others) in by_seed.items():
        metrics = dict(first.metrics)
        for other in others:
            if torn := [n for n in {**metrics, **other.metrics} if not _agree(n, first, other)]:
                clashes.append(Clash(seed, torn, first, other))
            metrics = {n: v for n, v in metrics.items() if n not in torn}
        for name in filter(is_time, metrics):
            times = [r.metrics[name] for r in (first, *others) if name in r.metrics]
            metrics[name] = statistics.median(times)
        runs.append(replace(first, metrics=metrics))
    return Group(runs, clashes)


def _agree(metric: str, a: Run, b: Run) -> bool:
    """Tell whether two runs say the same of a metric; times do not count."""
    left, right = a.metrics.get(metric), b.metrics.get(metric)
    if is_time(metric) or left == right:
        return True
    return left is not None and right is not None and math.isnan(left) and math.isnan(right)


def is_time(metric: str) -> bool:
    """Tell whether a metric measures the machine (times, speeds, peaks): no two runs have it in common."""
    return metric.endswith("seconds") or metric.startswith("machine/")


def varied_keys(runs: Sequence[Run]) -> list[str]:
    """Return the configuration keys, seeds apart, in which the runs differ.

    Options of a component count only among runs that chose the same component.
    """
    configs = [flat(r.config) for r in runs]
    keys = list(dict.fromkeys(k for c in configs for k in c if k not in _NOT_A_CHOICE))
    varied = []
    for key in keys:
        head, _, rest = key.partition(".")
        entries = {c.get(f"{head}.entry") for c in configs}
        having = [c[key] for c in configs if key in c]
        differs = len({repr(v) for v in having}) > 1
        if differs and (rest == "entry" or not (rest and len(entries) > 1 and _follows(configs, key))):
            varied.append(key)
    return varied


def _follows(configs: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Tell whether a key's value follows from which component was chosen."""
    head = key.partition(".")[0]
    seen: dict[Any, set[str]] = {}
    for c in configs:
        if key in c:
            seen.setdefault(c.get(f"{head}.entry"), set()).add(repr(c[key]))
    return all(len(v) == 1 for v in seen.values())


def label(run: Run, varied: Sequence[str]) -> str:
    """Return the choices that set a run apart from the others."""
    values = flat(run.config)
    parts = [f"{k.removesuffix('.entry')}={values[k]}" for k in varied if k in values]
    return " ".join(parts) or run.config.get("tag", "run")
