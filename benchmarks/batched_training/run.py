"""Searches over networks and gates trained as one batch, against plain torch one by one.

Run: OMP_NUM_THREADS=1 python benchmarks/batched_training/run.py [--rounds 3] [--steps 100]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy loads its library

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor
from torch.nn import functional as F

from poise_quantagg.aggregators import search
from poise_quantagg.aggregators.gates import GateTask, Rows
from poise_quantagg.base.nets import NetRegressor, _Search, draw
from poise_quantagg.training import CHUNK, Members, Schedule, Stream, batch_size, pinball, train

LEVELS = np.arange(1, 100) / 100
CONFIGS, FOLDS, MODELS = 20, 5, 6
SIZES = {278: 6, 1353: 5}  # rows of the fit (nine tenths of yacht and airfoil) and features
KINDS = ("gaussian", "simultaneous", "multi")
Loss = Callable[[torch.nn.Module, Tensor, Tensor | None, Tensor | None], Tensor]


class Net(torch.nn.Module):
    """A fully connected network of torch's own layers, as one would write it."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for k in range(len(params) // 2):
            layer = torch.nn.Linear(*params[f"W{k}"].shape)
            layer.weight.data, layer.bias.data = params[f"W{k}"].T.float().clone(), params[f"b{k}"].float()
            self.layers.append(layer)

    def forward(self, x: Tensor, masks: Tensor | None) -> Tensor:
        last = len(self.layers) - 1
        for k, layer in enumerate(self.layers):
            x = layer(x if masks is None or not 0 < k < last else x * masks[k - 1])
            x = F.elu(x) if k < last else x
        return x


def alone(task, members: Members, steps: int, amsgrad: bool, loss_of: Callable[[int], Loss]) -> list[Net]:
    """Train all members one after another with torch.optim.Adam, on the batches they get in company."""
    nets = []
    for c in range(len(members)):
        net = Net(task.init(c, torch.Generator().manual_seed(members.seeds[c] % 2**63)))
        optimizer = torch.optim.Adam(net.parameters(), lr=members.lr[c], amsgrad=amsgrad,
                                     weight_decay=members.weight_decay[c])
        stream, loss = Stream(members, c, torch.float32), loss_of(c)
        for step in range(steps):
            if step % CHUNK == 0:
                rows, masks, uniforms = stream.draw(CHUNK)
            at = step % CHUNK
            optimizer.zero_grad()
            loss(net, rows[at], masks[at] if masks is not None and stream.rate else None,
                 None if uniforms is None else uniforms[at]).backward()
            optimizer.step()
        nets.append(net)
    return nets


def net_loss(task, c: int) -> Loss:
    """Return the loss of a batch of a base network."""
    x, y, huber = task.x[task.part[c]], task.y[task.part[c]], task.huber[c, 0]

    def loss(net, rows, masks, uniforms):
        if task.kind == "gaussian":
            out = net(x[rows], masks)
            variance = F.softplus(out[:, 1]) + 1e-6
            return (0.5 * (variance.log() + (y[rows] - out[:, 0]) ** 2 / variance)).mean()
        if task.kind == "multi":
            return pinball(y[rows, None] - net(x[rows], masks), task.levels, huber).mean()
        tau = uniforms.clamp(1e-3, 1 - 1e-3)[:, None]
        out = net(torch.cat([x[rows], tau - 0.5], dim=1), masks)
        return pinball(y[rows, None] - out, tau, huber).mean()

    return loss


def gate_loss(task, c: int) -> Loss:
    """Return the loss of a batch of a coarse or medium gate."""

    def loss(gate, rows, masks, uniforms):
        Z, logits = task.Z[rows], gate(task.X[rows], masks)
        if task.resolution == "coarse":
            q = (logits.softmax(1)[:, :, None] * Z).sum(1)
        else:
            q = (logits.view(-1, task.p, task.m).softmax(1) * Z).sum(1)
        return pinball(task.y[rows, None] - q, task.levels).mean()

    return loss


def table(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features, a standardised target, and six models' quantiles (n, 6, 99)."""
    rng = np.random.default_rng(n)
    X = rng.normal(size=(n, SIZES[n]))
    y = X[:, 0] + np.sin(2 * X[:, 1]) + np.exp(0.5 * X[:, 2]) * 0.3 * rng.normal(size=n)
    y = (y - y.mean()) / y.std()
    Z = y[:, None, None] + 0.3 * rng.normal(size=(n, MODELS, 1)) * rng.uniform(0.5, 2, (MODELS, 1))
    return X, y, Z + rng.uniform(0.2, 0.6, (MODELS, 1)) * ndtri(LEVELS)


Group = tuple[object, Members, bool, Callable[[int], Loss]]


def net_groups(kind: str, n: int) -> list[Group]:
    """Return the batches, one per shape, of 20 configurations drawn by the search x 5 folds."""
    X, y, _ = table(n)
    parts = [np.flatnonzero(np.arange(n) % FOLDS != k) for k in range(FOLDS)]
    configs = draw(kind, CONFIGS, 0, {})
    space = len(configs)
    configs = (configs * 2)[:CONFIGS]  # the Gaussian net has 12 points: some twice, the work is the same
    model = NetRegressor(levels=LEVELS.tolist(), kind=kind, n_iter=space)
    found = _Search(model, configs, X, y, None, parts, LEVELS)
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, config in enumerate(configs):
        shapes.setdefault((config.width, config.depth), []).append(i)
    out = []
    for members in shapes.values():
        members.sort(key=lambda i: (configs[i].lr, configs[i].weight_decay))
        task, who, _ = found.problem([(i, k) for i in members for k in range(FOLDS)])
        out.append((task, who, True, lambda c, task=task: net_loss(task, c)))
    return out


def gate_groups(resolution: str, n: int) -> list[Group]:
    """Return the batches, one per shape, of the 20 gates that the search draws x 5 folds."""
    X, y, Z = table(n)
    cut = int(0.8 * n)
    rows = Rows(Z[:cut], y[:cut], X[:cut]), Rows(Z[cut:], y[cut:], X[cut:])
    parts = [torch.from_numpy(np.flatnonzero(np.arange(cut) % FOLDS != k)) for k in range(FOLDS)]
    configs = search.draw(search.SearchOptions(resolution, True, n_iter=CONFIGS))
    start = np.zeros((MODELS,) if resolution == "coarse" else (MODELS, len(LEVELS)))
    out = []
    for shape in dict.fromkeys((c.width, c.depth) for c in configs):
        own = sorted((c for c in configs if (c.width, c.depth) == shape), key=lambda c: c.lr)
        own = [c for c in own for _ in range(FOLDS)]
        task = GateTask(resolution, *rows, LEVELS, own, start, torch.float32)
        members = Members(
            seeds=list(range(len(own))), rows=parts * (len(own) // FOLDS),
            batch_size=batch_size(len(parts[0])), lr=[c.lr for c in own],
            weight_decay=[c.weight_decay for c in own], dropout=[c.dropout for c in own],
            width=shape[0], masks=shape[1] - 1)
        out.append((task, members, False, lambda c, task=task: gate_loss(task, c)))
    return out


def measure(groups: list[Group], rounds: int, steps: int) -> dict[str, float]:
    """Time both sides in alternating order; the last parameters must agree."""
    times: dict[str, list[float]] = {"batched": [], "one by one": []}
    schedule = Schedule(steps, steps, 10**9)
    for i in range(rounds):
        results = {}
        for name in list(times)[:: 1 if i % 2 == 0 else -1]:
            started = time.process_time()
            if name == "batched":
                results[name] = [train(task, who, Schedule(steps, steps, 10**9, amsgrad=ams))  # type: ignore
                                 for task, who, ams, _ in groups]
            else:
                results[name] = [alone(task, who, steps, ams, loss) for task, who, ams, loss in groups]
            times[name].append(time.process_time() - started)
        apart = max(
            float((net.layers[0].weight.detach().T - trained.params[c]["W0"]).abs().max())
            for trained, nets in zip(results["batched"], results["one by one"])
            for c, net in enumerate(nets) if trained.step[c] == schedule.max_steps)
        assert apart < 0.02, f"not the same work: weights differ by {apart}"  # float32, many steps
    medians = {name: statistics.median(t) for name, t in times.items()}
    ratios = [o / b for b, o in zip(times["batched"], times["one by one"])]
    count = sum(len(who) for _, who, _, _ in groups)
    return {"members": count, "batched_s": medians["batched"], "one_by_one_s": medians["one by one"],
            "batched_us_a_member_step": 1e6 * medians["batched"] / count / steps,
            "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for n in SIZES:
        cases = {f"{kind} net": (lambda kind=kind, n=n: net_groups(kind, n)) for kind in KINDS}
        cases |= {f"{r} gate": (lambda r=r, n=n: gate_groups(r, n)) for r in ("coarse", "medium")}
        for name, groups in cases.items():
            measure(groups(), 1, 4)
            found = measure(groups(), args.rounds, args.steps)
            figures[f"{name} {n}"] = {k: float(f"{v:.4g}") for k, v in found.items()}
            print(f"{name:18s} {n:5d}", figures[f"{name} {n}"], flush=True)
    result = {"rounds": args.rounds, "steps": args.steps, "threads": 1, "configurations": CONFIGS,
              "folds": FOLDS, "unit": "CPU seconds", "torch": torch.__version__, "figures": figures}
    target = Path(__file__).parent / "results" / "latest.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
