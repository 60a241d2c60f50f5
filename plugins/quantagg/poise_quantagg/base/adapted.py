"""Base networks behind an adapter: one by one, through core's training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from poise_quantagg.training import CHUNK, Batch, Members, Schedule, Stream


class Network(nn.Module):
    """The same network as `training.mlp`, as modules that an adapter can find."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for k in range(len(params) // 2):
            W = params[f"W{k}"]
            layer = nn.Linear(W.shape[0], W.shape[1])
            with torch.no_grad():
                layer.weight.copy_(W.T)
                layer.bias.copy_(params[f"b{k}"])
            self.layers.append(layer)

    def params(self) -> dict[str, Tensor]:
        """Return the layers' present weights as `training.mlp` takes them, with an axis for one member."""
        found = {}
        for k, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            found[f"W{k}"], found[f"b{k}"] = layer.weight.T[None], layer.bias[None]
        return found


class _LoopTask:
    """A member of a `NetTask` in the loop's terms; keeps the best folded weights it has seen."""

    def __init__(
        self, model: Any, attached: Any, task: Any, members: Members, schedule: Schedule
    ) -> None:
        self.model, self.attached, self.task = model, attached, task
        self.stream = Stream(members, 0, torch.float32)
        self.alive = torch.tensor([0])
        self.schedule = schedule
        self.score, self.at, self.now = np.inf, 0, 0
        self.best: dict[str, np.ndarray] = {}
        self.queue: list[Batch] = []

    def batch(self, step: int, part: int) -> Batch:
        if not self.queue:
            rows, masks, uniforms = self.stream.draw(CHUNK)
            drop = masks is not None and self.stream.rate > 0
            self.queue = [
                Batch(rows[t : t + 1], None if masks is None or not drop else masks[t : t + 1],
                      None if uniforms is None else uniforms[t : t + 1])
                for t in range(CHUNK)
            ][::-1]
        return self.queue.pop()

    def size(self, batch: Batch) -> int:
        return batch.rows.shape[1]

    def loss(self, batch: Batch) -> Tensor:
        return self.task.loss(self.model.params(), batch, self.alive)[0]

    def evaluate(self) -> dict[str, float]:
        self.now += self.schedule.eval_every
        score = float(self.task.score(self.model.params(), self.alive)[0])
        if score < self.score:
            self.score, self.at = score, self.now
            plain = self.attached.folded_state_dict()
            self.best = {
                f"{letter}{k}": (plain[f"layers.{k}.{name}"].T if letter == "W" else
                                 plain[f"layers.{k}.{name}"]).detach().double().numpy().copy()
                for k in range(len(self.model.layers)) for letter, name in (("W", "weight"), ("b", "bias"))
            }
        return {"validation_loss": score}

    def done(self) -> bool:
        """Say that no score has been better within the patience."""
        return self.now - self.at >= self.schedule.patience


def train_adapted(adapter: Any, task: Any, members: Members, schedule: Schedule):
    """Train one network behind an adapter; return (validation score, weights W0, b0, ...).

    Adam with AMSGrad as in the batch; the adapter's own optimizer drives its parameters.
    """
    from poise.config import Train
    from poise.recipes.loop import fit

    seed = members.seeds[0]
    network = Network(task.init(0, torch.Generator().manual_seed(seed)))
    attached = adapter.attach(network)
    optimizer = attached.optimizer(torch.optim.Adam, lr=members.lr[0], weight_decay=members.weight_decay[0],
                                   amsgrad=True)
    loop = _LoopTask(network, attached, task, members, schedule)
    train = Train(steps=schedule.max_steps, lr=members.lr[0], optimizer="adam", log_every=10**9,
                  eval_every=schedule.eval_every, checkpoint_every=0)
    fit(loop, optimizer, train, seed=seed, quiet=True)
    return loop.score, loop.best
