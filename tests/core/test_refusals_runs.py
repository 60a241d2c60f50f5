"""Guards of runs and their records that no other test meets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from poise.config import PARTS, RunConfig
from poise.errors import DataError, FileError, RunError
from poise.hooks import Input
from poise.runs.checked import read_config, read_mapping, read_rows, read_status, read_summary
from poise.runs.checkpoint import Checkpoints, pack_optimizer, unpack_optimizer
from poise.runs.liveness import LOCK, fate, lock, this_process
from poise.runs.origin import load_origin, look_at, same_inputs
from poise.runs.records import SWEEP, Records, find_runs
from poise.runs.resume import refuse_resume, resumed
from poise.runs.sweeps import Job, load_jobs, outcome_of, write_jobs

ROW = b'{"step": 1, "name": "loss", "value": 2.0}\n'


def test_a_run_that_was_stopped_before_it_wrote_anything_has_no_records(tmp_path):
    assert read_status(tmp_path / "status.json") == {} == read_mapping(tmp_path / "environment.json")
    assert read_rows(tmp_path / "metrics.jsonl") == []
    assert read_summary(tmp_path / "summary.json") == ({}, {})
    assert load_origin(tmp_path) is None and fate(tmp_path, {}) == "killed"
    (tmp_path / LOCK).touch()  # which nobody holds: whoever the process was
    assert fate(tmp_path, {**this_process(), "namespace": "another"}) == "killed"
    (tmp_path / "status.json").write_text("{}")
    assert read_status(tmp_path / "status.json") == {}


def test_a_link_to_nowhere_is_no_missing_record(tmp_path):
    (tmp_path / "status.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileError, match=r"cannot read .*status\.json"):
        read_status(tmp_path / "status.json")


@pytest.mark.parametrize("rows", [
    b"torn\r" + ROW, b"torn\n" + ROW, ROW + b"torn\n", ROW.replace(b"2.0", b"true"),
    ROW.replace(b"1", b"true"), ROW.replace(b"2.0", b"1" + 400 * b"0"), ROW.replace(b"2.0", b'"two"')])
def test_a_line_that_is_no_row_is_named(rows, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(rows)
    with pytest.raises(FileError, match=r"metrics\.jsonl is damaged: line \d is no metric row"):
        read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(("read", "text", "words"), [
    (read_summary, '{"metrics": {"a": true}}', "its metric a is True, no number"),
    (read_summary, '{"notes": []}', "its notes are no mapping"),
    (read_status, '{"state": "done", "reason": 3}', "its reason is no text"),
    (read_status, '{"state": "done", "process": [3]}', "its process is not of host, boot"),
    (read_status, '{"state": "done", "process": {"pid": 3}}', "its process is not of host, boot"),
    (read_config, "data: 3\n", "data is no component"),
    (read_config, "data: {name: x}\n", "data is no component"),
    (read_config, "seed: true\n", "seed is no whole number"), (read_config, "- 3\n", "it holds no mapping"),
    (read_config, "a: &x [1]\nb: *x\n", "it repeats values by aliases"),
    (read_config, "a: " + 40 * "[" + 40 * "]", "it is nested more than 32 levels deep"),
    (read_config, "a: {3: b}\n", "a has the key 3, which is no text"),
    (read_config, "a: [[2020-01-01]]\n", "a is a date, which Poise does not write"),
])
def test_records_of_another_form_are_named(read, text, words, tmp_path):
    (tmp_path / "record").write_text(text)
    with pytest.raises(FileError, match=f"record is damaged: {words}"):
        read(tmp_path / "record")


# ------------------------------------------------------------------ writing


def test_a_directory_is_claimed_once(tmp_path):
    records = Records(tmp_path / "run")
    records.begin({"seed": 1})
    records.log(1, {"loss": 2.0})
    records.close()
    records.log(2, {"loss": 1.0})  # to a file that is closed by now
    with pytest.raises(RunError, match="already holds a run: choose another"):
        Records(tmp_path / "run").begin({"seed": 2})
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "resolved.yaml"]
    assert read_config(tmp_path / "run" / "resolved.yaml") == {"seed": 1}
    with pytest.raises(FileError, match="holds 1 rows, the checkpoint expects 2"):
        Records(tmp_path / "run").open(keep_rows=2)
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 1


def test_rows_that_find_no_room_are_said(tmp_path):
    records = Records(tmp_path)
    with open("/dev/full", "ab", buffering=0) as full:
        records._file = full
        with pytest.raises(FileError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
            records.log(1, {"loss": 2.0})
    assert records.rows == 0


def test_a_directory_that_was_removed_is_not_made_again(tmp_path):
    folder = tmp_path / "run"
    records = Records(folder)
    records.begin({})
    shutil.rmtree(folder)
    saver = Checkpoints(folder / "checkpoints")
    for write in (lambda: records.status("done"), lambda: records.summary({}), lambda: records.put_back({}),
                  lambda: saver.save(1, {"model.w": torch.ones(2)}, {})):
        with pytest.raises(FileError, match="run was removed while a run was writing to it"):
            write()
    records.close()
    assert not folder.exists()


def test_without_a_score_no_checkpoint_is_the_best(tmp_path):
    saver = Checkpoints(tmp_path / "checkpoints", keep=3)
    assert saver.best() is None and saver.newest() is None
    for step, score in enumerate((None, float("nan"), float("inf")), start=1):
        saver.save(step, {"model.w": torch.ones(2)}, {"score": score})
    assert saver.best() is None and saver.newest().step == 3
    saver.save(4, {"model.w": torch.ones(2)}, {"score": 2})
    assert saver.best().step == 4


def test_an_optimizer_comes_back_with_tuples():
    made = [torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], betas=(0.5, 0.7)) for _ in range(2)]
    made[0].param_groups[0]["params"][0].sum().backward()
    made[0].step()
    tensors, values = pack_optimizer(made[0])
    unpack_optimizer(made[1], tensors, json.loads(json.dumps(values)))
    before, after = (one.state_dict() for one in made)
    assert after["param_groups"] == before["param_groups"]
    assert after["param_groups"][0]["betas"] == (0.5, 0.7)
    assert after["state"].keys() == before["state"].keys() == {0}


# ------------------------------------------------------------------ what a run reads


def test_what_cannot_be_read_again_is_no_input(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is no regular file: a run reads files"):
        look_at({"data.path": Input(tmp_path / "pipe", ())})
    with pytest.raises(DataError, match=r"^data\.path: cannot read /proc/self/mem: Input/output error$"):
        look_at({"data.path": Input(Path("/proc/self/mem"), ())})


def test_an_input_is_the_one_that_the_run_began_with(tmp_path):
    inputs = {"data.path": Input(tmp_path / "table", ())}
    with pytest.raises(DataError, match=r"table does not exist, which .* reads: .* data\.path=NEW"):
        same_inputs(tmp_path, {}, inputs)
    (tmp_path / "table").write_text("1")
    seen = look_at(inputs)
    assert same_inputs(tmp_path, seen, inputs) == seen == same_inputs(tmp_path, {}, inputs)
    (tmp_path / "table").write_text("2")
    with pytest.raises(DataError, match=f"its checksum was {seen['data.path']['checksum']} and is"):
        same_inputs(tmp_path, seen, inputs)


@pytest.mark.parametrize("text", ["[]", "{}", '{"run": 3, "inputs": {}}', '{"run": "a"}',
                                  '{"run": "a", "inputs": {"data.path": {"path": "b"}}}'])
def test_an_origin_of_another_form_is_named(text, tmp_path):
    (tmp_path / "origin.json").write_text(text)
    with pytest.raises(FileError, match=r"origin\.json is damaged: it does not hold the run's number and"):
        load_origin(tmp_path)


# ------------------------------------------------------------------ resuming


def test_a_run_that_is_done_or_may_live_is_not_resumed(tmp_path):
    records = Records(tmp_path)
    records.begin(RunConfig(**{kind: {"entry": "none"} for kind in PARTS}).plain())
    with lock(tmp_path):  # without a status it may be running, and somebody holds the lock
        with pytest.raises(RunError, match=r"is still running$"):
            resumed(tmp_path, {})
        records.status("running")
        with pytest.raises(RunError, match=r"is still running \(process \d+ on "):
            resumed(tmp_path, {}, force=True)
    records.status("done")
    records.close()
    with pytest.raises(RunError, match="is done: there is nothing to resume"):
        resumed(tmp_path, {})
    with pytest.raises(RunError, match=r"was begun on another machine, .* force_resume=true"):
        refuse_resume(tmp_path, "unknown")
    for state, force in (("unknown", True), ("killed", False), ("interrupted", False), ("failed", False)):
        refuse_resume(tmp_path, state, force)


# ------------------------------------------------------------------ sweeps


def test_jobs_take_the_place_of_no_run_and_of_no_sweep(tmp_path):
    jobs = [Job("0", ["a=1"], {"seed": 1}, {}), Job("1", ["a=2"], {"seed": 1}, {})]
    (tmp_path / "run" / "1").mkdir(parents=True)
    (tmp_path / "run" / "1" / "resolved.yaml").touch()
    write_jobs(tmp_path / "sweep", jobs)
    assert load_jobs(tmp_path / "sweep") == jobs
    for folder in ("run", "sweep"):
        with pytest.raises(RunError, match="already holds a run or a sweep: choose another"):
            write_jobs(tmp_path / folder, jobs[::-1])
    assert not (tmp_path / "run" / SWEEP).exists() and load_jobs(tmp_path / "sweep") == jobs


@pytest.mark.parametrize("jobs", [
    3, [3], [{}], [{"name": "..", "overrides": [], "config": {}, "places": {}}],
    [{"name": "a/../../b", "overrides": [], "config": {}, "places": {}}],
    [{"name": "a", "overrides": [3], "config": {}, "places": {}}],
    [{"name": "a", "overrides": [], "config": {}, "places": {}, "more": 1}]])
def test_a_damaged_list_of_jobs_is_named(jobs, tmp_path):
    (tmp_path / SWEEP).write_text(json.dumps({"jobs": jobs}))
    with pytest.raises(FileError, match="is damaged: it does not hold the jobs of a sweep"):
        load_jobs(tmp_path)


def test_a_job_without_a_record_is_said(tmp_path):
    with pytest.raises(RunError, match=r"a job of the sweep left no record: .* holds no run"):
        outcome_of(tmp_path)


def test_runs_are_found_below_directories_that_are_there(tmp_path):
    with pytest.raises(FileError, match=r"no directory .*nowhere"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(FileError, match="holds no run"):
        find_runs([tmp_path])
    (tmp_path / SWEEP).touch()  # of which nothing was started
    assert find_runs([tmp_path]) == []
