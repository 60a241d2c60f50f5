"""Does a compander train better networks? Tuned arms, other seeds for tuning, paired differences.

Run: python benchmarks/compander_comparison/run.py [--seeds 10] (Fashion-MNIST below POISE_DATA, or --data)
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from poise.data.components import Images
from poise.models.cnn import make_cnn
from poise.models.mlp import make_mlp
from poise.recipes.classify import score, tensors
from poise_compander import LrMatched, PowerPropagation, WeightCompander, WeightNorm

EPOCHS, BATCH, TRAIN, VALIDATION = 40, 50, 500, 2000
SELECTION = (100, 101)  # seeds that choose; none of them is reported
SIZES = {"mlp": 14, "cnn": 28}
RATES, DECAYS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0), (1e-4, 5e-4, 2e-3, 5e-3, 1e-2, 2e-2)
PAIRS = ((0.7, 0.7), (1.0, 1.0), (1.0, 0.6))
Setting = dict[str, Any]


def grid(**axes: Iterable[Any]) -> list[Setting]:
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


# what each arm may choose from: about as many settings for the plain one as for the compander
SEARCHES: dict[str, list[Setting]] = {
    "plain": grid(lr=(0.01, 0.02, 0.035, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5, 1.0), wd=DECAYS),
    "compander": grid(lr=(0.05, 0.1, 0.2, 0.5), wd=DECAYS, pair=PAIRS),
    "compander, learned": grid(lr=(0.05, 0.1, 0.2, 0.5), wd=(2e-3, 1e-2), pair=((0.5, 1.0), (1.0, 1.0))),
    "weight norm": grid(lr=RATES, wd=(5e-4, 5e-3, 2e-2)),
    "powerprop": grid(lr=RATES, wd=(5e-4, 5e-3, 2e-2)),
}
UNTUNED: dict[str, Setting] = {
    "plain, untuned": {"lr": 0.1, "wd": 5e-4},
    "compander, untuned": {"lr": 0.1, "wd": 5e-4, "pair": (0.7, 0.7)},
}


def network(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    mlp = kind == "mlp"
    model = make_mlp(196, 10, [128, 128], "relu", 0.0) if mlp else make_cnn(1, 10, (16, 32, 64))
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    return model


def adapter(arm: str, setting: Setting) -> Any:
    kind = arm.partition(", untuned")[0]
    a, b = setting.get("pair", (1.0, 1.0))
    made = {
        "compander": lambda: WeightCompander(a=a, b=b, bound_policy="grow"),
        "compander, learned": lambda: WeightCompander(a=a, b=b, learn="layer", bound_policy="grow"),
        "lr-matched": lambda: LrMatched(a=a, b=b),
        "weight norm": WeightNorm,
        "powerprop": lambda: PowerPropagation(alpha=2.0),
    }
    return made[kind]() if kind in made else None


def optimizer_of(model: nn.Module, arm: str, setting: Setting) -> torch.optim.Optimizer:
    """Return SGD with momentum; decay acts on all parameters, as in the recipes that the paper cites."""
    chosen = adapter(arm, setting)
    options = {"lr": setting["lr"], "momentum": 0.9, "weight_decay": setting["wd"]}
    if chosen is None:
        return torch.optim.SGD(model.parameters(), **options)
    return chosen.attach(model).optimizer(torch.optim.SGD, **options)


def one_run(data: Any, kind: str, arm: str, setting: Setting, seed: int, test: bool) -> Setting:
    """Train once; every arm sees the same rows in the same order from the same start."""
    (x, y), validation = data["train"], data["validation"]
    model = network(kind, seed)
    optimizer = optimizer_of(model, arm, setting)
    rates = [group["lr"] for group in optimizer.param_groups]
    order, best, kept = torch.Generator().manual_seed(seed), -1.0, None
    for epoch in range(EPOCHS):
        drop = 0.1 ** ((epoch >= 0.5 * EPOCHS) + (epoch >= 0.8 * EPOCHS))
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * drop
        model.train()
        for rows in torch.randperm(len(y), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows])
            if not torch.isfinite(loss):
                return {"validation": 0.0, "diverged": True}
            loss.backward()
            optimizer.step()
        model.eval()
        accuracy = score(model, *validation)[1]
        if accuracy > best:
            best, kept = accuracy, copy.deepcopy(model) if test else None
    found: Setting = {"validation": accuracy, "best_validation": best}
    if test:
        found["loss"], found["accuracy"] = score(model, *data["test"])
        found["train"] = score(model, x, y)[1]
        found["best_accuracy"] = score(kept.eval(), *data["test"])[1]  # type: ignore[union-attr]
        weights = torch.cat([m.weight.detach().flatten() for m in model.modules()
                             if isinstance(m, (nn.Linear, nn.Conv2d))])
        found["largest"] = float(weights.abs().max())
        found["near_zero"] = float((weights.abs() < 0.01).float().mean())
    return found


class Study:
    """Runs that were made before are read from a file, so that an interrupted study goes on."""

    def __init__(self, path: Path, folder: str | None) -> None:
        self.path, self.folder, self.started = path, folder, time.time()
        self.done: dict[str, Setting] = {}
        self.data: dict[tuple[str, int], Any] = {}
        if path.exists():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            self.done = {row["key"]: row["found"] for row in rows}

    def rows(self, kind: str, seed: int) -> Any:
        """Return the seed's 500 training and 2,000 validation images, and all test images."""
        if (kind, seed) not in self.data:
            images = Images(path=self.folder, size=SIZES[kind], limit=TRAIN + VALIDATION,
                            validation=VALIDATION / (TRAIN + VALIDATION)).load(seed)
            if (kind, -1) not in self.data:
                whole = Images(path=self.folder, size=SIZES[kind]).load(0)
                self.data[kind, -1] = tensors(whole.test, "cpu")
            self.data[kind, seed] = {
                "train": tensors(images.train, "cpu"), "validation": tensors(images.validation, "cpu"),
                "test": self.data[kind, -1]}
        return self.data[kind, seed]

    def run(self, kind: str, arm: str, setting: Setting, seed: int, test: bool) -> Setting:
        key = json.dumps([kind, arm, setting, seed, test])
        if key not in self.done:
            self.done[key] = one_run(self.rows(kind, seed), kind, arm, setting, seed, test)
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "found": self.done[key]}) + "\n")
        return self.done[key]

    def chosen(self, kind: str) -> dict[str, Setting]:
        """Return each arm's setting: the best accuracy on validation rows, last epoch, selection seeds."""
        best: dict[str, Setting] = {}
        for arm, settings in SEARCHES.items():
            means = [self._validation(kind, arm, setting) for setting in settings]
            best[arm] = settings[int(np.argmax(means))]
            print(f"{time.time() - self.started:6.0f} s  {kind}: {arm}: {best[arm]} of {len(settings)}, "
                  f"validation {max(means):.4f}", flush=True)
        best["lr-matched"] = dict(best["compander"])
        decays = [setting for setting in SEARCHES["plain"] if setting["lr"] == 0.1]
        best["plain, decay tuned"] = max(decays, key=lambda s: self._validation(kind, "plain", s))
        return best | UNTUNED

    def _validation(self, kind: str, arm: str, setting: Setting) -> float:
        found = [self.run(kind, arm, setting, seed, False) for seed in SELECTION]
        return statistics.mean(run["validation"] for run in found)


def table(results: Mapping[str, list[Setting]], base: str = "plain") -> list[dict[str, Any]]:
    """Return a row per arm: means, and paired differences to the base with 95 % intervals (Student's t)."""
    rows = []
    for arm, found in results.items():
        row: dict[str, Any] = {"arm": arm}
        for name in ("accuracy", "best_accuracy", "loss", "train", "largest", "near_zero"):
            row[name] = statistics.mean(r[name] for r in found)
        for name in ("accuracy", "best_accuracy"):
            row[f"{name}_sd"] = statistics.stdev(r[name] for r in found)
            differences = np.array([r[name] - b[name] for r, b in zip(found, results[base])])
            half = stats.t.ppf(0.975, len(found) - 1) * differences.std(ddof=1) / len(found) ** 0.5
            row[f"{name}_difference"] = [float(differences.mean()), float(half)]
        rows.append(row)
    return sorted(rows, key=lambda row: -row["accuracy"])


def show(rows: list[dict[str, Any]], settings: Mapping[str, Setting]) -> None:
    print("| arm | setting | train % | test %, last | difference | test %, best epoch | difference | loss "
          "| largest | near 0 |")
    print("|" + "---|" * 10)
    for row in rows:
        setting = ", ".join(f"{k} {v}" for k, v in settings[row["arm"]].items())
        cells = [row["arm"], setting, f"{100 * row['train']:.1f}"]
        for name in ("accuracy", "best_accuracy"):
            mean, half = row[f"{name}_difference"]
            cells += [f"{100 * row[name]:.2f} ± {100 * row[f'{name}_sd']:.2f}",
                      f"{100 * mean:+.2f} ± {100 * half:.2f}" if row["arm"] != "plain" else ""]
        cells += [f"{row['loss']:.3f}", f"{row['largest']:.2f}", f"{row['near_zero']:.3f}"]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--networks", nargs="+", default=["mlp", "cnn"], choices=["mlp", "cnn"])
    parser.add_argument("--data", default=None, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--work", type=Path, default=Path("runs/compander_comparison.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.parent.mkdir(parents=True, exist_ok=True)
    study, result = Study(args.work, args.data), {}
    for kind in args.networks:
        settings = study.chosen(kind)
        results = {arm: [study.run(kind, arm, setting, seed, True) for seed in range(args.seeds)]
                   for arm, setting in settings.items()}
        rows = table(results)
        show(rows, settings)
        result[kind] = {"settings": settings, "rows": rows}
    target = Path(__file__).parent / "results" / "latest.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"seeds": args.seeds, "networks": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
