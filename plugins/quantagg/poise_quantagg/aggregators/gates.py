"""Weights by gradient: global logits, and gates that look at the features (section 1.4, eq 17).

A gate is a network from features to logits; a softmax over models (for fine: over models and input
levels) makes the weights, and base predictions enter only through the weighted sum. Training starts
at given weights with a floor (`FLOOR` of the weight spread evenly, so that no softmax starts saturated);
`search.py` gives the exact global solution, and compares what was trained with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise_quantagg import monotone, penalties
from poise_quantagg.training import Batch, mlp, mlp_init, pinball

FLOOR = 0.05  # share of the starting weights spread evenly, so that no softmax starts saturated
_SCORE_NUMBERS = 1 << 23


@dataclass(frozen=True)
class GateConfig:
    """One point of the search space; `width` 0 means global weights."""

    width: int = 0
    depth: int = 0
    dropout: float = 0.0
    lr: float = 1e-3
    weight_decay: float = 1e-7
    penalty_weight: float = 0.0
    margin: float = 0.0


@dataclass(frozen=True)
class Rows:
    """Checked rows: Z (n, p, m), y (n,), X (n, d) standardised or None, weights (n,) or None."""

    Z: np.ndarray
    y: np.ndarray
    X: np.ndarray | None
    s: np.ndarray | None = None


def start_logits(weights: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return logits whose softmax over `axis` is `weights` with a floor."""
    even = 1 / weights.shape[axis]
    return np.log((1 - FLOOR) * np.maximum(weights, 0) + FLOOR * even)


class GateTask:
    """Losses of C gates of one shape; `resolution` is coarse, medium or fine.

    Fine gates materialise (C, B, m, pm) numbers: right for global weights, where the batch plays no
    part, and for tests; `fine.py` trains local ones in chunks.

    Parameters
    ----------
    train, validation : Rows
    configs : list of GateConfig, equal in width and depth
    start : array
        Logits, shape (p,), (p, m) or (m, pm).
    penalty : None, "constant", "adaptive" or "distance"
    profile : array, shape (m,), optional
        Margins of unit size for "adaptive" (`penalties.adaptive_margins`).
    isotonize : None, "sort", "pava" or "minmax"
        Applied inside the loss ("Grad..." in the paper).
    rank : int, optional
        A last hidden layer of this many units before the logits: an approximation with fewer numbers.
    """

    def __init__(
        self, resolution: str, train: Rows, validation: Rows, levels: np.ndarray,
        configs: Sequence[GateConfig], start: np.ndarray, dtype: torch.dtype, *,
        penalty: str | None = None, profile: np.ndarray | None = None, isotonize: str | None = None,
        rank: int | None = None,
    ) -> None:
        self.resolution, self.dtype, self.isotonize, self.penalty = resolution, dtype, isotonize, penalty
        self.p, self.m = train.Z.shape[1:]
        self.tau = np.array(levels, float)  # a copy: torch warns of arrays that cannot be written
        self.levels = torch.as_tensor(self.tau, dtype=dtype)
        self.Z, self.y, self.X, self.s = _tensors(train, dtype)
        self.held = _tensors(validation, dtype)
        self.start = torch.as_tensor(start.ravel(), dtype=torch.float64)
        first = configs[0]
        self.local = first.width > 0
        # the start minimises the pinball loss alone: it would beat what a penalty asks for
        self.scores_start = penalty is None and isotonize is None
        self.sizes = ()
        if self.local:
            assert self.X is not None
            inner = [first.width] * first.depth + ([rank] if rank else [])
            self.sizes = (self.X.shape[1], *inner, self.start.numel())
        self.undecayed = frozenset({f"b{len(self.sizes) - 2}", "logits"})
        column = lambda name: torch.tensor([getattr(c, name) for c in configs], dtype=dtype)  # noqa: E731
        self.strength, self.margin = column("penalty_weight"), column("margin")
        self.profile = None if profile is None else torch.as_tensor(profile, dtype=dtype)

    def init(self, member: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return parameters whose weights are exactly the starting ones, whatever the features."""
        if not self.local:
            return {"logits": self.start.clone()}
        params = mlp_init(self.sizes, generator)
        last = len(self.sizes) - 2
        params[f"W{last}"] = torch.zeros_like(params[f"W{last}"])
        params[f"b{last}"] = self.start.clone()
        return params

    def loss(self, params, batch: Batch, alive: Tensor) -> Tensor:
        """Return pinball plus penalty of each member's batch, shape (C,)."""
        X = None if self.X is None or not self.local else self.X[batch.rows]
        q = self.combine(params, self.Z[batch.rows], X, batch.masks)
        return self.objective(q, self.y[batch.rows], None if self.s is None else self.s[batch.rows],
                              alive)

    def objective(self, q: Tensor, y: Tensor, s: Tensor | None, alive: Tensor) -> Tensor:
        """Return the members' losses (C,) for predictions q (C, B, m) and targets y (C, B)."""
        strength, margin = self.strength[alive], self.margin[alive]
        extra = 0.0
        if self.penalty is not None and strength.any():
            extra = strength * self.crossing(q, margin[:, None]).mean(dim=1)
        q = monotone.isotonize(q, self.isotonize, self.tau)
        rows = pinball(y[..., None] - q, self.levels).mean(dim=2)
        return (rows if s is None else rows * s).mean(dim=1) + extra

    def crossing(self, q: Tensor, margin: Tensor) -> Tensor:
        """Return the crossing penalty of each row, shape (C, B); margin (C, 1)."""
        if self.penalty == "constant":
            return penalties.constant(q, margin, reduction="none")
        if self.penalty == "distance":
            return penalties.adaptive(q, margin[..., None] * penalties.DISTANCE_UNIT * self.levels,
                                      reduction="none")
        assert self.profile is not None
        return penalties.adaptive(q, margin[..., None] * self.profile, reduction="none")

    def score(self, params, alive: Tensor) -> Tensor:
        """Return the validation pinball of each member after sorting, shape (C,)."""
        Z, y, X, s = self.held
        width = max(self.p * self.m * (self.m if self.resolution == "fine" and self.local else 1),
                    *self.sizes, 1)
        step = max(1, _SCORE_NUMBERS // (width * len(alive)))
        total = torch.zeros(len(alive), dtype=self.dtype)
        for i in range(0, len(y), step):
            part = slice(i, i + step)
            x = None if X is None or not self.local else X[part].expand(len(alive), -1, -1)
            q = self.combine(params, Z[part].expand(len(alive), -1, -1, -1), x, None)
            q = monotone.isotonize(q, self.isotonize or "sort", self.tau)
            loss = pinball(y[part, None] - q, self.levels).mean(dim=2)
            total += (loss if s is None else loss * s[part]).sum(dim=1)
        return total / (len(y) if s is None else s.sum())

    def combine(self, params, Z: Tensor, X: Tensor | None, masks: Tensor | None) -> Tensor:
        """Return predictions (C, B, m) from Z (C, B, p, m)."""
        if self.local:
            assert X is not None
            return weigh(self.resolution, mlp(params, X, masks), Z)
        logits = params["logits"]
        if self.resolution == "fine":
            w = torch.softmax(logits.view(-1, self.m, self.p * self.m), dim=2)
            return torch.matmul(Z.flatten(2), w.transpose(1, 2))
        return weigh(self.resolution, logits[:, None], Z)


def weigh(resolution: str, logits: Tensor, Z: Tensor) -> Tensor:
    """Return weighted sums (..., m) of Z (..., p, m) by the softmax of logits (..., K)."""
    p, m = Z.shape[-2:]
    if resolution == "coarse":
        w = torch.softmax(logits, dim=-1)
        return torch.matmul(w.expand(*Z.shape[:-2], p)[..., None, :], Z).squeeze(-2)
    if resolution == "medium":
        w = torch.softmax(logits.unflatten(-1, (p, m)), dim=-2)
        return (w * Z).sum(dim=-2)
    w = torch.softmax(logits.unflatten(-1, (m, p * m)), dim=-1)
    return torch.matmul(w, Z.flatten(-2)[..., None]).squeeze(-1)


def _tensors(rows: Rows, dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(None if a is None else torch.as_tensor(a, dtype=dtype)
                 for a in (rows.Z, rows.y, rows.X, rows.s))
