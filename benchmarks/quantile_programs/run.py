"""Quantile regression averaging at 99 levels: the batched interior point, HiGHS, statsmodels.

Run: OMP_NUM_THREADS=1 python benchmarks/quantile_programs/run.py [--sizes 250 1000 4000 10000]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy loads its library
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import scipy
import statsmodels
from scipy.special import ndtri

from poise_quantagg.programs import medium
from poise_quantagg.reference import pinball_program

MODELS = 6
LEVELS = np.arange(1, 100) / 100
ROUNDS = {250: 7, 1000: 5, 4000: 3, 10_000: 3}
Solve = Callable[[np.ndarray, np.ndarray], tuple[float, float]]


def problem(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return quantiles Z (n, 6, 99) of correlated, imperfect models, and the target (n,)."""
    rng = np.random.default_rng(n)
    center, spread = rng.normal(size=n), rng.uniform(0.3, 1, size=n)
    Z = center[:, None, None] + 0.4 * rng.normal(size=(n, MODELS, 1)) * rng.uniform(0.3, 1, (MODELS, 1))
    Z = Z + spread[:, None, None] * rng.uniform(0.5, 1.5, (MODELS, 1)) * ndtri(LEVELS)
    Z += 0.05 * rng.normal(size=Z.shape)
    return np.sort(Z, axis=2), center + spread * rng.normal(size=n)


def loss(Z: np.ndarray, y: np.ndarray, k: int, w: np.ndarray) -> float:
    """Return the sum of pinball losses at level k for an intercept and weights w (7,)."""
    u, tau = y - w[0] - Z[:, :, k] @ w[1:], LEVELS[k]
    return float(np.maximum(tau * u, (tau - 1) * u).sum())


def interior(Z: np.ndarray, y: np.ndarray, simplex: bool = False) -> tuple[float, float]:
    """Return CPU seconds and the mean loss of all levels at once."""
    started = time.process_time()
    found = medium(Z, y, LEVELS, np.ones(len(y)), simplex=simplex, intercept=not simplex)
    return time.process_time() - started, found.objective


def highs(Z: np.ndarray, y: np.ndarray, simplex: bool = False) -> tuple[float, float]:
    """Return the same by one HiGHS program per level, on the bounded dual."""
    n, total = len(y), 0.0
    started = time.process_time()
    for k, tau in enumerate(LEVELS):
        A = Z[:, :, k] if simplex else np.c_[np.ones(n), Z[:, :, k]]
        total += pinball_program(A, y, np.ones(n), np.full(n, tau), simplex=simplex)[1]
    return time.process_time() - started, total / (n * len(LEVELS))


def quantreg(Z: np.ndarray, y: np.ndarray, simplex: bool = False) -> tuple[float, float]:
    """Return the same by statsmodels' QuantReg per level; above 1,000 rows scaled from nine levels."""
    from statsmodels.regression.quantile_regression import QuantReg

    n, total = len(y), 0.0
    levels = range(len(LEVELS)) if n <= 1000 else range(5, 99, 11)
    seconds = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations that run out
        for k in levels:
            started = time.process_time()
            w = QuantReg(y, np.c_[np.ones(n), Z[:, :, k]]).fit(q=LEVELS[k]).params
            seconds += time.process_time() - started
            total += loss(Z, y, k, w)
    return seconds * len(LEVELS) / len(levels), total / (n * len(levels))


def measure(n: int, sides: dict[str, Solve], rounds: int) -> dict[str, float]:
    """Return medians over rounds in alternating order, and the excess of our objective over HiGHS'."""
    Z, y = problem(n)
    times: dict[str, list[float]] = {name: [] for name in sides}
    value: dict[str, float] = {}
    for i in range(rounds):
        names = list(sides) if i % 2 == 0 else list(sides)[::-1]
        for name in names:
            if name == "statsmodels" and i >= 3:  # slow, and steady
                continue
            seconds, value[name] = sides[name](Z, y)
            times[name].append(seconds)
    medians = {f"{name}_s": statistics.median(t) for name, t in times.items()}
    ratios = [h / o for o, h in zip(times["ours"], times["highs"])]
    figures = {**medians, "highs_over_ours": statistics.median(ratios), "ratio_min": min(ratios),
               "ratio_max": max(ratios), "excess_over_highs": value["ours"] / value["highs"] - 1}
    if "statsmodels" in times:
        figures["statsmodels_over_ours"] = medians["statsmodels_s"] / medians["ours_s"]
        if n <= 1000:  # the same levels
            figures["statsmodels_excess"] = value["statsmodels"] / value["highs"] - 1
    return {k: float(f"{v:.4g}") for k, v in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=list(ROUNDS))
    args = parser.parse_args()
    interior(*problem(100)), highs(*problem(100)), quantreg(*problem(100))  # imports, first calls
    figures = {}
    for n in args.sizes:
        rounds = ROUNDS.get(n, 3)
        free: dict[str, Solve] = {"ours": interior, "highs": highs, "statsmodels": quantreg}
        onto: dict[str, Solve] = {"ours": lambda Z, y: interior(Z, y, True),
                                  "highs": lambda Z, y: highs(Z, y, True)}
        for name, sides in (("qra", free), ("medium", onto)):
            figures[f"{name} {n}"] = measure(n, sides, rounds)
            print(f"{name:7s} {n:6d}", figures[f"{name} {n}"], flush=True)
    result = {"models": MODELS, "levels": len(LEVELS), "threads": 1, "rounds": ROUNDS,
              "unit": "CPU seconds", "numpy": np.__version__, "scipy": scipy.__version__,
              "statsmodels": statsmodels.__version__,
              "figures": figures}
    target = Path(__file__).parent / "results" / "latest.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
