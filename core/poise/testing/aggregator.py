"""What every aggregator keeps."""

from __future__ import annotations

from typing import Any

import numpy as np

from poise.testing.faults import expect, expect_methods, expect_refusal


def sample(n: int = 80, p: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return monotone predictions Z (n, p, m), targets y (n,) and levels (m,)."""
    rng = np.random.default_rng(seed)
    levels = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    centre = rng.normal(size=n)
    y = centre + rng.normal(size=n)
    bias = np.linspace(-0.5, 0.5, p)
    noise = np.cumsum(rng.uniform(0.3, 0.7, size=(n, p, len(levels))), axis=-1)
    return centre[:, None, None] + bias[None, :, None] + noise - 1.5, y, levels


def check_aggregator(aggregator: Any, seed: int = 0) -> None:
    """Run an aggregator through its contract on a small sample.

    Raises
    ------
    ContractError
        Naming the first fault.
    """
    Z, y, levels = sample(seed=seed)
    kept = Z.copy(), y.copy()
    fitted = aggregator.fit(Z, y, levels=levels)
    expect_methods(fitted, ("predict", "weights"), "what fit returns")
    expect(np.array_equal(Z, kept[0]) and np.array_equal(y, kept[1]), "fit changes its inputs")
    out = fitted.predict(Z)
    _shape(out, Z)
    _level_order(out)
    _weights(fitted, Z, out)
    again = aggregator.fit(Z, y, levels=levels).predict(Z)
    expect(np.array_equal(out, again), "fitting twice on the same data differs")
    ones = aggregator.fit(Z, y, levels=levels, sample_weight=np.ones(len(y))).predict(Z)
    expect(np.allclose(out, ones, atol=1e-6), "sample weights of one change the result")
    _rows(fitted, Z, out)
    _equivariance(aggregator, Z, y, levels, out)
    _permutation(aggregator, Z, y, levels, out)
    expect_refusal(lambda: fitted.predict(Z[:, :, :-1]), "predict accepts another number of levels")
    expect_refusal(lambda: fitted.predict(Z[:, :-1]), "predict accepts another number of models")
    expect_refusal(lambda: aggregator.fit(Z, y[:-1], levels=levels), "fit accepts fewer targets than rows")
    broken = Z.copy()
    broken[0, 0, 0] = np.nan
    expect_refusal(lambda: aggregator.fit(broken, y, levels=levels), "fit accepts NaN predictions")
    expect_refusal(lambda: aggregator.fit(Z, y, levels=levels[::-1]), "fit accepts decreasing levels")


def _shape(out: np.ndarray, Z: np.ndarray) -> None:
    want = (Z.shape[0], Z.shape[2])
    expect(out.shape == want, f"predict has shape {out.shape}, not {want} (rows, levels)")
    expect(bool(np.isfinite(out).all()), "predict holds NaN or Inf")


def _level_order(out: np.ndarray) -> None:
    means = out.mean(0)
    expect(bool((np.diff(means) > 0).all()),
           "the level order is ignored: predictions at higher levels are not higher on average")


def _weights(fitted: Any, Z: np.ndarray, out: np.ndarray) -> None:
    w = np.asarray(fitted.weights())
    p, m = Z.shape[1:]
    expect(w.ndim >= 1 and w.shape in ((p,), (p, m), (p, m, m)),
           f"weights() has shape {w.shape}, not (p,), (p, m) or (p, m, m)")
    if not getattr(fitted, "linear", False):
        return
    forms = {1: "j,njk->nk", 2: "jk,njk->nk", 3: "jvk,njv->nk"}
    combined = np.einsum(forms[w.ndim], w, Z)
    expect(np.allclose(combined, out, atol=1e-8), "predict is not the sum of weights() times Z")


def _rows(fitted: Any, Z: np.ndarray, out: np.ndarray) -> None:
    some = np.arange(len(Z))[::-3]
    expect(np.allclose(fitted.predict(Z[some]), out[some], atol=1e-10),
           "a row's prediction depends on the other rows")


def _equivariance(agg: Any, Z: np.ndarray, y: np.ndarray, levels: np.ndarray, out: np.ndarray) -> None:
    moved = agg.fit(3.0 + 2.0 * Z, 3.0 + 2.0 * y, levels=levels).predict(3.0 + 2.0 * Z)
    expect(np.allclose(moved, 3.0 + 2.0 * out, atol=1e-4),
           "it is not affine equivariant: y and Z moved alike move the prediction otherwise")


def _permutation(agg: Any, Z: np.ndarray, y: np.ndarray, levels: np.ndarray, out: np.ndarray) -> None:
    order = np.roll(np.arange(Z.shape[1]), 1)
    swapped = agg.fit(Z[:, order], y, levels=levels).predict(Z[:, order])
    expect(np.allclose(swapped, out, atol=1e-4), "the result depends on the order of the models")
