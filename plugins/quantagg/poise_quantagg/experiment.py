"""The recipe `quantile`: cross-fit, aggregate, score on the test rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from poise.errors import ConfigError, DataError, nearest
from poise.interfaces import Arrays, Parts, Splits
from poise.registry import build
from poise_quantagg.checks import finite, level_index
from poise_quantagg.crossfit import CrossFit, cross_fit
from poise_quantagg.monotone import sort
from poise_quantagg.scores import crossing_rate, interval_coverage, wis

if TYPE_CHECKING:
    from poise_quantagg.components import QuantileEnsemble

NOMINAL = 0.8


def run(recipe: QuantileEnsemble, parts: Parts, context: Any) -> dict[str, float]:
    """Run the whole experiment.

    Features and target are standardised with the statistics of the training and validation rows
    (section 1.8), which together are cross-fitted: nothing here needs a validation set of its
    own. All scores are on the test rows, on the standardised target, after sorting; the crossing
    rate is that before sorting.

    Parameters
    ----------
    recipe : QuantileEnsemble
    parts : Parts
        `data` is needed; `model` and `aggregator` are optional.
    context : Context

    Returns
    -------
    dict of float
        `wis_mean/NAME` (the convention (2 / m) sum of pinball, in standard deviations of y),
        `coverage_80/NAME` and `crossing_raw/NAME` (shares), for every model and aggregator.

    Raises
    ------
    ConfigError
        Before data is loaded: for parts, names, options or levels that cannot be used.
    DataError
        For data that is not a table of finite numbers.
    """
    models, aggregators = _models(recipe, parts, context), _aggregators(recipe, parts)
    level_index(np.asarray(recipe.levels), [(1 - NOMINAL) / 2, 0.5, (1 + NOMINAL) / 2])
    if parts.data is None:
        raise ConfigError("recipe=quantile needs data: choose data=tabular")
    splits = parts.data.load(context.seed)
    context.note("provenance", splits.provenance)
    train, test, scale = _standardised(splits)
    with context.progress(len(models) * (recipe.folds + 1), "cross-fitting") as bar:
        fits = cross_fit(
            models, train.x, train.y, recipe.levels, folds=recipe.folds,
            seed=context.seed_for("folds"), n_jobs=recipe.n_jobs,
            progress=lambda what: bar.advance(note=what),
        )
    raw, weights = _predictions(fits, aggregators, train, test)
    rows = [_row(name, kind, q, test.y, fits.levels) for name, (kind, q) in raw.items()]
    context.note("scores", rows)
    context.note("weights", weights)
    context.note("units", "WIS in standard deviations of the target; coverage, crossing: shares")
    if recipe.figures:
        target = splits.spec.get("target", "target")
        context.note("figures", _draw(raw, test.y, fits.levels, scale=scale, target=target,
                                      folder=Path(context.directory)))
    metrics = {f"{key}/{row['name']}": row[key] for row in rows
               for key in ("wis_mean", "coverage_80", "crossing_raw")}
    context.log(0, metrics)
    return metrics


def _models(recipe: QuantileEnsemble, parts: Parts, context: Any) -> dict[str, Any]:
    """Build the base models; each gets its own seed unless the options name one."""
    for part in ("quantizer", "adapter"):
        if getattr(parts, part) is not None:
            raise ConfigError(f"recipe=quantile takes no {part}: leave it at none")
    for name in recipe.base_options:
        if name not in recipe.base:
            raise ConfigError(f"base_options.{name}{nearest(name, recipe.base)} is not in base")
    models = {name: build("model", name, **recipe.base_options.get(name, {}))
              for name in recipe.base}
    if parts.model is not None:
        models[parts.names.get("model", "model")] = parts.model
    if not models:
        raise ConfigError("base=[]: name at least one model")
    return {
        name: _seeded(model, recipe.base_options.get(name, {}), context.seed_for(f"model/{name}"))
        for name, model in models.items()
    }


def _seeded(model: Any, options: dict[str, Any], seed: int) -> Any:
    has = any(f.name == "random_state" for f in dataclasses.fields(model))
    if has and "random_state" not in options:
        return dataclasses.replace(model, random_state=seed % 2**32)  # scikit-learn's range
    return model


def _aggregators(recipe: QuantileEnsemble, parts: Parts) -> dict[str, Any]:
    aggregators = {name: build("aggregator", name) for name in recipe.aggregators}
    if parts.aggregator is not None:
        aggregators[parts.names.get("aggregator", "aggregator")] = parts.aggregator
    return aggregators


def _standardised(splits: Splits) -> tuple[Arrays, Arrays, tuple[float, float]]:
    """Return train and validation rows together, the test rows on their scale, (mean, std) of y."""
    x, y = (
        finite(f"train and validation {part}", np.concatenate(
            [getattr(splits.train, part), getattr(splits.validation, part)]), axes)
        for part, axes in (("x", 2), ("y", 1))
    )
    if y.std() == 0:
        raise DataError("the target is constant on the training rows: nothing to predict")
    width = np.where(x.std(axis=0) > 0, x.std(axis=0), 1.0)  # a constant column stays zero
    test = Arrays(finite("test x", splits.test.x, 2), finite("test y", splits.test.y, 1))
    train, test = (
        Arrays((a.x - x.mean(axis=0)) / width, (a.y - y.mean()) / y.std())
        for a in (Arrays(x, y), test)
    )
    return train, test, (float(y.mean()), float(y.std()))


def _predictions(
    fits: CrossFit, aggregators: dict[str, Any], train: Arrays, test: Arrays
) -> tuple[dict[str, tuple[str, np.ndarray]], dict[str, Any]]:
    """Return raw test quantiles (n, m) by name with their kind, and the weights over models."""
    Z = fits.predict(test.x)
    raw = {name: ("model", Z[:, j]) for j, name in enumerate(fits.models)}
    weights = {}
    for name, aggregator in aggregators.items():
        fitted = aggregator.fit(fits.Z, train.y, train.x, levels=fits.levels)
        raw[name] = ("aggregator", fitted.predict(Z, test.x))
        w = np.asarray(fitted.weights(test.x))
        if w.shape == (len(fits.models),):
            weights[name] = dict(zip(fits.models, w.tolist()))
    return raw, weights


def _row(name: str, kind: str, raw: np.ndarray, y: np.ndarray, levels: np.ndarray) -> dict:
    q = sort(raw)
    return {
        "name": name,
        "kind": kind,
        "wis_mean": float(wis(y, q, levels, convention="mean").mean()),
        "coverage_80": interval_coverage(y, q, levels, NOMINAL),
        "crossing_raw": crossing_rate(raw),
    }


def _draw(raw, y, levels, *, scale: tuple[float, float], target: str, folder: Path) -> list[str]:
    """Draw the figures; the fan is that of the last aggregator, in the target's own unit."""
    from poise_quantagg import plots

    mean, std = scale
    titles = {"model": "base models", "aggregator": "aggregators"}
    panels: dict[str, dict[str, np.ndarray]] = {}
    for name, (kind, q) in raw.items():
        panels.setdefault(titles[kind], {})[name] = sort(q)
    last, (_, q) = list(raw.items())[-1]
    files = ["figures/reliability.png", "figures/fan.png"]
    plots.reliability(folder / files[0], y, panels, levels,
                      title=f"Calibration on {len(y)} test rows, after sorting")
    plots.fan(folder / files[1], mean + std * y, mean + std * q, levels,
              title=f"Predictions of {last}", unit=target)
    return files
