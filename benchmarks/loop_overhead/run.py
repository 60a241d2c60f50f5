"""What the training loop costs over a bare PyTorch loop doing the same work (ResNet-20).

Run: python benchmarks/loop_overhead/run.py [--rounds 9] [--steps 12]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from poise.config import Train
from poise.interfaces import Arrays
from poise.models.components import ResNet20
from poise.recipes.classify import ClassifyTask, tensors
from poise.recipes.loop import Order, build_optimizer, fit
from poise.runs.context import RunContext

BATCH = 64


def data(rows: int = 2048) -> Arrays:
    """Return random images, 3 x 32 x 32, ten classes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, 32, 32, generator=g).numpy()
    return Arrays(x, torch.randint(0, 10, (rows,), generator=g).numpy())


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return ResNet20(in_channels=3, classes=10).build().train()


def settings(steps: int) -> Train:
    return Train(steps=steps, batch_size=BATCH, optimizer="sgd", lr=0.01, weight_decay=5e-4,
                 eval_every=0, checkpoint_every=0, log_every=10)


def bare(rows: Arrays, steps: int) -> tuple[float, float]:
    """Time a hand-written loop; return seconds and the last loss."""
    net, s = model(), settings(steps)
    x, y = torch.from_numpy(rows.x), torch.from_numpy(rows.y)
    optimizer = torch.optim.SGD(net.parameters(), lr=s.lr, momentum=s.momentum,
                                weight_decay=s.weight_decay)
    order = Order(len(y), BATCH, seed=0)
    loss, started = 0.0, time.perf_counter()
    for step in range(steps):
        index = order.rows(step)
        optimizer.zero_grad(set_to_none=True)
        out = F.cross_entropy(net(x[index]), y[index])
        out.backward()
        optimizer.step()
        loss = out.item()
    return time.perf_counter() - started, loss


def poise_loop(rows: Arrays, steps: int) -> tuple[float, float]:
    """Time the same work through `poise.recipes.loop.fit`, records and final checkpoint included."""
    net, s = model(), settings(steps)
    train, held_out = tensors(rows, "cpu"), tensors(Arrays(rows.x[:1], rows.y[:1]), "cpu")
    task = ClassifyTask(net, train, held_out, Order(len(rows), BATCH, 0), 1)
    task.evaluate = dict  # type: ignore[method-assign] - the bare loop does not evaluate either
    with tempfile.TemporaryDirectory() as folder:
        context = RunContext(Path(folder), quiet=True)
        context.records.open()
        optimizer = build_optimizer(s, net)
        started = time.perf_counter()
        fit(task, optimizer, s, context)
        seconds = time.perf_counter() - started
        context.records.close()
        loss = [json.loads(r) for r in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return seconds, next((r["value"] for r in reversed(loss) if r["name"] == "loss"), float("nan"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = data()
    bare(rows, 3), poise_loop(rows, 3)
    times: dict[str, list[float]] = {"bare": [], "poise": []}
    for i in range(args.rounds):  # A B, B A, ... so that drift hits both
        pair = [("bare", bare), ("poise", poise_loop)]
        losses = {}
        for name, function in pair if i % 2 == 0 else reversed(pair):
            seconds, losses[name] = function(rows, args.steps)
            times[name].append(seconds)
        assert losses["bare"] == losses["poise"], f"not the same work: {losses}"
        print(f"round {i + 1}/{args.rounds}: {times['poise'][-1] / times['bare'][-1]:.4f}", flush=True)
    ratios = [p / b for p, b in zip(times["poise"], times["bare"], strict=True)]
    result = {
        "median_ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios),
        "bare_step_ms": 1e3 * statistics.median(times["bare"]) / args.steps,
        "rounds": args.rounds, "steps": args.steps, "threads": args.threads, "batch": BATCH,
        "torch": torch.__version__,
    }
    target = Path(__file__).parent / "results" / "latest.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
