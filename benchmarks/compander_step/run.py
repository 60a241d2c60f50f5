"""A training step with companded weights against the plain model with torch's fused SGD.

Run: python benchmarks/compander_step/run.py [--rounds 40] [--threads 1 2]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.nn import functional as F

from poise.models.resnet import ResNet
from poise_compander import WeightCompander, native
from poise_compander.functions import arctan
from poise_compander.update import Step, Work

SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
KERNEL_BYTES = 28  # a weight in float32: read g, v, m, w; write v, m, w
WEIGHTS = 11_160_000


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
                         nn.Linear(512, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "MLP 3072-512-512-10, batch 64": (mlp, 64, 1.15),
    "ResNet-20, batch 32": (lambda: ResNet(3, 10), 32, 1.02),
    "ResNet-18, batch 4": (lambda: ResNet(3, 10, 64, (2, 2, 2, 2), projected=True), 4, 1.03),
}


def arm(make: Callable[[], nn.Module], kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer; the same start for every arm."""
    torch.manual_seed(0)
    model = make()
    if kind == "plain":
        return model, torch.optim.SGD(model.parameters(), fused=True, **SGD)
    how = {"path": "fast", "learn": "layer"} if kind == "learned" else {"path": kind}
    attached = WeightCompander(a=1.0, b=1.0, bound_policy="grow", **how).attach(model)
    return model, attached.optimizer(torch.optim.SGD, fused=True, **SGD)  # fused: biases and norms


def measure(
    make: Callable[[], nn.Module], batch: int, rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Time one step of each arm in every round, in random order; medians of times and of ratios."""
    arms = {kind: arm(make, kind) for kind in ("plain", "fast", "learned", "reference")}
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    times: dict[str, list[float]] = {kind: [] for kind in arms}
    names, order = list(arms), random.Random(0)
    for i in range(rounds + 3):
        for kind in order.sample(names, len(names)):
            model, optimizer = arms[kind]
            started = clock()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if i >= 3:
                times[kind].append(clock() - started)
    ratio = {kind: statistics.median(t / p for t, p in zip(times[kind], times["plain"]))
             for kind in ("fast", "learned", "reference")}
    median = {kind: statistics.median(t) for kind, t in times.items()}
    added = {kind: statistics.median(t - p for t, p in zip(times[kind], times["plain"])) for kind in ratio}
    return {"plain_ms": 1e3 * median["plain"], "fast_ratio": ratio["fast"],
            "learned_ratio": ratio["learned"], "reference_ratio": ratio["reference"],
            "added_fast_ms": 1e3 * added["fast"], "added_reference_ms": 1e3 * added["reference"],
            "added_reference_over_fast": added["reference"] / added["fast"]}


def bandwidth(rounds: int) -> dict[str, float]:
    """Return what the kernel and a copy move, in GB/s, in alternating order; 11.16 M weights."""
    kernel = native.kernel()
    assert kernel is not None, native.why_not()
    w, v, g, m, other = (0.1 * torch.randn(WEIGHTS) for _ in range(5))
    step = Step(0.7, 0.7, 0.7, 0.7, lr=1e-3, weight_decay=5e-4, momentum=0.9)
    parameter = nn.Parameter(w.clone())
    parameter.grad = g
    plain = torch.optim.SGD([parameter], fused=True, **SGD)
    acts = {"kernel": (lambda: kernel.update(arctan, [Work(step, w, v, g, [m])]), KERNEL_BYTES),
            "copy": (lambda: other.copy_(g), 8), "fused_sgd": (plain.step, 20)}
    times: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(rounds):
        for name, (act, _) in acts.items():
            started = time.perf_counter()
            act()
            times[name].append(time.perf_counter() - started)
    found = {name: size * WEIGHTS / statistics.median(times[name]) / 1e9
             for name, (_, size) in acts.items()}
    return {f"{name}_gb_s": rate for name, rate in found.items()} | {
        "kernel_over_copy": statistics.median(
            KERNEL_BYTES / 8 * c / k for k, c in zip(times["kernel"], times["copy"])),
        "kernel_ns_a_weight": 1e9 * statistics.median(times["kernel"]) / WEIGHTS}


def memory() -> dict[str, float]:
    """Return the resident memory that two steps add to the model and its gradients, in weights."""
    found = {}
    for kind in ("plain", "fast"):
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            layers = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8)))
            size = sum(p.numel() for p in layers.parameters()) * 4
            for p in layers.parameters():
                p.grad = torch.zeros_like(p)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if kind == "plain":
                optimizer: torch.optim.Optimizer = torch.optim.SGD(layers.parameters(), fused=True, **SGD)
            else:
                optimizer = WeightCompander().attach(layers).optimizer(torch.optim.SGD, **SGD)
            for _ in range(2):
                optimizer.step()
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            os.write(writer, str((after - before) / size).encode())
            os._exit(0)
        os.waitpid(child, 0)
        found[kind] = float(os.read(reader, 100))
    return {"plain_weights": found["plain"], "fast_weights": found["fast"],
            "extra_weights": found["fast"] - found["plain"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, dict[str, float]] = {"memory over momentum SGD": memory()}
    print(figures, flush=True)
    for threads in args.threads:
        torch.set_num_threads(threads)
        figures[f"kernel, {threads} thread"] = bandwidth(args.rounds)
        print(figures[f"kernel, {threads} thread"], flush=True)
        for name, (make, batch, limit) in CASES.items():
            clock = time.process_time if threads == 1 else time.perf_counter
            found = measure(make, batch, args.rounds, clock) | {"limit": limit}
            figures[f"{name}, {threads} thread"] = found
            print(f"{name}, {threads} thread:", {k: float(f"{v:.4g}") for k, v in found.items()},
                  flush=True)
    result = {"rounds": args.rounds, "torch": torch.__version__, "kernel": native.kernel() is not None,
              "clock": "CPU seconds on one thread, wall on two", "figures": {
                  k: {n: float(f"{v:.5g}") for n, v in f.items()} for k, f in figures.items()}}
    target = Path(__file__).parent / "results" / "latest.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
