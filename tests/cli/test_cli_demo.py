"""`poise demo`: a page after every part, and an end when it is asked to stop."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from cases import some
from cli_helpers import call

from poise.data import images
from poise.runs.records import find_runs, load_run

PART = """# @package _global_
tag: {name}_demo
threads: 1
data: {{limit: 300}}
model: {{hidden: [8]}}
train: {{steps: 4}}
{sweep}"""
SWEEP = "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,1'}}}\n"


@pytest.fixture
def parts(here, monkeypatch) -> Path:
    """A demo of three small parts, the second one a sweep."""
    conf = here / "conf"
    shutil.copytree(Path(__file__).parents[2] / "conf", conf)
    for path in (conf / "experiment").glob("*_demo.yaml"):
        path.unlink()
    for name, sweep in (("a", ""), ("b", SWEEP), ("c", "")):
        (conf / f"experiment/{name}_demo.yaml").write_text(PART.format(name=name, sweep=sweep))
    monkeypatch.setenv("POISE_CONF", str(conf))
    return here


def interrupted_at(monkeypatch, load: int) -> None:
    """Have this process interrupted when data load for this time; note the page as it is then."""
    count, original = [0], images.load_digits

    def ask(*args):
        count[0] += 1
        if count[0] == load:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(images, "load_digits", ask)


def test_the_demo_runs_every_part_and_writes_a_page(capsys, parts):
    done = call(capsys, "demo", "out").is_done()
    assert [x for x in done.err.splitlines() if " poise run experiment=" in x] == [
        f"[{i}/3] poise run experiment={n}_demo" for i, n in enumerate("abc", start=1)]
    text = (parts / "out/index.html").read_text()
    assert all(f"{name} (short form" in text for name in "abc")


@pytest.mark.parametrize("load, part, shown", some(
    [(1, 1, ""), (2, 2, "a"), (3, 2, "a"), (4, 3, "ab")], keep=[(1, 1, ""), (3, 2, "a")]))
def test_an_interrupted_demo_stops_and_shows_what_is_done(capsys, parts, monkeypatch, load, part, shown):
    interrupted_at(monkeypatch, load)
    words = [f"interrupted in part {part} of 3", *([f"{parts}/out/index.html"] if shown else [])]
    call(capsys, "demo", "out").refuses(130, *words)
    states = [load_run(d).state for d in find_runs([parts / "out"])]
    assert states == ["done"] * (load - 1) + ["interrupted"]
    page = parts / "out/index.html"
    text = page.read_text() if page.exists() else ""
    assert [name for name in "abc" if f"{name} (short form" in text] == list(shown)
