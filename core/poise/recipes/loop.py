"""The one training loop: accumulation, schedules, clipping, precision, records, checkpoints.

A batch is a pure function of (seed, step, part), so continuing from a checkpoint needs no data
position: the step is the position.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from poise.config import Train
from poise.errors import RunError
from poise.hooks import Located, Stops
from poise.runs.checkpoint import Checkpoint, pack_optimizer, unpack_optimizer
from poise.runs.context import Interrupted, RunContext, seed_for
from poise.runs.progress import progress

_OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_MOST_ROWS = 32  # named in a message
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class Task(Protocol):
    """What is being trained, in the loop's terms; it may also have enough early (`hooks.Stops`)."""

    model: nn.Module

    def batch(self, step: int, part: int) -> Any:
        """Return a batch; the same (step, part) gives the same batch."""
        ...

    def size(self, batch: Any) -> int:
        """Return how many targets the batch's mean loss is taken over."""
        ...

    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Return metrics on held-out data.

        The best checkpoint is the one of the lowest `validation_error`, or, without one, of the lowest
        `validation_loss`.
        """
        ...


def build_optimizer(train: Train, model: nn.Module, attached: Any = None) -> torch.optim.Optimizer:
    """Return the optimizer of a run; an adapter brings its own parameter groups or rule."""
    options: dict[str, Any] = {"lr": train.lr, "weight_decay": train.weight_decay}
    if train.optimizer == "sgd":
        options["momentum"] = train.momentum
    cls = _OPTIMIZERS[train.optimizer]
    if attached is not None:
        return attached.optimizer(cls, **options)
    return cls([p for p in model.parameters() if p.requires_grad], **options)


def rate(train: Train, step: int) -> float:
    """Return the factor on the learning rate at a step (counted from 0)."""
    if step < train.warmup:
        return (step + 1) / train.warmup
    if train.schedule == "constant":
        return 1.0
    if train.schedule == "steps":
        return train.factor ** sum(step >= share * train.steps for share in train.milestones)
    done = (step - train.warmup) / max(1, train.steps - train.warmup)
    return 1.0 - done if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


class _Alone:
    """What `fit` runs in without a context: no records and no checkpoints."""

    resume_from = checkpoints = None
    stopping = False

    def __init__(self, seed: int, quiet: bool) -> None:
        self.seed, self.quiet = seed, quiet

    def seed_for(self, purpose: str) -> int:
        return seed_for(self.seed, purpose)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def progress(self, total: int | None, label: str) -> Any:
        return progress(total, label, self.quiet)

    def graceful(self) -> nullcontext:
        return nullcontext()


Surroundings = RunContext | _Alone


def fit(
    task: Task, optimizer: torch.optim.Optimizer, train: Train, context: RunContext | None = None, *,
    seed: int = 0, quiet: bool = False,
) -> float:
    """Train for `train.steps` steps, from the context's checkpoint when it has one.

    Parameters
    ----------
    context : RunContext, optional
        Where records and checkpoints go; without one there are none, and `seed` and `quiet` (no progress
        on stderr) are what it would have said.

    Returns
    -------
    float
        Median seconds per step.

    Raises
    ------
    RunError
        When the loss is not finite; earlier checkpoints are intact.
    Interrupted
        After Ctrl-C, once a checkpoint is written.
    """
    around: Surroundings = context or _Alone(seed, quiet)
    torch.manual_seed(around.seed_for("dropout"))
    start = _restore(task, optimizer, around)
    times: list[float] = []
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    with around.graceful(), around.progress(train.steps - start, "training") as bar:
        for step in range(start, train.steps):
            began = time.perf_counter()
            loss = _step(task, optimizer, train, step, around)
            times.append(time.perf_counter() - began)
            bar.advance(note=f"loss {loss:.4g}")
            if _close(task, optimizer, train, around, step + 1, loss):
                break
    return sorted(times)[len(times) // 2] if times else 0.0


def _close(
    task: Task, optimizer: torch.optim.Optimizer, train: Train, context: Surroundings, done: int,
    loss: float,
) -> bool:
    """Record, evaluate and save what is due after a step; return whether the task has enough."""
    if done % train.log_every == 0:
        context.log(done, {"loss": loss, "lr": optimizer.param_groups[0]["lr"]})
    due = _due(done, train.eval_every, train)
    score = _evaluate(task, context, done) if due else None
    enough = due and isinstance(task, Stops) and task.done()
    if enough or _due(done, train.checkpoint_every, train) or context.stopping:
        _save(task, optimizer, context, done, score)
    if context.stopping and done < train.steps and not enough:
        raise Interrupted(f"interrupted at step {done} of {train.steps}")
    return enough


def _due(done: int, every: int, train: Train) -> bool:
    return done == train.steps or (every > 0 and done % every == 0)


def _step(
    task: Task, optimizer: torch.optim.Optimizer, train: Train, step: int, around: Surroundings
) -> float:
    """Take one optimizer step over all accumulation parts; return the mean loss."""
    factor = rate(train, step)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    optimizer.zero_grad(set_to_none=True)
    batches = [task.batch(step, part) for part in range(train.accumulate)]
    sizes = [task.size(b) for b in batches]
    total, loss_sum = sum(sizes), 0.0
    device = next(task.model.parameters()).device.type
    for batch, size in zip(batches, sizes, strict=True):
        with torch.autocast(device, torch.bfloat16, enabled=train.precision == "bf16"):
            loss = task.loss(batch)
        # parts are weighted by their targets, so accumulating equals one large batch
        part = loss if total == size else loss * (size / total)
        part.backward()
        loss_sum += float(part.detach())
    if not math.isfinite(loss_sum):
        where = f"{step + 1}{_where(task, train, step, around)}"
        raise RunError(f"the loss is {loss_sum} at step {where}: lower train.lr or set train.clip")
    if train.clip:
        trained = [p for g in optimizer.param_groups for p in g["params"]]
        nn.utils.clip_grad_norm_(trained, train.clip)
    optimizer.step()
    return loss_sum


def _where(task: Task, train: Train, step: int, around: Surroundings) -> str:
    """Say which rows a step saw, and what there is to go on from."""
    said = []
    if isinstance(task, Located):
        rows = [int(n) for part in range(train.accumulate) for n in task.rows(step, part)]
        more = f" and {len(rows) - _MOST_ROWS} more" if len(rows) > _MOST_ROWS else ""
        said.append(f"training rows {', '.join(map(str, rows[:_MOST_ROWS]))}{more}")
    if around.checkpoints is not None:
        steps = around.checkpoints.steps()
        said.append(f"the last good checkpoint is of step {steps[-1]}" if steps else "no checkpoint yet")
    return f" ({'; '.join(said)})" if said else ""


def _evaluate(task: Task, context: Surroundings, step: int) -> float | None:
    """Evaluate without disturbing the generator of training."""
    state, training = torch.get_rng_state(), task.model.training
    task.model.eval()
    with torch.no_grad():
        metrics = task.evaluate()
    task.model.train(training)
    torch.set_rng_state(state)
    context.log(step, metrics)
    if odd := [k for k, v in metrics.items() if not math.isfinite(v)]:
        raise RunError(f"{odd[0]} is {metrics[odd[0]]} at step {step}: lower train.lr or set train.clip")
    return metrics.get("validation_error", metrics.get("validation_loss"))


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes: trainable parameters and running statistics."""
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return found | {n: b for n, b in model.named_buffers() if n.rpartition(".")[2] in _RUNNING}


def _save(
    task: Task, optimizer: torch.optim.Optimizer, context: Surroundings, step: int,
    score: float | None,
) -> None:
    if isinstance(context, _Alone):
        return
    tensors, plain = pack_optimizer(optimizer)
    tensors |= {f"model.{n}": t for n, t in trained_tensors(task.model).items()}
    tensors["rng"] = torch.get_rng_state()
    meta = {"optimizer": plain, "score": score, "rows": context.records.rows}
    context.checkpoints.save(step, tensors, meta)


def _restore(task: Task, optimizer: torch.optim.Optimizer, context: Surroundings) -> int:
    saved = context.resume_from
    if saved is None:
        return 0
    load_trained(task.model, saved)
    unpack_optimizer(optimizer, saved.tensors, saved.meta["optimizer"])
    torch.set_rng_state(saved.tensors["rng"])
    return saved.step


def load_trained(model: nn.Module, saved: Checkpoint) -> None:
    """Copy what training had changed into a model; raises `RunError` for a checkpoint of another model."""
    tensors = {n.removeprefix("model."): t for n, t in saved.tensors.items() if n.startswith("model.")}
    _copy_into(trained_tensors(model), tensors)


def _copy_into(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    if live.keys() != saved.keys():
        odd = sorted(live.keys() ^ saved.keys())
        raise RunError(f"the checkpoint is of another model: {len(odd)} tensors differ, first {odd[0]}")
    for name, tensor in live.items():
        if tensor.shape != saved[name].shape:
            raise RunError(
                f"the checkpoint is of another model: {name} has shape {tuple(saved[name].shape)}, "
                f"here {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])


class Order:
    """Which rows make up a batch: epochs shuffled by (seed, epoch), every row once per epoch.

    Parameters
    ----------
    n : int
        Rows; at least one.
    batch_size : int
        Rows per batch; a batch may span two epochs.
    seed : int
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed = n, min(batch_size, n), seed
        self._epoch: tuple[int, Tensor] = (-1, torch.empty(0))

    def rows(self, index: int) -> Tensor:
        """Return the row numbers of batch `index`, shape (batch_size,)."""
        start, wanted = index * self.batch_size, self.batch_size
        parts = []
        while wanted:
            epoch, offset = divmod(start, self.n)
            part = self._permutation(epoch)[offset : offset + wanted]
            parts.append(part)
            start, wanted = start + len(part), wanted - len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed + epoch) % 2**63)
            self._epoch = (epoch, torch.randperm(self.n, generator=generator))
        return self._epoch[1]
