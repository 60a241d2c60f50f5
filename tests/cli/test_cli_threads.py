"""How many threads a run has: what it says, else OMP_NUM_THREADS, else one for each core it may use."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from cli_helpers import TINY, call, cut_back, result, shell

import poise
from poise.compose import compose
from poise.runs.records import find_runs, load_run

SILENT = tuple(word for word in TINY if not word.startswith("threads="))
CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "value, words, threads",
    [("3", (), 3), ("5,2", (), 5), (" 7 ", (), 7), ("3", ("threads=2",), 2), (None, (), CORES),
     ("0", (), CORES), ("many", (), CORES), ("-1", (), CORES), ("9999999", (), CORES)],
)
def test_the_variable_counts_where_the_run_says_nothing(monkeypatch, value, words, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    config = compose([*SILENT, *words]).config
    assert config is not None and config.threads == threads


def test_a_resumed_run_keeps_the_threads_that_it_began_with(capsys, here, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    poise.run([*SILENT, "hydra.run.dir=whole"])
    shutil.copytree(here / "whole", here / "run")
    cut_back(here / "run", 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(2)
    call(capsys, "run", "resume=run").is_done()
    assert torch.get_num_threads() == load_run("run").environment["threads"] == 1
    assert result(here / "run") == result(here / "whole")
    torch.set_num_threads(before)


@pytest.mark.slow
def test_the_processes_of_a_launcher_have_the_same_default(here):
    words = ("run", "-m", *SILENT, "launcher=joblib", "seed=0,1", "hydra.sweep.dir=sweep")
    shell(*words, cwd=here, OMP_NUM_THREADS=None).is_done()
    assert [load_run(d).config["threads"] for d in find_runs([here])] == [CORES, CORES]
