"""Neural base models (section 1.2): conditional Gaussian, simultaneous and multi-quantile networks.

A random search draws configurations from the paper's space; all configurations x folds of one shape
train as one batch (`training.train`). Each member keeps a part of its own rows, by which it stops and
by which each fold chooses its configuration, so out-of-fold predictions stay out of fold. Training is
in float32, prediction in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from poise.errors import FileError, RunError, require
from poise_quantagg import saved
from poise_quantagg.base.regressor import QuantileRegressor
from poise_quantagg.grid import interpolate

KINDS = ("gaussian", "simultaneous", "multi")
WIDTHS, DEPTHS, DROPOUTS = (64, 128), (2, 3), (0.0, 0.05, 0.1)
HUBERS, RATES, DECAYS = (0.0, 0.01), (1e-3, 3e-4), (1e-5, 1e-7)
HELD_OUT = 0.2  # of a member's rows, for early stopping
SCORED = 1000  # rows of it that are scored
_VARIANCE = 1e-6


@dataclass(frozen=True)
class Config:
    """One point of the search space."""

    width: int
    depth: int
    dropout: float
    lr: float
    weight_decay: float
    huber: float = 0.0


def space(kind: str) -> list[Config]:
    """Return the paper's search space of a kind of network: 12 or 96 points."""
    shapes = itertools.product(WIDTHS, DEPTHS, DROPOUTS)
    if kind == "gaussian":
        return [Config(*shape, lr=1e-3, weight_decay=1e-5) for shape in shapes]
    return [Config(*shape, lr, decay, huber)
            for shape in shapes for huber in HUBERS for lr in RATES for decay in DECAYS]


def draw(kind: str, count: int, seed: int, fixed: Mapping[str, Any]) -> list[Config]:
    """Draw distinct configurations; options in `fixed` that are not None replace what was drawn."""
    import dataclasses

    chosen = {k: v for k, v in fixed.items() if v is not None}
    points = list(dict.fromkeys(dataclasses.replace(c, **chosen) for c in space(kind)))
    order = np.random.default_rng(seed).permutation(len(points))
    return [points[i] for i in order[: max(1, count)]]


class NetRegressor(QuantileRegressor):
    """A tuned network, or the average of those of several folds.

    Parameters
    ----------
    kind : {"gaussian", "simultaneous", "multi"}
    n_iter : int
        Configurations tried.
    width, depth, dropout, lr, weight_decay, huber : optional
        Fixed instead of searched.
    max_steps, patience : int or None
        None: grows with the number of rows (`budget`).
    adapter : Adapter, optional
        Trained one by one through core's loop then; it must not freeze its base.
    """

    def __init__(
        self, *, levels, kind="multi", n_iter=4, width=None, depth=None, dropout=None, lr=None,
        weight_decay=None, huber=None, max_steps=None, patience=None, random_state=0, adapter=None,
    ):
        self.levels = levels
        self.kind = kind
        self.n_iter = n_iter
        self.width = width
        self.depth = depth
        self.dropout = dropout
        self.lr = lr
        self.weight_decay = weight_decay
        self.huber = huber
        self.max_steps = max_steps
        self.patience = patience
        self.random_state = random_state
        self.adapter = adapter

    def _fit(self, X, y, sample_weight) -> None:
        self._take(self._train(X, y, sample_weight, [np.arange(len(y))])[0])

    def fit_many(
        self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None,
        parts: Sequence[np.ndarray], progress: Callable[[str], None] | None = None,
    ) -> list[NetRegressor]:
        """Return one fitted regressor per part (row numbers), all trained together.

        Rows of weight 0 leave their parts: they set no scale and stop no training.
        """
        from poise_quantagg.checks import check_levels, differing

        if sample_weight is not None:
            parts = [rows[sample_weight[rows] > 0] for rows in parts]
            if differing(sample_weight[np.concatenate(parts)]) is None:
                sample_weight = None
        found = []
        for network in self._train(X, y, sample_weight, parts, progress):
            one = type(self)(**self.get_params(deep=False))
            one.levels_, one.n_features_in_ = check_levels(self.levels), X.shape[1]
            one._take(network)
            found.append(one)
        return found

    def _take(self, network: _Network) -> None:
        self.network_ = network
        self.best_params_ = dict(vars(network.config))

    def _train(self, X, y, sample_weight, parts, progress=None) -> list[_Network]:
        from poise_quantagg.checks import check_levels

        require("torch", "nets")
        fixed = {k: getattr(self, k) for k in
                 ("width", "depth", "dropout", "lr", "weight_decay", "huber")}
        configs = draw(self.kind, self.n_iter, self.random_state, fixed)
        search = _Search(self, configs, np.asarray(X, float), np.asarray(y, float), sample_weight,
                         parts, check_levels(self.levels))
        return search.run(progress)

    def _predict(self, X, levels) -> np.ndarray:
        return self.network_.quantiles(X, levels, self.levels_)

    def tensors(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what `from_tensors` needs: arrays, and plain values."""
        network = self.network_
        arrays = dict(network.weights)
        for name in ("x_mean", "x_scale"):
            arrays[name] = getattr(network, name)
        options = {k: v for k, v in self.get_params(deep=False).items() if k != "adapter"}
        options["levels"] = np.asarray(self.levels_).tolist()
        return arrays, {"options": options, "config": vars(network.config), "y_mean": network.y_mean,
                        "y_scale": network.y_scale, "n_features": self.n_features_in_}

    @classmethod
    def from_tensors(cls, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> NetRegressor:
        """Rebuild what `tensors` returned.

        Raises
        ------
        FileError
            For arrays that make no network.
        """
        model = cls(**meta["options"])
        if model.kind not in KINDS:
            raise FileError(f"kind is {model.kind!r}: allowed is one of {', '.join(KINDS)}")
        model.levels_ = np.asarray(meta["options"]["levels"])
        model.n_features_in_ = d = saved.number(meta, "n_features", 1)
        mean, scale = (saved.array(arrays, name, (d,)) for name in ("x_mean", "x_scale"))
        weights = {k: saved.array(arrays, k, (None,) * arrays[k].ndim) for k in arrays
                   if k not in ("x_mean", "x_scale")}
        model._take(_Network(model.kind, Config(**meta["config"]), weights, mean, scale,
                             float(meta["y_mean"]), float(meta["y_scale"])))
        return model


@dataclass(frozen=True)
class _Network:
    """A trained network in NumPy: weights W0, b0, ... in float64, and the units of its data."""

    kind: str
    config: Config
    weights: dict[str, np.ndarray]
    x_mean: np.ndarray
    x_scale: np.ndarray
    y_mean: float
    y_scale: float

    def quantiles(self, X: np.ndarray, levels: np.ndarray, trained: np.ndarray) -> np.ndarray:
        """Return quantiles (n, m) in the unit of y."""
        x = (X - self.x_mean) / self.x_scale
        if self.kind == "gaussian":
            from statistics import NormalDist

            mean, raw = self._forward(x).T
            sigma = np.sqrt(np.logaddexp(0, raw) + _VARIANCE)
            z = np.array([NormalDist().inv_cdf(t) for t in levels])
            q = mean[:, None] + sigma[:, None] * z
        elif self.kind == "multi":
            q = interpolate(self._forward(x), trained, levels)
        else:
            q = np.column_stack([
                self._forward(np.column_stack([x, np.full(len(x), t - 0.5)]))[:, 0] for t in levels
            ])
        return self.y_mean + self.y_scale * q

    def _forward(self, x: np.ndarray) -> np.ndarray:
        depth = len(self.weights) // 2
        for k in range(depth):
            x = x @ self.weights[f"W{k}"] + self.weights[f"b{k}"]
            if k < depth - 1:
                x = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
        return x


def budget(n: int) -> tuple[int, int, int]:
    """Return (max_steps, patience, eval_every) for n rows; the paper's 500 and 100 from 500 rows on."""
    if n <= 120:
        return 150, 60, 30
    if n < 500:
        return 3_000, 300, 50
    return 20_000, 500, 100


class _Search:
    """All configurations x parts, grouped by shape, trained and scored."""

    def __init__(self, model: NetRegressor, configs, X, y, sample_weight, parts, levels) -> None:
        self.model, self.configs, self.X, self.y, self.levels = model, configs, X, y, levels
        self.sample_weight, self.parts = sample_weight, parts
        self.units = [_units(X[rows], y[rows]) for rows in parts]

    def run(self, progress=None) -> list[_Network]:
        """Return the network of the best configuration of each part.

        Raises
        ------
        RunError
            When no configuration has a finite validation score.
        """
        scores = np.full((len(self.configs), len(self.parts)), np.inf)
        params: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        groups: dict[tuple[int, int], list[int]] = {}
        for i, config in enumerate(self.configs):
            groups.setdefault((config.width, config.depth), []).append(i)
        train = self._one_by_one if self.model.adapter is not None else self._together
        for shape, members in groups.items():
            for (i, k), (score, weights) in train(members).items():
                scores[i, k], params[i, k] = score, weights
            if progress:
                progress(f"{len(members)} configurations of {shape[1]} x {shape[0]} units")
        if not np.isfinite(scores.min(axis=0)).all():
            raise RunError(f"no network of kind {self.model.kind!r} has a finite validation loss: "
                           f"check the scale of X and y")
        # each part by its own held-out rows: a choice over all parts would let a fold's targets in
        best = np.argmin(np.where(np.isfinite(scores), scores, np.inf), axis=0)
        return [
            _Network(self.model.kind, self.configs[i], params[int(i), k], *self.units[k])
            for k, i in enumerate(best)
        ]

    def _together(self, configs: list[int]):
        """Train configurations of one shape x all parts as one batch."""
        from poise_quantagg.training import train

        # equal options side by side: the optimizer then has fewer pieces
        order = sorted(configs, key=lambda i: (self.configs[i].lr, self.configs[i].weight_decay))
        pairs = [(i, k) for i in order for k in range(len(self.parts))]
        task, members, schedule = self.problem(pairs)
        trained = train(task, members, schedule)
        return {
            pair: (float(trained.score[c]),
                   {n: t.double().numpy() for n, t in trained.params[c].items()})
            for c, pair in enumerate(pairs)
        }

    def problem(self, pairs: list[tuple[int, int]], dtype=None):
        """Return (task, members, schedule) of pairs (configuration, part) of one shape."""
        import torch

        from poise_quantagg.base.net_task import NetTask
        from poise_quantagg.training import Members, Schedule, batch_size

        dtype = dtype or torch.float32
        first = self.configs[pairs[0][0]]
        split = [self._split(k) for k in range(len(self.parts))]
        n = max(len(rows) for rows in self.parts)
        most, patience, every = budget(n)
        schedule = Schedule(self.model.max_steps or most, every, self.model.patience or patience)
        members = Members(
            seeds=[self._seed(i, k) for i, k in pairs], rows=[split[k][0] for _, k in pairs],
            batch_size=batch_size(n), lr=[self.configs[i].lr for i, _ in pairs],
            weight_decay=[self.configs[i].weight_decay for i, _ in pairs],
            dropout=[self.configs[i].dropout for i, _ in pairs],
            width=first.width, masks=first.depth - 1, uniforms=self.model.kind == "simultaneous",
        )
        data = [self._standardised(k) for k in range(len(self.parts))]
        task = NetTask(
            self.model.kind, [data[k] for _, k in pairs], [split[k][1] for _, k in pairs],
            self.levels, [self.configs[i].huber for i, _ in pairs], (first.width, first.depth), dtype,
            parts=[k for _, k in pairs], sample_weight=self.sample_weight,
        )
        return task, members, schedule

    def _one_by_one(self, configs: list[int]):
        from poise_quantagg.base.adapted import train_adapted

        return {
            (i, k): train_adapted(self.model.adapter, *self.problem([(i, k)]))
            for i in configs for k in range(len(self.parts))
        }

    def _seed(self, config: int, part: int) -> int:
        return int(np.random.SeedSequence([self.model.random_state, config, part]).generate_state(1)[0])

    def _split(self, part: int):
        """Return (training rows, validation rows) of a part, as tensors of global row numbers."""
        import torch

        rows = self.parts[part]
        order = np.random.default_rng([self.model.random_state, 7]).permutation(len(rows))
        held = min(SCORED, max(1, int(HELD_OUT * len(rows)))) if len(rows) > 1 else 0
        train, out = rows[order[held:]], rows[order[:held]]
        return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(out if held else train))

    def _standardised(self, part: int):
        x_mean, x_scale, y_mean, y_scale = self.units[part]
        return (self.X - x_mean) / x_scale, (self.y - y_mean) / y_scale


def _units(X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return means and scales of features and target; a constant one has scale 1."""
    x_scale, y_scale = X.std(axis=0), float(y.std())
    return X.mean(axis=0), np.where(x_scale > 0, x_scale, 1.0), float(y.mean()), y_scale or 1.0
