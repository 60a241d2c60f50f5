"""Files of finished work: what is not what its name says is never believed, and never waited for."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest

from poise.errors import FileError
from poise.files import load_arrays, save_arrays
from poise_quantagg import cache
from poise_quantagg.components import ExtraTrees, HistBoosting, Linear, MultiQuantileNet
from poise_quantagg.crossfit import cross_fit

LEVELS = [0.1, 0.5, 0.9]
MODELS = {"linear": Linear(), "trees": ExtraTrees(n_estimators=2),
          "net": MultiQuantileNet(n_iter=1, width=8, max_steps=30)}


def table():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(50, 2))
    return X, X[:, 0] + rng.normal(size=50)


def fitted(folder, models=MODELS, said=None, folds=3):
    X, y = table()
    return cross_fit(models, X[:40], y[:40], LEVELS, folds=folds, extra=X[40:], cache=folder,
                     progress=None if said is None else said.append)


def everything(found):
    X, _ = table()
    return np.concatenate([a.ravel() for a in (found.Z, found.extra, found.predict_folds(X))])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return folder, everything(fitted(folder))


def stems(folder):
    return sorted(file.stem for file in folder.glob("*.json"))


def test_an_entry_under_another_name_is_not_believed(tmp_path):
    folder, copy = tmp_path / "cache", tmp_path / "copy"
    models = {name: MODELS[name] for name in ("linear", "trees")}
    expected = everything(fitted(folder, models, folds=2))
    names = stems(folder)
    assert len(names) == 4 + 4  # jobs, and their models
    for one, other in itertools.permutations(names, 2):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        for end in (".json", ".safetensors"):
            shutil.copy(folder / f"{other}{end}", copy / f"{one}{end}")
        assert np.array_equal(everything(fitted(copy, models, folds=2)), expected), (one, other)


def test_entries_of_other_rows_are_not_believed(tmp_path):
    """A folder of another table under the names of this one, as a careless copy would make it."""
    X, y = table()
    mine, other = tmp_path / "mine", tmp_path / "other"
    expected = everything(fitted(mine))
    cross_fit(MODELS, X[:40], 2 * y[:40], LEVELS, folds=3, extra=X[40:], cache=other)
    files = {kind: [[s for s in stems(folder) if ("_" in s) == kind] for folder in (mine, other)]
             for kind in (True, False)}
    for own, foreign in files.values():
        for a, b in zip(own, foreign):
            for end in (".json", ".safetensors"):
                shutil.copy(other / f"{b}{end}", mine / f"{a}{end}")
    assert np.array_equal(everything(fitted(mine)), expected)


@pytest.mark.parametrize("change", [
    lambda arrays: {k: a[:-1] for k, a in arrays.items()},
    lambda arrays: {k: a[:, :-1] for k, a in arrays.items()},
    lambda arrays: {k: a.astype(np.float32) for k, a in arrays.items()},
    lambda arrays: {k: a * np.nan for k, a in arrays.items()},
    lambda arrays: {k: a for k, a in arrays.items() if not k.startswith("extra")},
    lambda arrays: arrays | {"more": np.zeros(2)},
], ids=["rows", "levels", "dtype", "nan", "missing", "more"])
def test_arrays_that_do_not_fit_their_job_are_made_again(change, whole, tmp_path):
    folder, expected = whole
    copy = shutil.copytree(folder, tmp_path / "copy")
    jobs = [s for s in stems(copy) if "_" not in s]
    for stem in jobs:
        arrays, meta = load_arrays(copy / stem)
        save_arrays(copy / stem, change(arrays), meta)
    said = []
    assert np.array_equal(everything(fitted(copy, said=said)), expected)
    assert len(said) == len(jobs) and not any(s.endswith("(cached)") for s in said)


@pytest.mark.parametrize("end", [".json", ".safetensors"])
def test_a_pipe_is_not_read(end, whole, tmp_path):
    folder, expected = whole
    copy = shutil.copytree(folder, tmp_path / "copy")
    for stem in stems(copy):
        (copy / f"{stem}{end}").unlink()
        os.mkfifo(copy / f"{stem}{end}")
    assert np.array_equal(everything(fitted(copy)), expected)  # and does not wait for a writer for ever


def test_a_folder_in_the_way_is_named(whole, tmp_path):
    folder, _ = whole
    copy = shutil.copytree(folder, tmp_path / "copy")
    stem = next(s for s in stems(copy) if "_" not in s)
    (copy / f"{stem}.json").unlink()
    (copy / f"{stem}.json").mkdir()
    with pytest.raises(FileError, match=rf"cannot write .*{stem}\.json"):
        fitted(copy)


def test_a_flipped_bit_anywhere_is_seen(whole, tmp_path):
    folder, expected = whole
    rng = np.random.default_rng(1)
    for number, file in enumerate(sorted(folder.iterdir()) * 2):
        copy = shutil.copytree(folder, tmp_path / str(number))
        data = bytearray(file.read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (copy / file.name).write_bytes(data if number % 2 else data[: rng.integers(len(data))])
        assert np.array_equal(everything(fitted(copy)), expected), file.name


def test_a_model_without_files_is_fitted_again_beside_foreign_ones(tmp_path):
    models = {"hist": HistBoosting(max_iter=3)}
    first = everything(fitted(tmp_path, models))
    assert not [s for s in stems(tmp_path) if "_" in s]
    assert np.array_equal(everything(fitted(tmp_path, models)), first)


def test_plain_values_are_kept_under_their_key(tmp_path):
    file, value = tmp_path / "one.json", {"rows": [{"wis": 0.1, "name": "a", "length": float("inf")}]}
    assert cache.kept(file, "split 1") is None
    cache.keep(file, "split 1", value)
    assert cache.kept(file, "split 1") == {"rows": [{"wis": 0.1, "name": "a", "length": "inf"}]}
    assert cache.kept(file, "split 2") is None
    text = file.read_text()
    for torn in (text[:-5], "", "[]", "{}", text.replace("0.1", "0.2"), text.replace("split 1", "split 2")):
        file.write_text(torn)
        assert cache.kept(file, "split 1") is None and cache.kept(file, "split 2") is None
    body = json.loads(text)
    file.write_text(json.dumps({**body, "more": 1}))
    assert cache.kept(file, "split 1") is None
