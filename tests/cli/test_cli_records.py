"""Records that are not what Poise writes: each is answered in one line that names the file, and soon."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from cli_helpers import call, cut_back

ROW = '{"step": 1, "name": "loss", "value": 1.0, "time": 0.1}\n'
PROCESS = {"host": "here", "boot": "1", "namespace": "pid:[1]", "pid": 1, "began": "1"}
BOMB = "a: &a [1, 2]\n" + "".join(f"{chr(97 + i)}: &{chr(97 + i)} [{('*' + chr(96 + i) + ', ') * 9}]\n"
                                  for i in range(1, 12))

ODD = {
    "metrics.jsonl": [
        '{"step": 1, "value": 1.0}\n', '{"step": 1e999, "name": "loss", "value": 1}\n',
        '{"step": 1, "name": "loss", "value": 1e999}\n', '{"step": 1, "name": "loss", "value": NaN}\n',
        '{"step": 1, "name": 3, "value": 1}\n', '{"step": true, "name": "loss", "value": 1}\n',
        '{"step": 1, "name": "loss", "value": "0x1"}\n',
        f'{{"step": {"1" * 5000}, "name": "a", "value": 1}}\n',
        f'{{"step": 1, "name": "loss", "value": 1{"0" * 400}}}\n', "[" * 100_000 + "\n", "[]\n", "3\n",
    ],
    "summary.json": [
        '{"metrics": {"a": null}}', '{"metrics": {"a": [1]}}', '{"metrics": {"a": 1e999}}',
        '{"metrics": {"a": "x"}}', '{"metrics": {}, "notes": 3}', "[" * 100_000,
    ],
    "status.json": [
        '{"state": 5}', '{"state": "asleep"}', '{"state": ["running"]}',
        '{"state": "running", "process": 5}',
        json.dumps({"state": "running", "process": {**PROCESS, "pid": "x"}}),
        json.dumps({"state": "running", "process": {**PROCESS, "host": None}}),
        '{"state": "failed", "reason": 5}',
    ],
    "resolved.yaml": [
        "tag: 2024-01-01\n", "tag: 2024-01-01 10:00:00\n", "tag: &a [*a]\n", "tag: &a {b: *a}\n", BOMB,
        "1: 2\n", "tag: !!binary aGVsbG8=\n", "tag: !!set {a}\n", "tag: !!python/name:os.system\n",
        "recipe: 3\n", "model: {entry: [1]}\n", "seed: [1]\n", f"seed: {'1' * 5000}\n",
        "tag: " + "[" * 50_000, "{a: " * 100 + "1" + "}" * 100, "tag: " + "x" * (1 << 19),
    ],
    "environment.json": ["3", '{"a": '],
    "origin.json": ["3", '{"run": 5, "inputs": {}}', '{"run": "5", "inputs": {"data.path": 3}}'],
}
CASES = [(name, text) for name, texts in ODD.items() for text in texts]


@pytest.fixture
def two(here, finished) -> Path:
    """A whole run `b` beside `a`, which was killed after its checkpoint."""
    for name in ("a", "b"):
        shutil.copytree(finished / name, here / name)
    cut_back(here / "a", 3)
    return here


def answers(capsys, name: str) -> None:
    """Check what each command says of a run `a` with a record that cannot be read."""
    call(capsys, "run", "resume=a").refuses(1, f"a/{name}")
    if name == "origin.json":  # which reports do not read
        return
    call(capsys, "compare", "a", "b").refuses(1, f"a/{name}")
    reported = call(capsys, "report", ".")
    reported.refuses(1, f"a/{name}")
    assert "test_accuracy" in reported.out, "the other run is reported"


@pytest.mark.parametrize("name, text", CASES, ids=[f"{n}-{t[:30]}" for n, t in CASES])
def test_odd_records_are_named_in_one_line(capsys, two, name, text):
    (two / "a" / name).write_text(text)
    answers(capsys, name)


@pytest.mark.parametrize("name", list(ODD))
def test_a_pipe_in_the_place_of_a_record_is_named_and_not_awaited(capsys, two, name):
    (two / "a" / name).unlink(missing_ok=True)
    os.mkfifo(two / "a" / name)
    answers(capsys, name)


@pytest.mark.parametrize("name", list(ODD))
def test_a_record_of_any_size_is_named_and_not_read(capsys, two, name):
    with open(two / "a" / name, "wb") as f:
        f.truncate(1 << 40)
    answers(capsys, name)


def test_numbers_that_are_not_finite_are_read_as_they_are_written(capsys, two):
    (two / "a/metrics.jsonl").write_text(ROW + ROW.replace("1.0", '"inf"') + ROW.replace("1.0", '"nan"'))
    assert call(capsys, "report", "a").is_done()
