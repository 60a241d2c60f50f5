"""Sweeps that were interrupted or failed in part: finished with the same bits, and nothing done twice."""

from __future__ import annotations

import csv
import io
import shutil
import signal
from pathlib import Path

import pytest
from cli_helpers import call, contents, finish, result, start, wait_for

import poise
from poise.runs.records import load_run

pytestmark = pytest.mark.xdist_group("sweeps")  # they share one that is whole
WORDS = (
    "threads=1", "model.hidden=[64]", "model.dropout=0.1", "train.steps=40", "train.eval_every=10",
    "train.log_every=2", "train.checkpoint_every=5",
)
SWEEP = ("-m", "seed=0,1,2", "hydra.sweep.dir=sweep")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A sweep of three jobs that was left alone."""
    directory = tmp_path_factory.mktemp("whole") / "sweep"
    poise.run([*WORDS, "hydra.mode=MULTIRUN", "seed=0,1,2", f"hydra.sweep.dir={directory}"])
    return directory


def same(one: Path, other: Path) -> None:
    """Check that two sweeps left the same results."""
    for job in ("0", "1", "2"):
        assert result(one / job) == result(other / job)


def test_an_interrupted_sweep_says_how_to_finish_it_and_is_finished_with_the_same_bits(capsys, here, whole):
    process = start("run", *SWEEP, *WORDS, cwd=here)
    wait_for((here / "sweep/1/checkpoints/step-00000010.json").exists, process)
    process.send_signal(signal.SIGINT)
    finish(process).refuses(130, "finish the sweep with: poise run resume=sweep")
    report = call(capsys, "report", "sweep", "--format=csv").is_done().out
    rows = {r[0]: r for r in csv.reader(io.StringIO(report)) if r}
    assert "# Not finished: 1 of 3 jobs were never started" in rows
    assert rows["sweep/1"][1:] == ["interrupted", load_run("sweep/1").status["reason"], "seed=1"]
    assert rows["sweep/2"][1:] == ["not started", "", "seed=2"]
    first = contents(here / "sweep/0")
    done = call(capsys, "run", "resume=sweep").is_done()
    assert [x for x in done.err.splitlines() if x.startswith("[")] == [
        f"[{n}/3] {' '.join([f'seed={n - 1}', *WORDS])}" for n in (2, 3)
    ]
    assert contents(here / "sweep/0") == first
    same(here / "sweep", whole)


def lost(whole: Path, here: Path, *jobs: str) -> Path:
    """Copy a sweep without some of its jobs."""
    shutil.copytree(whole, here / "sweep")
    for job in jobs:
        shutil.rmtree(here / "sweep" / job)
    return here / "sweep"


def test_a_sweep_of_which_nothing_was_started_is_reported_and_finished(capsys, here, whole):
    sweep = lost(whole, here, "0", "1", "2")
    assert "3 of 3 jobs were never started" in call(capsys, "report", sweep).is_done().out
    call(capsys, "run", f"resume={sweep}").is_done()
    same(sweep, whole)


def test_a_finished_sweep_is_not_resumed(capsys, here, whole):
    sweep = lost(whole, here)
    before = contents(sweep)
    call(capsys, "run", f"resume={sweep}").refuses(1, "done", "nothing to resume")
    assert contents(sweep) == before


def test_jobs_in_folders_of_their_own_names_are_finished_there(capsys, here):
    words = ("run", "-m", *WORDS, "train.steps=2", "seed=0,1", "hydra.sweep.dir=sweep",
             "'hydra.sweep.subdir=by/${hydra.job.num}-${seed}'".strip("'"))
    call(capsys, *words).is_done()
    shutil.copytree("sweep", "other")
    shutil.rmtree("other/by/1-1")
    call(capsys, "run", "resume=other").is_done()
    assert result(Path("other/by/1-1")) == result(Path("sweep/by/1-1"))


def test_of_a_sweep_that_failed_in_part_the_rest_is_done_from_any_directory(capsys, here, monkeypatch):
    rows = "\n".join(["x,z,y", *(f"{i},{i % 7},{2 * i + i % 3}" for i in range(60))])
    (here / "a.csv").write_text(rows)
    words = ("run", "-m", "recipe=quantile", "model=none", "data=tabular", "threads=1",
             "recipe.base=[linear]", "recipe.folds=2", "recipe.figures=false", "data.path=a.csv,b.csv",
             "hydra.sweep.dir=sweep")
    failed = call(capsys, *words)
    assert failed.code == 1 and "b.csv does not exist" in failed.err
    assert "poise run resume=sweep" in failed.err
    (here / "b.csv").write_text(rows)
    first = contents(here / "sweep/0")
    shutil.rmtree(here / "sweep/1")  # as if it had never been started
    (here / "deeper").mkdir()
    monkeypatch.chdir(here / "deeper")
    call(capsys, "run", "resume=../sweep").is_done()
    assert contents(here / "sweep/0") == first
    assert load_run(here / "sweep/1").metrics == load_run(here / "sweep/0").metrics


@pytest.mark.parametrize("change, code", [("seed=5", 2), ("train.keep=0", 2)])
def test_a_change_that_one_job_does_not_take_is_refused_before_any_runs(capsys, here, whole, change, code):
    sweep = lost(whole, here, "1", "2")
    call(capsys, "run", f"resume={sweep}", change).refuses(code, "job 2 of 3", change.partition("=")[2])
    assert not (sweep / "1").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"jobs": 3}', '{"jobs": [{"name": "../x"}]}'])
def test_a_damaged_list_of_jobs_is_named(capsys, here, whole, text):
    sweep = lost(whole, here, "2")
    (sweep / "sweep.json").write_text(text)
    call(capsys, "run", f"resume={sweep}").refuses(1, "sweep/sweep.json")
    reported = call(capsys, "report", sweep)
    reported.refuses(1, "sweep/sweep.json")
    assert "test_accuracy" in reported.out
