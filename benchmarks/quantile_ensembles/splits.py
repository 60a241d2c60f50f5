"""Write the sets of this benchmark as plain arrays, so that other environments can read them.

Run: POISE_DATA=... python benchmarks/quantile_ensembles/splits.py WORKDIR [--names ...] [--seeds 0 1 2]

The sets were fixed before any result was looked at. Splits are those of `poise`: 10 % test, 18 %
validation, the rest training. Features and target are standardised with the mean and the deviation of
the training and validation rows together; a column that is constant there becomes zero.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from store import LEVELS

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Table:
    """What to load: the name `poise` knows, and columns that would give the target away."""

    source: str
    drop: list[str] = field(default_factory=list)


PACKAGED = {  # come with a package
    "airfoil": Table("airfoil"),
    "boston": Table("boston"),
    "energy": Table("efficiency_heating"),
    "diabetes": Table("diabetes"),
    "bike_sharing_day": Table("bike_sharing_day"),
    "parkinson": Table("parkinson_total_UPDRS"),
}
OUTSIDE = {  # below POISE_DATA
    name: Table(name)
    for name in ("yacht", "concrete", "stock", "kin8nm", "power", "space_ga", "abalone", "quake", "cpu_act")
}
EXTRA = {
    "socmob": Table("socmob"),
    "sensory": Table("sensory"),
    "tecator": Table("tecator", ["moisture", "protein"]),
    "us_crime": Table("us_crime"),
    "elevators": Table("elevators"),
    "pol": Table("pol"),
    "wine_quality_red": Table("wine_quality_red"),
}
MAIN = {**PACKAGED, **OUTSIDE}
TABLES = {**MAIN, **EXTRA}


def standardised(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Shift and scale every part by the statistics of the first two (training and validation)."""
    seen = np.concatenate(parts[:2])
    mean, scale = seen.mean(axis=0), seen.std(axis=0)
    constant = np.ptp(seen, axis=0) == 0
    scale = np.where(constant, 1.0, scale)
    return [np.where(constant, 0.0, (part - mean) / scale) for part in parts]


def arrays(name: str, seed: int) -> dict[str, np.ndarray]:
    """Return the arrays of one split, standardised."""
    from poise.data.components import Tabular  # only here: other environments import the names above

    table = TABLES[name]
    splits = Tabular(name=table.source, drop=table.drop).load(seed)
    parts = {"train": splits.train, "val": splits.validation, "test": splits.test}
    out: dict[str, np.ndarray] = {}
    for axis in ("x", "y"):
        columns = standardised([np.asarray(getattr(p, axis), float) for p in parts.values()])
        out |= {f"{axis}_{key}": column for key, column in zip(parts, columns, strict=True)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--names", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        for seed in args.seeds:
            data = arrays(name, seed)
            assert all(np.isfinite(a).all() for a in data.values()), f"{name}-{seed} has missing values"
            np.savez(args.workdir / f"{name}-{seed}.npz", levels=LEVELS, **data)
        shapes = [data[f"x_{part}"].shape for part in ("train", "val", "test")]
        print(name, *shapes, flush=True)


if __name__ == "__main__":
    main()
