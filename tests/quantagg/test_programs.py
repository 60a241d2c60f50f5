"""The exact solver: certified gaps, agreement with HiGHS, awkward data, weights of rows, memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from cases import some
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri

from poise_quantagg import programs
from poise_quantagg.interior import solve
from poise_quantagg.programs import Program, basis, coarse, fine, linear, medium
from poise_quantagg.reference import pinball_program

GAP = EXCESS = 1e-7  # relative to the objective
KINDS = ("plain", "collinear", "duplicated", "constant", "ties", "outliers", "large", "small")
seeds = st.integers(0, 2**32 - 1)


def problem(n, p, m, kind="plain", seed=0):
    """Return (Z, y, levels): p imperfect models of one target, awkward in a given way."""
    rng = np.random.default_rng([seed, n, p, m])
    levels = np.arange(1, m + 1) / (m + 1)
    center, spread = rng.normal(size=n), rng.uniform(0.3, 1.2, size=(p, 1))
    y = center + rng.uniform(0.3, 1, size=n) * rng.normal(size=n)
    Z = center[:, None, None] + 0.5 * rng.normal(size=(n, p, 1)) + spread * ndtri(levels)
    Z += 0.05 * rng.normal(size=Z.shape)
    if kind == "collinear":
        Z[:, -1] = 0.3 * Z[:, 0] + 0.7 * Z[:, p // 2]
    elif kind == "duplicated":
        Z[:, -1] = Z[:, 0]
    elif kind == "constant":
        Z[:, 0] = 1.5
    elif kind == "ties":
        Z, y = np.round(Z, 1), np.round(y, 1)
    elif kind == "outliers":
        y[:3] = 1e6, -1e6, 1e6
        Z[rng.integers(n, size=5), rng.integers(p, size=5)] *= 1e6
    unit = {"large": 1e6, "small": 1e-6}.get(kind, 1.0)
    return unit * Z, unit * y, levels


@dataclass(frozen=True)
class Form:
    """A program: how it is solved here, and its columns for HiGHS at one level (coarse: at all)."""

    solve: Callable[..., Program]
    columns: Callable[[np.ndarray, int], np.ndarray]
    simplex: bool = True
    whole: bool = False
    shift: bool = False


FORMS = {
    "coarse": Form(coarse, lambda Z, k: Z.transpose(0, 2, 1).reshape(-1, Z.shape[1]), whole=True),
    "medium": Form(medium, lambda Z, k: Z[:, :, k]),
    "fine": Form(fine, lambda Z, k: Z.reshape(len(Z), -1)),
    "qra": Form(lambda *rows: medium(*rows, simplex=False, intercept=True),
                lambda Z, k: np.c_[np.ones(len(Z)), Z[:, :, k]], simplex=False),
    "coarse_free": Form(lambda *rows: coarse(*rows, simplex=False),
                        lambda Z, k: Z.transpose(0, 2, 1).reshape(-1, Z.shape[1]), False, True),
    "medium_free": Form(lambda *rows: medium(*rows, simplex=False), lambda Z, k: Z[:, :, k], False),
    "qra_simplex": Form(lambda *rows: medium(*rows, intercept=True), lambda Z, k: Z[:, :, k], shift=True),
}
FINE_FREE = {"fine_free": Form(lambda *rows: fine(*rows, simplex=False),
                               lambda Z, k: Z.reshape(len(Z), -1), simplex=False)}  # n > pm only


def combined(found, Z):
    """Return the predictions of a program's weights, by shape: coarse, medium, fine."""
    form = {1: "npm,p->nm", 2: "npm,pm->nm", 3: "npv,pvm->nm"}[found.w.ndim]
    return np.einsum(form, Z, found.w, optimize=True) + found.intercept


def achieved(found, Z, y, levels, s):
    u = y[:, None] - combined(found, Z)
    return float(s @ np.maximum(levels * u, (levels - 1) * u).sum(axis=1) / (s.sum() * len(levels)))


def by_highs(form, Z, y, levels, s):
    n, _, m = Z.shape
    if form.whole:
        rows = np.repeat(y, m), np.repeat(s, m), np.tile(levels, n)
        total = pinball_program(form.columns(Z, 0), *rows, simplex=form.simplex)[1]
    else:
        total = sum(pinball_program(form.columns(Z, k), y, s, np.full(n, levels[k]),
                                    simplex=form.simplex, shift=form.shift)[1] for k in range(m))
    return total / (s.sum() * m)


def check(name, n, p, m, kind, oracle=True, s=None):
    """Solve; assert the certificate, the objective's honesty, and no excess over HiGHS."""
    Z, y, levels = problem(n, p, m, kind)
    s = np.ones(n) if s is None else s
    form = (FORMS | FINE_FREE)[name]
    found = form.solve(Z, y, levels, s)
    # free fine weights can reach an outlier of 1e6 at 1e6 times the size: right, but with a looser bound
    loose = name == "fine_free" and kind == "outliers"
    assert 0 <= found.gap <= (0.01 if loose else GAP) * found.objective
    # offsets of 1e6 leave ten digits to residuals of size 1
    assert achieved(found, Z, y, levels, s) == pytest.approx(found.objective, rel=1e-9)
    if form.simplex:
        assert found.w.min() >= 0
        assert found.w.sum(axis=(0, 1) if name == "fine" else 0) == pytest.approx(1, abs=1e-12)
    if oracle:
        optimum = by_highs(form, Z, y, levels, s)
        assert found.objective <= optimum * (1 + EXCESS)
        assert found.objective >= optimum * (1 - 1e-6)  # what HiGHS' own tolerance leaves


# ------------------------------------------------------------------ gap and oracle


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "p", "m"), some([(100, 6, 9), (100, 20, 9)], keep=[(100, 6, 9)]))
def test_awkward_data_have_a_certified_optimum_that_highs_does_not_beat(name, n, p, m, kind):
    check(name, n, p, m, kind)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("n", "p", "m"), some(
    [(1000, 2, 9), (100, 2, 99), (1000, 6, 9), (100, 6, 99)], keep=[(1000, 2, 9), (100, 2, 99)]))
def test_more_rows_and_more_levels(name, n, p, m):
    check(name, n, p, m, "plain", oracle=name != "fine" or n * m < 9000)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("n", "p", "m"), list(product([100, 1000, 10_000], [2, 6, 20], [9, 99])))
def test_every_size_has_a_certified_optimum(name, n, p, m):
    check(name, n, p, m, "plain", oracle=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "p", "m"), [(1000, 6, 99), (1000, 20, 9), (10_000, 6, 9)])
def test_every_kind_of_data_at_larger_sizes(name, kind, n, p, m):
    askable = {"fine": p * m <= 200 and n <= 1000}.get(name, n * m <= 10_000 or not FORMS[name].whole)
    check(name, n, p, m, kind, oracle=askable)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qra", "medium"])
def test_highs_at_ten_thousand_rows_and_all_levels(name):
    check(name, 10_000, 6, 99, "plain")


@pytest.mark.parametrize("kind", KINDS)
def test_fine_with_free_weights(kind):
    check("fine_free", 100, 6, 9, kind)


@pytest.mark.parametrize("shift", [-1e6, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("name", ["medium_free", "fine_free", "coarse_free"])
def test_free_weights_far_from_zero(name, shift):
    """HiGHS gets the program about one model: its column in units of the shift, and differences to it."""
    Z, y, levels = problem(150, 4, 5)
    form = FORMS.get(name) or Form(lambda *rows: fine(*rows, simplex=False), FORMS["fine"].columns, False)
    found = form.solve(Z + shift, y + shift, levels, np.ones(len(y)))
    optimum = 0.0
    for k, level in enumerate([levels] if form.whole else levels):
        A = form.columns(Z, k)
        target = (np.repeat(y, 5) if form.whole else y) - A[:, 0]
        about = np.c_[A[:, 0] / abs(shift) + np.sign(shift), A[:, 1:] - A[:, :1]]
        tau = np.tile(level, len(y)) if form.whole else np.full(len(y), level)
        optimum += pinball_program(about, target, np.ones(len(target)), tau, simplex=False)[1]
    optimum /= 5 * len(y)
    assert found.objective <= optimum * (1 + EXCESS)
    assert found.gap <= GAP * found.objective
    # and it is what the weights give
    w = found.w if name != "coarse_free" else found.w[:, None]
    q = (np.einsum("npk,pkm->nm", Z + shift, w) if name == "fine_free" else
         np.einsum("npm,pm->nm", Z + shift, np.broadcast_to(w, (4, 5))))
    r = (y + shift)[:, None] - q
    assert np.maximum(levels * r, (levels - 1) * r).mean() == pytest.approx(found.objective, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "p", "m"), [(1000, 20, 9), (300, 2, 99)])
def test_fine_with_free_weights_and_two_hundred_columns(n, p, m, kind):
    check("fine_free", n, p, m, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fine_with_two_hundred_columns(kind):
    check("fine", 100, 2, 99, kind)


@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("name", FORMS)
def test_one_row_one_model_and_a_perfect_fit(name, m):
    levels = np.arange(1, m + 1) / (m + 1)
    Z, y = np.linspace(0, 1, m)[None, None] + np.zeros((1, 1, m)), np.array([0.3])
    one = FORMS[name].solve(Z, y, levels, np.ones(1))
    if FORMS[name].simplex and name != "fine":
        assert one.w == pytest.approx(1)
    Z, y, _ = problem(40, 3, m)
    Z[:, 1] = y[:, None]
    exact = FORMS[name].solve(Z, y, levels, np.ones(40))
    assert exact.objective <= 1e-9


# ------------------------------------------------------------------ weights of rows


@pytest.mark.parametrize("name", FORMS)
def test_weights_count_rows(name):
    """An integer weight is that many copies, zero is none."""
    Z, y, levels = problem(60, 4, 9)
    times = np.random.default_rng(0).integers(0, 4, size=60)
    weighted = FORMS[name].solve(Z, y, levels, times / times.mean())
    repeated = FORMS[name].solve(np.repeat(Z, times, axis=0), np.repeat(y, times), levels,
                                 np.ones(times.sum()))
    assert weighted.objective == pytest.approx(repeated.objective, rel=GAP)
    there = times > 0
    removed = FORMS[name].solve(Z[there], y[there], levels, times[there] / times[there].mean())
    assert weighted.objective == pytest.approx(removed.objective, rel=GAP)
    check(name, 60, 4, 9, "plain", s=times / times.mean())


@pytest.mark.parametrize("name", FORMS)
def test_absurd_rows_of_weight_zero_do_no_harm(name):
    Z, y, levels = problem(60, 4, 9)
    plain = FORMS[name].solve(Z, y, levels, np.ones(60))
    more = np.concatenate([Z, 1e9 * Z[:5]]), np.r_[y, -1e9 * y[:5]]
    found = FORMS[name].solve(*more, levels, np.r_[np.ones(60), np.zeros(5)])
    assert found.objective == pytest.approx(plain.objective, rel=GAP)


# ------------------------------------------------------------------ the certificate


@given(seeds, st.integers(1, 5), st.integers(2, 30), st.integers(0, 5), st.sampled_from([1.0, 1e3]))
@settings(max_examples=60, deadline=None)
def test_multipliers_are_feasible_so_the_bound_is_one(seed, q, n, free, spread):
    """Box and equations hold; then y'd - max (A'd) is below the loss of any weights."""
    rng = np.random.default_rng(seed)
    A = rng.standard_t(2, size=(3, q, n)) * spread
    y, s = rng.standard_t(2, size=(3, n)), rng.uniform(0.1, 3, size=(3, n))
    tau, simplex = rng.uniform(0.01, 0.99, size=(3, n)), np.arange(q) >= min(free, q)
    if free:
        A[:, ~simplex] = basis(A[:, ~simplex])[0]
    found = solve(A, y, s, tau, simplex)
    assert np.all(found.d <= s * tau * (1 + 1e-12))
    assert np.all(found.d >= -s * (1 - tau) * (1 + 1e-12))
    priced = np.einsum("bqn,bn->bq", A, found.d)
    assert np.abs(priced[:, ~simplex]).max(initial=0) <= 1e-12 * s.sum(axis=1).max()
    bound = np.einsum("bn,bn->b", y, found.d)
    if simplex.any():
        bound -= priced[:, simplex].max(axis=1)
    scale = np.einsum("bn,bn->b", s, np.abs(y))
    assert np.all(np.abs(bound - found.bound) <= 1e-9 * scale)
    for _ in range(5):
        w = np.where(simplex, rng.dirichlet(np.ones(q), size=3), rng.normal(size=(3, q)))
        if simplex.any():
            w[:, simplex] /= w[:, simplex].sum(axis=1, keepdims=True)
        r = y - np.einsum("bq,bqn->bn", w, A)
        loss = np.einsum("bn,bn->b", s, np.maximum(tau * r, (tau - 1) * r))
        assert np.all(loss >= found.bound - 1e-9 * scale)
    assert np.all(found.gap <= GAP * np.maximum(found.objective, 1e-5 * scale))


def test_a_problem_of_a_batch_is_solved_as_alone():
    Z, y, levels = problem(80, 4, 9)
    A = Z.transpose(2, 1, 0) - y
    rows = np.zeros(80), np.ones(80)
    together = solve(A, *rows, levels[:, None], np.ones(4, dtype=bool))
    for k in range(9):
        alone = solve(A[k : k + 1], *rows, levels[k : k + 1, None], np.ones(4, dtype=bool))
        assert alone.objective[0] == pytest.approx(together.objective[k], rel=1e-9)


@given(seeds, st.booleans(), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_basis_is_orthonormal_and_spans_what_is_independent(seed, intercept, copies):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(2, 4, 30)) * 10.0 ** rng.integers(-8, 8, size=(2, 4, 1))
    A = np.concatenate([A, A[:, :copies], A[:, :1] + A[:, 1:2]], axis=1)
    Q, T = basis(A, intercept)
    columns = np.concatenate([np.ones((2, 1, 30)), A], axis=1) if intercept else A
    assert Q.shape == columns.shape
    length = np.einsum("bqn,bqn->bq", Q, Q)
    assert np.all((np.abs(length - 1) < 1e-12) | (length == 0))
    # A's last row is the sum of two that may differ by 1e16 in size: then it repeats the larger one
    assert np.all(length.sum(axis=1) == pytest.approx(4 + intercept))
    gram = np.matmul(Q, Q.swapaxes(1, 2))
    assert gram == pytest.approx(np.einsum("bq,qr->bqr", length, np.eye(Q.shape[1])), abs=1e-12)
    made = np.matmul(T.swapaxes(1, 2), columns)
    size = np.matmul(np.abs(T).swapaxes(1, 2), np.abs(columns)).max()
    assert np.abs(Q - made).max() <= 1e-12 * max(1.0, size)
    rest = A - np.matmul(np.matmul(A, Q.swapaxes(1, 2)), Q)
    assert np.all(np.abs(rest).max(axis=2) <= 1e-7 * np.abs(A).max(axis=2))


# ------------------------------------------------------------------ linear quantile regression


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_linear_agrees_with_scikit_learn(alpha, weighted):
    from sklearn.linear_model import QuantileRegressor

    rng = np.random.default_rng(0)
    X, levels = rng.normal(size=(121, 4)), np.array([0.05, 0.3, 0.5, 0.9])  # 121 tau: no integer
    y = X[:, 0] - 0.5 * X[:, 1] + (1 + 0.5 * np.abs(X[:, 2])) * rng.normal(size=121) + 3
    s = rng.uniform(0.2, 2, size=121) if weighted else np.ones(121)
    slopes, intercepts = linear(X, y, levels, s / s.mean(), alpha)
    for k, level in enumerate(levels):
        peer = QuantileRegressor(quantile=level, alpha=alpha, solver="highs").fit(X, y, sample_weight=s)
        assert slopes[:, k] == pytest.approx(peer.coef_, abs=1e-6)
        assert intercepts[k] == pytest.approx(peer.intercept_, abs=1e-6)


def test_linear_takes_constant_and_repeated_features():
    rng = np.random.default_rng(1)
    X, y, levels = rng.normal(size=(80, 2)), rng.normal(size=80), np.array([0.2, 0.7])
    more = np.column_stack([X, X[:, 0], np.full(80, 7.0)])
    (a, b), (c, d) = linear(X, y, levels, np.ones(80)), linear(more, y, levels, np.ones(80))
    assert more @ c + d == pytest.approx(X @ a + b, abs=1e-6)


# ------------------------------------------------------------------ coarse on many residuals


@pytest.mark.parametrize("kind", ["plain", "duplicated", "ties", "outliers", "large"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_streamed_program_is_the_program(monkeypatch, kind, weighted):
    Z, y, levels = problem(400, 5, 49, kind)
    s = np.random.default_rng(0).integers(0, 3, size=400).astype(float) if weighted else np.ones(400)
    whole = coarse(Z, y, levels, s)
    monkeypatch.setattr(programs, "STREAM", 5000)  # of 19,600 residuals
    monkeypatch.setattr(programs, "_KEPT", 1000)
    monkeypatch.setattr(programs, "_BLOCK_BYTES", 1 << 16)  # several blocks of rows
    streamed = coarse(Z, y, levels, s)
    assert 0 <= streamed.gap <= GAP * streamed.objective
    assert streamed.objective == pytest.approx(whole.objective, rel=GAP)
    assert achieved(streamed, Z, y, levels, s) == pytest.approx(streamed.objective, rel=1e-9)


@given(seeds, st.sampled_from([9, 49]))
@settings(max_examples=25, deadline=None)
def test_the_reduced_program_touches_the_whole_from_below(seed, m):
    """Equal where it was made, nowhere above: so its lower bound is one for the whole."""
    rng = np.random.default_rng(seed)
    Z, y, levels = problem(50, 4, m, seed=seed)
    s, w = rng.uniform(0, 2, size=50), rng.dirichlet(np.ones(4))
    A, target, weight, tau = programs._reduced(Z, y, levels, s, w, rng.random((50, m)) < 0.2)

    def both(w):
        r, u = target[0] - w @ A[0], y[:, None] - w @ Z
        whole = s @ np.maximum(levels * u, (levels - 1) * u).sum(axis=1)
        return float(weight[0] @ np.maximum(tau[0] * r, (tau[0] - 1) * r)), float(whole)

    assert both(w)[0] == pytest.approx(both(w)[1], rel=1e-10)
    for other in rng.dirichlet(np.full(4, 0.3), size=20):
        reduced, whole = both(other)
        assert reduced <= whole * (1 + 1e-10)


MANY_ROWS = """
import json, resource, time
import numpy as np
from poise_quantagg.components import GlobalCoarse

n, p, m = {n}, 6, 99
levels, rng = np.arange(1, 100) / 100, np.random.default_rng(0)
grid = np.log(levels / (1 - levels))
Z, y = np.empty((n, p, m)), np.empty(n)
for i in range(0, n, 1 << 14):
    block = slice(i, min(n, i + (1 << 14)))
    center = rng.normal(size=(block.stop - i, 1, 1))
    y[block] = center[:, 0, 0] + rng.logistic(scale=0.5, size=block.stop - i)
    np.multiply(grid, rng.uniform(0.3, 0.7, size=(1, p, 1)), out=Z[block])
    Z[block] += center + 0.3 * rng.normal(size=(block.stop - i, p, 1))
start = time.perf_counter()
fitted = GlobalCoarse().fit(Z, y, levels=levels)
middle = time.perf_counter()
q = fitted.predict(Z)
end = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(dict(ratio=peak / Z.nbytes, fit=middle - start, predict=end - middle, shape=q.shape,
                      gap=fitted.gap / fitted.objective)))
"""


@pytest.mark.slow
def test_a_million_rows_take_at_most_half_of_z_beside_it():
    """Fit and predict on 1e6 x 6 x 99 float64, 4.75 GB."""
    done = subprocess.run([sys.executable, "-c", MANY_ROWS.format(n=1_000_000)], check=True,
                          capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    print(done.stdout)
    found = json.loads(done.stdout)
    assert found["shape"] == [1_000_000, 99]
    assert found["gap"] <= GAP
    assert found["ratio"] <= 1.5
