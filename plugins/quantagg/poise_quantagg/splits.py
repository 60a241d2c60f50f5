"""One split of the recipe `quantile`: its rows, and what was predicted for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from poise.errors import DataError
from poise.interfaces import Arrays, Splits
from poise_quantagg.checks import finite


@dataclasses.dataclass(frozen=True)
class Split:
    """One split on the scale of its training rows.

    Parameters
    ----------
    train, test : Arrays
        Training and validation rows together; test rows.
    scale : (mean, standard deviation) of the target
    columns : names of the features
    """

    train: Arrays
    test: Arrays
    scale: tuple[float, float]
    columns: list[str]


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What base models predict, without the models: forests on ten thousand rows take gigabytes.

    Parameters
    ----------
    models : list of str
    oof : array, shape (n, p, m)
        Out-of-fold, for the training rows.
    fold : array, shape (n,)
    test : array, shape (n_test, p, m)
    folds : array, shape (K, n_test, p, m)
        The test rows by each fold's models.
    levels : array, shape (m,)
    """

    models: list[str]
    oof: np.ndarray
    fold: np.ndarray
    test: np.ndarray
    folds: np.ndarray
    levels: np.ndarray

    @staticmethod
    def joined(parts: list[Predicted]) -> Predicted:
        """Put the models of several side by side."""
        axes = {"oof": 1, "test": 1, "folds": 2}
        arrays = {name: np.concatenate([getattr(part, name) for part in parts], axis=axis)
                  for name, axis in axes.items()}
        return dataclasses.replace(parts[0], models=[m for part in parts for m in part.models], **arrays)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One method on one split: test quantiles as they came, the CV+ interval, seconds, the fit, and whether
    its weights depend on the features."""

    kind: str
    raw: np.ndarray
    interval: np.ndarray
    seconds: float
    fitted: Any = None
    local: bool = False


def standardised(splits: Splits) -> Split:
    """Put training and validation rows together, and everything on their scale."""
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
    columns = [str(c) for c in splits.spec.get("columns", [f"x{i}" for i in range(x.shape[1])])]
    return Split(train, test, (float(y.mean()), float(y.std())), columns)
