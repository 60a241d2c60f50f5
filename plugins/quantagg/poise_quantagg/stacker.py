"""`QuantileStacker`: aggregate quantile predictions that come from anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poise.errors import ConfigError, DataError, FileError, MissingExtra, PoiseError, nearest, require
from poise.options import make, option_fields
from poise.registry import entries
from poise_quantagg import saved
from poise_quantagg.checks import (
    QuantileWarning,
    check_levels,
    finite_where_numbers,
    is_number,
    row_blocks,
    same_rows,
)
from poise_quantagg.monotone import OPERATORS, isotonize

SOLVERS = ("auto", "exact", "gradient")
FILE_KIND = "quantile_stacker"
CROSSING = "base predictions cross"
ROUNDING = 1e-9  # of a row's largest prediction; two quantiles that are apart by less count as equal


class QuantileStacker(require("sklearn.base", "quantagg").BaseEstimator):
    """Weigh precomputed quantile predictions of several models (arXiv 2103.00083, section 1.4).

    Parameters
    ----------
    aggregator : str
        Any that is registered, as `poise list aggregator` shows them: average, median, best, greedy, qra,
        fqra, global_coarse, global_medium, global_fine, local_coarse, local_medium, local_fine (the
        paper's DQA), and those of other plugins.
    levels : sequence of float, shape (m,), optional
        Increasing, in (0, 1); without them k / (m + 1), which is the paper's grid for m = 99.
    solver : {"auto", "exact", "gradient"}
        For global weights. auto: as the aggregator chooses, exact where there is no penalty.
    isotonize : None, "sort", "pava" or "minmax"
        Applied to predictions, row by row. Sorting and PAVA never raise the weighted interval score
        (Prop 2); the min-max sweep may.
    penalty : None, "constant", "adaptive" or "distance"
        Crossing penalty in training (eqs 19 and 21); global and local weights.
    n_iter : int
        Configurations that a search tries.
    options : mapping, optional
        Further options of the aggregator, as `poise describe aggregator NAME` lists them.
    random_state : int

    `solver`, `penalty`, `n_iter` and `random_state` go to aggregators that have options of these names.

    Attributes
    ----------
    fitted_ : the fitted aggregator
    aggregator_ : str
        What it was fitted by.
    levels_ : array, shape (m,)
    n_models_ : int
    feature_names_ : list of str, or None
        The columns of X, where it was a frame and the weights depend on it.
    """

    def __init__(
        self,
        aggregator: str = "global_coarse",
        levels: Sequence[float] | None = None,
        solver: str = "auto",
        isotonize: str | None = None,
        penalty: str | None = None,
        n_iter: int = 20,
        options: Mapping[str, Any] | None = None,
        random_state: int = 0,
    ) -> None:
        self.aggregator = aggregator
        self.levels = levels
        self.solver = solver
        self.isotonize = isotonize
        self.penalty = penalty
        self.n_iter = n_iter
        self.options = options
        self.random_state = random_state

    def fit(
        self, Z: np.ndarray, y: np.ndarray, X: np.ndarray | None = None, *,
        validation: tuple[Any, ...] | None = None, sample_weight: np.ndarray | None = None,
    ) -> QuantileStacker:
        """Learn the weights.

        Parameters
        ----------
        Z : array, shape (n, p, m)
            Out-of-fold predictions of p models at m levels, in the unit of y.
        y : array, shape (n,)
        X : array or frame, shape (n, d), optional
            Features, for local weights.
        validation : (Z, y) or (Z, y, X), optional
            Rows that choose among configurations; without them a fifth of the rows is held out where a
            choice is to be made.
        sample_weight : array, shape (n,), optional

        Raises
        ------
        ConfigError
            For an unknown aggregator, options it does not take or that exclude each other, ill-formed
            levels.
        DataError
            For wrong shapes, and values that are not finite, naming the rows.

        Warns
        -----
        QuantileWarning
            Once, when models cross in Z.
        """
        component = self.component()
        if self.levels is not None:
            check_levels(self.levels)
        fitted = component.fit(Z, y, X, levels=self.levels, validation=validation,
                               sample_weight=sample_weight)
        Z = np.asarray(Z)
        warn_crossing(Z, mended=self.isotonize is not None)
        self.fitted_, self.aggregator_, self.n_models_ = fitted, self.aggregator, Z.shape[1]
        self.feature_names_ = _names(X) if getattr(component, "needs_features", False) else None
        self.levels_ = check_levels(self.levels, Z.shape[2])
        return self

    def predict(self, Z: np.ndarray, X: np.ndarray | None = None) -> np.ndarray:
        """Combine predictions (n, p, m) into (n, m), made monotone as `isotonize` says.

        Raises
        ------
        ConfigError
            Before `fit`.
        DataError
            When Z or X do not fit those of the fit.
        """
        fitted = self._fitted(X)
        if X is not None and not getattr(fitted, "needs_features", False):
            same_rows("X", np.asarray(X), len(Z), "Z")
            finite_where_numbers("X", X)
        q = fitted.predict(Z, X)
        return q if self.isotonize is None else isotonize(q, self.isotonize, self.levels_)

    def weights(self, X: np.ndarray | None = None) -> np.ndarray:
        """Return the weights: (p,) coarse, (p, m) medium, (p, m_in, m_out) fine; local ones lead with n."""
        return self._fitted(X).weights(X)

    def save(self, path: str | Path) -> None:
        """Write `path.safetensors` and `path.json`; `load` reads them. No pickle.

        Raises
        ------
        ConfigError
            For an aggregator of another plugin that has no form without pickle; see `tensors`.
        """
        from poise.files import save_arrays

        save_arrays(path, *self.tensors())

    @classmethod
    def load(cls, path: str | Path) -> QuantileStacker:
        """Read what `save` wrote.

        Raises
        ------
        FileError
            For files that are missing, torn, altered, or of something else, and for an aggregator that is
            not installed.
        """
        from poise.files import load_arrays

        arrays, meta = load_arrays(path)
        if meta.get("kind") != FILE_KIND:
            raise FileError(f"{path} holds {meta.get('kind')!r}, not a {FILE_KIND}")
        try:
            return cls.from_tensors(arrays, meta)
        except MissingExtra:
            raise
        except PoiseError as error:
            raise FileError(f"{path}: {error}") from None
        except Exception as error:  # whatever the arrays of another plugin make its code raise
            raise FileError(f"{path} is damaged: {type(error).__name__}: {error}") from None

    def tensors(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what `from_tensors` needs: arrays, and plain values.

        What the aggregator's `fit` returned must have `tensors()`, which gives the same two, and its
        component a class method `from_tensors(arrays, values)` that rebuilds it.

        Raises
        ------
        ConfigError
            Before `fit`; for an aggregator without these two.
        """
        fitted, component = self._fitted(), _component_class(self.aggregator_)
        if not hasattr(fitted, "tensors") or not hasattr(component, "from_tensors"):
            raise ConfigError(
                f"aggregator={self.aggregator_} has no form without pickle: give {type(fitted).__name__} "
                f"tensors() and its component from_tensors(arrays, values), or use joblib.dump")
        arrays, values = fitted.tensors()
        params = self.get_params(deep=False) | {"levels": self.levels_.tolist()}
        return arrays, {"kind": FILE_KIND, "params": params, "aggregator": self.aggregator_,
                        "fitted": values, "n_models": self.n_models_, "feature_names": self.feature_names_}

    @classmethod
    def from_tensors(cls, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> QuantileStacker:
        """Rebuild what `tensors` returned, and predict one row, which fails where shapes do not fit.

        Raises
        ------
        FileError
            For an aggregator that is not installed, or that others have written; for numbers of models,
            levels or features that are none, or not those of the weights.
        """
        stacker = cls(**meta["params"])
        stacker.levels_ = check_levels(stacker.levels)
        m = len(stacker.levels_)
        stacker.n_models_ = saved.number(meta, "n_models", 1, saved.MOST // m)
        names = meta.get("feature_names")
        stacker.feature_names_ = None if names is None else saved.words(meta, "feature_names")
        stacker.aggregator_ = meta.get("aggregator", stacker.aggregator)
        try:
            component = _component_class(stacker.aggregator_)
        except ConfigError as error:
            raise FileError(f"it was made by an aggregator that is not there: {error}") from None
        fitted = component.from_tensors(arrays, meta["fitted"])
        stacker.fitted_, d = fitted, getattr(fitted, "n_features", None)
        if d is not None or not getattr(component, "needs_features", False):
            Z = np.zeros((1, stacker.n_models_, m))
            q = stacker.predict(Z, None if d is None else np.zeros((1, d)))
            if q.shape != (1, m) or not np.isfinite(q).all():
                raise FileError(f"it predicts {str(q)[:60]} for a row of zeros: expected {m} numbers")
        return stacker

    def _fitted(self, X: Any = None) -> Any:
        if not hasattr(self, "fitted_"):
            raise ConfigError("QuantileStacker is not fitted: call fit(Z, y) first")
        names = _names(X)
        fitted = getattr(self, "feature_names_", None)
        if fitted and names and names != fitted:
            raise DataError(f"X has the columns {names}; fitted on {fitted}: give the same ones "
                            f"in the same order")
        return self.fitted_

    def component(self) -> Any:
        """Return the aggregator that `fit` uses, all options checked.

        Raises
        ------
        ConfigError
            As for `fit`.
        """
        self._check_options()
        cls = _component_class(self.aggregator)
        have = {f.name for f in option_fields(cls)}
        if self.penalty is not None and "penalty" not in have:
            raise ConfigError(f"aggregator={self.aggregator} takes no penalty: use a global or local one")
        if self.solver == "exact" and "solver" not in have and getattr(cls, "needs_features", False):
            raise ConfigError(f"aggregator={self.aggregator} has no exact solver: use solver='auto'")
        given: dict[str, Any] = {"n_iter": self.n_iter, "random_state": self.random_state}
        if self.solver != "auto":
            given["solver"] = self.solver
        if self.penalty is not None:
            given["penalty"] = self.penalty
        options = {k: v for k, v in given.items() if k in have} | dict(self.options or {})
        # grid searches draw NumPy's numbers
        options = {k: v.item() if isinstance(v, np.generic) else v for k, v in options.items()}
        return make(cls, options, f"aggregator={self.aggregator}")

    def _check_options(self) -> None:
        if self.solver not in list(SOLVERS):
            raise ConfigError(f"solver={self.solver!r}: allowed is auto, exact, gradient")
        if self.isotonize is not None and self.isotonize not in list(OPERATORS):
            raise ConfigError(f"isotonize={self.isotonize!r}: allowed is one of "
                              f"{', '.join(OPERATORS)} or None")
        if not is_number(self.n_iter) or self.n_iter < 1:
            raise ConfigError(f"n_iter={self.n_iter!r}: allowed is a whole number >= 1")
        if not isinstance(self.options, (Mapping, type(None))):
            raise ConfigError(f"options={self.options!r}: allowed is a mapping of option to value, or None")


def _component_class(name: Any) -> Any:
    """Return the registered component of an aggregator; the registry knows those of all plugins.

    Raises
    ------
    ConfigError
        For an unknown name, with the nearest one.
    """
    found = {entry.name: entry for entry in entries("aggregator")}
    if name not in list(found):
        raise ConfigError(f"aggregator={name!r}{nearest(name, list(found))} (have: {', '.join(found)})")
    return found[name].load()


def _names(X: Any) -> list[str] | None:
    """Return the columns of a frame whose columns have names."""
    names = list(getattr(X, "columns", []))
    return names if names and all(isinstance(name, str) for name in names) else None


def warn_crossing(
    Z: np.ndarray, names: Sequence[str] | None = None, stacklevel: int = 3, mended: bool = False
) -> None:
    """Warn once, naming the models whose quantiles cross by more than rounding, and how often."""
    if Z.shape[2] < 2:
        return
    falls = np.zeros(Z.shape[1])
    for block in row_blocks(len(Z), Z.shape[1] * Z.shape[2]):
        q = np.asarray(Z[block], dtype=float)
        size = np.abs(q).max(axis=2, keepdims=True)  # of this row and model: an outlier hides nobody else
        falls += (np.diff(q, axis=2) < -ROUNDING * size).sum(axis=(0, 2))
    share = falls / (len(Z) * (Z.shape[2] - 1))
    if share.any():
        given = names or [f"model {j}" for j in range(len(share))]
        named = ", ".join(f"{given[j]} ({share[j]:.1%})" for j in range(len(share)) if share[j])
        how = "the result is made monotone" if mended else \
            "isotonize='sort' mends the result and never raises its score"
        warnings.warn(f"{CROSSING}, this share of neighbouring levels: {named}; {how}",
                      QuantileWarning, stacklevel=stacklevel)
