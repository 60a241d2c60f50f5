"""Random search over gates and global weights trained by gradient (section 1.4)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from poise.errors import RunError, require
from poise_quantagg.aggregators.fitted import LinearFit
from poise_quantagg.aggregators.fitted_gate import Features, GateFit, softmax
from poise_quantagg.aggregators.global_ import exact
from poise_quantagg.scores import pinball

WIDTHS, DEPTHS, DROPOUTS = (64, 128), (2, 3), (0.0, 0.05, 0.1)
STRENGTHS = (0.5, 1.0, 2.0, 5.0, 10.0)
MARGINS = {
    "constant": (1e-4, 1e-3, 5e-3, 7.5e-3, 9.9e-3),
    "adaptive": (1e-1, 5e-2, 1e-2, 1e-3, 1e-4),
    "distance": (1e-1, 5e-2, 1e-2, 1e-3, 1e-4),
}
RATES = {"local": (1e-3, 5e-4), "global": (1e-2, 1e-3)}
SMALL_HEAD = 2048  # weights
HELD_OUT = 0.2  # of the rows, when no validation rows are given


@dataclass(frozen=True)
class SearchOptions:
    """What a search needs beside the rows; the components say what each option is."""

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

    Training starts near the exact global solution on the training rows (`start="exact"`). Where no gate
    beats that solution on the validation rows, the result is the global solution on all rows, in the form
    of a gate that ignores the features. A penalty asks for something else than the pinball loss: then the
    best of what was trained is returned.

    Raises
    ------
    RunError
        When no configuration has a finite validation loss.
    """
    require("torch", "nets")
    rows = _Rows(Z, y, X, s)
    train, held = _parts(rows, validation, options.random_state)
    weights = starting_weights(options, train, levels)
    features = Features.of(rows.X) if options.local and rows.X is not None else None
    score, params, board = _best_of(options, train, held, weights, features, levels, progress)
    p, m = Z.shape[1:]
    if not options.local:
        resolution = "medium" if options.band is not None else options.resolution
        w = softmax(params["logits"].reshape(weights.shape), resolution, p, m)
        return LinearFit(w, m, objective=score)
    assert features is not None
    gate = GateFit(params, options.resolution, p, m, features, options.band, score, board)
    if options.start == "uniform" or options.penalty is not None or options.loss_isotonize is not None:
        return gate
    without = dataclasses.replace(gate, params=_constant(weights, features))
    q = np.sort(without.predict(held.Z, held.X), axis=1)
    reached = pinball(held.y, q, levels, sample_weight=held.s)
    if reached > score:
        return gate
    whole = _constant(starting_weights(options, rows, levels), features)
    return dataclasses.replace(gate, params=whole, score=reached)


@dataclass(frozen=True)
class _Rows:
    """Rows in their own units: Z (n, p, m), y, s (n,), X (n, d) or None."""

    Z: np.ndarray
    y: np.ndarray
    X: np.ndarray | None
    s: np.ndarray

    def some(self, rows: np.ndarray) -> _Rows:
        """Return the rows that an index or mask selects."""
        return _Rows(self.Z[rows], self.y[rows], None if self.X is None else self.X[rows], self.s[rows])


def _parts(rows: _Rows, validation, seed: int) -> tuple[_Rows, _Rows]:
    """Return training and validation rows; without the latter a fifth is held out."""
    if validation is not None:
        Z, y, X = validation
        return rows, _Rows(Z, y, X, np.ones(len(y)))
    n = len(rows.y)
    if n < 2:
        return rows, rows
    order = np.random.default_rng([seed, 11]).permutation(n)
    held = max(1, int(HELD_OUT * n))
    return rows.some(np.sort(order[held:])), rows.some(np.sort(order[:held]))


def _best_of(
    options: SearchOptions, train: _Rows, held: _Rows, weights: np.ndarray, features: Features | None,
    levels: np.ndarray, progress: Any,
) -> tuple[float, dict[str, np.ndarray], tuple[dict[str, Any], ...]]:
    """Return the best validation score, its parameters, and all configurations, best first."""
    unit = _spread(train)
    found = [one for one in _tried(options, train, held, weights, features, levels, progress)
             if np.isfinite(one[0])]
    if not found:
        raise RunError(f"no configuration of {'local' if options.local else 'global'}_"
                       f"{options.resolution} has a finite validation loss: look for outliers, y goes from "
                       f"{train.y.min():g} to {train.y.max():g}")
    found.sort(key=lambda one: one[0])
    board = tuple({**vars(config), "validation_pinball": score * unit, "step": step}
                  for score, step, config, _ in found)
    return found[0][0] * unit, {k: v.double().numpy() for k, v in found[0][3].items()}, board


def _tried(
    options: SearchOptions, train: _Rows, held: _Rows, weights: np.ndarray, features: Features | None,
    levels: np.ndarray, progress: Any,
) -> list[tuple[float, int, Any, dict[str, Any]]]:
    """Return (score, step, configuration, parameters) of all configurations, in units of the spread."""
    import torch

    from poise_quantagg.aggregators.gates import GateTask, start_logits
    from poise_quantagg.penalties import adaptive_margins

    # a small output layer of a fine gate lies in the cache: there doubled precision costs little
    dtype = torch.float64 if _axis(options) == 1 and weights.size <= SMALL_HEAD else torch.float32
    double = dtype == torch.float64
    rows = _scaled(train, train, options.band, features, double)
    validation = _scaled(held, train, options.band, features, double)
    profile = None
    if options.penalty == "adaptive":
        profile = adaptive_margins(train.Z, train.y, levels) / _spread(train)
    start = start_logits(weights, _axis(options)) if options.start == "exact" else np.zeros(weights.shape)
    configs = draw(options)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, config in enumerate(configs):
        groups.setdefault((config.width, config.depth), []).append(i)
    found = []
    for members in groups.values():
        members.sort(key=lambda i: configs[i].lr)  # equal ones side by side: fewer pieces to optimize
        chosen = [configs[i] for i in members]
        task = GateTask("medium" if options.band is not None else options.resolution, rows, validation,
                        levels, chosen, start, dtype, penalty=options.penalty, profile=profile,
                        isotonize=options.loss_isotonize, rank=options.rank)
        trained = _train(options, task, chosen, members, len(train.y), dtype, progress)
        found += [(float(trained.score[c]), int(trained.step[c]), config, trained.params[c])
                  for c, config in enumerate(chosen)]
    return found


def _scaled(part: _Rows, train: _Rows, band: int | None, features: Features | None, double: bool) -> Any:
    """Return rows for the gates, on the scale of the training rows."""
    from poise_quantagg.aggregators.gates import Rows

    numbers = np.float64 if double else np.float32
    center, unit = float(np.average(train.y, weights=train.s)), _spread(train)
    wide = window(part.Z, band)
    Z = np.subtract(wide, center, out=np.empty(wide.shape, numbers), casting="same_kind")
    Z /= numbers(unit)
    return Rows(Z, (part.y - center) / unit, features(part.X) if features and part.X is not None else None,
                None if np.all(part.s == part.s[0]) else part.s)


def _spread(rows: _Rows) -> float:
    """Return the standard deviation of the target; 1 where there is none."""
    unit = float(np.sqrt(np.cov(rows.y, aweights=rows.s))) if len(rows.y) > 1 else 0.0
    return unit if unit > 0 else 1.0


def _constant(weights: np.ndarray, features: Any) -> dict[str, np.ndarray]:
    """Return the parameters of a gate without hidden layers whose weights ignore the features."""
    logits = np.log(np.maximum(weights, np.finfo(float).tiny))
    return {"W0": np.zeros((len(features.mean), logits.size)), "b0": logits.ravel()}


def _train(options: SearchOptions, task, configs, numbers, n: int, dtype, progress):
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
        return train_fine(task, members, schedule, dtype, progress=progress)
    return train(task, members, schedule, dtype=dtype, progress=progress)


def starting_weights(options: SearchOptions, rows: _Rows, levels: np.ndarray) -> np.ndarray:
    """Return the exact global weights in the layout of the logits, or equal ones (the paper).

    Layouts: coarse (p,), medium (p, m), banded (p (2 band + 1), m), fine (m, pm). Fine ones start at the
    medium solution.
    """
    p, m = rows.Z.shape[1:]
    if options.start == "uniform":
        width = 1 if options.band is None else 2 * options.band + 1
        shape = {"coarse": (p,), "medium": (p, m), "fine": (m, p * m)}[options.resolution]
        w = np.ones(shape if options.band is None else (p * width, m))
        return w / w.sum(axis=_axis(options), keepdims=True)
    resolution = "coarse" if options.resolution == "coarse" else "medium"
    known = exact(resolution, rows.Z, rows.y, levels, rows.s).w
    if options.band is not None:
        w = np.zeros((p, 2 * options.band + 1, m))
        w[:, options.band] = known
        return w.reshape(-1, m)
    if options.resolution != "fine":
        return known
    w = np.zeros((m, p, m))
    w[np.arange(m), :, np.arange(m)] = known.T
    return w.reshape(m, p * m)


def _axis(options: SearchOptions) -> int:
    """Return the axis of the logits over which the softmax goes."""
    return 1 if options.resolution == "fine" and options.band is None else 0


def window(Z: np.ndarray, band: int | None) -> np.ndarray:
    """Return (n, p (2 band + 1), m): at level k, the predictions at levels k - band to k + band; Z as it
    is without a band."""
    if band is None:
        return Z
    m = Z.shape[2]
    near = np.clip(np.arange(m)[None] + np.arange(-band, band + 1)[:, None], 0, m - 1)
    return Z[:, :, near].reshape(len(Z), -1, m)
