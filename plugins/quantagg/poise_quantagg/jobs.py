"""One model on some folds at some levels: what joblib runs, on one thread each."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from poise.errors import ConfigError, DataError, require
from poise_quantagg.checks import differing, finite

LEVELS_OF_A_JOB = 25


@dataclass(frozen=True)
class Work:
    """What all jobs share; `train` may have one part more than `held` (all rows)."""

    X: np.ndarray
    y: np.ndarray
    weight: np.ndarray | None
    levels: np.ndarray
    train: list[np.ndarray]
    held: list[np.ndarray]
    extra: np.ndarray | None


@dataclass(frozen=True)
class Job:
    """One model on some folds at some levels."""

    name: str
    model: Any
    folds: tuple[int, ...]
    levels: np.ndarray


@dataclass(frozen=True)
class Result:
    """Predictions by fold: held-out rows (None for the fit on all rows), extra rows, and the model."""

    held: list[np.ndarray | None]
    extra: list[np.ndarray | None]
    fitted: list[Any]
    error: str = ""


def jobs_of(name: str, model: Any, work: Work) -> list[Job]:
    """Split a model into jobs: all folds at once where it trains so, else fold by fold."""
    model = _with(model, levels=work.levels.tolist())
    everything = tuple(range(len(work.train)))
    if getattr(model, "fits_many", False):
        return [Job(name, model, everything, work.levels)]
    if getattr(model, "per_level", False):
        from poise_quantagg.grid import coarse_grid

        trained = coarse_grid(work.levels, getattr(model, "grid", None))
        blocks = np.array_split(trained, -(-len(trained) // LEVELS_OF_A_JOB))
        return [Job(name, _with(model, levels=block.tolist(), grid=None), (k,), block)
                for k in everything for block in blocks]
    return [Job(name, model, (k,), work.levels) for k in everything]


def _with(model: Any, **options: Any) -> Any:
    """Return a component with some options changed, those it has."""
    if not dataclasses.is_dataclass(model) or isinstance(model, type):
        return model
    have = {f.name for f in dataclasses.fields(model)}
    return dataclasses.replace(model, **{k: v for k, v in options.items() if k in have})


def label(job: Job, work: Work) -> str:
    """Return what progress and failures call a job: "linear, fold 2/5"."""
    K = len(work.held)
    first, *others = job.folds
    if others:
        return f"{job.name}, {len(job.folds)} folds"
    where = "all rows" if first >= K else f"fold {first + 1}/{K}"
    some = "" if len(job.levels) == len(work.levels) else f", levels {job.levels[0]:g}..{job.levels[-1]:g}"
    return f"{job.name}, {where}{some}"


def fit(job: Job, X, y, weight, train, held, extra) -> Result:
    """Fit one job on one thread and predict its held-out and extra rows."""
    # torch first: under the limit it would say that it has one thread, and be given back that one
    with _one_torch_thread(), require("threadpoolctl", "quantagg").threadpool_limits(1):
        try:
            parts = [train[k] for k in job.folds]
            if getattr(job.model, "fits_many", False):
                fitted = job.model.build().fit_many(X, y, weight, parts)
            else:
                own = None if weight is None else differing(weight[parts[0]])
                options = {} if own is None else {"sample_weight": own}
                fitted = [job.model.build().fit(X[parts[0]], y[parts[0]], **options)]
            return Result(
                [quantiles_of(job.name, f, X[held[k]], job.levels) if k < len(held) else None
                 for k, f in zip(job.folds, fitted)],
                [None if extra is None else quantiles_of(job.name, f, extra, job.levels) for f in fitted],
                list(fitted),
            )
        except Exception as error:  # any library may stand behind a model; which one is reported
            if isinstance(error, ConfigError):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return Result([], [], [], reason)


class _one_torch_thread:  # noqa: N801 - reads as a statement
    """Run a block on one torch thread, when torch is there at all."""

    def __enter__(self) -> None:
        self.torch = sys.modules.get("torch")
        self.before = self.torch.get_num_threads() if self.torch else 1
        if self.torch:
            self.torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self.torch:
            self.torch.set_num_threads(self.before)


def quantiles_of(name: str, fitted: Any, X: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return a fitted model's predictions, shape (n, m), checked: any library may stand behind it.

    Raises
    ------
    DataError
        For another shape, or values that are not finite, by the model's name.
    """
    q = finite(f"prediction of {name}", fitted.predict_quantiles(X, levels), 2)
    if q.shape != (len(X), len(levels)):
        raise DataError(f"{name} predicts shape {q.shape}, not {(len(X), len(levels))}")
    return q
