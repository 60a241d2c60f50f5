"""What a step of a local fine gate costs, how near its limits that is, and what a whole search costs.

Run: POISE_DATA=<folder of tables> OMP_NUM_THREADS=1 python benchmarks/local_fine/run.py [--steps 60]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy loads its library
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.special import ndtri

from poise.data.components import Tabular
from poise_quantagg import cross_fit
from poise_quantagg.aggregators.fine import train_fine
from poise_quantagg.aggregators.gates import GateConfig, GateTask, Rows
from poise_quantagg.components import (
    ExtraTrees,
    HistBoosting,
    LightGBM,
    Linear,
    LocalFine,
    MultiQuantileNet,
    QuantileForest,
)
from poise_quantagg.training import Members, Schedule

LEVELS = np.arange(1, 100) / 100
MODELS, ROWS, FEATURES, BATCH, DEPTH = 6, 308, 6, 32, 2


def copy_rate() -> float:
    """Return the bytes a second that a copy of 256 MB reads and writes."""
    a, b = torch.ones(1 << 26), torch.empty(1 << 26)
    times = []
    for _ in range(5):
        started = time.process_time()
        b.copy_(a)
        times.append(time.process_time() - started)
    return 2 * 4 * len(a) / statistics.median(times)


def product_rate() -> float:
    """Return the float32 operations a second of a product of 1024 x 1024 matrices."""
    a = torch.randn(1024, 1024)
    times = []
    for _ in range(5):
        started = time.process_time()
        a @ a
        times.append(time.process_time() - started)
    return 2 * 1024**3 / statistics.median(times)


def batched_rate(width: int) -> float:
    """Return that of the forward product of a step, (99, 32, H) x (99, H, 594)."""
    h, W = torch.randn(BATCH, width).expand(99, -1, -1), torch.randn(99, width, 594)
    times = []
    for _ in range(5):
        started = time.process_time()
        torch.bmm(h, W)
        times.append(time.process_time() - started)
    return 2 * 99 * BATCH * width * 594 / statistics.median(times)


def problem(width: int) -> tuple[GateTask, Members]:
    """Return one gate on rows of the shape of yacht, with the constant crossing penalty."""
    rng, m = np.random.default_rng(0), len(LEVELS)
    X = rng.normal(size=(ROWS, FEATURES))
    y = X[:, 0] + 0.5 * rng.normal(size=ROWS)
    Z = X[:, :1, None] + 0.3 * rng.normal(size=(ROWS, MODELS, 1))
    Z = Z + rng.uniform(0.3, 0.8, (MODELS, 1)) * ndtri(LEVELS)
    cut = int(0.8 * ROWS)
    config = GateConfig(width, DEPTH, 0.05, 1e-3, 1e-7, 1.0, 5e-3)
    task = GateTask("fine", Rows(Z[:cut], y[:cut], X[:cut]), Rows(Z[cut:], y[cut:], X[cut:]), LEVELS,
                    [config], np.zeros((m, MODELS * m)), torch.float32, penalty="constant")
    members = Members(seeds=[0], rows=[torch.arange(cut)], batch_size=BATCH, lr=[1e-3],
                      weight_decay=[1e-7], dropout=[0.05], width=width, masks=DEPTH - 1)
    return task, members


def one_step(width: int, steps: int, rounds: int = 5) -> dict[str, float]:
    """Return milliseconds of a step, and what its bytes and operations would take at full rate."""
    task, members = problem(width)
    times = []
    for _ in range(rounds):
        both = []
        for count in (1, 1 + steps):  # the difference leaves out start, first and last validation
            started = time.process_time()
            train_fine(task, members, Schedule(count, 10**6, 10**9))
            both.append(time.process_time() - started)
        times.append((both[1] - both[0]) / steps)
    m, P = len(LEVELS), MODELS * len(LEVELS)
    moved, done = 4 * m * width * P * 8, 6 * BATCH * m * width * P
    bytes_s, flops_s, own_s = copy_rate(), product_rate(), batched_rate(width)
    step = statistics.median(times)
    return {
        "ms": 1e3 * step, "ms_min": 1e3 * min(times), "ms_max": 1e3 * max(times),
        "megabytes": moved / 1e6, "megaflops": done / 1e6, "copy_gb_s": bytes_s / 1e9,
        "product_gflop_s": flops_s / 1e9, "own_product_gflop_s": own_s / 1e9,
        "bytes_ms": 1e3 * moved / bytes_s, "flops_ms": 1e3 * done / flops_s,
        "share_of_limit": max(moved / bytes_s, done / flops_s) / step,
        "share_of_both_in_turn": (moved / bytes_s + done / flops_s) / step,
    }


def whole_search(n_iter: int) -> dict[str, float]:
    """Return the CPU seconds of the default search on yacht, out-of-fold arrays of six models given."""
    splits = Tabular(name="yacht").load()
    parts = (splits.train, splits.validation, splits.test)
    X, y = np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts])
    models = {
        "quantile_forest": QuantileForest(), "extra_trees": ExtraTrees(), "linear": Linear(),
        "lightgbm": LightGBM(grid=19), "hist_boosting": HistBoosting(grid=19, max_iter=50),
        "net": MultiQuantileNet(n_iter=1, max_steps=300),
    }
    Z = cross_fit(models, X, y, LEVELS).Z
    started = time.process_time()
    found = LocalFine(n_iter=n_iter).fit(Z, y, X, levels=LEVELS)
    seconds = time.process_time() - started
    return {"rows": len(y), "models": Z.shape[1], "configurations": len(found.leaderboard),
            "cpu_s": seconds, "best_step_mean": statistics.mean(r["step"] for r in found.leaderboard)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--configurations", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for width in (64, 128):
        figures[f"step width {width}"] = one_step(width, args.steps)
        print(width, {k: float(f"{v:.4g}") for k, v in figures[f"step width {width}"].items()}, flush=True)
    if args.configurations:
        figures["search on yacht"] = whole_search(args.configurations)
        print(figures["search on yacht"], flush=True)
    figures = {name: {k: float(f"{v:.4g}") for k, v in row.items()} for name, row in figures.items()}
    result = {"batch": BATCH, "depth": DEPTH, "models": MODELS, "levels": len(LEVELS), "threads": 1,
              "steps": args.steps, "torch": torch.__version__, "figures": figures}
    target = Path(__file__).parent / "results" / "latest.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
