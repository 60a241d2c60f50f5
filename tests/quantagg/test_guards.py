"""Guards that nothing else meets: each is reached by what it is there for, and says what to do."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from poise.errors import ConfigError, DataError, RunError
from poise.interfaces import Arrays, Splits
from poise_quantagg import programs
from poise_quantagg.aggregators.simple import fqra
from poise_quantagg.calibration import Calibration
from poise_quantagg.checks import check_levels, row_weights
from poise_quantagg.comparison import relative_bootstrap
from poise_quantagg.components import Average, GlobalCoarse, LightGBM, Linear, MultiQuantileNet
from poise_quantagg.crossfit import cross_fit
from poise_quantagg.estimator import QuantileAggregatorRegressor
from poise_quantagg.reference import pinball_program
from poise_quantagg.splits import standardised
from poise_quantagg.vertex import _passing

LEVELS = [0.1, 0.5, 0.9]


def test_levels_that_nobody_can_guess_are_asked_for():
    assert check_levels(None, 3) == pytest.approx([0.25, 0.5, 0.75])
    with pytest.raises(ConfigError, match="levels are missing: give increasing numbers"):
        check_levels(None)


def test_a_program_without_an_optimum_is_said():
    A, y = np.random.default_rng(0).normal(size=(20, 2)), np.arange(20.0)
    with pytest.raises(RunError, match="HiGHS stopped without an optimum"):
        pinball_program(A, y, -np.ones(20), np.full(20, 0.5), simplex=False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_weights_that_cannot_be_trained_name_the_targets_range():
    rng = np.random.default_rng(0)
    y, Z = rng.normal(size=40), 1e300 * rng.normal(size=(40, 2, 3))
    component = GlobalCoarse(solver="gradient", start="uniform", n_iter=1, max_steps=5)
    with pytest.raises(RunError, match=r"no configuration of global_coarse .* y goes from -\d.* to \d"):
        component.fit(Z, y, levels=np.array(LEVELS))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_network_that_cannot_be_trained_is_said():
    X, y = np.random.default_rng(0).normal(size=(30, 2)), np.full(30, 1.7e308)  # their sum overflows
    with pytest.raises(RunError, match="no network of kind 'multi' has a finite validation loss"):
        MultiQuantileNet(levels=LEVELS, n_iter=1, max_steps=20).build().fit(X, y)


@dataclass(frozen=True)
class Moody:
    """A model that has no form in a file, and fails once a flag is there."""

    flag: str

    def build(self, spec=None):
        return self

    def fit(self, X, y, sample_weight=None):
        if Path(self.flag).exists():
            raise OSError("the licence\nran out")
        return self

    def predict_quantiles(self, X, levels=None):
        return np.tile(np.asarray(levels), (len(X), 1))


def test_a_cached_model_that_cannot_be_fitted_again_is_named(tmp_path):
    X, y, models = np.arange(12.0)[:, None], np.arange(12.0), {"moody": Moody(str(tmp_path / "flag"))}
    first = cross_fit(models, X, y, LEVELS, folds=3, cache=tmp_path / "cache")
    (tmp_path / "flag").touch()
    again = cross_fit(models, X, y, LEVELS, folds=3, cache=tmp_path / "cache")
    assert np.array_equal(again.Z, first.Z)
    with pytest.raises(RunError, match="moody failed when fitted again: OSError: the licence ran out"):
        again.predict(X)


def test_validation_rows_are_two_or_three_arrays():
    Z, y = np.zeros((6, 2, 3)), np.zeros(6)
    for bad in (Z, (Z,), (Z, y, None, None), {"Z": Z, "y": y}):
        with pytest.raises(DataError, match=r"validation must be \(Z, y\) or \(Z, y, X\)"):
            Average().fit(Z, y, validation=bad)


@pytest.mark.parametrize("seed", [-1, 0.5, "0", True, None])
def test_a_seed_is_a_whole_number_also_where_the_aggregator_draws_nothing(seed):
    model = QuantileAggregatorRegressor(LEVELS, ["linear"], "average", random_state=seed)
    with pytest.raises(ConfigError, match=r"^random_state=.*: allowed is a whole number >= 0"):
        model.fit(np.arange(20.0)[:, None], np.arange(20.0))


def test_weights_whose_sum_overflows_are_as_good_as_others():
    assert row_weights(1e308 * np.array([1.0, 1.0, 0.5, 1.5]), 4) == pytest.approx([1, 1, 0.5, 1.5])


def test_no_vertex_has_a_negative_weight_on_the_simplex():
    """The row is met at (1.00008, -0.00008), beside the weights (0.9999, 0.0001)."""
    A, w, both = np.array([[0.0], [0.05]]), np.array([1 - 1e-4, 1e-4]), np.array([True, True])
    assert _passing(A, np.array([4e-6]), both, w, 1e-5) == pytest.approx([1 - 8e-5, 8e-5])
    assert _passing(A, np.array([-4e-6]), both, w, 1e-5) is None


@pytest.mark.parametrize("n_jobs", [0, "two", 1.5, True])
def test_a_number_of_processes_is_a_whole_number(n_jobs):
    model = QuantileAggregatorRegressor(LEVELS, ["linear"], n_jobs=n_jobs)
    with pytest.raises(ConfigError, match=r"^n_jobs=.*: allowed is a number of processes; -1: all cores"):
        model.fit(np.arange(20.0)[:, None], np.arange(20.0))


def test_scores_are_compared_with_scores_of_their_own_form():
    for pair in (({"a": [1.0, 2.0]}, [1.0, 2.0]), ([1.0, 2.0], {"a": [1.0, 2.0]})):
        with pytest.raises(DataError, match="both must be arrays, or both dicts of arrays"):
            relative_bootstrap(*pair)


@pytest.mark.parametrize("constant", [0.0, 5.0, 1e6 / 3])
def test_a_constant_feature_says_nothing_and_harms_nothing(constant):
    rng = np.random.default_rng(0)
    X, new = rng.normal(size=(2, 40, 2))
    y = X[:, 0] + rng.normal(size=40)
    wide = np.column_stack([X, np.full(40, constant)])
    line, other = (Linear(levels=LEVELS).build().fit(rows, y) for rows in (X, wide))
    for value in (constant, constant + 1):  # rows of another value: nothing was learnt of it
        q = other.predict_quantiles(np.column_stack([new, np.full(40, value)]))
        assert q == pytest.approx(line.predict_quantiles(new), rel=1e-9)
    net = MultiQuantileNet(levels=LEVELS, n_iter=1, width=4, max_steps=20).build().fit(wide, y)
    assert np.isfinite(net.predict_quantiles(wide)).all()
    parts = [Arrays(wide[s], y[s]) for s in (slice(20), slice(20, 30), slice(30, 40))]
    split = standardised(Splits(*parts, {"source": "made"}, {}))
    assert np.abs(split.train.x[:, 2]).max() < 1e-6 and np.abs(split.test.x[:, 2]).max() < 1e-6


@pytest.mark.parametrize("seed", [3, 13, 37])
def test_a_gap_is_not_negative_where_the_bound_lies_above_the_optimum_by_rounding(seed):
    """Without a word for it these gaps are -1e-16 to -1e-18."""
    rng = np.random.default_rng(seed)
    Z, levels = rng.normal(size=(4, 2, 3)), np.array([0.2, 0.5, 0.8])
    assert programs.fine(Z, Z[:, 0, 0], levels, np.ones(4)).gap >= 0
    Z, y = rng.normal(size=(3, 3, 3)), np.full(3, 2.5)  # 2.5 itself: the factors' program is exact
    for choose in ("bic", "variance"):
        assert fqra(Z, y, levels, np.ones(3), factors=None, choose=choose, variance=0.9).gap >= 0


@pytest.mark.parametrize("levels", [[0.5], [0.2, 0.5], [0.2, 0.5, 0.9], [0.1, 0.3]])
def test_the_median_alone_is_no_pair_and_an_interval_is_calibrated_by_itself(levels):
    rng, levels = np.random.default_rng(0), np.array(levels)
    y, q = rng.normal(size=40), np.sort(rng.normal(size=(40, len(levels))), axis=1)
    found = Calibration(y, q, None, levels)
    assert found.pairs is None
    with warnings.catch_warnings(action="ignore"):  # some ends lie beyond the levels
        ends = found.interval(q, 0.4)
    assert ends.shape == (40, 2) and np.isfinite(ends).all()


def test_a_seed_reaches_lightgbm_as_a_number_that_it_holds():
    X, y = np.arange(20.0)[:, None], np.arange(20.0)
    for seed, told in ((5, 5), (2**31 - 1, 2**31 - 1), (2**31 + 5, 5)):
        model = LightGBM(levels=LEVELS, n_estimators=1, random_state=seed).build().fit(X, y)
        assert f"[seed: {told}]" in model.tensors()[1]["boosters"][0]


@dataclass(frozen=True)
class Counting:
    """A model that writes down on how many threads torch would work while it is fitted."""

    seen: list

    def build(self, spec=None):
        return self

    def fit(self, X, y, sample_weight=None):
        self.seen.extend(torch_threads())
        return self

    def predict_quantiles(self, X, levels=None):
        return np.tile(np.asarray(levels), (len(X), 1))


def torch_threads():
    """Return torch's number of threads in this thread and in a new one: torch keeps one for each."""
    with ThreadPoolExecutor(1) as pool:
        return [torch.get_num_threads(), pool.submit(torch.get_num_threads).result()]


def test_torch_has_one_thread_while_a_model_is_fitted_and_its_own_again_afterwards():
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        cross_fit({"counting": Counting(seen)}, np.arange(8.0)[:, None], np.arange(8.0), LEVELS, folds=2)
        assert set(seen) == {1} and torch_threads() == [3, 3]
    finally:
        torch.set_num_threads(before)
