"""What surrounds a run: other runs at the same instant, no home, no terminal, another hash seed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cli_helpers import POISE, TINY, call, contents, environment, finish, result, shell, start, wait_for

import poise
from poise.compose import free_directory
from poise.runs.records import find_runs, load_run

# a run of some seconds that is interrupted, not awaited
LONG = ("threads=1", "train.steps=100000", "train.eval_every=0", "train.checkpoint_every=50")


@pytest.mark.slow  # of the very same instant, which is harder to meet, the next test tells
def test_two_runs_started_at_once_get_directories_of_their_own(here):
    both = [start("run", *TINY, f"seed={s}", cwd=here) for s in (0, 1)]
    for process in both:
        finish(process).is_done()
    runs = [load_run(d) for d in find_runs([here])]
    assert sorted(r.config["seed"] for r in runs) == [0, 1]
    assert all(r.state == "done" for r in runs)


def test_runs_of_the_very_same_instant_get_directories_of_their_own(here):
    instant = Path("runs/the-same-instant")
    taken = [free_directory(instant) for _ in range(3)]
    assert len(set(taken)) == 3 and all(d.is_dir() for d in taken)


def test_a_directory_that_holds_a_run_is_refused_and_stays_as_it_was(capsys, here):
    call(capsys, "run", *TINY, "hydra.run.dir=one").is_done()
    before = contents(here / "one")
    again = call(capsys, "run", *TINY, "seed=1", "hydra.run.dir=one")
    again.refuses(1, "one already holds a run", "resume=")
    assert contents(here / "one") == before


def test_a_sweep_into_a_directory_that_holds_one_is_refused_and_it_stays_as_it_was(capsys, here):
    words = ["run", "-m", *TINY, "seed=0,1", "hydra.sweep.dir=one"]
    call(capsys, *words).is_done()
    before = contents(here / "one")
    call(capsys, *words).refuses(1, "already holds a run")
    assert contents(here / "one") == before


@pytest.mark.slow
def test_of_two_processes_for_one_directory_one_runs(here):
    both = [start("run", *TINY, f"seed={s}", "hydra.run.dir=one", cwd=here) for s in (0, 1)]
    ended = [finish(p) for p in both]
    assert sorted(e.code for e in ended) == [0, 1]
    ended[ended[0].code == 0].refuses(1, "already holds a run")
    winner = 0 if ended[0].code == 0 else 1
    poise.run([*TINY, f"seed={winner}", "hydra.run.dir=alone"])
    assert result(here / "one") == result(here / "alone")


@pytest.mark.slow  # in test_cli_liveness.py another process holds a run that takes no time
def test_a_run_in_progress_is_not_resumed_by_another_process(capsys, here):
    process = start("run", *LONG, "hydra.run.dir=one", cwd=here)
    wait_for((here / "one/checkpoints/step-00000050.json").exists, process)
    call(capsys, "run", "resume=one").refuses(1, "still running", process.pid)
    process.terminate()
    assert finish(process).code == 130


@pytest.mark.slow
def test_a_file_in_the_place_of_a_home_stays_as_it_was(here):
    (here / "file").write_text("")
    home = str(here / "file")
    shell("run", *TINY, cwd=here, HOME=home, POISE_CACHE=None, XDG_CACHE_HOME=None).is_done()
    assert (here / "file").read_text() == ""


def test_without_home_input_and_terminal_and_with_another_hash_seed_a_run_is_the_same(here):
    words = [*TINY, "model.dropout=0.1"]
    poise.run([*words, "hydra.run.dir=here"])
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", POISE, "run", *words, "hydra.run.dir=there"], cwd=here,
        env=environment(HOME="/dev/null", POISE_CACHE=None, XDG_CACHE_HOME=None, PYTHONHASHSEED="4242"),
        capture_output=True, text=True, timeout=300, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
    assert "test_accuracy" in done.stdout
    assert result(here / "here") == result(here / "there")


def test_a_reader_that_leaves_early_is_no_error(here):
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {POISE} list | head -1"], cwd=here, env=environment(),
        capture_output=True, text=True, timeout=300, check=False,
    )
    assert done.stdout == "model:\n" and done.stderr == ""
