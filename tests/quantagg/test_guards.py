"""Guards that nothing else meets: each is reached by what it is there for, and says what to do."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from poise.errors import ConfigError, RunError
from poise_quantagg.checks import check_levels
from poise_quantagg.components import GlobalCoarse, MultiQuantileNet
from poise_quantagg.crossfit import cross_fit
from poise_quantagg.reference import pinball_program

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
