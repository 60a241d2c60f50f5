"""Signals at any moment of a run: it says that it was stopped, and goes on to the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import slowly
from fuzzing import FULL, Verdicts, cases

from poise.cli.main import main
from poise.runs.records import load_run

POISE = str(Path(sys.executable).with_name("poise"))
WORDS = ["threads=1", "model.hidden=[64]", "train.steps=400", "train.eval_every=50", "train.log_every=20",
         "train.checkpoint_every=25", "hydra.run.dir=run"]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]


def default_signals():
    for one in SIGNALS[:3]:
        signal.signal(one, signal.SIG_DFL)  # a background job would inherit "ignore"


def started(folder):
    return subprocess.Popen([POISE, "run", *WORDS], cwd=folder, text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"},
                            preexec_fn=default_signals)  # noqa: PLW1509 - the child only resets signals


def result(folder):
    """Return weights and final metrics, times apart."""
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    return ((folder / "final.safetensors").read_bytes(),
            {k: v for k, v in metrics.items() if not k.endswith("seconds")})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run that was left alone, and how long it took."""
    folder = tmp_path_factory.mktemp("alone")
    began = time.monotonic()
    process = started(folder)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return result(folder / "run"), time.monotonic() - began


def stopped(folder, rng, took, case) -> bool:
    """Stop a run at a random moment, go on, and tell whether all is as it must be."""
    process, number = started(folder), rng.choice(SIGNALS)
    case |= {"signal": number.name, "after": rng.uniform(0.2, 1.0) * took}
    try:
        process.wait(timeout=case["after"])
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    _, said = process.communicate(timeout=60)
    case |= {"code": process.returncode, "said": said[-300:]}
    run = folder / "run"
    if not (run / "resolved.yaml").exists():  # before there was a run
        return process.returncode in (130, -number)
    case["state"] = state = load_run(run).state
    # a signal may also come when the run is done, and the process on its way out
    allowed = {0: ["done"], 130: ["interrupted", "done"], -number: ["done"]}
    if number == signal.SIGKILL:
        allowed[-number].append("killed")
    if "Traceback" in said or state not in allowed.get(process.returncode, ()):
        return False
    return state == "done" or main(["run", f"resume={run}"]) == 0


# test_cli_kill.py and test_cli_signals.py have moments of every kind by default
@pytest.mark.parametrize("size", [1] if FULL else [slowly(0)], ids=["full" if FULL else "more"])
def test_signals(size, alone, tmp_path, capsys):
    want, took = alone
    verdicts = Verdicts("signals")
    for rng in cases(size, 2, 200):
        folder = tmp_path / "here"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

        case = {}

        def right(folder=folder, rng=rng, case=case):
            return stopped(folder, rng, took, case) and (
                not (folder / "run").exists() or result(folder / "run") == want)

        verdicts.judge(case, right)
        capsys.readouterr()
    with capsys.disabled():
        verdicts.check()
