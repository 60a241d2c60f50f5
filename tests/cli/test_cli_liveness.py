"""Who carries out a run: the lock on its directory tells, in containers, after kills, at a second call."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import (
    POISE,
    call,
    contents,
    cut_back,
    edit_json,
    environment,
    finish,
    observed,
    result,
    start,
    wait_for,
)

import poise
from poise.runs.liveness import LOCK, HeldError, fate, lock, this_process
from poise.runs.records import load_run

WORDS = (
    "threads=1", "model.hidden=[128]", "train.batch_size=128", "train.steps=60", "train.eval_every=20",
    "train.log_every=1", "train.checkpoint_every=10",
)
NEW_NUMBERS = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was left alone."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    poise.run([*WORDS, f"hydra.run.dir={directory}"])
    return directory


@pytest.fixture
def stopped(here, whole) -> Path:
    """The same run as a kill before its first checkpoint would have left it."""
    shutil.copytree(whole, here / "run")
    for path in (here / "run/checkpoints").iterdir():
        path.unlink()
    cut_back(here / "run", 0)
    return here / "run"


def contained(*argv: str, cwd: Path) -> subprocess.Popen:
    """Start `poise` where it has number 1, as in a container, or skip."""
    if subprocess.run([*NEW_NUMBERS, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process numbers of one's own here")
    return subprocess.Popen(
        [*NEW_NUMBERS, POISE, *argv], cwd=cwd, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow  # by default numbers of other machines and containers are compared below
def test_a_run_that_was_killed_as_number_1_is_continued_by_another_number_1(here, whole):
    process = contained("run", *WORDS, "hydra.run.dir=run", cwd=here)
    wait_for((here / "run/checkpoints/step-00000010.json").exists, process)
    assert load_run(here / "run").state == "running"
    assert load_run(here / "run").status["process"]["pid"] == 1
    process.kill()
    finish(process)
    assert load_run(here / "run").state == "killed"
    finish(contained("run", "resume=run", cwd=here)).is_done()
    assert result(here / "run") == result(whole)


@pytest.mark.slow
def test_of_two_resumes_at_once_one_continues_and_one_is_told_so(stopped, whole):
    both = [start("run", "resume=run", cwd=stopped.parent) for _ in range(2)]
    ended = sorted((finish(p) for p in both), key=lambda e: e.code)
    ended[0].is_done()
    assert ended[1].code == 1 and "Traceback" not in ended[1].err
    assert any(w in ended[1].complaint for w in ("run is still running (process ", "run is done"))
    assert len(observed(stopped)) == len(observed(whole))
    assert result(stopped) == result(whole)


def test_a_resume_of_a_run_that_another_process_holds_changes_nothing(capsys, stopped):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from pathlib import Path\n"
         "from poise.runs.liveness import lock\n"
         "with lock(Path(sys.argv[1])):\n    print(1, flush=True); time.sleep(60)", str(stopped)],
        stdout=subprocess.PIPE, env=environment(),
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    before = contents(stopped)
    call(capsys, "run", f"resume={stopped}").refuses(1, stopped, "still running (process ")
    assert contents(stopped) == before
    holder.kill()
    holder.communicate()
    assert load_run(stopped).state == "killed"


def test_a_new_run_takes_the_lock_before_it_writes_anything(capsys, here):
    (here / "run").mkdir()
    with lock(here / "run"):
        call(capsys, "run", *WORDS, "hydra.run.dir=run").refuses(1, "run already holds", "still running")
    assert list(contents(here / "run")) == [LOCK]


def test_a_look_at_a_run_does_not_take_the_lock_from_the_process_that_looks(tmp_path):
    with lock(tmp_path):
        assert fate(tmp_path, this_process()) == "running"
        with pytest.raises(HeldError), lock(tmp_path):
            pass
        code = (
            "import sys; from pathlib import Path; from poise.runs.liveness import fate, this_process\n"
            "print(fate(Path(sys.argv[1]), this_process()))"
        )
        seen = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True,
                              env=environment(), check=True)
        assert seen.stdout == "running\n"
    assert fate(tmp_path, this_process()) == "killed"


def test_a_child_that_outlives_a_killed_run_does_not_keep_it_alive(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from poise.runs.liveness import lock\n"
        "with lock(Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n        time.sleep(60)\n"
        "    print(1, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE,
                               env=environment(), start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    assert fate(tmp_path, this_process()) == "running"
    process.kill()
    process.wait()
    assert fate(tmp_path, this_process()) == "killed"
    os.killpg(process.pid, signal.SIGKILL)


def test_a_run_of_another_machine_is_resumed_only_when_told_to(capsys, stopped, whole):
    elsewhere = {**this_process(), "host": "elsewhere", "boot": "another"}
    edit_json(stopped / "status.json", process=elsewhere)
    assert load_run(stopped).state == "unknown"
    before = contents(stopped)
    call(capsys, "run", f"resume={stopped}").refuses(1, "elsewhere", "force_resume=true")
    call(capsys, "run", f"resume={stopped}", "force_resume=maybe").refuses(2, "maybe", "true or false")
    assert contents(stopped) == before
    assert "unknown" in call(capsys, "report", stopped).is_done().out
    call(capsys, "run", f"resume={stopped}", "force_resume=true").is_done()
    assert result(stopped) == result(whole)


def test_a_run_of_this_machine_before_it_was_started_anew_was_killed(tmp_path):
    assert fate(tmp_path, {**this_process(), "boot": "before"}) == "killed"


@pytest.mark.parametrize(
    "change, expected",
    [({}, "running"), ({"began": "1"}, "killed"), ({"pid": 2**22 + 1}, "killed"),
     ({"namespace": "pid:[1]"}, "unknown"), ({"boot": "another", "host": "elsewhere"}, "unknown")],
    ids=str,
)
def test_where_there_are_no_locks_the_process_is_compared(tmp_path, monkeypatch, change, expected):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with lock(tmp_path):
        pass
    assert fate(tmp_path, {**this_process(), **change}) == expected
