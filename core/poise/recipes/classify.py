"""Train a classifier."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.errors import ConfigError
from poise.interfaces import Arrays, Parts, Splits
from poise.recipes.loop import Order, build_optimizer, fit, load_trained
from poise.recipes.prepare import evaluating, finish, load_splits, observed, prepare, save_final, sizes
from poise.runs.context import RunContext, seed_for

Rows = tuple[Tensor, Tensor]  # inputs (n, ...) and classes (n,)
_EVAL_ROWS = 512
_PAD = 4  # pixels that an augmented image may move


class ClassifyTask:
    """Cross-entropy on rows held in memory."""

    def __init__(
        self, model: nn.Module, train: Rows, validation: Rows, order: Order, accumulate: int, *,
        augment: bool = False, attached: Any = None,
    ) -> None:
        self.model, self.order, self.accumulate = model, order, accumulate
        (self.x, self.y), self.validation = train, validation
        self.augment, self.attached = augment, attached

    def rows(self, step: int, part: int) -> Tensor:
        return self.order.rows(step * self.accumulate + part)

    def batch(self, step: int, part: int) -> tuple[Tensor, Tensor]:
        index, rows = step * self.accumulate + part, self.rows(step, part)
        x = self.x[rows]
        if self.augment:
            seed = seed_for(self.order.seed, f"augment/{index}")
            x = crop_flip(x, torch.Generator().manual_seed(seed))
        return x, self.y[rows]

    def size(self, batch: tuple[Tensor, Tensor]) -> int:
        return len(batch[1])

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def evaluate(self) -> dict[str, float]:
        with evaluating(self.attached):
            loss, accuracy = score(self.model, *self.validation)
        return {"validation_loss": loss, "validation_accuracy": accuracy, "validation_error": 1 - accuracy,
                **observed(self.attached)}


def crop_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (n, c, h, w) moved by up to 4 pixels each way, half of them mirrored."""
    n, _, height, width = x.shape
    down, right = torch.randint(0, 2 * _PAD + 1, (2, n), generator=generator)
    mirrored = torch.rand(n, generator=generator) < 0.5
    rows = down[:, None] + torch.arange(height)
    columns = torch.arange(width).expand(n, width)
    columns = right[:, None] + torch.where(mirrored[:, None], width - 1 - columns, columns)
    padded = F.pad(x, (_PAD,) * 4)
    picked = [torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    moved = padded.permute(0, 2, 3, 1)[tuple(i.to(x.device) for i in picked)]
    return moved.permute(0, 3, 1, 2).contiguous()


def tensors(rows: Arrays, device: str) -> Rows:
    """Return float32 inputs and int64 classes on the device."""
    x = torch.as_tensor(rows.x, dtype=torch.float32, device=device)
    return x, torch.as_tensor(rows.y, dtype=torch.int64, device=device)


def loaded(splits: Splits, normalise: bool, device: str) -> dict[str, Rows]:
    """Return the three splits as tensors, normalised with the statistics of the training rows."""
    found = {name: tensors(getattr(splits, name), device) for name in ("train", "validation", "test")}
    if not normalise:
        return found
    x = found["train"][0]
    axes = [i for i in range(x.ndim) if i != 1]
    mean, deviation = x.mean(axes, keepdim=True), x.std(axes, keepdim=True)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    return {name: ((x - mean) / deviation, y) for name, (x, y) in found.items()}


@torch.no_grad()
def score(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy."""
    outputs = torch.cat([model(part) for part in x.split(_EVAL_ROWS)])
    return float(F.cross_entropy(outputs, y)), float((outputs.argmax(-1) == y).double().mean())


def run(parts: Parts, context: RunContext, *, normalise: bool, augment: str) -> dict[str, float]:
    """Train, evaluate on the test split, save; see `Classify`."""
    assert parts.data is not None and parts.train is not None
    splits = load_splits(parts, context)
    rows = loaded(splits, normalise, context.device)
    if augment != "none" and rows["train"][0].ndim != 4:
        raise ConfigError(f"recipe.augment={augment} is for images; the data has rows of shape "
                          f"{tuple(rows['train'][0].shape[1:])}: write recipe.augment=none")
    model, attached = prepare(parts, context, splits.spec)
    order = Order(len(splits.train), parts.train.batch_size, context.seed_for("order"))
    task = ClassifyTask(model, rows["train"], rows["validation"], order, parts.train.accumulate,
                        augment=augment != "none", attached=attached)
    model.train()
    seconds: float = 0.0
    if parts.train.steps:
        optimizer = build_optimizer(parts.train, model, attached)
        seconds = fit(task, optimizer, parts.train, context)
    model.eval()
    metrics = _final(model, rows) | _best(model, rows["test"], context)
    finish(attached, context)
    save_final(model, attached, context)
    return metrics | sizes(model) | {"step_seconds": seconds}


def _final(model: nn.Module, rows: dict[str, Rows]) -> dict[str, float]:
    metrics = {}
    for name, part in rows.items():
        loss, accuracy = score(model, *part)
        metrics |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
    return metrics


def _best(model: nn.Module, test: Rows, context: RunContext) -> dict[str, float]:
    """Return what the checkpoint of the lowest validation error scores on the test rows."""
    best = context.checkpoints.best()
    if best is None:
        return {}
    other = copy.deepcopy(model).eval()  # nobody watches over a copy's weights
    load_trained(other, best)
    loss, accuracy = score(other, *test)
    return {"best_step": float(best.step), "best_test_loss": loss, "best_test_accuracy": accuracy}
