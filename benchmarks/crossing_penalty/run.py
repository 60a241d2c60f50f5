"""What the crossing penalty costs, forward and backward: counting against all pairs.

Run: python benchmarks/crossing_penalty/run.py [--rounds 21] [--steps 10]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from poise_quantagg.penalties import adaptive, all_pairs, constant

LEVELS = 99
DELTA = 0.0099  # the paper's largest constant margin
SHAPES = {"64x99": (64, LEVELS), "25x64x99": (25, 64, LEVELS)}
LONG = {"64x257": (64, 257), "64x1025": (64, 1025)}  # more levels: the second is counted by merging
NOISE = 0.02  # of rows that cross a little, as late in training


def predictions(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return rows of unit variance: random, or sorted with a little noise, or monotone."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(*shape, generator=generator, dtype=dtype)
    if kind == "noisy":
        g = g.sort(-1).values + NOISE * torch.randn(g.shape, generator=generator, dtype=dtype)
    if kind == "monotone":
        g = torch.linspace(-2, 2, shape[-1], dtype=dtype).expand(g.shape).clone()
    return g.requires_grad_()


def run(penalty: Callable[[Tensor], Tensor], g: Tensor, steps: int) -> tuple[float, Tensor]:
    """Return the CPU seconds of one forward and backward pass, the mean of some, and the gradient."""
    started = time.process_time()
    for _ in range(steps):
        g.grad = None
        penalty(g).backward()
    seconds = (time.process_time() - started) / steps
    assert g.grad is not None
    return seconds, g.grad


def measure(
    pair: list[tuple[str, Callable[[Tensor], Tensor]]], g: Tensor, rounds: int, steps: int
) -> dict[str, float]:
    """Time two penalties in alternating order; both gradients must agree in every round."""
    times: dict[str, list[float]] = {name: [] for name, _ in pair}
    for i in range(-2, rounds):  # two rounds to warm up
        gradients = {}
        for name, penalty in pair if i % 2 == 0 else reversed(pair):  # A B, B A: drift hits both
            seconds, gradients[name] = run(penalty, g, steps)
            if i >= 0:
                times[name].append(seconds)
        first, second = gradients.values()
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-9), "not the same gradient"
    medians = {name: statistics.median(t) for name, t in times.items()}
    fast, slow = (name for name, _ in pair)
    ratios = [s / f for f, s in zip(times[fast], times[slow], strict=True)]
    return {"fast_ms": 1e3 * medians[fast], "all_pairs_ms": 1e3 * medians[slow],
            "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def cases(g: Tensor) -> dict[str, list[tuple[str, Callable[[Tensor], Tensor]]]]:
    """Return the pairs of penalties to compare, by name."""
    h = torch.linspace(-DELTA, DELTA, g.shape[-1], dtype=g.dtype)
    margins = h[None, :] - h[:, None]
    return {
        "constant": [("fast", lambda x: constant(x, DELTA)), ("all pairs", lambda x: all_pairs(x, DELTA))],
        "adaptive": [("fast", lambda x: adaptive(x, h)), ("all pairs", lambda x: all_pairs(x, margins))],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=10, help="passes in a row in a round")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.float64):
        for size, shape in (SHAPES | (LONG if dtype == torch.float32 else {})).items():
            small = size == "64x99"
            rounds, steps = (args.rounds, args.steps) if small else (5, min(args.steps, 3))
            for kind in ("random", "noisy", "monotone"):
                g = predictions(kind, shape, dtype)
                for name, pair in cases(g).items():
                    key = f"{name} {str(dtype).removeprefix('torch.')} {size} {kind}"
                    figures[key] = {k: round(v, 4) for k, v in measure(pair, g, rounds, steps).items()}
                    print(f"{key:40s}", figures[key], flush=True)
    result = {"rounds": args.rounds, "steps": args.steps, "threads": args.threads, "delta": DELTA,
              "torch": torch.__version__, "figures": figures}
    target = Path(__file__).parent / "results" / "latest.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
