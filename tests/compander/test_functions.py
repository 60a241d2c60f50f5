"""Companding functions: inverse, derivatives, bounds, other people's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import ConfigError
from poise_compander import functions
from poise_compander.functions import FUNCTIONS, Function, arctan, check_function, erf, register, tanh

few = settings(max_examples=80, derandomize=True, deadline=None, database=None)
AB = st.floats(0.3, 3.0)
everywhere = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=lambda f: f.name)


def one(x):
    return torch.tensor([x], dtype=torch.float64)


@everywhere
@few
@given(a=AB, b=AB, share=st.floats(-0.98, 0.98))
def test_the_inverse_undoes_the_map(function, a, b, share):
    w = one(share * min(function.bound(a), 3.0))
    assert torch.allclose(function.forward(function.inverse(w, a, b), a, b), w, rtol=1e-12, atol=1e-15)


@everywhere
@few
@given(a=AB, b=AB, u=st.floats(-3, 3))
def test_the_map_undoes_the_inverse(function, a, b, u):
    v = one(b * u)
    assert torch.allclose(function.inverse(function.forward(v, a, b), a, b), v, rtol=1e-9, atol=1e-12)


@everywhere
@few
@given(a=AB, b=AB, v=st.floats(-4, 4))
def test_derivatives_are_slopes(function, a, b, v):
    v, h = one(v), 1e-6
    for found, up, down in (
        (function.derivative, function.forward(v + h, a, b), function.forward(v - h, a, b)),
        (function.by_a, function.forward(v, a + h, b), function.forward(v, a - h, b)),
        (function.by_b, function.forward(v, a, b + h), function.forward(v, a, b - h)),
    ):
        assert torch.allclose(found(v, a, b), (up - down) / (2 * h), rtol=1e-6, atol=1e-8)


@everywhere
def test_autograd_agrees_with_every_derivative(function):
    v = torch.linspace(-3, 3, 41, dtype=torch.float64).requires_grad_()
    a, b = one(0.9).requires_grad_(), one(0.6).requires_grad_()
    assert torch.autograd.gradcheck(function.forward, (v, a, b))
    by = torch.autograd.grad(function.forward(v, a, b).sum(), (v, a, b))
    with torch.no_grad():
        assert torch.allclose(by[0], function.derivative(v, a, b), rtol=1e-10, atol=1e-14)
        assert torch.allclose(by[1], function.by_a(v, a, b).sum(), rtol=1e-10, atol=1e-12)
        assert torch.allclose(by[2], function.by_b(v, a, b).sum(), rtol=1e-10, atol=1e-12)


def test_forms_that_the_paper_gives():
    """Psi' = (a/b) cos^2(w/a) = ab/(b^2 + v^2); dw/da = w/a; dw/db = -(v/b) Psi'."""
    v, a, b = torch.linspace(-9, 9, 101, dtype=torch.float64), 0.8, 0.5
    w, slope = arctan.forward(v, a, b), arctan.derivative(v, a, b)
    assert torch.allclose(slope, a / b * torch.cos(w / a).square(), rtol=1e-10)
    assert torch.allclose(slope, a * b / (b * b + v * v), rtol=1e-14)
    assert torch.allclose(arctan.by_a(v, a, b), w / a, rtol=1e-14)
    assert arctan.bound(a) == a * math.pi / 2 and erf.bound(a) == tanh.bound(a) == a
    assert functions.arsinh.bound(a) == math.inf


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_out_nothing_overflows_or_cancels(function, dtype):
    v = torch.tensor([-1e30, -50.0, -9.0, 0.0, 9.0, 50.0, 1e30], dtype=dtype)
    w, slope = function.forward(v, 0.7, 0.7), function.derivative(v, 0.7, 0.7)
    assert torch.isfinite(w).all() and torch.isfinite(slope).all() and (slope >= 0).all()
    assert w.abs().max() <= torch.tensor(function.bound(0.7), dtype=dtype)
    assert torch.equal(slope, slope.flip(0))
    exact = function.derivative(v[2:5].double(), 0.7, 0.7)
    assert torch.allclose(slope[2:5].double(), exact, rtol=2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("function", [arctan, erf, tanh], ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_and_beyond_the_bound_there_is_no_inverse(function, dtype):
    """A bare tan would return another branch: tan(2.0 / 0.7) maps to -0.199."""
    bound = function.bound(0.7)
    w = torch.tensor([bound * 1.0001, -bound * 1.0001, 2.0, -5.0], dtype=dtype)
    assert torch.isnan(function.inverse(w, 0.7, 1.0)).all()
    assert float(0.7 * torch.atan(torch.tan(torch.tensor(2.0) / 0.7))) == pytest.approx(-0.199, abs=1e-3)


@pytest.mark.parametrize("function", [arctan, erf, tanh], ids=lambda f: f.name)
def test_near_the_bound_float32_comes_back(function):
    w = torch.tensor([0.9, 0.99, 0.9995], dtype=torch.float32) * function.bound(0.7)
    v = function.inverse(w, 0.7, 0.8)
    assert v.dtype == torch.float32 and (v.diff() > 0).all()
    assert torch.allclose(function.forward(v, 0.7, 0.8), w, rtol=3e-7)


@everywhere
def test_tensors_arrays_and_numbers_give_back_their_kind(function):
    t = function.forward(torch.tensor([0.3]), 0.7, 0.6)
    n = function.forward(np.array([0.3], dtype=np.float32), 0.7, 0.6)
    x = function.forward(0.3, 0.7, 0.6)
    assert isinstance(t, torch.Tensor) and n.dtype == np.float32 and isinstance(x, float)
    assert float(t) == float(n[0]) == pytest.approx(x, rel=1e-6)
    for act in (function.inverse, function.derivative, function.by_a, function.by_b):
        assert isinstance(act(np.array([0.3]), 0.7, 0.6), np.ndarray)
        assert isinstance(act(0.3, 0.7, 0.6), float)


@everywhere
def test_whole_numbers_are_real_ones(function):
    assert function.forward(1, 0.7, 0.6) == function.forward(1.0, 0.7, 0.6)
    assert function.inverse(torch.tensor([0, 1]), 2.0, 0.6)[1] == pytest.approx(
        function.inverse(1.0, 2.0, 0.6), rel=1e-6)
    assert function.inverse(np.array([0, 1]), 2.0, 0.6)[1] == function.inverse(1.0, 2.0, 0.6)


@everywhere
@pytest.mark.parametrize("make", [
    lambda x: x[::-1], lambda x: x.astype(">f8"), lambda x: x.astype(np.longdouble),
    lambda x: x.astype(">f4"), lambda x: np.broadcast_to(x, (2, 5))])
def test_arrays_of_any_layout(function, make):
    x = np.linspace(-0.4, 0.4, 5)
    for act in (function.forward, function.inverse, function.derivative):
        found = act(make(x), 0.7, 0.6)
        assert isinstance(found, np.ndarray)
        assert np.allclose(found, make(act(x, 0.7, 0.6)).astype(float), rtol=1e-6)


@everywhere
def test_a_and_b_may_be_arrays_too(function):
    v, a, b = np.array([0.1, 0.2]), np.array([0.7, 0.8]), np.array([0.5, 0.6])
    one_by_one = [function.forward(*three) for three in zip(v, a, b)]
    assert np.array_equal(function.forward(v, a, b), one_by_one)


@pytest.mark.parametrize("x", [None, "1", 1j, np.array([1j]), [None]])
def test_what_is_no_real_number_is_refused(x):
    with pytest.raises(ConfigError, match="take real numbers, not"):
        arctan.forward(x, 0.7, 0.6)


# ------------------------------------------------------------------ other people's


def softsign(**changes):
    parts = {"name": "softsign", "psi": lambda u: u / (1 + u.abs()),
             "psi_inverse": lambda u: u / (1 - u.abs()),
             "psi_derivative": lambda u: 1 / (1 + u.abs()).square(), "limit": 1.0}
    return Function(**parts | changes)


@pytest.fixture
def registered():
    yield register(softsign())
    del FUNCTIONS["softsign"]


def test_a_function_of_ones_own_is_registered(registered):
    assert functions.named("softsign") is registered
    with pytest.raises(ConfigError, match="there is a function 'softsign' already"):
        register(softsign())


@pytest.mark.parametrize(("changes", "fault"), [
    ({"psi": lambda u: u / (1 + u.abs()) + 0.01}, "is not odd"),
    ({"psi": lambda u: -u, "psi_derivative": lambda u: -torch.ones_like(u)}, "is not increasing"),
    ({"limit": 0.5}, "exceeds its bound"),
    ({"psi": lambda u: u / (1 + u.abs()) + (u.abs() > 50) * u.sign()}, "exceeds its bound .* far out"),
    ({"limit": 2.0}, "has limit 2, but does not reach it"),
    ({"limit": math.inf}, "has limit inf, but does not reach it"),
    ({"psi_inverse": lambda u: u}, "has another inverse"),
    ({"psi_derivative": lambda u: 1 / (1 + u.abs())}, "has another derivative"),
])
def test_a_function_that_contradicts_itself_is_refused(changes, fault):
    with pytest.raises(ConfigError, match=f"companding function 'softsign' {fault}"):
        register(softsign(**changes))
    assert "softsign" not in FUNCTIONS


@everywhere
def test_the_builtin_ones_pass_the_same_check(function):
    check_function(function)
    check_function(function, 2.0, 0.1)


def test_an_unknown_function_is_refused_with_a_near_name():
    with pytest.raises(ConfigError, match="no function 'arctann'; did you mean 'arctan'"):
        functions.named("arctann")
