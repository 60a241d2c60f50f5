"""The recipe `quantile`: the paper's comparison on one data set, over several random splits."""

from __future__ import annotations

import dataclasses
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from poise.errors import ConfigError, nearest
from poise.interfaces import Parts, Splits
from poise.registry import build, entries
from poise_quantagg import scores
from poise_quantagg.cache import keep, kept
from poise_quantagg.checks import QuantileWarning, level_index
from poise_quantagg.conformal import CVPlus
from poise_quantagg.crossfit import cross_fit
from poise_quantagg.monotone import OPERATORS, isotonize, sort
from poise_quantagg.splits import Outcome, Predicted, Split, standardised

NOMINAL = 0.8
METRICS = ("wis_paper", "wis_hub", "coverage_80", "length_80", "crossing_raw")
CROSSFIT, SPLITS = "crossfit", "splits"  # folders of an unfinished run: fitted models, finished splits


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the recipe needs beside its parts; the component `QuantileEnsemble` says what each option is."""

    base: list[str]
    base_options: dict[str, Any]
    aggregators: list[str]
    aggregator_options: dict[str, Any]
    levels: list[float]
    splits: int
    folds: int
    refit: str
    n_jobs: int
    figures: bool


def check(parts: Parts, settings: Settings) -> None:
    """Refuse what cannot be run, before data is loaded.

    Raises
    ------
    ConfigError
        For unknown names, options or levels that cannot be used, and parts that play no role.
    """
    if parts.quantizer is not None:
        raise ConfigError("recipe=quantile takes no quantizer: leave it at none")
    if parts.data is None:
        raise ConfigError("recipe=quantile needs data: choose data=tabular")
    models = _models(settings, parts, 0)
    if parts.adapter is not None and not any(_takes_adapter(m) for m in models.values()):
        raise ConfigError(f"adapter={parts.names.get('adapter')}: no base model is a network; add "
                          f"multi_quantile_net to recipe.base, or leave adapter at none")
    _aggregators(settings, parts, 0)
    level_index(np.asarray(settings.levels), [(1 - NOMINAL) / 2, 0.5, (1 + NOMINAL) / 2])


def run(parts: Parts, context: Any, settings: Settings) -> dict[str, float]:
    """Run all splits and return scores averaged over them.

    Features and target are standardised with the statistics of the training and validation rows
    (section 1.8), which together are cross-fitted; trained aggregators hold out a fifth of the
    out-of-fold rows. All scores are on the test rows, on the standardised target, after sorting; the
    crossing rate is that before sorting.

    Parameters
    ----------
    parts : Parts
        `data` is needed; `model`, `aggregator` and `adapter` are optional.
    context : Context
    settings : Settings

    Returns
    -------
    dict of float
        `wis_paper/NAME` (2 sum of pinball) and `wis_hub/NAME` ((2/m) sum), in standard deviations of
        the target; `coverage_80/NAME`, `crossing_raw/NAME` (shares), `length_80/NAME`, for every model
        and aggregator.

    Raises
    ------
    ConfigError
        Before data is loaded: see `check`.
    DataError
        For data that is not a table of finite numbers, or a constant target.
    """
    check(parts, settings)
    rows, last = _all_splits(settings, parts, context)
    table = _averaged(rows)
    context.note("scores", table)
    context.note("by_split", {"rows": rows, "data": last["data"], "levels": last["levels"]})
    context.note("units", "WIS (paper: 2 sum, hub: 2/m sum of pinball) and length in standard deviations "
                          "of the target; coverage, crossing: shares; after sorting but for crossing_raw")
    return {f"{key}/{row['name']}": row[key] for row in table for key in METRICS}


def _all_splits(
    settings: Settings, parts: Parts, context: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Carry out the splits that are not kept from before; return all rows, and what the last one said."""
    folder, rows, done = Path(context.directory), [], {}
    jobs = len(_models(settings, parts, 0)) + len(_aggregators(settings, parts, 0))
    with context.progress(settings.splits * jobs, "models and aggregators") as bar:
        for number in range(settings.splits):
            seed = context.seed + number
            file, key = folder / SPLITS / f"{seed}.json", f"split {seed}"
            before = kept(file, key)  # finished before the run was interrupted
            if before is not None:
                done = _numbers(before)
                bar.advance(jobs, note=f"split {seed}: kept from before")
            else:
                done = _split(settings, parts, seed, folder, bar, first=number == 0)
                keep(file, key, done)
            rows += done["rows"]
            for key, value in done["notes"].items():
                context.note(key, value)
            _log(context, number, done["rows"])
    for left in (CROSSFIT, SPLITS):
        shutil.rmtree(folder / left, ignore_errors=True)
    return rows, done


def _split(
    settings: Settings, parts: Parts, seed: int, folder: Path, bar: Any, *, first: bool
) -> dict[str, Any]:
    """Carry out one split; returns plain values: its rows, the data's name, notes (of the first one)."""
    assert parts.data is not None
    splits = parts.data.load(seed)
    split = standardised(splits)
    found, outcomes = _fit(settings, parts, seed, split, folder, bar)
    notes: dict[str, Any] = {}
    if first:
        notes = {"provenance": splits.provenance, "weights": _weights(outcomes, found.models)}
        if settings.figures:
            from poise_quantagg.figures import draw

            target = str(splits.spec.get("target", "target"))
            notes["figures"] = draw(outcomes, split, found, target, folder)
    rows = [{"split": seed, **_row(name, outcome, split.test.y, found.levels)}
            for name, outcome in outcomes.items()]
    return {"rows": rows, "data": _data_name(parts, splits), "levels": len(found.levels), "notes": notes}


def _numbers(done: dict[str, Any]) -> dict[str, Any]:
    """Return what `_split` had returned from what was kept, which holds infinite lengths as text."""
    words = ("split", "name", "kind")
    rows = [{k: v if k in words else float(v) for k, v in row.items()} for row in done["rows"]]
    return {**done, "rows": rows}


def _data_name(parts: Parts, splits: Splits) -> str:
    for key in ("path", "name"):
        if value := getattr(parts.data, key, None):
            return str(value)
    return str(splits.provenance.get("source"))


def _log(context: Any, number: int, rows: list[dict[str, Any]]) -> None:
    context.log(number, {f"{key}/{row['name']}": row[key] for row in rows for key in METRICS})


# ------------------------------------------------------------------ parts


def _models(settings: Settings, parts: Parts, seed: int) -> dict[str, Any]:
    """Build the base models; each gets its own seed unless the options name one."""
    _known("base_options", settings.base_options, "model")
    models = {name: build("model", name, **settings.base_options.get(name, {})) for name in settings.base}
    if parts.model is not None:
        models[parts.names.get("model", "model")] = parts.model
    if not models:
        raise ConfigError("base=[]: name at least one model")
    made = {}
    for name, model in models.items():
        one = _seeded(model, settings.base_options.get(name, {}), seed, f"model/{name}")
        if parts.adapter is not None and _takes_adapter(one):
            one = dataclasses.replace(one, adapter=parts.adapter)
        made[name] = one
    return made


def _known(key: str, options: Mapping[str, Any], kind: str) -> None:
    """Refuse options of what does not exist; those of what is not chosen this time are ignored."""
    names = [e.name for e in entries(kind)]
    for name in options:
        if name not in names:
            raise ConfigError(f"{key}.{name}: no {kind} named {name!r}{nearest(name, names)}")


def _takes_adapter(model: Any) -> bool:
    return any(f.name == "adapter" for f in dataclasses.fields(model))


def _seeded(component: Any, options: Mapping[str, Any], seed: int, purpose: str) -> Any:
    from poise.runs.context import seed_for

    has = any(f.name == "random_state" for f in dataclasses.fields(component))
    if has and "random_state" not in options:
        own = seed_for(seed, purpose) % 2**32  # scikit-learn's range
        return dataclasses.replace(component, random_state=own)
    return component


def _aggregators(settings: Settings, parts: Parts, seed: int) -> dict[str, Any]:
    _known("aggregator_options", settings.aggregator_options, "aggregator")
    made = {}
    for name in settings.aggregators:
        options = settings.aggregator_options.get(name, {})
        made[name] = _seeded(build("aggregator", name, **options), options, seed, f"aggregator/{name}")
    if parts.aggregator is not None:
        made[parts.names.get("aggregator", "aggregator")] = parts.aggregator
    return made


# ------------------------------------------------------------------ one split


def _fit(
    settings: Settings, parts: Parts, seed: int, split: Split, folder: Path, bar: Any
) -> tuple[Predicted, dict[str, Outcome]]:
    """Cross-fit the base models one after the other, then fit every aggregator on them."""
    outcomes: dict[str, Outcome] = {}
    parts_of: list[Predicted] = []
    for name, model in _models(settings, parts, seed).items():
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QuantileWarning)
            one = cross_fit(
                {name: model}, split.train.x, split.train.y, settings.levels, folds=settings.folds,
                seed=seed, n_jobs=settings.n_jobs, refit=settings.refit, extra=split.test.x,
                cache=folder / CROSSFIT,
            )
        seconds = time.process_time() - began
        assert one.extra is not None
        parts_of.append(Predicted([name], one.Z, one.fold, one.extra, one.predict_folds(split.test.x),
                                  one.levels))
        outcomes[name] = Outcome("model", one.extra[:, 0], _interval(parts_of[-1], None, split), seconds)
        bar.advance(note=f"split {seed}: {name}")
    found = Predicted.joined(parts_of)
    for name, aggregator in _aggregators(settings, parts, seed).items():
        began = time.process_time()
        fitted = aggregator.fit(found.oof, split.train.y, split.train.x, levels=found.levels)
        raw = fitted.predict(found.test, split.test.x)
        seconds = time.process_time() - began
        outcomes[name] = Outcome("aggregator", raw, _interval(found, fitted, split), seconds, fitted,
                                 getattr(aggregator, "needs_features", False))
        bar.advance(note=f"split {seed}: {name}")
    return found, outcomes


def _interval(found: Predicted, fitted: Any, split: Split) -> np.ndarray:
    """Return the CV+ interval (n, 2) at the nominal coverage, of one model or of an aggregator."""
    if fitted is None:
        oof, new = found.oof[:, 0], found.folds[:, :, 0]
    else:
        oof = fitted.predict(found.oof, split.train.x)
        new = np.stack([fitted.predict(Z, split.test.x) for Z in found.folds])
    ends = level_index(found.levels, [(1 - NOMINAL) / 2, (1 + NOMINAL) / 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantileWarning)
        plus = CVPlus(sweep=False).fit(split.train.y, sort(oof)[:, ends], found.fold, found.levels[ends])
    return plus.predict_interval(np.sort(new, axis=2)[:, :, ends], 1 - NOMINAL)


def _row(name: str, outcome: Outcome, y: np.ndarray, levels: np.ndarray) -> dict[str, Any]:
    q = sort(outcome.raw)
    row = {
        "name": name,
        "kind": outcome.kind,
        "wis_paper": scores.wis(y, q, levels, "paper"),
        "wis_hub": scores.wis(y, q, levels, "hub"),
        "coverage_80": scores.interval_coverage(y, q, levels, NOMINAL),
        "length_80": scores.interval_length(q, levels, NOMINAL),
        "coverage_80_cv": float(np.mean((outcome.interval[:, 0] <= y) & (y <= outcome.interval[:, 1]))),
        "length_80_cv": float(np.mean(outcome.interval[:, 1] - outcome.interval[:, 0])),
        "crossing_raw": scores.crossing_rate(outcome.raw),
        "cpu_seconds": round(outcome.seconds, 2),
        "wis_none": scores.wis(y, outcome.raw, levels, "paper"),
    }
    for how in OPERATORS:
        row[f"wis_{how}"] = scores.wis(y, isotonize(outcome.raw, how, levels), levels, "paper")
    return row


def _averaged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per method: means over splits."""
    table = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        keys = [k for k in own[0] if k not in ("split", "name", "kind") and k != "wis_none"
                and k not in {f"wis_{how}" for how in OPERATORS}]
        table.append({"name": name, "kind": own[0]["kind"],
                      **{k: float(np.mean([row[k] for row in own])) for k in keys}})
    return table


def _weights(outcomes: Mapping[str, Outcome], models: list[str]) -> dict[str, Any]:
    """Return the weights over models of those aggregators that have one number per model."""
    found = {}
    for name, outcome in outcomes.items():
        if outcome.fitted is None or outcome.local:
            continue
        w = np.asarray(outcome.fitted.weights())
        if w.ndim == 1:
            found[name] = dict(zip(models, w.tolist()))
    return found
