"""The recipe and its report, on a real table."""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from poise.errors import ConfigError, DataError
from poise.interfaces import Arrays, Parts, Splits
from poise_quantagg import reporting
from poise_quantagg.components import GlobalCoarse, HistBoosting, QuantileEnsemble
from poise_quantagg.experiment import METRICS

LEVELS = [0.1, 0.25, 0.5, 0.75, 0.9]


def table(n=200):
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return x[:n], y[:n]


@dataclass(frozen=True)
class Diabetes:
    """scikit-learn's table behind the data contract."""

    rows: int = 200

    def load(self, seed=0):
        x, y = table(self.rows)
        order = np.random.default_rng(seed).permutation(len(y))
        cuts = [int(0.6 * len(y)), int(0.8 * len(y))]
        parts = [Arrays(x[i], y[i]) for i in np.split(order, cuts)]
        return Splits(*parts, {"source": "scikit-learn load_diabetes"}, {"target": "progression"})


class Notebook:
    """A context that keeps what it is told."""

    device = "cpu"

    def __init__(self, directory, seed=0):
        self.directory, self.seed = Path(directory), seed
        self.logged, self.notes, self.advanced = [], {}, 0

    def log(self, step, values):
        self.logged.append((step, dict(values)))

    def note(self, key, value):
        self.notes[key] = json.loads(json.dumps(value, allow_nan=False))

    def seed_for(self, purpose):
        digest = hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    @contextlib.contextmanager
    def progress(self, total, label):
        self.total = total
        yield self

    def advance(self, n=1, note=""):
        self.advanced += n


# ------------------------------------------------------------------ the recipe

QUICK = {"n_iter": 2, "max_steps": 60, "patience": 30}


def test_the_recipe_scores_every_model_and_aggregator(tmp_path):
    recipe = QuantileEnsemble(
        base=["linear", "quantile_forest"], levels=LEVELS, folds=3,
        base_options={"quantile_forest": {"n_estimators": 10}},
        aggregators=["average", "qra", "global_medium", "local_coarse", "local_fine"],
        aggregator_options={"local_coarse": QUICK, "local_fine": QUICK},
    )
    context = Notebook(tmp_path)
    parts = Parts(data=Diabetes(), model=HistBoosting(max_iter=10), aggregator=GlobalCoarse(),
                  names={"model": "boosted", "aggregator": "mine"})
    metrics = recipe.run(parts, context)
    names = {"linear", "quantile_forest", "boosted", *recipe.aggregators, "mine"}
    assert set(metrics) == {f"{key}/{name}" for name in names for key in METRICS}
    # standardised target: always predicting the marginal quantiles scores about 0.56
    assert 0.2 < metrics["wis_hub/mine"] < 0.56
    assert metrics["wis_paper/mine"] == pytest.approx(len(LEVELS) * metrics["wis_hub/mine"])
    assert context.advanced == context.total == len(names)
    assert {row["name"] for row in context.notes["scores"]} == names
    assert sum(context.notes["weights"]["mine"].values()) == pytest.approx(1)
    assert {f"figures/{n}.png" for n in ("fan", "reliability", "weights_qra", "weights_global_medium",
                                         "weights_local_coarse", "weights_local_fine")} == set(
        context.notes["figures"])
    for file in context.notes["figures"]:
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "crossfit").exists()


def test_scores_are_means_over_splits_each_with_its_own_rows(tmp_path):
    recipe = QuantileEnsemble(base=["linear"], aggregators=["best"], levels=LEVELS, folds=2, splits=3,
                              figures=False)
    context = Notebook(tmp_path)
    metrics = recipe.run(Parts(data=Diabetes()), context)
    rows = [row for row in context.notes["by_split"]["rows"] if row["name"] == "linear"]
    assert [row["split"] for row in rows] == [0, 1, 2]
    assert len({row["wis_paper"] for row in rows}) == 3
    assert metrics["wis_paper/linear"] == pytest.approx(np.mean([row["wis_paper"] for row in rows]))
    assert metrics["wis_paper/best"] == pytest.approx(metrics["wis_paper/linear"])  # it has no choice


def test_an_interrupted_run_goes_on_with_the_split_it_was_in(tmp_path):
    class Watched(Diabetes):
        def __init__(self, until=99):
            super().__init__(60)
            self.until, self.loaded = until, []

        def load(self, seed=0):
            if seed == self.until:
                raise KeyboardInterrupt
            self.loaded.append(seed)
            return super().load(seed)

    recipe = QuantileEnsemble(base=["linear"], aggregators=["best", "qra"], levels=LEVELS, splits=3,
                              figures=False)
    whole = Notebook(tmp_path / "whole")
    expected = recipe.run(Parts(data=Watched()), whole)
    with pytest.raises(KeyboardInterrupt):
        recipe.run(Parts(data=Watched(until=2)), Notebook(tmp_path / "cut"))
    data, again = Watched(), Notebook(tmp_path / "cut")
    assert recipe.run(Parts(data=data), again) == expected
    assert data.loaded == [2]
    assert again.advanced == again.total == whole.total
    kept, all_at_once = ([{k: v for k, v in row.items() if k != "cpu_seconds"}
                          for row in context.notes["by_split"]["rows"]] for context in (again, whole))
    assert kept == all_at_once
    assert again.notes["provenance"] == whole.notes["provenance"]
    assert not list((tmp_path / "cut").iterdir())


def test_the_recipe_is_decided_by_the_seed(tmp_path):
    recipe = QuantileEnsemble(base=["quantile_forest"], levels=LEVELS, folds=2, figures=False,
                              base_options={"quantile_forest": {"n_estimators": 5}})
    first, again, other = (
        recipe.run(Parts(data=Diabetes()), Notebook(tmp_path, s)) for s in (0, 0, 1)
    )
    assert first == again != other


def test_an_adapter_reaches_the_networks_and_changes_their_training(tmp_path):
    from poise.registry import build

    recipe = QuantileEnsemble(
        base=["multi_quantile_net", "linear"], levels=LEVELS, folds=2, figures=False, aggregators=["qra"],
        base_options={"multi_quantile_net": {"n_iter": 1, "width": 16, "depth": 2, "max_steps": 100}})
    plain, companded = (
        recipe.run(Parts(data=Diabetes(100), adapter=adapter, names={"adapter": "compander"}),
                   Notebook(tmp_path))
        for adapter in (None, build("adapter", "compander", a=1.0, b=0.6))
    )
    assert plain["wis_paper/linear"] == companded["wis_paper/linear"]
    assert plain["wis_paper/multi_quantile_net"] != companded["wis_paper/multi_quantile_net"]
    for metrics in (plain, companded):
        assert metrics["wis_hub/multi_quantile_net"] < 0.7


@pytest.mark.parametrize(("options", "parts", "message"), [
    ({"base": ["lightgmb"]}, {}, "did you mean 'lightgbm'"),
    ({"base": []}, {}, "at least one model"),
    ({"base_options": {"linaer": {}}}, {}, "did you mean 'linear'"),
    ({"base_options": {"linear": {"alhpa": 1.0}}}, {}, "did you mean 'alpha'"),
    ({"aggregators": ["mean"]}, {}, "no aggregator named 'mean'"),
    ({"aggregator_options": {"qre": {}}}, {}, "did you mean 'qra'"),
    ({"levels": [0.1, 0.5]}, {}, "level 0.9"),
    ({"base": ["linear"]}, {"adapter": object(), "names": {"adapter": "x"}}, "no base model is a network"),
    ({}, {"quantizer": object()}, "takes no quantizer"),
    ({}, {"data": None}, "needs data"),
])
def test_a_bad_choice_is_refused_before_data_is_loaded(tmp_path, options, parts, message):
    class Untouched:
        def load(self, seed=0):
            raise AssertionError("data was loaded")

    recipe = QuantileEnsemble(**options)
    with pytest.raises(ConfigError, match=message):
        recipe.run(Parts(**{"data": Untouched(), **parts}), Notebook(tmp_path))


def test_a_frozen_base_is_refused_for_networks_that_start_untrained(tmp_path):
    from poise.registry import build

    recipe = QuantileEnsemble(base=["gaussian_net"], levels=LEVELS)
    with pytest.raises(ConfigError, match="freezes its base"):
        recipe.check(Parts(data=Diabetes(), adapter=build("adapter", "bone"), names={"adapter": "bone"}))


def test_a_constant_target_is_refused(tmp_path):
    class Constant:
        def load(self, seed=0):
            part = Arrays(np.arange(8.0)[:, None], np.ones(8))
            return Splits(part, part, part, {})

    with pytest.raises(DataError, match="constant"):
        QuantileEnsemble(base=["linear"]).run(Parts(data=Constant()), Notebook(tmp_path))


# ------------------------------------------------------------------ the report


class Finished:
    """What a report sees of a run."""

    def __init__(self, data, scores):
        keys = ("wis_paper", "wis_none", "wis_sort", "wis_pava", "wis_minmax")
        rest = {"coverage_80": 0.75, "coverage_80_cv": 0.81, "length_80": 1.0, "length_80_cv": 1.2,
                "crossing_raw": 0.1, "cpu_seconds": 2.0, "kind": "aggregator"}
        rows = [{"split": i, "name": name, **dict.fromkeys(keys, value), **rest}
                for name, values in scores.items() for i, value in enumerate(values)]
        self.notes = {"by_split": {"rows": rows, "data": data}}


def test_the_report_says_the_geometric_mean_ratio_and_who_wins():
    runs = [Finished("a", {"best": [2.0, 4.0], "qra": [1.0, 2.0], "average": [2.0, 4.0]}),
            Finished("b", {"best": [1.0, 1.0], "qra": [2.0, 2.0], "average": [1.0, 1.0]})]
    tables, figures = reporting.report(runs)
    title, columns, rows = tables[0]
    by_name = {row[0]: dict(zip(columns, row)) for row in rows}
    assert "relative to best" in title and "4 splits" in title
    assert by_name["qra"]["ratio"] == "1.000" and by_name["qra"]["win/tie/loss"] == "1/0/1"
    assert by_name["average"]["win/tie/loss"] == "0/2/0"
    assert by_name["best"]["interval"] == "1.000 to 1.000"
    assert figures[0][1].startswith(b"\x89PNG")
    titles = " ".join(table[0] for table in tables)
    assert "Isotonisation" in titles and "Coverage" in titles


def test_a_method_that_is_not_on_every_set_is_left_out_of_the_mean():
    runs = [Finished("a", {"best": [2.0], "qra": [1.0]}), Finished("b", {"best": [1.0]})]
    assert [row[0] for row in reporting.report(runs)[0][0][2]] == ["best"]


def test_sets_may_differ_in_how_often_they_were_split():
    runs = [Finished("a", {"best": [2.0, 4.0, 3.0], "qra": [1.0, 2.0, 2.0]}),
            Finished("b", {"best": [1.0], "qra": [2.0]})]
    tables, _ = reporting.report(runs)
    assert "2 set(s), 4 splits" in tables[0][0]
    assert any("Isotonisation" in title for title, *_ in tables)


def test_a_split_that_was_run_twice_counts_once():
    first, again = Finished("a", {"best": [2.0, 4.0]}), Finished("a", {"best": [3.0, 4.0]})
    found = reporting.collect([first, again])
    assert [row["wis_paper"] for row in found["a"]["best"]] == [3.0, 4.0]


def test_other_levels_are_another_set_and_adapters_other_methods():
    runs = [Finished("a", {"best": [2.0]}), Finished("a", {"best": [1.0]}), Finished("b", {"best": [1.0]})]
    for run, levels in zip(runs, (99, 9, 9)):
        run.notes["by_split"]["levels"] = levels
    assert set(reporting.collect(runs)) == {"a, 99 levels", "a, 9 levels", "b"}
    companded = Finished("b", {"best": [5.0]})
    companded.config = {"adapter": {"entry": "compander"}}
    companded.notes["by_split"]["levels"] = 9
    found = reporting.collect([*runs, companded])["b"]
    assert {name: rows[0]["wis_paper"] for name, rows in found.items()} == {"best": 1.0,
                                                                          "best + compander": 5.0}


def test_a_report_without_finished_runs_is_empty():
    class Nothing:
        notes = {}  # noqa: RUF012

    assert reporting.report([Nothing()]) == ([], [])
