"""Random search over gates and global weights trained by gradient (section 1.4)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from poise.errors import DataError, RunError, require
from poise_quantagg.aggregators.fitted import LinearFit, check_predictions
from poise_quantagg.aggregators.global_ import exact
from poise_quantagg.checks import finite, row_blocks

WIDTHS, DEPTHS, DROPOUTS = (64, 128), (2, 3), (0.0, 0.05, 0.1)
STRENGTHS = (0.5, 1.0, 2.0, 5.0, 10.0)
MARGINS = {
    "constant": (1e-4, 1e-3, 5e-3, 7.5e-3, 9.9e-3),
    "adaptive": (1e-1, 5e-2, 1e-2, 1e-3, 1e-4),
    "distance": (1e-1, 5e-2, 1e-2, 1e-3, 1e-4),
}
RATES = {"local": (1e-3, 5e-4), "global": (1e-2, 1e-3)}
HELD_OUT = 0.2  # of the rows, when no validation rows are given


@dataclass(frozen=True)
class SearchOptions:
    """What a search needs beside the rows; see `components.py` for each option."""

    resolution: str
    local: bool
    penalty: str | None = None
    penalty_weight: float | None = None
    margin: float | None = None
    loss_isotonize: str | None = None
    start: str = "exact"
    n_iter: int = 20
    max_steps: int | None = None
    patience: int | None = None
    width: int | None = None
    depth: int | None = None
    rank: int | None = None
    band: int | None = None
    random_state: int = 0


def draw(options: SearchOptions) -> list[Any]:
    """Return distinct configurations from the paper's space."""
    from poise_quantagg.aggregators.gates import GateConfig

    shapes = list(itertools.product(WIDTHS, DEPTHS, DROPOUTS)) if options.local else [(0, 0, 0.0)]
    if options.penalty is None:
        strengths: Sequence[float] = (0.0,)
        margins: Sequence[float] = (0.0,)
    else:
        strengths = STRENGTHS if options.penalty_weight is None else (options.penalty_weight,)
        margins = MARGINS[options.penalty] if options.margin is None else (options.margin,)
    points = [
        GateConfig(options.width or width, options.depth or depth, dropout, lr, 1e-7, strength, margin)
        if options.local else GateConfig(0, 0, 0.0, lr, 0.0, strength, margin)
        for width, depth, dropout in shapes
        for lr in RATES["local" if options.local else "global"]
        for strength in strengths for margin in margins
    ]
    points = list(dict.fromkeys(points))
    order = np.random.default_rng(options.random_state).permutation(len(points))
    return [points[i] for i in order[: max(1, options.n_iter)]]


def search(
    options: SearchOptions, Z: np.ndarray, y: np.ndarray, X: np.ndarray | None, levels: np.ndarray,
    s: np.ndarray, validation: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None,
    progress: Any = None,
) -> Any:
    """Train all configurations, return the best on the validation rows as a fitted aggregator.

    Raises
    ------
    RunError
        When no configuration has a finite validation loss.
    """
    require("torch", "nets")
    import torch

    from poise_quantagg.aggregators.gates import GateTask, Rows
    from poise_quantagg.penalties import adaptive_margins

    windowed = options.band is not None
    resolution = "medium" if windowed else options.resolution

    def rows(Z, y, X, s=None):
        Z = (window(Z, options.band) if windowed else Z).astype(np.float32)
        Z -= np.float32(center)
        Z /= np.float32(unit)
        return Rows(Z, (y - center) / unit, features(X) if features else None, s)

    if not s.all():  # rows of weight 0 neither train nor choose
        Z, y, X, s = Z[s > 0], y[s > 0], None if X is None else X[s > 0], s[s > 0]
    center, unit = float(np.average(y, weights=s)), float(np.sqrt(np.cov(y, aweights=s))) if len(y) > 1 \
        else 0.0
    unit = unit if unit > 0 else 1.0
    features = Features.of(X) if options.local and X is not None else None

    weighted = None if np.all(s == s[0]) else s
    start = starting_weights(options, Z, y, levels, s)
    if validation is None:
        train, held = _split(len(y), options.random_state)
        fit_rows = rows(Z[train], y[train], None if X is None else X[train],
                        None if weighted is None else weighted[train])
        held_rows = rows(Z[held], y[held], None if X is None else X[held],
                         None if weighted is None else weighted[held])
    else:
        fit_rows, held_rows = rows(Z, y, X, weighted), rows(*validation)
    profile = adaptive_margins(Z, y, levels) / unit if options.penalty == "adaptive" else None
    configs = draw(options)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, config in enumerate(configs):
        groups.setdefault((config.width, config.depth), []).append(i)
    best: tuple[float, dict[str, np.ndarray]] | None = None
    board = []
    for members in groups.values():
        members.sort(key=lambda i: configs[i].lr)  # equal ones side by side: fewer pieces to optimize
        chosen = [configs[i] for i in members]
        task = GateTask(resolution, fit_rows, held_rows, levels, chosen, start, torch.float32,
                        penalty=options.penalty, profile=profile, isotonize=options.loss_isotonize,
                        rank=options.rank)
        trained = _train(options, task, chosen, members, len(fit_rows.y), progress)
        for c, i in enumerate(members):
            score = float(trained.score[c]) * unit
            board.append({**vars(configs[i]), "validation_pinball": score, "step": int(trained.step[c])})
            if np.isfinite(score) and (best is None or score < best[0]):
                best = score, {k: v.double().numpy() for k, v in trained.params[c].items()}
    if best is None:
        raise RunError(f"no configuration of {'local' if options.local else 'global'}_"
                       f"{options.resolution} has a finite validation loss: look for outliers, y goes from "
                       f"{y.min():g} to {y.max():g}")
    score, params = best
    if not options.local:
        w = _softmax(params["logits"].reshape(start.shape), resolution, Z.shape[1], Z.shape[2])
        return LinearFit(w, Z.shape[2], objective=score)
    return GateFit(params, options.resolution, Z.shape[1], Z.shape[2], features, options.band, score,
                   tuple(sorted(board, key=lambda row: row["validation_pinball"])))


def _train(options: SearchOptions, task, configs, numbers, n: int, progress):
    import torch

    from poise_quantagg.aggregators.fine import train_fine
    from poise_quantagg.training import Members, Schedule, batch_size, train

    first = configs[0]
    seeds = [int(np.random.SeedSequence([options.random_state, i]).generate_state(1)[0]) for i in numbers]
    members = Members(
        seeds=seeds, rows=[torch.arange(n)] * len(configs), batch_size=batch_size(n),
        lr=[c.lr for c in configs], weight_decay=[c.weight_decay for c in configs],
        dropout=[c.dropout for c in configs], width=first.width, masks=max(0, first.depth - 1),
    )
    small, fine = n < 500, options.local and task.resolution == "fine"
    # a fine step costs a hundred times a coarse one: half the patience
    patience = options.patience or (300 if small else 500) // (2 if fine else 1)
    schedule = Schedule(options.max_steps or (3_000 if small else 20_000), 50 if small else 100, patience,
                        amsgrad=False)
    if fine:
        return train_fine(task, members, schedule, progress=progress)
    return train(task, members, schedule, progress=progress)


def starting_weights(options: SearchOptions, Z, y, levels, s) -> np.ndarray:
    """Return logits to start from: the exact global solution, or zeros (the paper)."""
    from poise_quantagg.aggregators.gates import start_logits

    p, m = Z.shape[1:]
    if options.band is not None:
        width = 2 * options.band + 1
        w = np.zeros((p, width, m))
        w[:, options.band] = exact("medium", Z, y, levels, s).w if options.start == "exact" else 1 / p
        logits = start_logits(w.reshape(p * width, m))
        return logits if options.start == "exact" else np.zeros_like(logits)
    if options.start == "uniform":
        return np.zeros({"coarse": (p,), "medium": (p, m), "fine": (m, p * m)}[options.resolution])
    if options.resolution != "fine":
        return start_logits(exact(options.resolution, Z, y, levels, s).w)
    w = np.zeros((m, p, m))
    w[np.arange(m), :, np.arange(m)] = exact("medium", Z, y, levels, s).w.T
    return start_logits(w.reshape(m, p * m).T).T


def _split(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng([seed, 11]).permutation(n)
    held = max(1, int(HELD_OUT * n)) if n > 1 else 0
    return np.sort(order[held:]), np.sort(order[:held] if held else order)


def _softmax(logits: np.ndarray, resolution: str, p: int, m: int) -> np.ndarray:
    """Return weights (..., p), (..., p, m) or (..., p, m_in, m_out) from logits (..., K)."""
    axis = -1 if resolution != "medium" else -2
    w = np.exp(logits - logits.max(axis=axis, keepdims=True))
    w /= w.sum(axis=axis, keepdims=True)
    if resolution != "fine":
        return w
    return np.moveaxis(w.reshape(*w.shape[:-1], p, m), -3, -1)


def window(Z: np.ndarray, band: int | None) -> np.ndarray:
    """Return (n, p (2 band + 1), m): at level k, the predictions at levels k - band to k + band."""
    m = Z.shape[2]
    near = np.clip(np.arange(m)[None] + np.arange(-(band or 0), (band or 0) + 1)[:, None], 0, m - 1)
    return Z[:, :, near].reshape(len(Z), -1, m)


@dataclass(frozen=True)
class Features:
    """The units of the gate's inputs."""

    mean: np.ndarray
    scale: np.ndarray

    @staticmethod
    def of(X: np.ndarray) -> Features:
        """Learn means and scales from rows (n, d); a constant column has scale 1."""
        scale = X.std(axis=0)
        return Features(X.mean(axis=0), np.where(scale > 0, scale, 1.0))

    def __call__(self, X: np.ndarray) -> np.ndarray:
        return (X - self.mean) / self.scale


@dataclass(frozen=True)
class GateFit:
    """Weights that are a function of the features.

    Parameters
    ----------
    params : dict of arrays W0, b0, ...
    resolution : {"coarse", "medium", "fine"}
    p, m : int
    features : Features
    band : int or None
        For banded fine gates.
    score : float
        Mean pinball loss on the validation rows, sorted, in the unit of y.
    leaderboard : tuple of dict
        All configurations tried, best first.
    """

    params: dict[str, np.ndarray]
    resolution: str
    p: int
    m: int
    features: Any
    band: int | None = None
    score: float | None = None
    leaderboard: tuple[dict[str, Any], ...] = ()
    linear = False
    needs_features = True

    def predict(self, Z: np.ndarray, X: np.ndarray | None = None) -> np.ndarray:
        """Return the weighted sums, shape (n, m).

        Raises
        ------
        DataError
            Without features, for shapes that differ from the fit, or values that are not finite.
        """
        Z, X = check_predictions(Z, self.p, self.m), self._checked(X, len(Z))
        out = np.empty((len(Z), self.m))
        for block in row_blocks(len(Z), self.params[f"b{len(self.params) // 2 - 1}"].size):
            w = self._weights(X[block])
            if w.ndim == 2:
                out[block] = np.einsum("np,npm->nm", w, Z[block])
            elif w.ndim == 3:
                out[block] = np.einsum("npm,npm->nm", w, Z[block])
            else:
                out[block] = np.einsum("npvm,npv->nm", w, Z[block], optimize=True)
        return out

    def weights(self, X: np.ndarray | None = None) -> np.ndarray:
        """Return the weights at rows X: (n, p), (n, p, m) or (n, p, m_in, m_out).

        Fine weights of n rows take 8 n p m^2 bytes: 470 MB for 1,000 rows, 6 models and 99 levels.
        """
        return self._weights(self._checked(X, None))

    def _checked(self, X: np.ndarray | None, n: int | None) -> np.ndarray:
        if X is None:
            raise DataError("these weights depend on the features: give X")
        X = finite("X", X, 2)
        if n is not None and len(X) != n:
            raise DataError(f"X has {len(X)} rows and Z has {n}: they must be equal")
        if X.shape[1] != len(self.features.mean):
            raise DataError(f"X has {X.shape[1]} features; fitted on {len(self.features.mean)}")
        return X

    def _weights(self, X: np.ndarray) -> np.ndarray:
        x = self.features(X)
        depth = len(self.params) // 2
        for k in range(depth):
            x = x @ self.params[f"W{k}"] + self.params[f"b{k}"]
            if k < depth - 1:
                x = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
        p, m = self.p, self.m
        if self.resolution == "coarse":
            return _softmax(x, "coarse", p, m)
        if self.band is not None:
            return self._unwindowed(_softmax(x.reshape(len(x), -1, m), "medium", p, m))
        if self.resolution == "medium":
            return _softmax(x.reshape(len(x), p, m), "medium", p, m)
        return _softmax(x.reshape(len(x), m, p * m), "fine", p, m)

    def _unwindowed(self, w: np.ndarray) -> np.ndarray:
        """Return banded weights (n, p (2b + 1), m) as fine ones (n, p, m_in, m_out)."""
        n, band, m = len(w), int(self.band or 0), self.m
        w = w.reshape(n, self.p, 2 * band + 1, m)
        full = np.zeros((n, self.p, m, m))
        for offset in range(2 * band + 1):
            near = np.clip(np.arange(m) + offset - band, 0, m - 1)
            for k in range(m):
                full[:, :, near[k], k] += w[:, :, offset, k]
        return full

