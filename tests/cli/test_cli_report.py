"""Reports: of one run, a sweep, a mixture; in every format; with what did not finish."""

from __future__ import annotations

import csv
import io
import re
import shutil
from pathlib import Path

import pytest
from cases import some
from cli_helpers import TINY, call, cut_back, edit_json

import poise
from poise.report.loading import Found
from poise.report.tables import compare, tables
from poise.runs.records import Run


@pytest.fixture
def mixture(here, finished) -> Path:
    """Two finished runs beside one that failed, one interrupted, one killed."""
    for name in ("a", "b"):
        shutil.copytree(finished / name, here / name)
    for name, state in (("c", "failed"), ("d", "interrupted"), ("e", "running")):
        shutil.copytree(finished / "a", here / name)
        cut_back(here / name, 3)
        edit_json(here / name / "status.json", state=state, reason=f"why {name}")
    return here


def rows(text: str) -> list[list[str]]:
    return [r for r in csv.reader(io.StringIO(text)) if r]


def test_one_run_is_one_row(capsys, finished):
    text = call(capsys, "report", finished / "a").is_done().out
    accuracy = poise.load_run(finished / "a").metrics["test_accuracy"]
    assert text.startswith("Runs\n") and f"{accuracy:.4g}" in text
    assert "Not finished" not in text and "Paired" not in text


def test_two_runs_that_differ_are_two_rows_named_by_what_differs(capsys, finished):
    title, head, first, second, *_ = rows(call(capsys, "report", finished, "--format=csv").out)
    assert title == ["# Runs"] and head[:2] == ["choices", "runs"]
    assert "hidden=[8]" in first[0] and "hidden=[12]" in second[0]


def test_seeds_of_one_choice_are_one_row_with_mean_and_spread(capsys, here):
    poise.run([*TINY, f"hydra.run.dir={here}/0"])
    poise.run([*TINY, "seed=1", f"hydra.run.dir={here}/1"])
    a, b = (poise.load_run(here / n).metrics["test_loss"] for n in "01")
    (_, _, row, *_) = rows(call(capsys, "report", here, "--format", "csv", "--metric", "test_loss").out)
    assert row[1] == "2" and row[2].startswith(f"{(a + b) / 2:.4g} ± ")


def test_paired_differences_use_the_same_seeds(capsys, here):
    for width in (8, 12):
        for seed in (0, 1):
            poise.run([*TINY, f"seed={seed}", f"model.hidden=[{width}]",
                       f"hydra.run.dir={here}/{width}-{seed}"])
    losses = {n: poise.load_run(here / n).metrics["test_loss"] for n in ("8-0", "8-1", "12-0", "12-1")}
    mean = (losses["12-0"] - losses["8-0"] + losses["12-1"] - losses["8-1"]) / 2
    order = [here / n for n in ("8-0", "8-1", "12-0", "12-1")]
    text = call(capsys, "report", *order, "--metric=test_loss").is_done().out
    assert "Paired differences to: model.hidden=[8]" in text and f"{mean:+.4g} ± " in text


@pytest.mark.parametrize("form", ["terminal", "markdown", "csv", "html"])
def test_what_did_not_finish_is_listed_with_its_reason(capsys, mixture, form):
    call(capsys, "report", mixture, "--format", form, "--out", "page").is_done()
    text = Path("page").read_text()
    for word in ("Not finished", "failed", "interrupted", "killed", "why c", "why d", "why e"):
        assert word in text


def test_a_folder_where_nothing_finished_is_reported_too(capsys, mixture):
    text = call(capsys, "report", mixture / "c", mixture / "d").is_done().out
    assert "why c" in text and "why d" in text


def test_markdown_is_a_table(capsys, finished):
    lines = call(capsys, "report", finished, "--format", "markdown").is_done().out.splitlines()
    assert lines[0] == "**Runs**" and set(lines[3]) == set("|-")
    assert all(x.count("|") == lines[2].count("|") for x in lines[2:6])


@pytest.mark.parametrize(
    "patterns, shown",
    [(["test_*"], {"test_loss", "test_accuracy"}), (["train_loss", "model_bytes"],
     {"train_loss", "model_bytes"}), (["*"], None)],
    ids=["pattern", "two", "all"],
)
def test_metrics_are_chosen_by_pattern(capsys, finished, patterns, shown):
    asked = [x for p in patterns for x in ("--metric", p)]
    _, head, *_ = rows(call(capsys, "report", finished / "a", "--format=csv", *asked).is_done().out)
    assert set(head[2:]) == (shown or set(poise.load_run(finished / "a").metrics))


def test_a_pattern_that_matches_nothing_is_refused(capsys, finished):
    call(capsys, "report", finished, "--metric", "tset_*").refuses(2, "tset_*", "test_loss")


def test_the_page_fetches_nothing(capsys, here, mixture):
    call(capsys, "report", mixture, "--format", "html", "--out", here / "page.html").is_done()
    text = (here / "page.html").read_text()
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s)>]+)""", text)
    assert links and all(x.startswith("data:") for x in links)
    assert "<script" not in text and "<link" not in text and "@import" not in text


def test_the_page_escapes_what_people_wrote(capsys, here):
    poise.run([*TINY, "tag='<b>x<i>'", f"hydra.run.dir={here}/one"])
    call(capsys, "report", "one", "--format", "html").is_done()
    assert "<b>x<i>" not in Path("report.html").read_text()


def test_no_run_no_report(capsys, here):
    call(capsys, "report", "nowhere").refuses(1, "nowhere")
    call(capsys, "report", here).refuses(1, here, "no run")


def test_compare_tells_choices_and_metrics(capsys, finished):
    text = call(capsys, "compare", finished / "a", finished / "b", "--format=csv").is_done().out
    a, b = (poise.load_run(finished / n).metrics["trainable_parameters"] for n in "ab")
    assert ["model.hidden", "[8]", "[12]"] in rows(text) and ["seed", "0", "1"] in rows(text)
    (row,) = [r for r in rows(text) if r[0] == "trainable_parameters"]
    assert [x.replace(",", "") for x in row[1:]] == [f"{a:.0f}", f"{b:.0f}", f"{b - a:.0f}"]


def test_compare_of_a_run_with_itself_shows_no_choice(capsys, finished):
    text = call(capsys, "compare", finished / "a", finished / "a").is_done().out
    assert "Choices that differ" not in text and "Metrics" in text


DAMAGE = {
    "status.json": ["", "{", "[]", "null"],
    "summary.json": ["", '{"metrics": ', "[]", '{"metrics": 3}'],
    "environment.json": ["", "[]"],
    "metrics.jsonl": ["null\n", '{"step": 1}\n', '{"step": 1, "name": "x", "value": "a b"}\n'],
    "resolved.yaml": ["", "a: [", "- 1", "\x00"],
}


@pytest.mark.parametrize(
    "name, text", [(n, t) for n, texts in DAMAGE.items() for t in texts], ids=repr)
def test_damaged_records_are_named(capsys, here, finished, name, text):
    shutil.copytree(finished / "a", here / "a")
    (here / "a" / name).write_text(text)
    call(capsys, "report", "a").refuses(1, f"a/{name}")


def test_a_last_row_torn_by_a_kill_is_left_out(capsys, here, finished):
    shutil.copytree(finished / "a", here / "a")
    path = here / "a" / "metrics.jsonl"
    whole = poise.load_run("a").rows
    path.write_bytes(path.read_bytes()[:-9])
    assert poise.load_run("a").rows == whole[:-1]


def test_compare_of_a_sweep_of_several_kinds_is_refused(capsys, here):
    for name, steps in (("s/0", 2), ("s/1", 3)):
        poise.run([*TINY, f"train.steps={steps}", f"hydra.run.dir={here / name}"])
    call(capsys, "compare", "s", "s/0").refuses(2, "s holds 2 kinds of runs")


def test_a_metric_that_is_not_finite_is_shown_as_such():
    from poise.report.numbers import difference, number, spread

    assert number(float("nan")) == "nan" and number(float("inf")) == "inf"
    assert "nan" in spread([1.0, float("nan")]) and "nan" in difference([1.0, float("nan")])


# ------------------------------------------------------------------ statistics, and repeats


def run_of(folder, seed, choice="a", **metrics):
    """A finished run as read from its records."""
    config = {"seed": seed, "tag": "t", "model": {"entry": choice}}
    numbers = {name: float(value) for name, value in metrics.items()}
    return Run(folder, "done", config, {}, numbers, {}, [], {})


def cells(runs, title, metric="loss"):
    found = Found(list(runs), {}, {}, 0, [])
    (table,) = [t for t in tables(found, [metric]) if t.title.startswith(title)]
    return [row[1:] for row in table.rows]


LOSS = {"a": {0: 1.0, 1: 4.0, 2: 2.0, 3: 9.0}, "b": {2: 4.0, 0: 2.0, 1: 7.0}}  # in no order


def test_published_statistics_of_known_numbers():
    """sd with n - 1; pairs by seed, whatever the order; other minus first; t with the root of n."""
    runs = [run_of(Path(f"{c}{s}"), s, c, loss=v) for c, seeds in LOSS.items() for s, v in seeds.items()]
    for order in (runs, [*runs[:1], *runs[:0:-1]]):
        assert sorted(cells(order, "Runs")) == [["3", "4.333 ± 2.5"], ["4", "4 ± 3.6"]]
        assert cells(order, "Paired") == [["3", "+2 ± 1 (t=3.5)"]]
    assert cells(runs[::-1], "Paired") == [["3", "-2 ± 1 (t=-3.5)"]]


def test_compare_subtracts_the_first_from_the_second(here):
    for name, seeds in LOSS.items():
        for seed, value in seeds.items():
            folder = here / name / str(seed)
            folder.mkdir(parents=True)
            (folder / "resolved.yaml").write_text(f"seed: {seed}\nmodel:\n  entry: {name}\n")
            (folder / "status.json").write_text('{"state": "done"}')
            (folder / "summary.json").write_text(f'{{"metrics": {{"loss": {value}}}}}')
    assert rows(compare("a", "b", "csv"))[-1] == ["loss", "4 ± 3.6", "4.333 ± 2.5", "+2 ± 1 (t=3.5)"]
    assert rows(compare("b", "a", "csv"))[-1] == ["loss", "4.333 ± 2.5", "4 ± 3.6", "-2 ± 1 (t=-3.5)"]


def test_a_run_that_is_repeated_counts_once():
    runs = [run_of(Path(f"{c}{s}"), s, c, loss=v, step_seconds=s + 1)
            for c, seeds in LOSS.items() for s, v in seeds.items()]
    again = [run_of(Path(f"again/{r.directory}"), r.config["seed"], r.config["model"]["entry"],
                    loss=r.metrics["loss"], step_seconds=r.metrics["step_seconds"] + 2) for r in runs]
    for title in ("Runs", "Paired"):
        assert cells([*runs, *again, *again], title) == cells(runs, title)
    assert cells([*runs, *again], "Runs", "step_seconds")[0] == ["4", "3.5 ± 1.3"]
    nan = [run_of(Path(n), 0, loss=float("nan")) for n in "xy"]
    assert cells(nan, "Runs") == [["1", "nan"]]
    peaks = [run_of(Path(str(n)), 0, **{"machine/peak_bytes": n}) for n in (4, 6, 11)]
    assert cells(peaks, "Runs", "machine/peak_bytes") == [["1", "6"]]


@pytest.mark.parametrize("other", [{"loss": 1.5}, {}], ids=["another value", "none"])
def test_repeats_that_differ_are_named_and_no_mean_is_taken(other):
    runs = [run_of(Path(f"{c}{s}"), s, c, loss=v) for c, seeds in LOSS.items() for s, v in seeds.items()]
    runs.append(run_of(Path("odd"), 0, "a", **other))
    assert cells(runs, "Runs") == [["4", "-"], ["3", "4.333 ± 2.5"]]
    assert cells(runs, "Paired") == [["3", "-"]]
    assert cells(runs, "Repeats that differ") == [["0", "loss", "a0", "odd"]]


@pytest.mark.parametrize("how", some(["copied", "run"], keep=["copied"]))
def test_a_sweep_that_is_there_twice_says_what_it_said_once(capsys, here, how):
    sweep = [*TINY, "--multirun", "model.hidden=[8],[12]", "seed=0,1", "tag=twice"]
    texts = []
    for name in ("one", "two"):
        if name == "one" or how == "run":
            call(capsys, "run", *sweep, f"hydra.sweep.dir={here}/all/{name}").is_done()
        else:
            shutil.copytree(here / "all/one", here / "all/two")
        texts.append(call(capsys, "report", "all", "--format", "csv", "--metric", "*_loss").is_done().out)
    assert texts[0] == texts[1] and texts[0].count("±") > 4
