"""Files whose checksums are right and whose content is not: refused by name, or as good as any other."""

import copy
import json
import shutil
import warnings

import numpy as np
import pytest

from poise.errors import FileError
from poise.files import checksum, load_arrays, save_arrays
from poise_quantagg.checks import QuantileWarning
from poise_quantagg.components import ExtraTrees, LightGBM, Linear, MultiQuantileNet
from poise_quantagg.estimator import QuantileAggregatorRegressor
from poise_quantagg.stacker import QuantileStacker

pytestmark = pytest.mark.filterwarnings("ignore:base predictions cross")
LEVELS = [0.1, 0.5, 0.9]
MUTATIONS = 60  # of each ensemble
LIES = [None, True, -1, 0, 1, 3, 10**9, 10**30, 0.5, float("nan"), float("inf"), "", "linear", "nowhere",
        [], {}, [0.9, 0.1], [float("nan")], ["a", "a"], [[]], {"a": 1}]


def rows(n=60):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 3))
    return X, np.round(X[:, 0] + rng.normal(size=n), 1)


ENSEMBLES = {
    "qra": {"estimators": {"linear": Linear(), "trees": ExtraTrees(n_estimators=2)}, "cv": 2},
    "nested": {"estimators": {"linear": Linear()}, "cv": 3, "conformal": "nested", "aggregator": "median"},
    "split": {"estimators": {"boosted": LightGBM(n_estimators=2), "linear": Linear()}, "cv": 2,
              "conformal": "split", "aggregator": "global_fine", "refit": "bag"},
    "gate": {"estimators": {"linear": Linear(), "net": MultiQuantileNet(n_iter=1, width=4, max_steps=20)},
             "cv": 2, "aggregator": "local_medium", "n_iter": 1,
             "options": {"width": 4, "depth": 1, "max_steps": 20}},
}


@pytest.fixture(scope="module", params=ENSEMBLES)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantileWarning)
        QuantileAggregatorRegressor(LEVELS, **ENSEMBLES[request.param]).fit(*rows()).save(folder)
    return folder


def rewrite(folder, stem, change):
    """Change the arrays and values of one file, and make every checksum right again."""
    arrays, meta = load_arrays(folder / stem)
    save_arrays(folder / stem, *change(dict(arrays), copy.deepcopy(meta)))
    if stem != "ensemble":
        arrays, meta = load_arrays(folder / "ensemble")
        meta["parts"][stem] = checksum(folder / f"{stem}.json")
        save_arrays(folder / "ensemble", arrays, meta)


def places(value, path=()):
    """Yield the path of everything in plain values; of a list its ends."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:2] \
        if isinstance(value, list) else []
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def lie(rng, arrays, meta):
    """Change one value or array in some way; a booster's own text is its library's business."""
    paths = [p for p in places(meta) if "boosters" not in p]
    if rng.random() < 0.6:
        path = paths[rng.integers(len(paths))]
        where = meta
        for key in path[:-1]:
            where = where[key]
        if isinstance(where, dict) and rng.random() < 0.2:
            del where[path[-1]]
        else:
            where[path[-1]] = LIES[rng.integers(len(LIES))]
        return arrays, meta
    name = sorted(arrays)[rng.integers(len(arrays))]
    array = arrays.pop(name)
    changes = [
        lambda a: a[:-1], lambda a: a[..., None], lambda a: np.concatenate([a, a]), lambda a: a.ravel()[:0],
        lambda a: a.astype(np.float32), lambda a: a.astype(np.int64), lambda a: a.astype(np.uint8),
        lambda a: a.astype(bool), lambda a: a.T, lambda a: a.reshape(-1),
        lambda a: np.full(a.shape, np.nan), lambda a: np.full(a.shape, -7, a.dtype),
        lambda a: np.full(a.shape, 10**6, np.int64), lambda a: np.full(a.shape, np.inf),
    ]
    number = rng.integers(len(changes) + 1)
    if number < len(changes):
        with np.errstate(invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arrays[name] = changes[number](np.asarray(array))
    return arrays or {"other": np.zeros(1)}, meta


def used(folder):
    """Load and predict in every way; return whether it was refused by the name of the folder."""
    try:
        model = QuantileAggregatorRegressor.load(folder)
    except FileError as error:
        assert str(folder) in str(error) and "\n" not in str(error), error
        return False
    X = rows()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q, interval = model.predict_quantiles(X), model.predict_interval(X, 0.2)
    assert q.shape == (60, len(model.levels_)) and np.isfinite(q).all()
    assert interval.shape == (60, 2) and not np.isnan(interval).any()
    return True


def test_a_lie_in_any_file_is_refused_by_name_or_does_no_harm(saved, tmp_path):
    rng, refused, folder = np.random.default_rng(5), 0, tmp_path / "it"
    stems = sorted(file.stem for file in saved.glob("*.json"))
    for number in range(MUTATIONS):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        stem = stems[number % len(stems)] if number % 3 else "ensemble"
        rewrite(folder, stem, lambda arrays, meta: lie(rng, arrays, meta))
        refused += not used(folder)
    assert MUTATIONS // 3 < refused < MUTATIONS  # both happen


@pytest.mark.parametrize(("stem", "change", "words"), [
    ("ensemble", lambda a, m: (a, m | {"n_features": 10**12}), "n_features"),
    ("ensemble", lambda a, m: (a, m | {"n_features": 4}), "3 features|4 features"),
    ("ensemble", lambda a, m: (a, m | {"folds": 10**12}), "folds"),
    ("ensemble", lambda a, m: (a, m | {"models": ["linear", "linear"]}), "distinct names"),
    ("ensemble", lambda a, m: (a, m | {"parts": {**m["parts"], "../other": "0"}}), "belong together"),
    ("ensemble", lambda a, m: (a, m | {"leaderboard": [{"model": "x"}]}), "leaderboard"),
    ("ensemble", lambda a, m: (a, m | {"params": m["params"] | {"levels": [0.9, 0.1, 0.5]}}), "increasing"),
    ("ensemble", lambda a, m: (a, m | {"params": m["params"] | {"levels": [0.1, 0.5, 0.8]}}), "levels of"),
    ("ensemble", lambda a, m: (a, m | {"params": m["params"] | {"aggregator": "nowhere"}}), "'nowhere'"),
    ("ensemble", lambda a, m: (a | {"calibration.fold": a["calibration.fold"] * 2}, m), "folds"),
    ("ensemble", lambda a, m: (a | {"calibration.q": a["calibration.q"][:, :2]}, m), r"calibration\.q"),
    ("ensemble", lambda a, m: ({k: v for k, v in a.items() if k != "calibration.y"}, m), r"calibration\.y"),
    ("ensemble", lambda a, m: (a, m | {"features": ["a"]}), "1 names are given for 3 features"),
    ("ensemble", lambda a, m: (a, m | {"parts": {k.replace("l_0_1", "l_9_9"): v
                                                for k, v in m["parts"].items()}}),
     "model_0_1 is missing, or no part"),
    ("ensemble", lambda a, m: (a | {"calibration.fold": np.arange(60) % 3}, m), "of 3 folds, and there"),
    ("ensemble", lambda a, m: (a, m | {"nested": 1}), "1 nested weights for 2 folds"),
    ("stacker", lambda a, m: (a, m | {"n_models": 10**12}), "n_models"),
    ("stacker", lambda a, m: (a, m | {"n_models": 3}), "3 models"),
    ("stacker", lambda a, m: (a, m | {"aggregator": "nowhere"}), "'nowhere'"),
    ("stacker", lambda a, m: (a, m | {"params": m["params"] | {"isotonize": "up"}}), "'up'"),
    ("stacker", lambda a, m: (a | {"w": a["w"] * np.nan}, m), "not finite"),
    ("stacker", lambda a, m: (a | {"w": a["w"].T}, m), "array w has shape"),
    ("stacker", lambda a, m: (a | {"intercept": a["intercept"][:1]}, m), "intercept"),
    ("stacker", lambda a, m: (a | {"atoms": a["atoms"][:, ::-1]}, m), "atoms"),
    ("model_0_0", lambda a, m: (a | {"scale_": a["scale_"] * 0}, m), "finite|NaN"),
    ("model_0_0", lambda a, m: (a | {"coef_": a["coef_"].astype(np.int64)}, m), "kind 'f'"),
    ("model_0_0", lambda a, m: (a, m | {"levels": [0.5, 0.1, 0.9]}), "increasing"),
    ("model_0_0", lambda a, m: (a, m | {"class": ["LinearRegressor"]}), "unknown kind"),
    ("model_0_0", lambda a, m: (a, m | {"class": "JoinedLevels"}), "model_0_0"),
    ("model_1_1", lambda a, m: (a | {"targets": a["targets"] * np.nan}, m), "damaged"),
], ids=lambda value: "lie" if callable(value) else value)  # the address of a lambda is no name
def test_lies_are_named(stem, change, words, tmp_path):
    QuantileAggregatorRegressor(LEVELS, **ENSEMBLES["qra"]).fit(*rows()).save(tmp_path)
    assert used(tmp_path)
    rewrite(tmp_path, stem, change)
    with pytest.raises(FileError, match=words) as caught:
        QuantileAggregatorRegressor.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    lambda a, m: (a, m | {"fitted": m["fitted"] | {"resolution": "finest"}}),
    lambda a, m: (a, m | {"fitted": m["fitted"] | {"band": 10**9}}),
    lambda a, m: (a, m | {"fitted": m["fitted"] | {"p": 10**9}, "n_models": 10**6}),
    lambda a, m: (a | {"gate.W0": a["gate.W0"][:2]}, m),
    lambda a, m: (a | {"gate.b0": a["gate.b0"][:2]}, m),
    lambda a, m: (a | {"gate.W9": a["gate.b0"]}, m),
    lambda a, m: (a | {"features.scale": a["features.scale"] * 0}, m),
], ids=["resolution", "band", "p", "W", "b", "more", "scale"])
def test_a_gate_that_is_none_is_refused(change, tmp_path):
    X, y = rows()
    Z = np.repeat(y[:, None, None], 3, axis=2).repeat(2, axis=1) + np.array(LEVELS)
    small = {"width": 4, "depth": 1, "max_steps": 20}
    QuantileStacker("local_medium", LEVELS, n_iter=1, options=small).fit(Z, y, X).save(tmp_path / "gate")
    save_arrays(tmp_path / "gate", *change(*load_arrays(tmp_path / "gate")))
    with pytest.raises(FileError, match="gate"):
        QuantileStacker.load(tmp_path / "gate")


def test_tensors_that_are_none_or_not_of_numpy_are_refused_by_name(tmp_path):
    QuantileAggregatorRegressor(LEVELS, **ENSEMBLES["qra"]).fit(*rows()).save(tmp_path)
    whole, stem = (tmp_path / "stacker.safetensors").read_bytes(), tmp_path / "stacker"
    from poise.files import _write_bundle

    meta = load_arrays(stem)[1]
    other = whole.replace(b'"F64"', b'"BF16"', 1)
    for data in (b"", b"\xff" * 100, whole[:20], other, (2**60).to_bytes(8, "little")):
        _write_bundle(stem, data, meta)
        arrays, index = load_arrays(tmp_path / "ensemble")
        index["parts"]["stacker"] = checksum(tmp_path / "stacker.json")
        save_arrays(tmp_path / "ensemble", arrays, index)
        with pytest.raises(FileError, match=r"stacker\.safetensors holds no arrays"):
            QuantileAggregatorRegressor.load(tmp_path)
    (tmp_path / "stacker.json").write_text("[" * 100_000)
    with pytest.raises(FileError, match=r"stacker\.json"):
        QuantileStacker.load(stem)
    (tmp_path / "stacker.json").write_text(json.dumps([1]))
    with pytest.raises(FileError, match=r"stacker\.json"):
        QuantileStacker.load(stem)
