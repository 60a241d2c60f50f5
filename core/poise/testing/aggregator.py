"""What every aggregator keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from poise.errors import MissingExtra
from poise.testing.faults import ContractError, expect, expect_methods, expect_refusal


def sample(n: int = 80, p: int = 3, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Return monotone predictions Z (n, p, m), targets y (n,), features X (n, 2) and levels (m,).

    Which model is the least biased depends on the second feature.
    """
    rng = np.random.default_rng(seed)
    levels = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    X = rng.normal(size=(n, 2))
    y = X[:, 0] + rng.normal(size=n)
    bias = 2.0 * np.abs(np.linspace(-1, 1, p) - np.tanh(3 * X[:, 1:]))
    noise = np.cumsum(rng.uniform(0.3, 0.7, size=(n, p, len(levels))), axis=-1)
    return (X[:, :1] + bias)[:, :, None] + noise - 1.5, y, X, levels


def check_aggregator(aggregator: Any, seed: int = 0) -> list[str]:
    """Run an aggregator through its contract on a small sample.

    Returns
    -------
    list of str
        The checks that were made, in order.

    Raises
    ------
    ContractError
        Naming the first fault.
    """
    Z, y, features, levels = sample(seed=seed)
    X = features if getattr(aggregator, "needs_features", False) else None
    case = _Case(aggregator, Z, y, X, levels, seed)
    checks = CHECKS if X is None else CHECKS | FEATURE_CHECKS
    for check in checks.values():
        check(case)
    return list(checks)


class _Case:
    """An aggregator, the rows of its sample, what its `fit` returned and what that predicts."""

    def __init__(
        self, aggregator: Any, Z: np.ndarray, y: np.ndarray, X: np.ndarray | None, levels: np.ndarray,
        seed: int,
    ) -> None:
        self.aggregator, self.Z, self.y, self.X, self.levels, self.seed = aggregator, Z, y, X, levels, seed
        given = [array for array in (Z, y, X) if array is not None]
        kept = [array.copy() for array in given]
        self.fitted = self.fit("on the sample")
        expect_methods(self.fitted, ("predict", "weights"), "what fit returns")
        self.out = self.fitted.predict(Z, X)
        self.untouched = all(np.array_equal(a, b) for a, b in zip(given, kept))

    def fit(self, how: str, **changes: Any) -> Any:
        """Fit on the sample with some arguments replaced; a failure is a fault, said to happen `how`."""
        given = {"Z": self.Z, "y": self.y, "X": self.X, "levels": self.levels} | changes
        return _working(
            lambda: self.aggregator.fit(given.pop("Z"), given.pop("y"), given.pop("X"), **given),
            f"fit fails {how}")

    def predict(self, how: str, **changes: Any) -> np.ndarray:
        """Fit with some arguments replaced, check the weights, and predict the sample."""
        fitted = self.fit(how, **changes)
        return self.checked(fitted, self.Z, self.X, f" after a fit {how}")

    def checked(self, fitted: Any, Z: np.ndarray, X: np.ndarray | None, where: str) -> np.ndarray:
        """Return a prediction that has its shape, is finite, and is what the weights say."""
        out = _working(lambda: fitted.predict(Z, X), f"predict fails{where}")
        _shape(out, Z, where)
        _weights(fitted, Z, X, out, where)
        return out

    def refuses(self, fault: str, **changes: Any) -> None:
        """Check that `fit` refuses some arguments in place of those of the sample."""
        given = {"Z": self.Z, "y": self.y, "X": self.X, "levels": self.levels} | changes
        expect_refusal(
            lambda: self.aggregator.fit(given.pop("Z"), given.pop("y"), given.pop("X"), **given), fault)


def _inputs(case: _Case) -> None:
    expect(case.untouched, "fit changes its inputs")


def _prediction(case: _Case) -> None:
    _shape(case.out, case.Z)


def _level_order(case: _Case) -> None:
    means = case.out.mean(0)
    # neighbouring levels may be the same where one level may borrow from another
    rises = np.diff(means) >= -1e-6 * np.ptp(means)
    expect(bool(rises.all() and means[-1] > means[0]),
           "the level order is ignored: predictions at higher levels are not higher on average")


def _weights_of_the_sample(case: _Case) -> None:
    _weights(case.fitted, case.Z, case.X, case.out)


def _repeated_fit(case: _Case) -> None:
    again = case.fit("a second time").predict(case.Z, case.X)
    expect(np.array_equal(case.out, again), "fitting twice on the same data differs")


def _weights_of_one(case: _Case) -> None:
    ones = case.fit("with sample_weight", sample_weight=np.ones(len(case.y))).predict(case.Z, case.X)
    expect(np.allclose(case.out, ones, atol=1e-6), "sample weights of one change the result")


def _rows_alone(case: _Case) -> None:
    some = np.arange(len(case.Z))[::-3]
    alone = case.fitted.predict(case.Z[some], None if case.X is None else case.X[some])
    expect(np.allclose(alone, case.out[some], atol=1e-10), "a row's prediction depends on the other rows")


def _affine_maps(case: _Case) -> None:
    Z = 3.0 + 2.0 * case.Z
    moved = case.fit("on other units", Z=Z, y=3.0 + 2.0 * case.y).predict(Z, case.X)
    expect(np.allclose(moved, 3.0 + 2.0 * case.out, atol=1e-4),
           "it is not affine equivariant: y and Z moved alike move the prediction otherwise")


def _order_of_models(case: _Case) -> None:
    Z = case.Z[:, np.roll(np.arange(case.Z.shape[1]), 1)]
    swapped = case.fit("on models in another order", Z=Z).predict(Z, case.X)
    expect(np.allclose(swapped, case.out, atol=1e-4), "the result depends on the order of the models")


def _refused_shapes(case: _Case) -> None:
    Z, X, fitted = case.Z, case.X, case.fitted
    expect_refusal(lambda: fitted.predict(Z[:, :, :-1], X), "predict accepts another number of levels")
    expect_refusal(lambda: fitted.predict(Z[:, :-1], X), "predict accepts another number of models")
    case.refuses("fit accepts fewer targets than rows", y=case.y[:-1])


def _refused_nan(case: _Case) -> None:
    broken = _spoiled(case.Z)
    case.refuses("fit accepts NaN predictions", Z=broken)
    case.refuses("fit accepts NaN targets", y=_spoiled(case.y))
    case.refuses("fit accepts NaN sample weights", sample_weight=_spoiled(np.ones(len(case.y))))
    expect_refusal(lambda: case.fitted.predict(broken, case.X), "predict accepts NaN predictions")


def _refused_levels(case: _Case) -> None:
    case.refuses("fit accepts decreasing levels", levels=case.levels[::-1])


def _refused_weights(case: _Case) -> None:
    ones = np.ones(len(case.y))
    case.refuses("fit accepts negative sample weights", sample_weight=np.append(ones[1:], -1.0))
    case.refuses("fit accepts sample weights that are all zero", sample_weight=0 * ones)
    case.refuses("fit accepts fewer sample weights than rows", sample_weight=ones[:-1])


def _new_rows(case: _Case) -> None:
    """Check that the weights explain rows that the fit has not seen, too."""
    Z, _, X, _ = sample(seed=case.seed + 1000)
    case.checked(case.fitted, Z, None if case.X is None else X, " on new rows")


def _default_levels(case: _Case) -> None:
    m = len(case.levels)
    meant = case.predict("with levels k / (m + 1)", levels=np.arange(1, m + 1) / (m + 1))
    expect(np.allclose(case.predict("with levels=None", levels=None), meant, atol=1e-8),
           "levels=None is not k / (m + 1)")


def _sample_weights(case: _Case) -> None:
    """Check weights that differ: only their ratios count, and rows of weight zero not at all."""
    how, weight = "with sample_weight", np.arange(len(case.y)) % 4.0
    kept = weight.copy()
    out = case.predict(how, sample_weight=weight)
    expect(np.array_equal(weight, kept), "fit changes the sample weights")
    scaled = case.predict(how, sample_weight=3.0 * weight)
    expect(np.allclose(scaled, out, atol=1e-6), "three times the sample weights change the result")
    Z, y, X = case.Z.copy(), case.y.copy(), None if case.X is None else case.X.copy()
    for array, value in ((Z, 50.0), (y, -100.0), (X, 9.0)):
        if array is not None:
            array[weight == 0] = value
    other = case.predict(how, Z=Z, y=y, X=X, sample_weight=weight)
    expect(np.allclose(other, out, atol=1e-6), "rows of weight zero change the result")


def _validation(case: _Case) -> None:
    Z, y, X, _ = sample(n=40, seed=case.seed + 2000)
    given = (Z, y) if case.X is None else (Z, y, X)
    kept = [array.copy() for array in given]
    weight = np.arange(len(case.y)) % 3.0
    for more in ({}, {"sample_weight": weight}):
        how = "with validation" + " and sample_weight" * bool(more)
        out = case.predict(how, validation=given, **more)
        again = case.predict(how, validation=given, **more)
        expect(np.array_equal(out, again), f"fitting twice {how} differs")
    expect(all(np.array_equal(a, b) for a, b in zip(given, kept)), "fit changes the validation rows")


def _features_matter(case: _Case) -> None:
    w = np.asarray(case.fitted.weights(case.X))
    expect(not np.allclose(w, w[:1], atol=1e-9), "the features are ignored: every row has the same weights")


def _missing_features(case: _Case) -> None:
    case.refuses("fit accepts missing features", X=None)
    expect_refusal(lambda: case.fitted.predict(case.Z), "predict accepts missing features")
    expect_refusal(case.fitted.weights, "weights accepts missing features")


def _refused_features(case: _Case) -> None:
    Z, X, fitted = case.Z, case.X, case.fitted
    assert X is not None
    expect_refusal(lambda: fitted.predict(Z, X[:-1]), "predict accepts features of fewer rows")
    expect_refusal(lambda: fitted.predict(Z, X[:, :-1]), "predict accepts another number of features")
    broken = _spoiled(X)
    case.refuses("fit accepts NaN features", X=broken)
    expect_refusal(lambda: fitted.predict(Z, broken), "predict accepts NaN features")
    expect_refusal(lambda: fitted.weights(broken), "weights accepts NaN features")


CHECKS: dict[str, Callable[[_Case], None]] = {
    "inputs are left alone": _inputs,
    "prediction": _prediction,
    "order of levels": _level_order,
    "weights": _weights_of_the_sample,
    "repeated fit": _repeated_fit,
    "sample weights of one": _weights_of_one,
    "rows alone": _rows_alone,
    "affine maps": _affine_maps,
    "order of models": _order_of_models,
    "refused shapes": _refused_shapes,
    "refused NaN": _refused_nan,
    "refused levels": _refused_levels,
    "refused sample weights": _refused_weights,
    "new rows": _new_rows,
    "default levels": _default_levels,
    "sample weights": _sample_weights,
    "validation": _validation,
}
FEATURE_CHECKS: dict[str, Callable[[_Case], None]] = {
    "features matter": _features_matter,
    "missing features": _missing_features,
    "refused features": _refused_features,
}


def _working(action: Callable[[], Any], fault: str) -> Any:
    """Return what an action returns; whatever it raises is the fault, but for a missing package."""
    try:
        return action()
    except MissingExtra:
        raise
    except Exception as error:
        why = " ".join(str(error).split())
        raise ContractError(f"{fault}: {type(error).__name__}: {why}") from error


def _spoiled(array: np.ndarray) -> np.ndarray:
    """Return a copy whose first number is NaN."""
    out = array.copy()
    out.flat[0] = np.nan
    return out


def _shape(out: np.ndarray, Z: np.ndarray, where: str = "") -> None:
    want = (Z.shape[0], Z.shape[2])
    expect(out.shape == want, f"predict has shape {out.shape}, not {want} (rows, levels){where}")
    expect(bool(np.isfinite(out).all()), f"predict holds NaN or Inf{where}")


def _weights(fitted: Any, Z: np.ndarray, X: np.ndarray | None, out: np.ndarray, where: str = "") -> None:
    """Check the shape of the weights, and that they give the prediction where they claim to."""
    w = np.asarray(fitted.weights(X))
    p, m = Z.shape[1:]
    lead, call, axis = ((), "weights()", "") if X is None else ((len(Z),), "weights(X)", "n, ")
    expect(w.shape in (lead + (p,), lead + (p, m), lead + (p, m, m)),
           f"{call} has shape {w.shape}, not ({axis}p), ({axis}p, m) or ({axis}p, m, m){where}")
    if X is None and not getattr(fitted, "linear", False):
        return
    form = {1: "j,njk->nk", 2: "jk,njk->nk", 3: "jvk,njv->nk"}[w.ndim - len(lead)]
    combined = np.einsum("n" * len(lead) + form, w, Z)
    expect(np.allclose(combined, out, atol=1e-8), f"predict is not the sum of {call} times Z{where}")
