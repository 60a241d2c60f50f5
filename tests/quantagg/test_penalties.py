"""Crossing penalties: the fast forms equal the sum over all pairs, in value and gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import ConfigError, DataError
from poise_quantagg import penalties
from poise_quantagg.penalties import adaptive, adaptive_margins, all_pairs, constant, distance

seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from([1, 2, 3, 17, 32, 33, 34, 65, 99])


def sample(seed, shape, kind="random"):
    """Return predictions that cross anywhere, a little, at two levels, or not at all."""
    g = np.random.default_rng(seed).normal(size=shape)
    if kind != "random":
        g = np.sort(g, axis=-1)
    if kind == "noisy":
        g = g + 0.05 * np.random.default_rng(seed + 1).normal(size=shape)
    if kind == "swapped":  # two levels, mostly far apart
        i, j = np.random.default_rng(seed + 2).integers(shape[-1], size=2)
        g[..., [i, j]] = g[..., [j, i]]
    return torch.tensor(g, requires_grad=True)


def by_hand(g, delta):
    """The definition, in loops, for rows (n, m) and a margin matrix (m, m)."""
    n, m = g.shape
    pairs = [(i, j) for i in range(m) for j in range(i + 1, m)]
    total = sum(max(row[i] - row[j] + delta[i, j], 0.0) for row in g for i, j in pairs)
    return total / (n * max(m * (m - 1) / 2, 1))


def assert_same(fast, oracle, g, tolerance=1e-10):
    assert fast.shape == oracle.shape
    assert torch.allclose(fast, oracle, rtol=tolerance, atol=tolerance)
    weight = torch.linspace(0.5, 2, fast.numel(), dtype=fast.dtype).reshape(fast.shape)
    own, = torch.autograd.grad((fast * weight).sum(), g)
    base, = torch.autograd.grad((oracle * weight).sum(), g, retain_graph=True)
    assert torch.allclose(own, base, rtol=tolerance, atol=tolerance * 1e-3)


# ------------------------------------------------------------------ equality


def test_all_pairs_is_the_definition():
    g = sample(0, (4, 6))
    delta = np.random.default_rng(1).uniform(0, 1, (6, 6))
    assert all_pairs(g, torch.from_numpy(delta)).item() == pytest.approx(by_hand(g.detach().numpy(), delta))
    assert all_pairs(g, 0.3).item() == pytest.approx(by_hand(g.detach().numpy(), np.full((6, 6), 0.3)))
    assert all_pairs(g, 0.3, reduction="none").mean().item() == pytest.approx(all_pairs(g, 0.3).item())


@given(seeds, sizes, st.sampled_from(["random", "noisy", "monotone", "swapped"]),
       st.sampled_from([0.0, 1e-4, 0.0099, 0.3, 50.0]), st.sampled_from(["mean", "none"]))
@settings(max_examples=150, deadline=None)
def test_constant_margins_equal_all_pairs(seed, m, kind, delta, reduction):
    g = sample(seed, (5, m), kind)
    assert_same(constant(g, delta, reduction=reduction), all_pairs(g, delta, reduction=reduction), g)


@pytest.mark.parametrize("shape", [(99,), (3, 99), (4, 5, 99), (2, 1, 3, 7), (1, 1)])
@pytest.mark.parametrize("kind", ["random", "noisy"])
def test_any_leading_axes(shape, kind):
    g = sample(3, shape, kind)
    assert_same(constant(g, 0.02), all_pairs(g, 0.02), g)
    assert constant(g, 0.02, reduction="none").shape == shape[:-1]


def test_margins_by_configuration():
    g, delta = sample(4, (4, 5, 20)), torch.tensor([0.0, 0.1, 0.5, 9.0], dtype=torch.float64)[:, None]
    fast = constant(g, delta, reduction="none").mean(-1)
    assert_same(fast, all_pairs(g, delta[..., None, None], reduction="none").mean(-1), g)
    one_by_one = torch.stack([constant(g[c], float(delta[c])) for c in range(4)])
    assert torch.allclose(fast, one_by_one)


def test_many_rows_and_many_levels_take_more_than_one_block(monkeypatch):
    monkeypatch.setattr(penalties, "COUNT_PAIRS", 1000)
    g = sample(5, (103, 5))
    assert_same(constant(g, 0.1, reduction="none"), all_pairs(g, 0.1, reduction="none"), g)
    g = sample(6, (2, 300))  # counts beyond one byte
    assert_same(constant(g, 0.1), all_pairs(g, 0.1), g)
    g = torch.arange(300.0, 0, -1, dtype=torch.float64).requires_grad_()
    assert_same(constant(g, 0.1), all_pairs(g, 0.1), g)


@pytest.mark.parametrize("m", [7, 16, 17, 99, 256, 257, 512, 513, 1024, 1025])
@pytest.mark.parametrize("kind", ["random", "noisy", "monotone", "swapped", "ties"])
def test_merging_equals_all_pairs_at_any_size(monkeypatch, m, kind):
    if kind == "ties":  # quarters are exact, so that equal means equal
        g = torch.round(4 * sample(m, (3, m)).detach()).div(4).requires_grad_()
    else:
        g = sample(m, (3, m), kind)
    oracle = all_pairs(g, 0.25, reduction="none")
    assert_same(constant(g, 0.25, reduction="none"), oracle, g)  # whichever path is the usual one
    monkeypatch.setattr(penalties, "COMPARED", 0)
    assert_same(constant(g, 0.25, reduction="none"), oracle, g)
    monkeypatch.setattr(penalties, "COUNT_PAIRS", 1)  # a row at a time
    assert_same(constant(g, 0.25, reduction="none"), oracle, g)


@given(seeds, st.integers(1, 70), st.sampled_from(["random", "noisy", "swapped"]))
@settings(max_examples=60, deadline=None)
def test_merging_counts_the_pairs_that_comparing_counts(seed, m, kind):
    g, delta = sample(seed, (4, m), kind).detach(), torch.rand(4, dtype=torch.float64)
    active = (g[:, None, :] < (g + delta[:, None])[:, :, None]).triu(1)
    lower, upper = penalties._merge_counts(g, delta)
    assert torch.equal(lower, active.sum(2)) and torch.equal(upper, active.sum(1))


@pytest.mark.parametrize("compared", [0, 512])
def test_other_devices_take_the_same_two_ways(monkeypatch, compared):
    monkeypatch.setattr(penalties, "_hinge_on_cpu", penalties._hinge_elsewhere)
    monkeypatch.setattr(penalties, "COMPARED", compared)
    g, delta = sample(7, (3, 4, 40)), torch.rand(3, 1, dtype=torch.float64)
    assert_same(constant(g, delta), all_pairs(g, delta[..., None, None]), g)
    assert_same(constant(g, 0.1, reduction="none"), all_pairs(g, 0.1, reduction="none"), g)


@given(seeds, sizes, st.sampled_from(["mean", "none"]))
@settings(max_examples=40, deadline=None)
def test_adaptive_margins_equal_all_pairs(seed, m, reduction):
    g = sample(seed, (5, m), "noisy")
    h = np.sort(np.random.default_rng(seed).normal(size=m))
    oracle = all_pairs(g, torch.from_numpy(h[None] - h[:, None]), reduction=reduction)
    assert_same(adaptive(g, h, reduction=reduction), oracle, g)


def test_adaptive_margins_by_configuration():
    g, h = sample(8, (3, 4, 9)), torch.rand(3, 1, 9, dtype=torch.float64).sort().values
    assert_same(adaptive(g, h), all_pairs(g, h[..., None, :] - h[..., :, None]), g)


def test_distance_margins_equal_all_pairs():
    levels, g = np.arange(1, 20) / 20, sample(9, (3, 4, 19), "noisy")
    delta0 = torch.tensor([[0.1], [1.0], [40.0]], dtype=torch.float64)
    apart = torch.from_numpy(levels[None] - levels[:, None])
    assert_same(distance(g, levels, delta0), all_pairs(g, 0.01 * delta0[..., None, None] * apart), g)
    assert_same(distance(g, levels, 2.0), all_pairs(g, 0.02 * apart), g)
    assert distance(g, torch.from_numpy(levels), 2.0).item() == distance(g, levels, 2.0).item()


@pytest.mark.parametrize("penalty", [
    lambda g: constant(g, 0.3), lambda g: constant(g, 0.3, reduction="none"), lambda g: constant(g, 0.0),
    lambda g: adaptive(g, np.linspace(0, 1, 8)), lambda g: distance(g, np.arange(1, 9) / 9, 30.0),
])
def test_gradcheck(penalty):
    assert torch.autograd.gradcheck(penalty, sample(10, (2, 3, 8)))


# ------------------------------------------------------------------ what the penalty means


def test_it_is_zero_exactly_when_all_gaps_reach_the_margin():
    g = torch.arange(10.0, dtype=torch.float64).requires_grad_()
    assert constant(g, 0.5).item() == constant(g, 1.0).item() == 0
    assert constant(g, 1.5).item() == pytest.approx(0.5 * 9 / 45)
    constant(g, 1.0).backward()
    assert g.grad.abs().max() == 0


def test_ties_have_the_subgradient_of_relu():
    g = torch.tensor([1.0, 1.0, 0.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    for penalty in (constant(g, 0.0), adaptive(g, np.zeros(5))):
        assert_same(penalty, all_pairs(g, 0.0), g)


def test_moving_all_levels_changes_nothing_even_far_away():
    g = sample(11, (3, 99), "noisy")
    for penalty in (lambda x: constant(x, 0.01), lambda x: adaptive(x, np.zeros(99))):
        assert penalty(g + 1e6).item() == pytest.approx(penalty(g).item(), rel=1e-6)


def test_single_precision_stays_single_and_close():
    g = sample(12, (64, 99)).detach().float().requires_grad_()
    for value in (constant(g, 0.01), adaptive(g, np.linspace(0, 0.1, 99))):
        assert value.dtype == torch.float32
        assert torch.autograd.grad(value, g)[0].dtype == torch.float32
    assert constant(g, 0.01).item() == pytest.approx(all_pairs(g.double(), 0.01).item(), rel=1e-5)
    assert constant(g.half(), 0.01).dtype == torch.float16


@pytest.mark.parametrize("compared", [0, 512])
def test_nan_is_not_hidden(monkeypatch, compared):
    monkeypatch.setattr(penalties, "COMPARED", compared)
    g = torch.tensor([[2.0, float("nan"), 1.0]])
    assert constant(g, 0.1).isnan() and adaptive(g, np.zeros(3)).isnan()


# ------------------------------------------------------------------ adaptive margins


def test_adaptive_margins_are_quantiles_around_the_pilot_median():
    rng = np.random.default_rng(0)
    levels, Z, y = np.array([0.1, 0.5, 0.9]), rng.normal(size=(50, 4, 3)), rng.normal(size=50)
    expected = np.quantile(y - np.median(Z[:, :, 1], axis=1), levels)
    assert adaptive_margins(Z, y, levels) == pytest.approx(expected)
    assert np.all(np.diff(adaptive_margins(Z, y, levels)) >= 0)
    nearest = np.quantile(y - np.median(Z[:, :, 2], axis=1), [0.1, 0.2, 0.4])
    assert adaptive_margins(Z, y, [0.1, 0.2, 0.4]) == pytest.approx(nearest)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(("error", "call"), [
    (ConfigError, lambda g: constant(g, -0.1)),
    (ConfigError, lambda g: constant(g, float("nan"))),
    (ConfigError, lambda g: constant(g, torch.tensor([[0.1], [-0.1]]))),
    (ConfigError, lambda g: constant(g, 0.1, reduction="sum")),
    (ConfigError, lambda g: adaptive(g, np.array([1.0, 0.0, 2.0, 3.0]))),
    (ConfigError, lambda g: distance(g, [0.1, 0.5], 0.1)),
    (ConfigError, lambda g: distance(g, [0.1, 0.2, 0.3, 0.4], -1.0)),
    (DataError, lambda g: constant(g, torch.ones(7))),
    (DataError, lambda g: constant(torch.tensor(1.0), 0.1)),
    (DataError, lambda g: constant(torch.ones(3, 0), 0.1)),
    (DataError, lambda g: constant(torch.ones(3, 2, dtype=torch.long), 0.1)),
    (DataError, lambda g: adaptive(g, np.ones(3))),
    (DataError, lambda g: adaptive_margins(np.ones((2, 1, 4)), np.ones(3), np.arange(1, 5) / 5)),
])
def test_bad_input_is_refused_in_one_line(error, call):
    with pytest.raises(error) as caught:
        call(sample(0, (2, 3, 4)))
    assert "\n" not in str(caught.value)
