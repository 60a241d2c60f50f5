"""Train a classifier."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.interfaces import Arrays, Parts
from poise.recipes.loop import Order, build_optimizer, fit
from poise.recipes.prepare import prepare, save_final, sizes
from poise.runs.context import RunContext

_EVAL_ROWS = 512


class ClassifyTask:
    """Cross-entropy on rows held in memory."""

    def __init__(
        self, model: nn.Module, train: Arrays, validation: Arrays, order: Order, accumulate: int,
        device: str,
    ) -> None:
        self.model, self.order, self.accumulate = model, order, accumulate
        self.x, self.y = tensors(train, device)
        self.validation = tensors(validation, device)

    def batch(self, step: int, part: int) -> tuple[Tensor, Tensor]:
        rows = self.order.rows(step * self.accumulate + part)
        return self.x[rows], self.y[rows]

    def size(self, batch: tuple[Tensor, Tensor]) -> int:
        return len(batch[1])

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def evaluate(self) -> dict[str, float]:
        loss, accuracy = score(self.model, *self.validation)
        return {"validation_loss": loss, "validation_accuracy": accuracy}


def tensors(rows: Arrays, device: str) -> tuple[Tensor, Tensor]:
    """Return float32 inputs and int64 classes on the device."""
    x = torch.as_tensor(rows.x, dtype=torch.float32, device=device)
    return x, torch.as_tensor(rows.y, dtype=torch.int64, device=device)


@torch.no_grad()
def score(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy."""
    outputs = torch.cat([model(part) for part in x.split(_EVAL_ROWS)])
    return float(F.cross_entropy(outputs, y)), float((outputs.argmax(-1) == y).double().mean())


def run(parts: Parts, context: RunContext) -> dict[str, float]:
    """Train, evaluate on the test split, save; see `Classify`."""
    assert parts.data is not None and parts.train is not None
    splits = parts.data.load(context.seed)
    context.note("data", splits.provenance)
    model, attached = prepare(parts, context, splits.spec)
    order = Order(len(splits.train), parts.train.batch_size, context.seed_for("order"))
    task = ClassifyTask(
        model, splits.train, splits.validation, order, parts.train.accumulate, context.device
    )
    model.train()
    seconds: float = 0.0
    if parts.train.steps:
        optimizer = build_optimizer(parts.train, model, attached)
        seconds = fit(task, optimizer, parts.train, context)
    model.eval()
    metrics = _final(model, splits, context.device) | sizes(model) | {"step_seconds": seconds}
    if attached is not None:
        context.note("adapter", attached.report())
    save_final(model, attached, context)
    return metrics


def _final(model: nn.Module, splits: Any, device: str) -> dict[str, float]:
    metrics = {}
    for name in ("train", "validation", "test"):
        loss, accuracy = score(model, *tensors(getattr(splits, name), device))
        metrics |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
    return metrics
