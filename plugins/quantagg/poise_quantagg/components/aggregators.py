"""Aggregators: options with defaults and ranges, heavy imports inside methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from poise.errors import ConfigError
from poise.options import option
from poise_quantagg.components.checked import Checked, seed_option

if TYPE_CHECKING:
    import numpy as np

    from poise.interfaces import FittedAggregator
    from poise_quantagg.checks import FitRows

PENALTIES = ("constant", "adaptive", "distance")
ISOTONIZERS = ("sort", "pava", "minmax")


class _Aggregator(Checked):
    """Shared signature; `_solve` gets checked arrays."""

    needs_features: ClassVar[bool] = False
    streams: ClassVar[bool] = False  # looks at a block of rows at a time: a float32 Z stays as it is

    def fit(
        self,
        Z: np.ndarray,
        y: np.ndarray,
        X: np.ndarray | None = None,
        *,
        levels: np.ndarray | None = None,
        validation: tuple[np.ndarray, ...] | None = None,
        sample_weight: np.ndarray | None = None,
    ) -> FittedAggregator:
        """Fit on out-of-fold predictions; see `poise.interfaces.Aggregator`.

        Parameters
        ----------
        Z : array, shape (n, p, m)
            Predictions of p models at m levels, in the unit of y.
        y : array, shape (n,)
        X : array, shape (n, d), optional
            Features; needed by local weights, ignored by others.
        levels : array, shape (m,), optional
            Increasing, in (0, 1); without them k / (m + 1).
        validation : (Z, y) or (Z, y, X), optional
            Rows that choose among configurations and stop training; without them a fifth of the rows
            is held out where that is needed.
        sample_weight : array, shape (n,), optional
            Non-negative, not all zero.

        Raises
        ------
        ConfigError
            For ill-formed levels, or options that exclude each other.
        DataError
            For wrong shapes, values that are not finite, negative or all-zero weights, features that
            are needed and missing.
        """
        from poise_quantagg.atoms import atoms_of
        from poise_quantagg.checks import fit_rows

        rows = fit_rows(Z, y, X, levels, validation, sample_weight, self.needs_features,
                        keep_float32=self.streams)
        fitted = self._solve(rows)
        have = {f.name for f in dataclasses.fields(fitted)}  # a median takes what is there
        return dataclasses.replace(fitted, atoms=atoms_of(rows.y)) if "atoms" in have else fitted

    def _solve(self, rows: FitRows) -> Any:
        raise NotImplementedError

    @classmethod
    def from_tensors(cls, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> FittedAggregator:
        """Rebuild what `fit` had returned from what its `tensors` gave.

        Raises
        ------
        FileError
            For what another kind of aggregator had saved.
        """
        from poise_quantagg.aggregators.fitted import LinearFit

        return LinearFit.from_tensors(arrays, meta)


@dataclass(frozen=True)
class Average(_Aggregator):
    """Mean over models, level by level (section 1.4 "simple aggregators"); nothing is learnt."""

    streams: ClassVar[bool] = True

    def _solve(self, rows):
        from poise_quantagg.aggregators.simple import average

        return average(rows.Z)


@dataclass(frozen=True)
class Median(_Aggregator):
    """Median over models, level by level; not linear in Z (see `FittedMedian`)."""

    streams: ClassVar[bool] = True

    def _solve(self, rows):
        from poise_quantagg.aggregators.simple import median

        return median(rows.Z)

    @classmethod
    def from_tensors(cls, arrays, meta):
        """Rebuild a saved `FittedMedian`."""
        from poise_quantagg.aggregators.fitted import FittedMedian

        return FittedMedian.from_tensors(arrays, meta)


@dataclass(frozen=True)
class Best(_Aggregator):
    """The one model of least pinball loss, on the validation rows when there are some."""

    streams: ClassVar[bool] = True

    def _solve(self, rows):
        from poise_quantagg.aggregators.simple import best

        if rows.validation is not None:
            Z, y, _ = rows.validation
            return best(Z, y, rows.levels, y * 0 + 1)
        return best(rows.Z, rows.y, rows.levels, rows.s)


@dataclass(frozen=True)
class Greedy(_Aggregator):
    """Forward selection with replacement (Caruana et al. 2004), one weight per model, as AutoGluon's."""

    streams: ClassVar[bool] = True
    rounds: int = option(50, "models added, repeats included", low=1)

    def _solve(self, rows):
        from poise_quantagg.aggregators.simple import greedy

        return greedy(rows.Z, rows.y, rows.levels, rows.s, self.rounds)


@dataclass(frozen=True)
class QRA(_Aggregator):
    """Quantile regression averaging: y on the models' predictions, level by level, exact."""

    intercept: bool = option(True, "add an intercept to each level")
    simplex: bool = option(False, "weights non-negative with sum 1")

    def _solve(self, rows):
        from poise_quantagg.aggregators.simple import qra

        return qra(rows.Z, rows.y, rows.levels, rows.s, intercept=self.intercept, simplex=self.simplex)


@dataclass(frozen=True)
class FQRA(_Aggregator):
    """Factor QRA: y on the leading principal components of the models' predictions, exact."""

    factors: int | None = option(None, "components; null: chosen by `choose`", low=1)
    choose: str = option("bic", "how the number of factors is chosen", choices=("bic", "variance"))
    variance: float = option(0.95, "share to explain with choose=variance", above=0, high=1)

    def _solve(self, rows):
        from poise_quantagg.aggregators.simple import fqra

        return fqra(rows.Z, rows.y, rows.levels, rows.s, factors=self.factors, choose=self.choose,
                    variance=self.variance)


@dataclass(frozen=True)
class _Trained(_Aggregator):
    """Options of weights that are trained by gradient."""

    penalty: str | None = option(None, "crossing penalty: constant, adaptive, distance; null: none")
    penalty_weight: float | None = option(None, "its weight; null: searched", above=0)
    margin: float | None = option(None, "its margin, for y of unit variance; null: searched", low=0)
    loss_isotonize: str | None = option(
        None, "sort, pava or minmax inside the training loss; null: none")
    start: str = option("exact", "weights that training starts from: the exact global solution, or "
                        "equal ones as in the paper", choices=("exact", "uniform"))
    n_iter: int = option(20, "configurations tried", low=1)
    max_steps: int | None = option(None, "optimizer steps at most; null: by the number of rows", low=1)
    patience: int | None = option(
        None, "steps without a better validation score before stopping; null: by the rows", low=1)
    random_state: int = seed_option()

    resolution: ClassVar[str] = ""
    local: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("penalty", PENALTIES), ("loss_isotonize", ISOTONIZERS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ConfigError(f"{type(self).__name__}.{name}={value!r} is not allowed: it must be "
                                  f"one of {', '.join(allowed)} or null")

    def _search(self, rows, **more):
        import numpy as np

        from poise_quantagg.aggregators.search import SearchOptions, search

        names = ("penalty", "penalty_weight", "margin", "loss_isotonize", "start", "n_iter",
                 "max_steps", "patience", "random_state")
        options = SearchOptions(self.resolution, self.local, **{k: getattr(self, k) for k in names}, **more)
        Z = np.asarray(rows.Z, dtype=float)
        return search(options, Z, rows.y, rows.X, rows.levels, rows.s, rows.validation)


@dataclass(frozen=True)
class _Global(_Trained):
    """Weights that do not depend on the features (eq 16).

    The paper minimises by SGD over a softmax; `solver=exact` solves the same problem as a linear
    program with a certified gap: no step size, no stopping rule, no seed.
    """

    solver: str = option("auto", "auto: exact unless there is a penalty or loss_isotonize",
                         choices=("auto", "exact", "gradient"))
    simplex: bool = option(True, "weights non-negative with sum 1; false: free, exact solver only")

    def __post_init__(self) -> None:
        super().__post_init__()
        needs = [k for k in ("penalty", "loss_isotonize") if getattr(self, k) is not None]
        if self.solver == "exact" and needs:
            raise ConfigError(f"{type(self).__name__}: solver=exact takes no {needs[0]}: use "
                              f"solver=gradient or auto")
        if not self.simplex and (needs or self.solver == "gradient"):
            raise ConfigError(f"{type(self).__name__}: simplex=false is for the exact solver: drop "
                              f"{needs[0] if needs else 'solver=gradient'}")

    def _solve(self, rows):
        from poise_quantagg.aggregators.global_ import exact

        by_gradient = self.penalty is not None or self.loss_isotonize is not None
        if self.solver == "gradient" or (self.solver == "auto" and by_gradient):
            return self._search(rows)
        return exact(self.resolution, rows.Z, rows.y, rows.levels, rows.s, self.simplex)


@dataclass(frozen=True)
class GlobalCoarse(_Global):
    """One weight per model, shared by all levels."""

    resolution: ClassVar[str] = "coarse"
    streams: ClassVar[bool] = True


@dataclass(frozen=True)
class GlobalMedium(_Global):
    """One weight per model and level."""

    resolution: ClassVar[str] = "medium"


@dataclass(frozen=True)
class GlobalFine(_Global):
    """One weight per model, input level and output level."""

    resolution: ClassVar[str] = "fine"


@dataclass(frozen=True)
class _Local(_Trained):
    """Weights that a network computes from the features (eq 17)."""

    width: int | None = option(None, "hidden units of a layer; null: searched", low=1)
    depth: int | None = option(None, "hidden layers; null: searched", low=1)

    resolution: ClassVar[str] = ""
    local: ClassVar[bool] = True
    needs_features: ClassVar[bool] = True

    def _solve(self, rows):
        return self._search(rows, width=self.width, depth=self.depth)

    @classmethod
    def from_tensors(cls, arrays, meta):
        """Rebuild a saved `GateFit`."""
        from poise_quantagg.aggregators.fitted_gate import GateFit

        return GateFit.from_tensors(arrays, meta)


@dataclass(frozen=True)
class LocalCoarse(_Local):
    """One weight per model, by a network from the features."""

    resolution: ClassVar[str] = "coarse"


@dataclass(frozen=True)
class LocalMedium(_Local):
    """One weight per model and level, by a network from the features."""

    resolution: ClassVar[str] = "medium"


@dataclass(frozen=True)
class LocalFine(_Local):
    """One weight per model, input level and output level, by a network from the features (DQA).

    `rank` and `band` are approximations: the first puts a bottleneck before the logits, the second
    lets a level look only at levels near it. Both train faster and hold fewer numbers.
    """

    rank: int | None = option(None, "units of a last hidden layer before the logits; null: none", low=1)
    band: int | None = option(None, "input levels on each side of the output level; null: all", low=0)

    resolution: ClassVar[str] = "fine"

    def _solve(self, rows):
        return self._search(rows, width=self.width, depth=self.depth, rank=self.rank, band=self.band)
