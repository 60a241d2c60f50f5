"""Isotonisation: what each operator promises (T3 to T5) and what it does not, oracles, gradients."""

import warnings

import numpy as np
import pytest
import torch
from cases import some
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression
from scipy.stats import norm

from poise.errors import ConfigError, DataError
from poise_quantagg.checks import QuantileWarning
from poise_quantagg.monotone import isotonize, minmax, pava, sort
from poise_quantagg.scores import pinball_loss, wis_rows

LEVELS = np.arange(1, 20) / 20
OPERATORS = {"sort": sort, "pava": pava, "minmax": lambda q: minmax(q, LEVELS)}
GUARANTEED = [sort, pava]
seeds = st.integers(0, 2**32 - 1)


def rows(seed, n=100, m=19):
    """Return targets (n,) and predictions (n, m) of mixed scales: monotone, with ties, crossing."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-3, 3, size=(n, 1))
    q = rng.normal(size=(n, m))
    q[: n // 4] = np.sort(q[: n // 4])
    q[n // 4 : n // 2] = np.round(q[n // 4 : n // 2])
    return rng.normal(size=n) * scale[:, 0], q * scale


def crossing(q):
    return (np.diff(q, axis=1) < 0).any(axis=1)


# ------------------------------------------------------------------ what all operators do


@pytest.mark.parametrize("name", OPERATORS)
@given(seeds)
@settings(max_examples=20, deadline=None)
def test_outputs_are_monotone_and_monotone_rows_stay_bit_for_bit(name, seed):
    _, q = rows(seed)
    given_q, out = q.copy(), OPERATORS[name](q)
    assert np.all(np.diff(out, axis=1) >= 0)
    assert np.array_equal(out[~crossing(q)], q[~crossing(q)])
    assert np.array_equal(OPERATORS[name](out), out)
    assert np.array_equal(q, given_q) and not np.shares_memory(out, q)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_any_leading_axes_numpy_or_torch_give_the_same_in_the_same_kind(name, kind):
    q = rows(0, n=24)[1].astype(kind)
    flat = OPERATORS[name](q.astype(float))
    tolerance = {"rtol": 1e-6 if kind == np.float32 else 1e-14, "atol": 0}
    for shape in [(24, 19), (2, 3, 4, 19), (1, 24, 19)]:
        out = OPERATORS[name](q.reshape(shape))
        assert out.shape == shape
        np.testing.assert_allclose(out.reshape(24, 19), flat, **tolerance)
        tensor = OPERATORS[name](torch.from_numpy(q).reshape(shape))
        assert isinstance(tensor, torch.Tensor) and tensor.numpy().dtype == kind
        assert tensor.shape == shape
        np.testing.assert_allclose(tensor.reshape(24, 19).numpy(), flat, **tolerance)
    assert OPERATORS[name](q[3]).tolist() == OPERATORS[name](q[3:4])[0].tolist()
    assert OPERATORS[name](list(q[3])).shape == (19,)


@pytest.mark.parametrize("name", ["sort", "minmax"])
def test_infinite_ends_are_kept(name):
    q = np.zeros(19)
    q[0], q[-1] = -np.inf, np.inf
    assert np.array_equal(OPERATORS[name](q), q)


# ------------------------------------------------------------------ T3, T4


@pytest.mark.parametrize("operator", GUARANTEED)
@given(seeds, st.sampled_from([1, 2, 4, np.inf]))
@settings(max_examples=40, deadline=None)
def test_t3_no_row_moves_away_from_a_monotone_truth(operator, seed, order):
    _, q = rows(seed)
    truth = np.sort(rows(seed + 1)[1], axis=1)
    before = np.linalg.norm(q - truth, ord=order, axis=1)
    after = np.linalg.norm(operator(q) - truth, ord=order, axis=1)
    assert np.all(after <= before * (1 + 1e-12))


def test_t3_fails_for_the_sweep():
    g, truth = np.array([0.0, 5.0, 0.0]), np.zeros(3)
    swept = minmax(g, [0.25, 0.5, 0.75])
    assert swept.tolist() == [0, 5, 5]
    assert np.linalg.norm(swept - truth) > np.linalg.norm(g - truth)


@pytest.mark.parametrize("operator", GUARANTEED)
@given(seeds)
@settings(max_examples=40, deadline=None)
def test_t4_no_row_gets_a_higher_loss_and_crossing_rows_a_lower_one(operator, seed):
    y, q = rows(seed)
    gain = pinball_loss(y, q, LEVELS).sum(axis=1) - pinball_loss(y, operator(q), LEVELS).sum(axis=1)
    size = np.abs(y) + np.abs(q).max(axis=1)
    assert np.all(gain >= -1e-12 * size)
    assert np.all(gain[crossing(q)] > 0)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_t4_prime_the_gain_of_sorting_does_not_depend_on_y(seed):
    y, q = rows(seed)
    gain = pinball_loss(y, q, LEVELS).sum(axis=1) - pinball_loss(y, sort(q), LEVELS).sum(axis=1)
    assert np.all(np.abs(gain - (sort(q) - q) @ LEVELS) <= 1e-12 * (np.abs(y) + np.abs(q).max(axis=1)))


def test_t4_double_prime_sorting_needs_equal_level_weights_and_weighted_pava_does_not():
    weights, levels, g, y = np.array([10.0, 1.0]), [0.1, 0.2], np.array([[1.0, 0.0]]), [2.0]
    loss = [pinball_loss(y, q, levels)[0] @ weights for q in (g, sort(g), pava(g, weights), pava(g))]
    assert loss[:2] == pytest.approx([1.4, 2.2])
    assert loss[2] <= 1.4 < loss[3]  # equal weights in PAVA do not help either


@given(seeds, st.booleans())
@settings(max_examples=40, deadline=None)
def test_t4_weighted_pava_never_raises_the_loss_with_the_same_weights(seed, by_row):
    y, q = rows(seed)
    w = np.random.default_rng(seed).uniform(0.01, 10, size=q.shape if by_row else q.shape[1])
    before, after = ((w * pinball_loss(y, x, LEVELS)).sum(axis=1) for x in (q, pava(q, w)))
    assert np.all(after <= before + 1e-11 * (np.abs(y) + np.abs(q).max(axis=1)))


def test_t5_the_sweep_may_raise_the_wis_of_a_row():
    g, levels = np.array([[0.0, 5.0, 0.0]]), [0.25, 0.5, 0.75]
    before, after = (wis_rows([0.0], x, levels, "paper")[0] for x in (g, minmax(g, levels)))
    assert (before, after) == pytest.approx((5, 7.5))


@pytest.mark.parametrize(("m", "noise", "mean_falls"), [(19, 0.3, True), (99, 1.0, False)])
def test_t5_of_noisy_rows_about_half_or_more_get_worse_and_sometimes_their_mean(m, noise, mean_falls):
    rng, levels = np.random.default_rng(0), np.arange(1, m + 1) / (m + 1)
    y, q = rng.normal(size=4000), norm.ppf(levels) + noise * rng.normal(size=(4000, m))
    swept, kept = (wis_rows(y, x, levels, "hub") for x in (minmax(q, levels), q))
    assert (swept > kept).mean() > 0.4
    assert (swept.mean() < kept.mean()) == mean_falls


# ------------------------------------------------------------------ PAVA against an oracle


@given(seeds, st.integers(1, 40), st.sampled_from([None, "level", "row"]))
@settings(max_examples=60, deadline=None)
def test_pava_is_scipys_isotonic_regression(seed, m, kind):
    rng = np.random.default_rng(seed)
    q = rows(seed, n=12, m=m)[1]
    w = {None: None, "level": rng.uniform(0.1, 9, m), "row": rng.uniform(0.1, 9, (12, m))}[kind]
    each = [None] * 12 if w is None else np.broadcast_to(w, q.shape)
    oracle = np.stack([isotonic_regression(x, weights=v).x for x, v in zip(q, each, strict=True)])
    np.testing.assert_allclose(pava(q, w), oracle, rtol=0, atol=1e-13 * np.abs(q).max())


def test_pava_by_hand():
    assert pava([3.0, 1.0, 2.0]).tolist() == [2, 2, 2]
    assert pava([1.0, 3.0, 2.0, 5.0]).tolist() == [1, 2.5, 2.5, 5]
    assert pava([3.0, 0.0], [2.0, 1.0]).tolist() == [2, 2]


# ------------------------------------------------------------------ the sweep


def test_the_sweep_by_hand():
    q, levels = [3.0, 0.0, 1.0, 0.5, 2.0], [0.1, 0.3, 0.5, 0.7, 0.9]
    assert minmax(q, levels).tolist() == [0, 0, 1, 1, 2]


def test_without_a_median_the_nearest_level_is_the_pivot_and_of_two_the_lower():
    assert minmax([2.0, 1.0], [0.1, 0.9]).tolist() == [2, 2]
    assert minmax([2.0, 1.0, 0.0], [0.1, 0.2, 0.4]).tolist() == [0, 0, 0]
    assert minmax([2.0, 1.0, 0.0, 3.0], [0.3, 0.4, 0.6, 0.7]).tolist() == [1, 1, 1, 3]


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_the_sweep_only_enlarges_central_intervals(seed):
    _, q = rows(seed)
    out = minmax(q, LEVELS)
    assert np.array_equal(out[:, 9], q[:, 9])
    assert np.all(out[:, :9] <= q[:, :9]) and np.all(out[:, 10:] >= q[:, 10:])


# ------------------------------------------------------------------ gradients


def tensor(seed=0, shape=(2, 3, 8)):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape), requires_grad=True)


W = np.random.default_rng(9).uniform(0.2, 5, 8)


@pytest.mark.parametrize("operator", [
    sort, pava, lambda q: pava(q, W), lambda q: pava(q, torch.from_numpy(W)),
    lambda q: pava(q, np.tile(W, (2, 3, 1))), lambda q: minmax(q, np.arange(1, 9) / 9),
])
@pytest.mark.parametrize("seed", some(range(3), keep=[0]))
def test_gradients_are_exact(operator, seed):
    assert torch.autograd.gradcheck(operator, tensor(seed))
    assert torch.autograd.gradgradcheck(lambda q: operator(q) ** 2, tensor(seed))


def test_jacobians_are_a_permutation_a_block_average_and_a_selection():
    q = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian
    assert jacobian(sort, q).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert jacobian(pava, q).tolist() == [[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]]
    weighted = jacobian(lambda x: pava(x, [1.0, 3.0, 1.0]), q)
    assert weighted.tolist() == [[1, 0, 0], [0, 0.75, 0.25], [0, 0.75, 0.25]]
    assert jacobian(lambda x: minmax(x, [0.25, 0.5, 0.75]), q).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]


# ------------------------------------------------------------------ isotonize


def test_isotonize_dispatches():
    q = rows(1)[1]
    assert isotonize(q, None, LEVELS) is q
    for name, operator in OPERATORS.items():
        assert np.array_equal(isotonize(q, name, LEVELS), operator(q))
    w = np.arange(1.0, 20)
    assert np.array_equal(isotonize(q, "pava", LEVELS, w), pava(q, w))
    with pytest.raises(ConfigError, match="sort, pava, minmax"):
        isotonize(q, "isotonic", LEVELS)
    for name in OPERATORS:
        with pytest.raises(ConfigError, match="levels"):
            isotonize(q, name, LEVELS[:-1])


@pytest.mark.parametrize("weights", [np.arange(1.0, 20), torch.arange(1.0, 20)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_sorting_with_unequal_weights_warns_exactly_once(weights, as_tensor):
    q = torch.from_numpy(rows(1)[1]) if as_tensor else rows(1)[1]
    with pytest.warns(QuantileWarning, match="pava") as caught:
        isotonize(q, "sort", LEVELS, weights)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        isotonize(q, "sort", LEVELS, np.full(19, 0.3))
        isotonize(q, "pava", LEVELS, weights)
        isotonize(q, "minmax", LEVELS, weights)
        isotonize(q, None, LEVELS, weights)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("call", [
    lambda: sort(1.0), lambda: sort(np.empty((0, 3))), lambda: sort([np.nan, 1.0]),
    lambda: sort(torch.tensor([1, 2])), lambda: sort(torch.empty(0, 3)), lambda: pava([np.inf, 1.0]),
    lambda: pava([1.0, 2.0], [1.0]), lambda: pava([1.0, 2.0], [1.0, 0.0]),
    lambda: pava([1.0, 2.0], [1.0, -1.0]),
    lambda: pava(np.ones((2, 3)), np.ones((3, 3))), lambda: pava(torch.ones(2), [1.0, np.nan]),
    lambda: minmax(["a", "b"], [0.1, 0.9]),
])
def test_bad_arrays_are_refused_in_one_line(call):
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bad_levels_are_refused():
    for levels in ([0.9, 0.1], [0.5], [0.0, 1.0]):
        with pytest.raises(ConfigError):
            minmax([1.0, 2.0], levels)
