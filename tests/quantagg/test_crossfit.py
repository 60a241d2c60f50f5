"""Cross-fitting: nothing leaks, folds of every kind, jobs, failures, the cache that resumes."""

import functools
import pickle
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from cases import some
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import KFold, RepeatedKFold, ShuffleSplit, TimeSeriesSplit

from poise.errors import ConfigError, DataError, RunError
from poise_quantagg import cache, crossfit, jobs
from poise_quantagg.adapters import per_level, wrap
from poise_quantagg.base.regressor import JoinedLevels
from poise_quantagg.checks import QuantileWarning
from poise_quantagg.components import (
    ExtraTrees,
    GaussianNet,
    HistBoosting,
    LightGBM,
    Linear,
    MultiQuantileNet,
    QuantileForest,
)
from poise_quantagg.crossfit import cross_fit, pair_predictions
from poise_quantagg.folds import assign_folds, make_folds

LEVELS = [0.1, 0.25, 0.5, 0.75, 0.9]
NET = {"n_iter": 2, "width": 8, "depth": 2, "lr": 0.01, "max_steps": 60}


def table(n=200):
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return x[:n], y[:n]


@dataclass(frozen=True)
class Parrot:
    """Predicts the target of the nearest row it has seen, so a leak shows as a perfect hit."""

    shift: float = 0.0

    def build(self, spec=None):
        return FittedParrot(self.shift)


class FittedParrot:
    def __init__(self, shift=0.0):
        self.shift = shift

    def fit(self, X, y, sample_weight=None):
        self.x, self.y, self.weight = X[:, 0], y, sample_weight
        return self

    def predict_quantiles(self, X, levels=None):
        nearest = np.abs(X[:, :1] - self.x).argmin(axis=1)
        return np.repeat(self.y[nearest][:, None] + self.shift, len(levels), axis=1)


@dataclass(frozen=True)
class Faulty:
    """Fails where the training rows lack a row, or with what it predicts."""

    without: float | None = None
    predicts: str = ""

    def build(self, spec=None):
        return self

    def fit(self, X, y, sample_weight=None):
        if self.without is not None and self.without not in X[:, 0]:
            raise ZeroDivisionError("no such\nrow")
        return self

    def predict_quantiles(self, X, levels=None):
        q = np.zeros((len(X), len(levels)))
        return {"": q, "nan": q * np.nan, "shape": q[:, :-1]}[self.predicts]


def line(n=53):
    return np.arange(float(n))[:, None], np.arange(float(n)) + 100


# ------------------------------------------------------------------ what out-of-fold means


def test_every_row_is_predicted_once_by_a_model_that_has_not_seen_it():
    x, y = line()
    done = []
    fits = cross_fit({"parrot": Parrot()}, x, y, LEVELS, folds=4, seed=1, progress=done.append)
    assert fits.Z.shape == (53, 1, 5) and np.isfinite(fits.Z).all() and fits.covered.all()
    assert not np.any(fits.Z[:, 0, 0] == y)
    assert done == [f"parrot, fold {k}/4" for k in (1, 2, 3, 4)]
    for k, model in enumerate(fits.models["parrot"]):
        assert np.array_equal(np.sort(model.y), y[fits.fold != k])
        assert np.array_equal(fits.Z[fits.fold == k, 0], model.predict_quantiles(x[fits.fold == k], LEVELS))


def test_new_rows_are_predicted_by_the_mean_over_folds_or_by_a_model_of_all_rows():
    x, y = line()
    models = {"parrot": Parrot(), "other": Parrot(7.0)}
    bag = cross_fit(models, x, y, LEVELS, folds=4)
    folds = bag.predict_folds(x)
    assert folds.shape == (4, 53, 2, 5) and bag.whole == {}
    assert np.array_equal(bag.predict(x), folds.mean(axis=0))
    assert np.array_equal(folds[2, :, 1], bag.models["other"][2].predict_quantiles(x, LEVELS))
    done = []
    every = cross_fit(models, x, y, LEVELS, folds=4, refit="all", progress=done.append)
    assert np.array_equal(every.predict(x)[:, 0, 0], y) and np.array_equal(every.predict(x)[:, 1, 0], y + 7)
    assert np.array_equal(every.Z, bag.Z) and len(every.models["parrot"]) == 4
    assert done[4] == "parrot, all rows"


@pytest.mark.parametrize("refit", ["bag", "all"])
@pytest.mark.parametrize("model", [Linear(), LightGBM(n_estimators=5), GaussianNet(**NET)],
                         ids=["linear", "lightgbm", "net"])
def test_extra_rows_are_predicted_as_new_rows_are(refit, model):
    x, y = table(120)
    fits = cross_fit({"it": model}, x[:90], y[:90], LEVELS, folds=3, refit=refit, extra=x[90:])
    assert fits.extra is not None and fits.extra.shape == (30, 1, 5)
    assert fits.extra == pytest.approx(fits.predict(x[90:]), rel=1e-12)


def test_sample_weights_reach_the_rows_they_belong_to():
    x, y = line(20)
    weight = np.arange(20.0)
    fits = cross_fit({"parrot": Parrot()}, x, y, LEVELS, folds=4, sample_weight=weight)
    for k, model in enumerate(fits.models["parrot"]):
        train = (fits.fold != k) & (weight > 0)
        assert model.weight == pytest.approx(weight[train] / weight[1:].mean())
        assert np.array_equal(model.x, x[train, 0])
    bare = cross_fit({"parrot": Parrot()}, x, y, LEVELS, folds=4)
    assert bare.models["parrot"][0].weight is None


# ------------------------------------------------------------------ folds


def test_folds_are_even_shuffled_and_decided_by_the_seed():
    fold = assign_folds(53, 5, seed=3)
    assert sorted(np.bincount(fold)) == [10, 10, 11, 11, 11]
    assert np.array_equal(fold, assign_folds(53, 5, seed=3))
    assert not np.array_equal(fold, assign_folds(53, 5, seed=4))
    assert np.any(np.diff(fold) < 0)


@given(st.lists(st.integers(0, 9), min_size=12, max_size=60), st.integers(2, 4), st.integers(0, 99))
@settings(max_examples=60)
def test_a_group_is_never_split(groups, folds, seed):
    groups = np.array(groups)
    x, y = line(len(groups))
    names = len(np.unique(groups))
    if names < folds:
        with pytest.raises(ConfigError, match=f"folds={folds}: allowed is 2 <= folds <= {names} groups"):
            make_folds(x, y, folds, seed, groups)
        return
    parts = make_folds(x, y, folds, seed, groups)
    held = np.concatenate([rows for _, rows in parts])
    assert sorted(held) == list(range(len(y)))
    for train, test in parts:
        assert len(test) and not set(groups[train]) & set(groups[test])
        assert sorted([*train, *test]) == list(range(len(y)))
    sizes = [len(test) for _, test in parts]
    assert max(sizes) - min(sizes) <= np.bincount(groups).max()


def test_groups_of_any_names_reach_cross_fit():
    x, y = line(12)
    groups = np.repeat(["ann", "bob", "cid", "dan"], 3)
    fits = cross_fit({"parrot": Parrot()}, x, y, LEVELS, folds=2, groups=groups)
    assert all(len(set(fits.fold[groups == g])) == 1 for g in groups)
    with pytest.raises(DataError, match=r"groups has shape \(11,\), y has 12 rows"):
        cross_fit({"parrot": Parrot()}, x, y, LEVELS, folds=2, groups=groups[1:])


def test_a_splitter_decides_the_folds_itself():
    x, y = line(12)
    fits = cross_fit({"parrot": Parrot()}, x, y, LEVELS, folds=KFold(3))
    assert np.array_equal(fits.fold, np.repeat([0, 1, 2], 4))
    for splitter in (RepeatedKFold(n_splits=3, n_repeats=2), ShuffleSplit(8, random_state=0)):
        with pytest.raises(ConfigError, match="holds out some rows twice"):
            cross_fit({"parrot": Parrot()}, x, y, LEVELS, folds=splitter)


def test_time_splits_leave_the_first_rows_without_prediction_and_see_only_the_past():
    x, y = line(24)
    fits = cross_fit({"parrot": Parrot(), "linear": Linear()}, x, y, LEVELS, folds=TimeSeriesSplit(3))
    assert np.array_equal(fits.fold, np.repeat([-1, 0, 1, 2], 6))
    assert np.isnan(fits.Z[:6]).all() and np.isfinite(fits.Z[6:]).all()
    assert np.array_equal(fits.covered, fits.fold >= 0)
    assert (fits.Z[6:, 0, 0] < y[6:]).all()  # the nearest row of the past
    assert np.isfinite(fits.predict(x)).all()


# ------------------------------------------------------------------ jobs


@pytest.mark.parametrize("model", [LightGBM(n_estimators=5), HistBoosting(max_iter=5)],
                         ids=["lightgbm", "hist_boosting"])
def test_levels_in_blocks_give_what_all_levels_together_give(model, monkeypatch):
    x, y = table(90)
    levels = np.arange(1, 61) / 61
    done = []
    blocks = cross_fit({"it": model}, x, y, levels, folds=2, progress=done.append)
    assert len(done) == 6 and done[0] == "it, fold 1/2, levels 0.0163934..0.327869"
    assert isinstance(blocks.models["it"][0], JoinedLevels)
    monkeypatch.setattr(jobs, "LEVELS_OF_A_JOB", 100)
    whole = cross_fit({"it": model}, x, y, levels, folds=2)
    assert np.array_equal(blocks.Z, whole.Z)
    assert np.array_equal(blocks.predict(x), whole.predict(x))
    fitted = blocks.models["it"][0]
    assert np.array_equal(fitted.predict_quantiles(x, [0.3, 0.5]),
                          whole.models["it"][0].predict_quantiles(x, [0.3, 0.5]))


def test_a_grid_of_levels_is_interpolated_to_all():
    x, y = table(90)
    levels = np.arange(1, 100) / 100
    done = []
    fits = cross_fit({"it": LightGBM(n_estimators=5, grid=11)}, x, y, levels, folds=2, progress=done.append)
    assert len(done) == 2 and fits.Z.shape == (90, 1, 99)
    direct = LightGBM(levels=levels.tolist(), n_estimators=5, grid=11).build()
    held = fits.fold == 0
    assert fits.Z[held, 0] == pytest.approx(direct.fit(x[~held], y[~held]).predict_quantiles(x[held]))
    assert np.isfinite(fits.predict(x)).all()


@pytest.mark.parametrize("refit", ["bag", "all"])
def test_the_folds_of_a_network_are_one_job(refit):
    x, y = table(90)
    done = []
    model = MultiQuantileNet(**NET)
    fits = cross_fit({"net": model}, x, y, LEVELS, folds=3, refit=refit, progress=done.append)
    assert done == [f"net, {3 + (refit == 'all')} folds"]
    assert len(fits.models["net"]) == 3 and len(fits.whole) == (refit == "all")
    held = fits.fold == 1
    assert np.array_equal(fits.models["net"][1].predict_quantiles(x[held]), fits.Z[held, 0])


def test_the_result_does_not_depend_on_the_number_of_processes():
    x, y = table(100)
    models = {"linear": Linear(), "forest": QuantileForest(n_estimators=5), "net": GaussianNet(**NET)}
    one, two = (cross_fit(models, x, y, LEVELS, folds=3, n_jobs=j) for j in (1, 2))
    assert np.array_equal(one.Z, two.Z)
    assert np.array_equal(one.predict(x), two.predict(x))


@dataclass(frozen=True)
class CountsThreads:
    """Predicts how many threads BLAS, OpenMP and torch would use."""

    def build(self, spec=None):
        return self

    def fit(self, X, y, sample_weight=None):
        return self

    def predict_quantiles(self, X, levels=None):
        import threadpoolctl
        import torch

        pools = threadpoolctl.threadpool_info()
        most = max([torch.get_num_threads(), *(p["num_threads"] for p in pools)])
        return np.full((len(X), len(levels)), float(most))


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_job_uses_one_thread_and_gives_the_others_back(n_jobs):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x, y = line(10)
        fits = cross_fit({"threads": CountsThreads()}, x, y, LEVELS, folds=2, n_jobs=n_jobs)
        assert np.unique(fits.Z).tolist() == [1.0]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------ bad input and failures


def test_cross_fitting_refuses_what_it_cannot_use():
    x, y = table(20)
    fit = functools.partial(cross_fit, {"linear": Linear()}, x, y, LEVELS)
    for folds in (1, 21):
        with pytest.raises(ConfigError, match=f"folds={folds}: allowed is 2 <= folds <= 20 rows"):
            fit(folds=folds)
    for folds in (True, 2.0, "five", None):
        with pytest.raises(ConfigError, match="allowed is a number, a splitter"):
            fit(folds=folds)
    with pytest.raises(ConfigError, match="refit='none': allowed is one of bag, all"):
        fit(refit="none")
    with pytest.raises(ConfigError, match="no models"):
        cross_fit({}, x, y, LEVELS)
    with pytest.raises(DataError, match="y has 19"):
        cross_fit({"linear": Linear()}, x, y[:-1], LEVELS)
    for levels in ([0.5, 0.1], [0.5, 0.5], [0.0, 0.5], [0.5, 1.0], []):
        with pytest.raises(ConfigError, match="levels="):
            cross_fit({"linear": Linear()}, x, y, levels)
    for name in ("X", "y", "extra"):
        broken = {"X": x.copy(), "y": y.copy(), "extra": x.copy()}
        broken[name][[2, 5]] = np.inf
        with pytest.raises(DataError, match=f"{name}.* in 2 rows, first rows 2, 5"):
            cross_fit({"linear": Linear()}, broken["X"], broken["y"], LEVELS, extra=broken["extra"])
    with pytest.raises(DataError, match="sample_weight"):
        fit(sample_weight=-np.ones(20))


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_model_that_fails_in_one_fold_is_left_out_and_named_once(n_jobs):
    x, y = line(12)
    models = {"before": Parrot(), "broken": Faulty(without=5.0), "after": Parrot(1.0)}
    with pytest.warns(QuantileWarning) as caught:
        fits = cross_fit(models, x, y, LEVELS, folds=KFold(3), n_jobs=n_jobs)
    assert len(caught) == 1
    assert str(caught[0].message).endswith("broken (fold 2/3: ZeroDivisionError: no such row)")
    assert list(fits.models) == ["before", "after"] and fits.Z.shape == (12, 2, 5)
    assert fits.failures == {"broken": "fold 2/3: ZeroDivisionError: no such row"}
    assert np.array_equal(fits.Z[:, 1], fits.Z[:, 0] + 1)


@pytest.mark.parametrize(("predicts", "words"), [
    ("nan", "prediction of broken has NaN or Inf in"),
    ("shape", r"broken predicts shape \(4, 4\), not \(4, 5\)"),
])
def test_predictions_that_are_none_are_a_failure_too(predicts, words):
    x, y = line(12)
    with pytest.warns(QuantileWarning, match=words):
        fits = cross_fit({"parrot": Parrot(), "broken": Faulty(predicts=predicts)}, x, y, LEVELS, folds=3)
    assert list(fits.models) == ["parrot"]


def test_when_all_fail_every_reason_is_given():
    x, y = line(12)
    models = {"a": Faulty(without=5.0), "b": Faulty(predicts="nan")}
    with pytest.raises(RunError, match=r"every model failed: a: fold 2/3: Zero.*; b: fold 1/3: DataError"):
        cross_fit(models, x, y, LEVELS, folds=KFold(3))


# ------------------------------------------------------------------ pairs of folds


def test_pairs_of_folds_are_predicted_by_models_that_saw_neither():
    x, y = line(20)
    fold = np.arange(20) % 4
    pairs = pair_predictions({"parrot": Parrot(), "other": Parrot(1.0)}, x, y, np.array(LEVELS), fold)
    assert list(pairs) == [(k, l) for k in range(4) for l in range(k + 1, 4)]
    for (k, l), Z in pairs.items():
        rows = np.flatnonzero((fold == k) | (fold == l))
        assert Z.shape == (10, 2, 5) and np.array_equal(Z[:, 1], Z[:, 0] + 1)
        assert not np.isin(Z[:, 0, 0], y[rows]).any()
    with pytest.raises(RunError, match=r"a model failed on a pair of folds: broken \(.*ZeroDivisionError"):
        pair_predictions({"broken": Faulty(without=5.0)}, x, y, np.array(LEVELS), fold)


# ------------------------------------------------------------------ the cache


class Stopped(Exception):
    pass


def stop_after(count):
    """Return a progress that raises after so many jobs, and what it was told."""
    told = []

    def progress(what):
        told.append(what)
        if len(told) == count:
            raise Stopped

    return progress, told


MODELS = {"linear": Linear(), "trees": ExtraTrees(n_estimators=3), "boosted": LightGBM(n_estimators=4),
          "net": MultiQuantileNet(**NET), "hist": HistBoosting(max_iter=3)}


@pytest.fixture(scope="module")
def fresh():
    x, y = table(80)
    return cross_fit(MODELS, x[:60], y[:60], LEVELS, folds=3, extra=x[60:])


def resumed(cache, said=None, models=MODELS, **options):
    x, y = table(80)
    return cross_fit(models, x[:60], y[:60], LEVELS, folds=3, extra=x[60:], cache=cache,
                     progress=None if said is None else said.append, **options)


def same(one, two):
    x, _ = table(80)
    return (np.array_equal(one.Z, two.Z) and np.array_equal(one.extra, two.extra)
            and np.array_equal(one.predict(x), two.predict(x))
            and np.array_equal(one.predict_folds(x), two.predict_folds(x)))


@pytest.mark.parametrize("after", [1, 4, 10, 13])
def test_an_interrupted_fit_goes_on_where_it_was(after, fresh, tmp_path):
    progress, told = stop_after(after)
    with pytest.raises(Stopped):
        x, y = table(80)
        cross_fit(MODELS, x[:60], y[:60], LEVELS, folds=3, extra=x[60:], cache=tmp_path, progress=progress)
    said = []
    again = resumed(tmp_path, said)
    assert sorted(s.removesuffix(" (cached)") for s in said) == sorted(resumed_labels())
    assert [s for s in said if s.endswith("(cached)")] == [f"{s} (cached)" for s in told]
    assert same(again, fresh)
    assert same(pickle.loads(pickle.dumps(again)), fresh)


def resumed_labels():
    return [f"{name}, fold {k}/3" for name in MODELS if name != "net" for k in (1, 2, 3)] + ["net, 3 folds"]


def fits_again(monkeypatch):
    """Count the fits by model."""
    real, count = jobs.fit, Counter()

    def fit(job, *args):
        count[job.name] += 1
        return real(job, *args)

    for module in (cache, crossfit):
        monkeypatch.setattr(module, "fit", fit)
    return count


def test_models_are_read_or_fitted_once_when_new_rows_ask_for_them(fresh, tmp_path, monkeypatch):
    resumed(tmp_path)
    count = fits_again(monkeypatch)
    again = resumed(tmp_path)
    assert same(again, fresh)
    assert count == {"hist": 3}  # the only one that has no form without pickle


def test_a_network_without_its_file_is_fitted_once_for_all_folds(tmp_path, monkeypatch):
    models = {"net": MODELS["net"]}
    first = resumed(tmp_path, models=models)
    for file in tmp_path.glob("*_0.*"):
        file.unlink()
    count = fits_again(monkeypatch)
    again = resumed(tmp_path, models=models)
    assert np.array_equal(again.Z, first.Z) and count == {}
    assert same(again, first) and count == {"net": 1}


DAMAGE = {
    "torn": lambda f: f.write_bytes(f.read_bytes()[:-9]), "empty": lambda f: f.write_bytes(b""),
    "missing": lambda f: f.unlink(),
    "altered": lambda f: f.write_bytes(bytes([f.read_bytes()[0] ^ 1]) + f.read_bytes()[1:]),
}


@pytest.mark.parametrize(("kind", "how"), some(
    product(["json", "safetensors"], DAMAGE),
    keep=[("json", "torn"), ("json", "missing"), ("safetensors", "empty"), ("safetensors", "altered")]))
def test_a_damaged_file_is_computed_again(how, kind, fresh, tmp_path):
    resumed(tmp_path)
    files = sorted(tmp_path.glob(f"*.{kind}"), key=lambda f: ("_" in f.stem, f.name))
    for file in files[:6] + files[-9:]:  # predictions of some jobs, models of some
        DAMAGE[how](file)
    said = []
    assert same(resumed(tmp_path, said), fresh)
    assert sum(not s.endswith("(cached)") for s in said) == 6
    said.clear()
    resumed(tmp_path, said)
    assert all(s.endswith("(cached)") for s in said)


def test_failures_are_not_cached(tmp_path):
    x, y = line(12)
    for _ in range(2):
        said = []
        with pytest.warns(QuantileWarning, match="broken"):
            cross_fit({"parrot": Parrot(), "broken": Faulty(without=5.0)}, x, y, LEVELS, folds=KFold(3),
                      cache=tmp_path, progress=said.append)
    assert [s for s in said if not s.endswith("(cached)")] == ["broken, fold 2/3"]


def test_another_version_of_a_library_computes_again(tmp_path, monkeypatch):
    x, y = line(12)
    said = []
    for version in ("1", "1", "2"):
        monkeypatch.setattr(cache, "_libraries", lambda version=version: f"lightgbm={version}")
        cross_fit({"parrot": Parrot()}, x, y, LEVELS, folds=3, cache=tmp_path, progress=said.append)
    assert [s.endswith("(cached)") for s in said] == [False] * 3 + [True] * 3 + [False] * 3


def changed_at(array, at):
    out = array.copy()
    out[at] += 1
    return out


X_60, Y_60 = table(60)
SAME = {"models": {"m": ExtraTrees(n_estimators=2)}, "X": X_60, "y": Y_60, "levels": LEVELS, "folds": 3,
        "seed": 0}


@pytest.mark.parametrize(("change", "kept"), [
    ({}, 3), ({"models": {"other name": ExtraTrees(n_estimators=2)}}, 3), ({"refit": "all"}, 3),
    ({"y": changed_at(Y_60, 7)}, 0), ({"X": changed_at(X_60, (7, 1))}, 0), ({"levels": LEVELS[:-1]}, 0),
    ({"seed": 1}, 0), ({"folds": 4}, 0), ({"sample_weight": np.arange(1.0, 61)}, 0),
    ({"extra": X_60[:3]}, 0), ({"models": {"m": ExtraTrees(n_estimators=3)}}, 0),
    ({"models": {"m": ExtraTrees(n_estimators=2, random_state=1)}}, 0),
    ({"models": {"m": QuantileForest(n_estimators=2)}}, 0),
], ids=str)
def test_what_decides_a_job_decides_its_key(change, kept, tmp_path):
    cross_fit(**SAME, cache=tmp_path)
    said = []
    cross_fit(**SAME | change, cache=tmp_path, progress=said.append)
    assert sum(s.endswith("(cached)") for s in said) == kept


def estimator_of(**options):
    from sklearn.ensemble import GradientBoostingRegressor

    return GradientBoostingRegressor(loss="quantile", n_estimators=2, max_depth=2, random_state=0,
                                     **options)


@pytest.mark.parametrize("build", [
    lambda **o: per_level(estimator_of(**o), "alpha"),
    lambda **o: wrap(Quantiles(estimator_of(**o))),
], ids=["per_level", "wrapped"])
def test_options_of_wrapped_estimators_decide_the_key(build, tmp_path):
    x, y = table(40)
    run = functools.partial(cross_fit, X=x, y=y, levels=[0.2, 0.8], folds=2, cache=tmp_path)
    first = run({"it": build(learning_rate=0.1)})
    said = []
    again = run({"it": build(learning_rate=0.1)}, progress=said.append)
    assert all(s.endswith("(cached)") for s in said) and np.array_equal(again.Z, first.Z)
    assert np.array_equal(again.predict(x), first.predict(x))
    said.clear()
    other = run({"it": build(learning_rate=0.2)}, progress=said.append)
    assert not any(s.endswith("(cached)") for s in said) and not np.array_equal(other.Z, first.Z)


class Quantiles:
    """An estimator around another one, whose repr does not tell its options."""

    def __init__(self, estimator, scale=(1.0,) * 400):
        self.estimator, self.scale = estimator, scale

    def get_params(self, deep=True):
        return {"estimator": self.estimator, "scale": self.scale}

    def __repr__(self):
        return "Quantiles()"

    def fit(self, X, y):
        self.models = {t: type(self.estimator)(**self.estimator.get_params() | {"alpha": t}).fit(X, y)
                       for t in (0.2, 0.8)}
        return self

    def predict_quantiles(self, X, levels):
        return np.column_stack([self.models[t].predict(X) for t in levels])


def test_pairs_of_folds_are_cached_too(tmp_path, monkeypatch):
    x, y = table(40)
    fold = np.arange(40) % 3
    models = {"linear": Linear(), "boosted": LightGBM(n_estimators=3)}
    first = pair_predictions(models, x, y, np.array(LEVELS), fold, cache=tmp_path)
    count = fits_again(monkeypatch)
    again = pair_predictions(models, x, y, np.array(LEVELS), fold, cache=tmp_path)
    assert not count
    assert all(np.array_equal(first[k], again[k]) for k in first)


def test_cross_fitting_is_silent_where_nothing_is_wrong():
    x, y = table(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models = {"linear": Linear(), "trees": ExtraTrees(n_estimators=2)}
        cross_fit(models, x, y, LEVELS, folds=3).predict(x)


def test_out_of_fold_predictions_of_a_searched_network_do_not_depend_on_the_folds_targets():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 3))
    y = x[:, 0] + rng.normal(size=90)
    models = {"net": MultiQuantileNet(n_iter=4, max_steps=150)}
    one = cross_fit(models, x, y, [0.1, 0.5, 0.9], folds=3)
    held = one.fold == 0
    for _ in range(3):
        changed = y.copy()
        changed[held] = 10 * rng.normal(size=held.sum())
        other = cross_fit(models, x, changed, [0.1, 0.5, 0.9], folds=3)
        # other members beside it may change the rounding of a member's products, nothing else
        assert other.Z[held] == pytest.approx(one.Z[held], abs=1e-3)
