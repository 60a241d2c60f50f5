"""Asked to stop at any moment, and written to nowhere: a run keeps its record, and ends in one line."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from cases import some
from cli_helpers import POISE, TINY, call, contents, environment, finish, result, shell, start, wait_for

import poise
from poise.runs.records import load_run


def asked_in(patch, where: str, number: int) -> None:
    """Have this process sent a signal the next time a function is called."""
    module, _, name = where.rpartition(".")
    original = pytest.importorskip(module).__dict__[name]

    def ask(*args, **options):
        patch.undo()
        os.kill(os.getpid(), number)
        return original(*args, **options)

    patch.setattr(where, ask)


MOMENTS = {
    "data": "poise.data.images.load_digits", "model": "poise.recipes.classify.prepare",
    "last evaluation": "poise.recipes.classify._final", "last write": "poise.recipes.classify.save_final",
}


SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@pytest.mark.parametrize("moment, number", some(
    itertools.product(MOMENTS, SIGNALS),
    keep=[*((m, signal.SIGTERM) for m in MOMENTS), *(("model", n) for n in SIGNALS[1:])]))
def test_asked_to_stop_outside_of_training_a_run_is_interrupted_and_can_be_continued(
    capsys, here, finished, monkeypatch, moment, number
):
    with monkeypatch.context() as patch:
        asked_in(patch, MOMENTS[moment], number)
        call(capsys, "run", *TINY, "hydra.run.dir=run").refuses(130, "interrupted", "poise run resume=run")
    assert load_run("run").state == "interrupted"
    call(capsys, "run", "resume=run").is_done()
    assert result(here / "run") == result(finished / "a")


def test_asked_to_stop_while_it_says_how_it_ended_a_run_ends_as_it_did(capsys, here, monkeypatch):
    from poise.runs.records import Records

    original = Records.status

    def ask(self, state, reason=""):
        if state == "done":
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, state, reason)

    monkeypatch.setattr(Records, "status", ask)
    call(capsys, "run", *TINY, "hydra.run.dir=run").is_done()
    assert load_run("run").state == "done"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_asked_to_stop_a_write_leaves_no_draft(tmp_path, monkeypatch):
    from poise.files import write_bytes

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "file", b"x")
    assert contents(tmp_path) == {}


@pytest.mark.slow
def test_a_run_that_was_started_to_ignore_a_closing_terminal_ignores_it(here):
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", POISE, "run", *TINY, "train.steps=2000",
         "train.checkpoint_every=50", "hydra.run.dir=run"],
        cwd=here, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    wait_for((here / "run/checkpoints/step-00000050.json").exists, process)
    process.send_signal(signal.SIGHUP)
    finish(process).is_done()


# ------------------------------------------------------------------ what is removed under a run


LONG = (
    "threads=1", "model.hidden=[8]", "data.limit=300", "train.eval_every=0", "train.checkpoint_every=50",
)


def removed(patch, *paths: Path) -> None:
    """Have directories removed right before the checkpoint at step 100."""
    from poise.runs.checkpoint import Checkpoints

    original = Checkpoints.save

    def save(self, step, tensors, meta):
        if step == 100:
            for path in paths:
                shutil.rmtree(path)
        original(self, step, tensors, meta)

    patch.setattr(Checkpoints, "save", save)


def test_checkpoints_that_are_removed_are_written_again(capsys, here, monkeypatch):
    removed(monkeypatch, here / "run/checkpoints")
    call(capsys, "run", *LONG, "train.steps=200", "hydra.run.dir=run").is_done()
    assert {p.name for p in (here / "run/checkpoints").glob("*.json")} == {
        "step-00000150.json", "step-00000200.json"}


def test_a_run_whose_directory_is_removed_ends_in_a_line_and_makes_no_other(capsys, here, monkeypatch):
    removed(monkeypatch, here / "run")
    call(capsys, "run", *LONG, "train.steps=200", "hydra.run.dir=run").refuses(1, "run was removed while")
    assert not (here / "run").exists()


def test_a_removed_working_directory_is_named_and_spares_what_is_elsewhere(capsys, here, monkeypatch):
    (here / "work").mkdir()
    monkeypatch.chdir(here / "work")
    with monkeypatch.context() as patch:
        removed(patch, here / "work")
        call(capsys, "run", *LONG, "train.steps=150", f"hydra.run.dir={here}/there").is_done()
    call(capsys, "run", *LONG, "hydra.run.dir=here").refuses(2, "working directory was removed")
    call(capsys, "report", here / "there").is_done()


# ------------------------------------------------------------------ streams that take nothing


def redirected(how: str, *argv: str, cwd: Path, **changes: str) -> subprocess.CompletedProcess:
    """Call `poise` through a shell that redirects its streams."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$@" {how}', "bash", POISE, *argv], cwd=cwd, timeout=300,
        env=environment(**changes), capture_output=True, text=True, check=False,
    )


@pytest.mark.parametrize(
    "how, code",
    [("<&- >&- 2>&-", 0), (">/dev/full", 1), pytest.param("2>/dev/full", 0, marks=pytest.mark.slow),
     pytest.param("2>&1 | head -1", 0, marks=pytest.mark.slow)],
)
def test_whatever_becomes_of_its_streams_a_run_keeps_its_record(here, finished, how, code):
    ended = redirected(how, "run", *TINY, "hydra.run.dir=run", cwd=here)
    assert ended.returncode == code and "Traceback" not in ended.stderr
    assert result(here / "run") == result(finished / "a")
    if code:
        assert ended.stderr.splitlines()[-1] == "poise: cannot write to stdout: No space left on device"


def test_an_encoding_of_few_characters_is_enough(here):
    for seed in (0, 1):
        poise.run([*TINY, f"seed={seed}", f"hydra.run.dir={here}/runs/{seed}"])
    done = shell("report", "runs", cwd=here, LC_ALL="C", PYTHONIOENCODING="ascii").is_done()
    assert " +- " in done.out and done.out.isascii()


@pytest.mark.slow
def test_a_process_that_is_asked_to_stop_says_so_in_one_line(here):
    process = start("run", *LONG, "train.steps=100000", "hydra.run.dir=run", cwd=here)
    wait_for((here / "run/checkpoints/step-00000050.json").exists, process)
    process.send_signal(signal.SIGHUP)
    finish(process).refuses(130, "interrupted", "poise run resume=run")
    assert load_run(here / "run").state == "interrupted"
