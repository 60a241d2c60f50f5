"""What the tests of the command line share: calling `poise`, and reading what a run left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from poise.runs.records import load_run

POISE = str(Path(sys.executable).with_name("poise"))
# a run of a tenth of a second
TINY = (
    "threads=1", "model.hidden=[8]", "data.limit=300", "train.steps=6", "train.eval_every=3",
    "train.log_every=2", "train.checkpoint_every=3",
)


@dataclass(frozen=True)
class Finished:
    """How a call of `poise` ended."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line of stderr that says what is wrong."""
        lines = [x for x in self.err.splitlines() if x.startswith("poise: ")]
        assert len(lines) == 1, self.err
        return lines[0]

    def is_done(self) -> Finished:
        assert self.code == 0, self.err
        return self

    def refuses(self, code: int, *words: object) -> Finished:
        """Check the exit code, and that one line without a traceback holds every word."""
        assert self.code == code, (self.code, self.err)
        assert "Traceback" not in self.err + self.out, self.err
        for word in words:
            assert str(word) in self.complaint, self.complaint
        return self


def call(capsys, *argv: object) -> Finished:
    """Call `poise` in this process."""
    from poise.cli.main import main

    capsys.readouterr()
    code = main([str(a) for a in argv])
    caught = capsys.readouterr()
    return Finished(code, caught.out, caught.err)


def environment(**changes: str | None) -> dict[str, str]:
    """Return this process's environment with some variables set, or (None) removed."""
    whole = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    return {k: v for k, v in whole.items() if v is not None}


def _default_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job would inherit "ignore"


def start(*argv: object, cwd: Path, **changes: str | None) -> subprocess.Popen:
    """Start `poise` in a process of its own."""
    return subprocess.Popen(
        [POISE, *map(str, argv)], cwd=cwd, env=environment(**changes), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=_default_signals,  # noqa: PLW1509 - the child only resets a signal
    )


def finish(process: subprocess.Popen) -> Finished:
    """Wait for a started process."""
    out, err = process.communicate(timeout=300)
    return Finished(process.returncode, out, err)


def shell(*argv: object, cwd: Path, **changes: str | None) -> Finished:
    """Call `poise` in a process of its own."""
    return finish(start(*argv, cwd=cwd, **changes))


def python(code: str, *argv: object, cwd: Path, **changes: str | None) -> Finished:
    """Run Python code in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], cwd=cwd, env=environment(**changes),
        text=True, capture_output=True, timeout=300, check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def wait_for(condition, process: subprocess.Popen) -> None:
    """Wait until a condition holds or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.002)


def observed(directory: Path) -> list[tuple[int, str, float]]:
    """Return what a run recorded, without the times."""
    return [(r["step"], r["name"], r["value"]) for r in load_run(directory).rows]


def result(directory: Path) -> tuple[bytes, list, dict]:
    """Return everything a run and its resumed twin must agree on: weights, rows, final metrics."""
    metrics = load_run(directory).metrics
    final = {k: v for k, v in metrics.items() if not k.endswith("seconds")}
    return (directory / "final.safetensors").read_bytes(), observed(directory), final


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory."""
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*")) if p.is_file()
    }


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut_back(directory: Path, step: int) -> None:
    """Leave of a finished run what a kill right after the checkpoint at `step` would have left."""
    for name in ("final.safetensors", "final.json", "summary.json"):
        (directory / name).unlink()
    edit_json(directory / "status.json", state="running")
    for path in (directory / "checkpoints").iterdir():
        if int(path.stem.split("-")[1]) > step:
            path.unlink()
