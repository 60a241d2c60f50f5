"""`QuantileStacker`: names and shapes, solvers, monotone results, files, frames, bad input."""

import json
import pickle
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
from cases import some
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from poise.errors import ConfigError, DataError, FileError
from poise.registry import entries
from poise_quantagg.checks import QuantileWarning
from poise_quantagg.scores import pinball, wis
from poise_quantagg.stacker import QuantileStacker

LEVELS = [0.1, 0.3, 0.5, 0.7, 0.9]
GATE = {"max_steps": 60, "patience": 60, "width": 8, "depth": 2}
SHAPES = {"average": 1, "median": 1, "best": 1, "greedy": 1, "qra": 2, "fqra": 2, "global_coarse": 1,
          "global_medium": 2, "global_fine": 3, "local_coarse": 1, "local_medium": 2, "local_fine": 3}
everywhere = pytest.mark.parametrize("aggregator", SHAPES)


def problem(n=80, p=3, seed=0, levels=LEVELS):
    """Return (Z, y, X): p monotone predictions, biased in turn as the first feature says."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 2))
    y = X[:, 0] + rng.normal(size=n)
    bias = np.abs(np.linspace(-1, 1, p) - np.tanh(2 * X[:, 1:])) if p > 1 else np.zeros((n, 1))
    q = np.sort(rng.normal(size=(n, p, len(levels))), axis=2)
    return (X[:, :1] + bias)[:, :, None] + q, y, X


def crossing(n=80, p=3, seed=0):
    Z, y, X = problem(n, p, seed)
    Z[:, 1] = np.random.default_rng(1).permuted(Z[:, 1], axis=1)
    return Z, y, X


def made(aggregator, **options):
    usual = {"levels": LEVELS, "n_iter": 1, "options": GATE if aggregator.startswith("local") else None}
    return QuantileStacker(aggregator, **usual | options)


# ------------------------------------------------------------------ names and shapes


def test_the_aggregators_are_those_that_were_promised():
    assert set(SHAPES) == {e.name for e in entries("aggregator") if e.plugin == "quantagg"}
    with pytest.raises(ConfigError, match="did you mean 'global_fine'"):
        QuantileStacker("global_fin").fit(*problem())


@everywhere
def test_names_and_shapes(aggregator):
    Z, y, X = problem()
    stacker = made(aggregator)
    assert stacker.fit(Z, y, X) is stacker
    q, w = stacker.predict(Z, X), stacker.weights(X)
    lead = (80,) if aggregator.startswith("local") else ()
    assert q.shape == (80, 5) and w.shape == (*lead, *[(3,), (3, 5), (3, 5, 5)][SHAPES[aggregator] - 1])
    assert stacker.n_models_ == 3 and stacker.levels_.tolist() == LEVELS
    if aggregator not in ("qra", "fqra"):
        over = {1: -1, 2: -2, 3: (-3, -2)}[SHAPES[aggregator]]
        assert (w >= 0).all() and w.sum(axis=over) == pytest.approx(1)
        forms = {1: "j,njk->nk", 2: "jk,njk->nk", 3: "jvk,njv->nk"}
        if aggregator != "median":
            form = "n" * len(lead) + forms[SHAPES[aggregator]]
            assert q == pytest.approx(np.einsum(form, w, Z), abs=1e-9)
    some = stacker.predict(Z[:7], X[:7])
    assert some == pytest.approx(q[:7], abs=1e-12)


@everywhere
def test_a_fit_is_decided_by_its_options_and_rows(aggregator):
    Z, y, X = problem()
    kept = Z.copy(), y.copy(), X.copy()
    q = made(aggregator).fit(Z, y, X).predict(Z, X)
    assert np.array_equal(q, made(aggregator).fit(Z, y, X).predict(Z, X))
    assert all(np.array_equal(a, b) for a, b in zip((Z, y, X), kept))
    assert np.array_equal(q, clone(made(aggregator).fit(Z, y, X)).fit(Z, y, X).predict(Z, X))


def test_finer_weights_fit_the_rows_no_worse_and_local_ones_learn_what_depends_on_the_features():
    Z, y, X = problem(400)
    loss = {a: pinball(y, made(a).fit(Z, y, X).predict(Z, X), LEVELS)
            for a in ("average", "best", "global_coarse", "global_medium", "global_fine")}
    assert loss["global_fine"] <= loss["global_medium"] + 1e-9 <= loss["global_coarse"] + 2e-9
    assert loss["global_coarse"] <= min(loss["average"], loss["best"]) + 1e-9
    local = QuantileStacker("local_coarse", LEVELS, n_iter=2, options={"max_steps": 600, "patience": 300})
    new, target, features = problem(400, seed=1)
    global_ = made("global_coarse").fit(Z, y).predict(new)
    assert pinball(target, local.fit(Z, y, X).predict(new, features), LEVELS) \
        < 0.97 * pinball(target, global_, LEVELS)


def test_levels_are_those_of_the_paper_when_none_are_given():
    Z, y, _ = problem(levels=range(99))
    stacker = QuantileStacker().fit(Z[:, :, :9], y)
    assert stacker.levels_ == pytest.approx(np.arange(1, 10) / 10)
    assert QuantileStacker().fit(Z, y).levels_ == pytest.approx(np.arange(1, 100) / 100)


# ------------------------------------------------------------------ solvers, penalties, validation


@pytest.mark.parametrize("aggregator", some(
    ["global_coarse", "global_medium", "global_fine"], keep=["global_coarse", "global_medium"]))
def test_auto_is_exact_without_a_penalty_and_gradient_with_one(aggregator):
    Z, y, _ = problem()
    exact = made(aggregator, solver="exact").fit(Z, y)
    auto, gradient = made(aggregator).fit(Z, y), made(aggregator, solver="gradient").fit(Z, y)
    assert np.array_equal(auto.weights(), exact.weights())
    assert exact.fitted_.gap is not None and gradient.fitted_.gap is None
    losses = [pinball(y, s.predict(Z), LEVELS) for s in (exact, gradient)]
    assert losses[0] <= losses[1] + 1e-9 <= 1.3 * losses[0]
    with_penalty = made(aggregator, penalty="constant").fit(Z, y)
    assert with_penalty.fitted_.gap is None
    with pytest.raises(ConfigError, match="solver=exact takes no penalty"):
        made(aggregator, solver="exact", penalty="constant").fit(Z, y)


@pytest.mark.parametrize("penalty", ["constant", "adaptive", "distance"])
@pytest.mark.parametrize("aggregator", ["global_medium", "local_medium"])
def test_every_penalty_can_be_asked_for(aggregator, penalty):
    Z, y, X = problem()
    stacker = made(aggregator, penalty=penalty, n_iter=2).fit(Z, y, X)
    assert np.isfinite(stacker.predict(Z, X)).all()


def test_validation_rows_decide_where_there_is_a_choice():
    Z, y, X = problem()
    held, target, features = problem(40, seed=3)
    held[:, 2] = target[:, None]  # only the validation rows know that model 2 is perfect
    best = made("best").fit(Z, y, validation=(held, target))
    assert best.weights().tolist() == [0, 0, 1]
    assert made("best").fit(Z, y, validation=(held, target, None)).weights().tolist() == [0, 0, 1]
    for aggregator in ("local_coarse", "global_coarse"):
        stacker = made(aggregator, solver="auto").fit(Z, y, X, validation=(held, target, features))
        assert np.isfinite(stacker.predict(Z, X)).all()
    local = made("local_coarse").fit(Z, y, X, validation=(held, target, features))
    other = made("local_coarse").fit(Z, y, X)
    assert local.fitted_.score != other.fitted_.score
    assert local.fitted_.score == pytest.approx(
        pinball(target, np.sort(local.predict(held, features)), LEVELS), rel=1e-4)


def test_sample_weights_are_rows_that_count_more():
    Z, y, _ = problem(30)
    weight = np.random.default_rng(0).integers(1, 4, 30)
    rows = np.repeat(np.arange(30), weight)
    for aggregator in ("global_coarse", "global_medium", "global_fine", "qra", "best", "greedy"):
        weighted = made(aggregator).fit(Z, y, sample_weight=weight)
        repeated = made(aggregator).fit(Z[rows], y[rows])
        losses = [pinball(y[rows], s.predict(Z[rows]), LEVELS) for s in (weighted, repeated)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# ------------------------------------------------------------------ monotone results


@given(st.sampled_from(["sort", "pava", "minmax"]), st.integers(0, 99))
@settings(max_examples=20)
def test_isotonized_quantiles_are_monotone_and_score_no_worse(how, seed):
    Z, y, _ = crossing(40, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantileWarning)
        raw = made("global_medium").fit(Z, y).predict(Z)
        q = made("global_medium", isotonize=how).fit(Z, y).predict(Z)
    assert (np.diff(q) >= -1e-12).all()
    if how != "minmax":
        assert wis(y, q, LEVELS, convention="mean") <= wis(y, raw, LEVELS, convention="mean") + 1e-12


@everywhere
def test_crossing_models_are_named_in_exactly_one_warning(aggregator):
    Z, y, X = crossing()
    share = f"{(np.diff(Z[:, 1]) < 0).mean():.1%}"
    with pytest.warns(QuantileWarning, match=rf"base predictions cross.*: model 1 \({share}\);") as caught:
        made(aggregator, isotonize="sort").fit(Z, y, X)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(aggregator).fit(*problem())


# ------------------------------------------------------------------ bad input


@everywhere
@pytest.mark.parametrize("levels", [[0.9, 0.7, 0.5, 0.3, 0.1], [0.1, 0.3, 0.3, 0.7, 0.9],
                                    [0.0, 0.3, 0.5, 0.7, 0.9], [0.1, 0.3, 0.5, 0.7, 1.0],
                                    [0.1, 0.3, np.nan, 0.7, 0.9], [0.1, 0.9], [], "abc",
                                    ["a"] * 5], ids=str)
def test_ill_formed_levels_are_refused(aggregator, levels):
    with pytest.raises(ConfigError, match="levels"):
        made(aggregator, levels=levels).fit(*problem())


def test_levels_in_float32_are_the_decimals_that_they_print_as():
    stacker = made("average", levels=np.array(LEVELS, dtype=np.float32)).fit(*problem())
    assert stacker.levels_.tolist() == LEVELS


@everywhere
@pytest.mark.parametrize(("change", "words"), [
    (lambda Z, y, X: (Z[:, :, 0], y, X), r"Z has shape \(80, 3\): allowed are 3 axes"),
    (lambda Z, y, X: (Z[:79], y, X), "Z has 79 rows and y has 80"),
    (lambda Z, y, X: (Z, y[:, None], X), r"y has shape \(80, 1\): allowed are 1 axes"),
    (lambda Z, y, X: (Z[:, :0], y, X), r"Z has shape \(80, 0, 5\)"),
    (lambda Z, y, X: (Z[:0], y[:0], X[:0]), r"Z has shape \(0, 3, 5\)"),
    (lambda Z, y, X: ("text", y, X), "Z is not an array of real numbers"),
    (lambda Z, y, X: (Z, y.astype("datetime64[s]"), X), "y is not an array of real numbers: dates"),
    (lambda Z, y, X: (spoiled(Z), y, X), r"Z\[5, 0, 0\] is nan; .* in 2 rows, first rows 5, 9"),
    (lambda Z, y, X: (Z, spoiled(y, np.inf), X), r"y\[5\] is inf; .* in 2 rows, first rows 5, 9"),
])
def test_bad_rows_are_named(aggregator, change, words):
    with pytest.raises(DataError, match=words):
        made(aggregator).fit(*change(*problem()))


@pytest.mark.parametrize("dtype", [str, object, np.float32])
def test_whatever_can_be_read_as_numbers_is(dtype):
    Z, y, _ = problem()
    given = made("global_coarse").fit(Z.round(2).astype(dtype), y).predict(Z[:3])
    np.testing.assert_allclose(given, made("global_coarse").fit(Z.round(2), y).predict(Z[:3]), atol=1e-5)


def spoiled(array, value=np.nan):
    out = array.copy()
    out.reshape(len(out), -1)[[5, 9], 0] = value
    return out


@pytest.mark.parametrize("aggregator", ["local_coarse", "local_medium", "local_fine"])
def test_local_weights_need_features_that_fit(aggregator):
    Z, y, X = problem()
    with pytest.raises(DataError, match="weights that depend on the features need them: give X"):
        made(aggregator).fit(Z, y)
    with pytest.raises(DataError, match=r"X\[5, 0\] is nan; X has NaN or Inf in 2 rows, first rows 5, 9"):
        made(aggregator).fit(Z, y, spoiled(X))
    with pytest.raises(DataError, match="X has 79 rows and y has 80"):
        made(aggregator).fit(Z, y, X[1:])
    with pytest.raises(DataError, match="give validation X"):
        made(aggregator).fit(Z, y, X, validation=(Z, y))
    stacker = made(aggregator).fit(Z, y, X)
    for call in (lambda: stacker.predict(Z), stacker.weights):
        with pytest.raises(DataError, match="these weights depend on the features: give X"):
            call()
    with pytest.raises(DataError, match="X has 79 rows and Z has 80"):
        stacker.predict(Z, X[1:])
    with pytest.raises(DataError, match="X has 1 features; fitted on 2"):
        stacker.predict(Z, X[:, :1])
    with pytest.raises(DataError, match="validation X has 1 features; X has 2"):
        made(aggregator).fit(Z, y, X, validation=(Z, y, X[:, :1]))


def test_frames_with_columns_in_another_order_are_refused(tmp_path):
    Z, y, X = problem()
    frame = pd.DataFrame(X, columns=["a", "b"])
    made("local_coarse").fit(Z, y, frame).save(tmp_path / "gate")
    stacker = QuantileStacker.load(tmp_path / "gate")
    np.testing.assert_array_equal(stacker.predict(Z, frame), stacker.predict(Z, X))
    for call in (lambda: stacker.predict(Z, frame[["b", "a"]]), lambda: stacker.weights(frame[["b", "a"]])):
        with pytest.raises(DataError, match=r"X has the columns \['b', 'a'\]; fitted on \['a', 'b'\]"):
            call()


def test_gates_take_read_only_levels_and_rows_of_weight_zero_without_a_warning():
    Z, y, X = problem()
    some = np.zeros(len(y))
    some[:3] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stacker = made("local_coarse", levels=pd.Series(LEVELS)).fit(Z, y, X, sample_weight=some)
    alone = made("local_coarse").fit(Z[:3], y[:3], X[:3])
    np.testing.assert_array_equal(stacker.weights(X), alone.weights(X))


def test_sample_weights_may_be_as_large_as_numbers_go():
    Z, y, _ = problem()
    huge = made("global_coarse").fit(Z, y, sample_weight=np.full(len(y), 1e308))
    np.testing.assert_allclose(huge.weights(), made("global_coarse").fit(Z, y).weights(), atol=1e-12)


@pytest.mark.parametrize(("options", "words"), [
    ({"solver": "highs"}, "solver='highs': allowed is auto, exact, gradient"),
    ({"isotonize": "sorted"}, "isotonize='sorted': allowed is one of sort, pava, minmax or None"),
    ({"penalty": "l2"}, "penalty='l2' is not allowed: it must be one of constant, adaptive, distance"),
    ({"n_iter": 0}, "n_iter"), ({"random_state": -1}, "random_state"),
    ({"options": {"wdith": 3}}, "wdith"),
    ({"aggregator": "qra", "penalty": "constant"}, "aggregator=qra takes no penalty"),
    ({"aggregator": "local_fine", "solver": "exact"}, "aggregator=local_fine has no exact solver"),
    ({"aggregator": None}, "aggregator=None"), ({"aggregator": ["qra"]}, r"aggregator=\['qra'\]"),
    ({"options": ["simplex"]}, "allowed is a mapping"), ({"isotonize": ["sort"]}, "isotonize="),
], ids=str)
def test_options_that_cannot_be_used_are_refused(options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        QuantileStacker(levels=LEVELS).set_params(**options).fit(*problem())
    assert "\n" not in str(caught.value)


def test_options_may_be_numpys_numbers():
    Z, y, X = problem()
    options = {k: np.int64(v) for k, v in GATE.items()}
    gate = QuantileStacker("local_coarse", options=options, n_iter=np.int64(2), random_state=np.int64(0))
    plain = QuantileStacker("local_coarse", options=GATE, n_iter=2)
    np.testing.assert_array_equal(gate.fit(Z, y, X).weights(X), plain.fit(Z, y, X).weights(X))


def test_predictions_must_fit_and_need_a_fit():
    Z, y, _ = problem()
    for call in (lambda: made("average").predict(Z), made("average").weights,
                 lambda: made("average").save("here")):
        with pytest.raises(ConfigError, match="QuantileStacker is not fitted: call fit"):
            call()
    stacker = made("average").fit(Z, y)
    with pytest.raises(DataError, match="Z has 2 models and 5 levels; fitted on 3 and 5"):
        stacker.predict(Z[:, :2])
    with pytest.raises(DataError, match="Z has NaN or Inf in 2 rows"):
        stacker.predict(spoiled(Z))
    for validation in ((Z,), Z, (Z, y, None, None)):
        with pytest.raises(DataError, match="validation must be"):
            stacker.fit(Z, y, validation=validation)
    with pytest.raises(DataError, match="models and levels must be the same"):
        stacker.fit(Z, y, validation=(Z[:, :2], y))
    for weight in (-np.ones(80), np.zeros(80), np.ones(79), np.full(80, np.nan)):
        with pytest.raises(DataError, match="sample_weight"):
            stacker.fit(Z, y, sample_weight=weight)


@everywhere
@pytest.mark.parametrize(("n", "p"), [(1, 3), (2, 3), (60, 1), (1, 1)])
def test_one_row_and_one_model_are_enough(aggregator, n, p):
    Z, y, X = problem(n, p)
    stacker = made(aggregator).fit(Z, y, X)
    q = stacker.predict(Z, X)
    assert q.shape == (n, 5) and np.isfinite(q).all()
    if p == 1 and aggregator not in ("qra", "fqra", "global_fine", "local_fine"):
        assert q == pytest.approx(Z[:, 0])


@everywhere
def test_a_constant_target_gives_finite_quantiles(aggregator):
    Z, y, X = problem()
    stacker = made(aggregator).fit(Z, y * 0 + 3, X)
    assert np.isfinite(stacker.predict(Z, X)).all()


# ------------------------------------------------------------------ files, copies, frames


@everywhere
def test_a_saved_stacker_predicts_the_same_to_the_bit(aggregator, tmp_path):
    Z, y, X = problem()
    stacker = made(aggregator, isotonize="pava").fit(Z, y, X)
    stacker.save(tmp_path / "it")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["it.json", "it.safetensors"]
    back = QuantileStacker.load(tmp_path / "it")
    joblib.dump(stacker, tmp_path / "whole")
    mapped = joblib.load(tmp_path / "whole", mmap_mode="r")
    for other in (back, pickle.loads(pickle.dumps(stacker)), mapped):
        assert np.array_equal(other.predict(Z, X), stacker.predict(Z, X))
        assert np.array_equal(other.weights(X), stacker.weights(X))
        assert np.array_equal(other.levels_, stacker.levels_) and other.n_models_ == 3
        assert other.get_params() == stacker.get_params()
    back.save(tmp_path / "again")
    for kind in ("json", "safetensors"):
        assert (tmp_path / f"again.{kind}").read_bytes() == (tmp_path / f"it.{kind}").read_bytes()


def test_banded_and_low_rank_gates_are_saved_too(tmp_path):
    Z, y, X = problem()
    for options in ({"band": 1}, {"rank": 3}):
        stacker = made("local_fine", options=GATE | options).fit(Z, y, X)
        stacker.save(tmp_path / "it")
        assert np.array_equal(QuantileStacker.load(tmp_path / "it").predict(Z, X), stacker.predict(Z, X))


def rewritten(path, change):
    """Write the saved metadata anew, with a checksum that fits."""
    from poise.files import load_arrays, save_arrays

    arrays, meta = load_arrays(path)
    changed = change(arrays, meta)
    save_arrays(path, *(changed if isinstance(changed, tuple) else (arrays, meta)))


def test_files_that_do_not_name_their_aggregator_are_read_by_their_parameters(tmp_path):
    """Those of versions before the registry was asked."""
    Z, y, _ = problem()
    stacker = made("median").fit(Z, y)
    stacker.save(tmp_path / "it")
    rewritten(tmp_path / "it", lambda arrays, meta: meta.pop("aggregator") and None)
    assert np.array_equal(QuantileStacker.load(tmp_path / "it").predict(Z), stacker.predict(Z))


@pytest.mark.parametrize("change", [
    lambda arrays, meta: meta.update(kind="other"),
    lambda arrays, meta: meta["fitted"].update(kind="code"),
    lambda arrays, meta: meta["fitted"].pop("m"),
    lambda arrays, meta: meta["params"].update(code=1),
    lambda arrays, meta: meta.pop("params"),
    lambda arrays, meta: meta.pop("n_models"),
    lambda arrays, meta: meta["params"].update(levels=[0.5, 0.1]),
    lambda arrays, meta: ({"w": arrays["w"][:, :2]}, meta),
    lambda arrays, meta: ({"w": arrays["w"][None, None]}, meta),
    lambda arrays, meta: ({"other": arrays["w"]}, meta),
], ids=range(10))
def test_a_file_of_something_else_is_refused(change, tmp_path):
    Z, y, _ = problem()
    made("global_medium").fit(Z, y).save(tmp_path / "it")
    rewritten(tmp_path / "it", change)
    with pytest.raises(FileError):
        QuantileStacker.load(tmp_path / "it")


def test_a_gate_whose_layers_do_not_fit_is_refused(tmp_path):
    Z, y, X = problem()
    made("local_medium").fit(Z, y, X).save(tmp_path / "it")
    rewritten(tmp_path / "it",
              lambda arrays, meta: ({**arrays, "gate.W0": arrays["gate.W0"][:, :-1]}, meta))
    with pytest.raises(FileError, match=r"it: the array gate\.b0 has shape"):
        QuantileStacker.load(tmp_path / "it")


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_torn_altered_and_missing_files_are_named(kind, tmp_path):
    Z, y, _ = problem()
    made("global_fine").fit(Z, y).save(tmp_path / "it")
    file = tmp_path / f"it.{kind}"
    data = file.read_bytes()
    for damaged in (data[: len(data) // 2], b"", bytes([data[0] ^ 1]) + data[1:]):
        file.write_bytes(damaged)
        with pytest.raises(FileError, match=file.name):
            QuantileStacker.load(tmp_path / "it")
    file.unlink()
    with pytest.raises(FileError, match=file.name):
        QuantileStacker.load(tmp_path / "it")


def test_nothing_in_a_file_is_code(tmp_path):
    Z, y, _ = problem()
    made("global_coarse").fit(Z, y).save(tmp_path / "it")
    meta = json.loads((tmp_path / "it.json").read_text())["meta"]
    assert meta["kind"] == "quantile_stacker" and meta["fitted"]["kind"] == "linear"


@everywhere
def test_series_and_frames_are_read_by_position(aggregator):
    Z, y, X = problem()
    index = np.random.default_rng(0).permutation(80)
    frame, series = pd.DataFrame(X, index=index, columns=["a", "b"]), pd.Series(y, index=index)
    q = made(aggregator).fit(Z, y, X).predict(Z, X)
    assert made(aggregator).fit(Z, series, frame).predict(Z, frame) == pytest.approx(q, rel=1e-6)
    assert np.array_equal(made(aggregator).fit(Z.tolist(), y.tolist(), X.tolist()).predict(Z, X), q)


def test_an_outlier_of_one_model_does_not_hide_that_another_crosses():
    rng = np.random.default_rng(0)
    Z, y = np.sort(rng.normal(size=(200, 3, 9)), axis=2), rng.normal(size=200)
    Z[:, 1] = 1e-4 * Z[:, 1, ::-1]
    Z[0, 0, -1] = 1e6
    with pytest.warns(QuantileWarning, match=r"model 1 \(100.0%\)") as caught:
        QuantileStacker("qra").fit(Z, y)
    assert len(caught) == 1


def test_features_are_looked_at_even_where_weights_do_not_depend_on_them():
    rng = np.random.default_rng(0)
    Z, y, X = np.sort(rng.normal(size=(50, 3, 5)), axis=2), rng.normal(size=50), rng.normal(size=(50, 2))
    bad = X.copy()
    bad[3, 1] = np.inf
    for aggregator in ("average", "qra"):
        stacker = QuantileStacker(aggregator).fit(Z, y, X)
        for features, words in ((bad, "NaN or Inf in 1 row, 3"), (X[:3], "X has 3 rows")):
            with pytest.raises(DataError, match=words):
                QuantileStacker(aggregator).fit(Z, y, features)
            with pytest.raises(DataError, match=words):
                stacker.predict(Z, features)


@pytest.mark.parametrize("n_iter", [0, -1, 2.5, True])
def test_a_search_tries_at_least_one_configuration(n_iter):
    Z = np.sort(np.random.default_rng(0).normal(size=(9, 2, 3)), axis=2)
    with pytest.raises(ConfigError, match="n_iter"):
        QuantileStacker("qra", n_iter=n_iter).fit(Z, Z[:, 0, 1])


def test_masked_values_are_refused():
    rng = np.random.default_rng(0)
    Z = np.ma.masked_array(np.sort(rng.normal(size=(9, 2, 3)), axis=2), mask=False)
    QuantileStacker("average").fit(Z, np.ones(9))
    Z[0, 0, 0] = np.ma.masked
    with pytest.raises(DataError, match="masked"):
        QuantileStacker("average").fit(Z, np.ones(9))
