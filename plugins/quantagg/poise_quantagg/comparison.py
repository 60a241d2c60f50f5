"""Paired comparisons of scores over repeated splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from poise.errors import ConfigError, DataError
from poise_quantagg.checks import finite

Array = np.ndarray | Sequence


class Relative(NamedTuple):
    """A ratio of scores (below 1: better than the reference) and its confidence interval."""

    ratio: float
    lower: float
    upper: float


def relative_bootstrap(
    scores: Array | Mapping[str, Array],
    reference: Array | Mapping[str, Array],
    *,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Relative:
    """Return how `scores` compare with `reference` over repeated splits, with a percentile interval.

    On each data set the ratio is mean(scores) / mean(reference) over splits; over sets it is the
    geometric mean. A bootstrap sample draws splits with replacement within each set, keeping the two
    scores of a split together. It covers the choice of splits, not that of data sets; with few
    splits the interval is too narrow, and with one it is a point.

    Parameters
    ----------
    scores, reference : array, shape (n_splits,), or dict of name -> such an array
        Positive, smaller is better; the same splits in the same order.
    n_boot : int
    level : float
        Of the interval, in (0, 1).
    seed : int

    Raises
    ------
    ConfigError
        For n_boot < 1 or a level out of range.
    DataError
        For different sets or lengths, or scores that are not positive and finite.
    """
    if n_boot < 1 or not 0 < level < 1:
        raise ConfigError(f"n_boot={n_boot!r}, level={level!r}: allowed are n_boot >= 1, 0 < level < 1")
    rng = np.random.default_rng(seed)
    logs, draws = [], []
    for own, base in _paired(scores, reference):
        pick = rng.integers(len(own), size=(n_boot, len(own)))
        logs.append(np.log(own.mean() / base.mean()))
        draws.append(np.log(own[pick].mean(axis=1) / base[pick].mean(axis=1)))
    lower, upper = np.quantile(np.mean(draws, axis=0), [(1 - level) / 2, (1 + level) / 2])
    return Relative(*(float(np.exp(v)) for v in (np.mean(logs), lower, upper)))


def _paired(scores, reference) -> list[tuple[np.ndarray, np.ndarray]]:
    if isinstance(scores, Mapping) != isinstance(reference, Mapping):
        raise DataError("scores and reference: both must be arrays, or both dicts of arrays")
    own = scores if isinstance(scores, Mapping) else {"the set": scores}
    base = reference if isinstance(reference, Mapping) else {"the set": reference}
    if not own or set(own) != set(base):
        raise DataError(f"sets {sorted(own)} against {sorted(base)}: they must be the same, at least one")
    return [_pair(name, own[name], base[name]) for name in own]


def _pair(name: str, own: Array, base: Array) -> tuple[np.ndarray, np.ndarray]:
    a, b = finite(f"scores of {name}", own, 1), finite(f"reference of {name}", base, 1)
    if len(a) != len(b):
        raise DataError(f"{name}: {len(a)} splits have scores and {len(b)} a reference: pair them")
    if min(a.min(), b.min()) <= 0:
        raise DataError(f"{name} holds the score {min(a.min(), b.min()):g}: allowed are scores > 0")
    return a, b
