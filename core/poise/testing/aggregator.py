"""What every aggregator keeps."""

from __future__ import annotations

from typing import Any

import numpy as np

from poise.testing.faults import expect, expect_methods, expect_refusal


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


def check_aggregator(aggregator: Any, seed: int = 0) -> None:
    """Run an aggregator through its contract on a small sample.

    Raises
    ------
    ContractError
        Naming the first fault.
    """
    Z, y, features, levels = sample(seed=seed)
    X = features if getattr(aggregator, "needs_features", False) else None
    kept = Z.copy(), y.copy(), features.copy()
    fitted = aggregator.fit(Z, y, X, levels=levels)
    expect_methods(fitted, ("predict", "weights"), "what fit returns")
    out = fitted.predict(Z, X)
    expect(all(np.array_equal(a, b) for a, b in zip((Z, y, features), kept)), "fit changes its inputs")
    _shape(out, Z)
    _level_order(out)
    _weights(fitted, Z, X, out)
    again = aggregator.fit(Z, y, X, levels=levels).predict(Z, X)
    expect(np.array_equal(out, again), "fitting twice on the same data differs")
    ones = aggregator.fit(Z, y, X, levels=levels, sample_weight=np.ones(len(y))).predict(Z, X)
    expect(np.allclose(out, ones, atol=1e-6), "sample weights of one change the result")
    some = np.arange(len(Z))[::-3]
    expect(np.allclose(fitted.predict(Z[some], None if X is None else X[some]), out[some], atol=1e-10),
           "a row's prediction depends on the other rows")
    moved = aggregator.fit(3.0 + 2.0 * Z, 3.0 + 2.0 * y, X, levels=levels).predict(3.0 + 2.0 * Z, X)
    expect(np.allclose(moved, 3.0 + 2.0 * out, atol=1e-4),
           "it is not affine equivariant: y and Z moved alike move the prediction otherwise")
    order = np.roll(np.arange(Z.shape[1]), 1)
    swapped = aggregator.fit(Z[:, order], y, X, levels=levels).predict(Z[:, order], X)
    expect(np.allclose(swapped, out, atol=1e-4), "the result depends on the order of the models")
    _refusals(aggregator, fitted, Z, y, X, levels)
    if X is not None:
        _features(aggregator, fitted, Z, y, X, levels)


def _refusals(
    aggregator: Any, fitted: Any, Z: np.ndarray, y: np.ndarray, X: np.ndarray | None, levels: np.ndarray
) -> None:
    expect_refusal(lambda: fitted.predict(Z[:, :, :-1], X), "predict accepts another number of levels")
    expect_refusal(lambda: fitted.predict(Z[:, :-1], X), "predict accepts another number of models")
    expect_refusal(lambda: aggregator.fit(Z, y[:-1], X, levels=levels),
                   "fit accepts fewer targets than rows")
    broken = Z.copy()
    broken[0, 0, 0] = np.nan
    expect_refusal(lambda: aggregator.fit(broken, y, X, levels=levels), "fit accepts NaN predictions")
    expect_refusal(lambda: aggregator.fit(Z, y, X, levels=levels[::-1]), "fit accepts decreasing levels")


def _features(
    aggregator: Any, fitted: Any, Z: np.ndarray, y: np.ndarray, X: np.ndarray, levels: np.ndarray
) -> None:
    """Check an aggregator that says `needs_features`."""
    w = np.asarray(fitted.weights(X))
    expect(not np.allclose(w, w[:1], atol=1e-9), "the features are ignored: every row has the same weights")
    expect_refusal(lambda: aggregator.fit(Z, y, levels=levels), "fit accepts missing features")
    expect_refusal(lambda: fitted.predict(Z), "predict accepts missing features")
    expect_refusal(fitted.weights, "weights accepts missing features")
    expect_refusal(lambda: fitted.predict(Z, X[:-1]), "predict accepts features of fewer rows")
    expect_refusal(lambda: fitted.predict(Z, X[:, :-1]), "predict accepts another number of features")
    broken = X.copy()
    broken[0, 0] = np.nan
    expect_refusal(lambda: aggregator.fit(Z, y, broken, levels=levels), "fit accepts NaN features")


def _shape(out: np.ndarray, Z: np.ndarray) -> None:
    want = (Z.shape[0], Z.shape[2])
    expect(out.shape == want, f"predict has shape {out.shape}, not {want} (rows, levels)")
    expect(bool(np.isfinite(out).all()), "predict holds NaN or Inf")


def _level_order(out: np.ndarray) -> None:
    means = out.mean(0)
    # neighbouring levels may be the same where one level may borrow from another
    rises = np.diff(means) >= -1e-6 * np.ptp(means)
    expect(bool(rises.all() and means[-1] > means[0]),
           "the level order is ignored: predictions at higher levels are not higher on average")


def _weights(fitted: Any, Z: np.ndarray, X: np.ndarray | None, out: np.ndarray) -> None:
    """Check the shape of the weights, and that they give the prediction where they claim to."""
    w = np.asarray(fitted.weights(X))
    p, m = Z.shape[1:]
    lead, call, axis = ((), "weights()", "") if X is None else ((len(Z),), "weights(X)", "n, ")
    expect(w.shape in (lead + (p,), lead + (p, m), lead + (p, m, m)),
           f"{call} has shape {w.shape}, not ({axis}p), ({axis}p, m) or ({axis}p, m, m)")
    if X is None and not getattr(fitted, "linear", False):
        return
    form = {1: "j,njk->nk", 2: "jk,njk->nk", 3: "jvk,njv->nk"}[w.ndim - len(lead)]
    combined = np.einsum("n" * len(lead) + form, w, Z)
    expect(np.allclose(combined, out, atol=1e-8), f"predict is not the sum of {call} times Z")
