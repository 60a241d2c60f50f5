"""Files that are missing, torn, altered, of another version, or have no room: named, and nothing lost."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from cases import some
from cli_helpers import call, contents, cut_back, observed, result

import poise
from poise.files import load_bundle
from poise.runs.records import load_run

QUANTILE = (
    "run", "recipe=quantile", "model=none", "data=tabular", "threads=1", "recipe.base=[linear]",
    "recipe.folds=2", "recipe.figures=false", "hydra.run.dir=run",
)
LONGER = (
    "threads=1", "model.hidden=[8]", "model.dropout=0.1", "data.limit=300", "train.steps=40",
    "train.eval_every=0", "train.log_every=4", "train.checkpoint_every=10", "train.keep=10",
)


# ------------------------------------------------------------------ data

ROWS = ["x,z,y", *(f"{i},{i % 7},{2 * i + i % 3}" for i in range(60))]
BAD_DATA = {
    "empty": "",
    "header only": "x,z,y\n",
    "one row": "x,z,y\n1,2,3\n",
    "a target that is missing": "\n".join([*ROWS[:30], "1,2,", *ROWS[30:]]),
    "a target that is infinite": "\n".join([*ROWS[:30], "1,2,inf", *ROWS[30:]]),
    "a target of words": "\n".join([*ROWS[:30], "1,2,many", *ROWS[30:]]),
    "a torn line": "\n".join([*ROWS[:30], "1,2", "3,4,5,6"]),
    "not text": b"\x93NUMPY\x00\xff\xfe" * 40,
}


@pytest.mark.parametrize("content", BAD_DATA.values(), ids=list(BAD_DATA))
def test_bad_data_fail_the_run_in_one_line_that_names_the_file(capsys, here, content):
    path = here / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    call(capsys, *QUANTILE, f"data.path={path}").refuses(1, path)
    one = load_run("run")
    assert one.state == "failed" and str(path) in one.status["reason"]


def test_missing_data_are_named(capsys, here):
    call(capsys, *QUANTILE, f"data.path={here}/none.csv").refuses(1, f"{here}/none.csv")
    assert load_run("run").state == "failed"


def test_a_torn_parquet_file_is_named(capsys, here):
    path = here / "table.parquet"
    path.write_bytes(b"PAR1" + bytes(100))
    call(capsys, *QUANTILE, f"data.path={path}").refuses(1, path)


def test_the_same_table_whole_is_fine(capsys, here):
    (here / "table.csv").write_text("\n".join(ROWS))
    call(capsys, *QUANTILE, f"data.path={here}/table.csv").is_done()


# ------------------------------------------------------------------ no room, no permission


def test_a_file_in_the_way_of_the_records_is_named(capsys, here):
    (here / "taken").write_text("precious")
    for out in ("paths.out=taken", "paths.out=taken/deeper", "hydra.run.dir=taken",
                "hydra.run.dir=taken/deeper"):
        call(capsys, "run", *LONGER, out).refuses(1, "taken", "hydra.run.dir=DIR")
    call(capsys, "run", "-m", *LONGER, "seed=0,1", "paths.out=taken").refuses(1, "taken")
    assert (here / "taken").read_text() == "precious"


def test_a_file_system_that_is_read_only_is_named(capsys, here, tmpfs):
    folder = tmpfs("size=1m,ro")
    call(capsys, "run", *LONGER, f"paths.out={folder}").refuses(1, folder, "Read-only")
    call(capsys, "run", *LONGER, f"hydra.run.dir={folder}").refuses(1, folder, "Read-only")


def test_a_full_disk_fails_the_run_and_keeps_the_checkpoints_before_it(capsys, here, tmpfs):
    folder = tmpfs("size=256k")
    words = [*LONGER, "train.checkpoint_every=4", "model.hidden=[32]"]
    call(capsys, "run", *words, f"hydra.run.dir={folder}/run").refuses(1, "cannot write", "No space left")
    kept = sorted((folder / "run/checkpoints").glob("*.json"))
    assert kept, "some checkpoints were written before the disk was full"
    for path in kept:
        load_bundle(path.with_suffix(""))
    assert load_run(folder / "run").state in ("failed", "killed")

    subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)
    call(capsys, "run", f"resume={folder}/run").is_done()
    call(capsys, "run", *words, "hydra.run.dir=whole").is_done()
    assert result(folder / "run") == result(here / "whole")


# ------------------------------------------------------------------ damaged checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run with checkpoints at 10, 20, 30 and 40."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    poise.run([*LONGER, f"hydra.run.dir={directory}"])
    return directory


def killed(whole: Path, place: Path, *, keep: tuple[int, ...]) -> Path:
    """Copy the run as a kill after the checkpoint at 30 would have left it, with these checkpoints."""
    shutil.copytree(whole, place)
    cut_back(place, 30)
    for path in (place / "checkpoints").iterdir():
        if int(path.stem.split("-")[1]) not in keep:
            path.unlink()
    return place


TENTHS = [("torn", tenth) for tenth in range(10)]
FLIPS = [("flipped", tenth) for tenth in range(0, 10, 2)]


def damage(path: Path, how: str, tenth: int) -> None:
    data = bytearray(path.read_bytes())
    at = len(data) * tenth // 10
    if how == "torn":
        path.write_bytes(data[:at])
        return
    data[at + random.Random(tenth).randrange(len(data) // 10)] ^= 0x81
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("how, tenth", some(
    [*TENTHS, *FLIPS], keep=[("torn", 0), ("torn", 9), ("flipped", 4)]))
def test_a_damaged_checkpoint_is_named_and_the_older_one_gives_the_same_end(
    capsys, here, whole, suffix, how, tenth
):
    directory = killed(whole, here / "run", keep=(20, 30))
    damage(directory / f"checkpoints/step-00000030.{suffix}", how, tenth)
    resumed = call(capsys, "run", "resume=run").is_done()
    assert f"step-00000030.{suffix}" in resumed.complaint
    assert result(directory) == result(whole)


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("how, tenth", [("torn", 0), ("torn", 7), ("flipped", 4)])
def test_with_no_other_checkpoint_a_damaged_one_ends_the_resume_and_nothing_changes(
    capsys, here, whole, suffix, how, tenth
):
    directory = killed(whole, here / "run", keep=(30,))
    damage(directory / f"checkpoints/step-00000030.{suffix}", how, tenth)
    before = contents(directory)
    ended = call(capsys, "run", "resume=run")
    assert ended.code == 1 and "Traceback" not in ended.err
    assert f"step-00000030.{suffix}" in ended.err.splitlines()[-1]
    assert contents(directory) == before


def test_tensors_without_an_index_are_no_checkpoint(capsys, here, whole):
    directory = killed(whole, here / "run", keep=(20, 30))
    (directory / "checkpoints/step-00000030.json").unlink()
    call(capsys, "run", "resume=run").is_done()
    assert result(directory) == result(whole)


def test_without_any_checkpoint_a_resume_starts_over(capsys, here, whole):
    directory = killed(whole, here / "run", keep=())
    call(capsys, "run", "resume=run").is_done()
    assert result(directory) == result(whole)


def test_rows_after_the_checkpoint_are_cut_also_a_torn_one(capsys, here, whole):
    directory = killed(whole, here / "run", keep=(10,))
    with open(directory / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": 99, "na')
    call(capsys, "run", "resume=run").is_done()
    assert observed(directory) == observed(whole)


# ------------------------------------------------------------------ what a resume refuses


def unchanged(capsys, directory: Path, code: int, *words: str, also: tuple[str, ...] = ()) -> None:
    """Check that a resume is refused and leaves every file as it was."""
    before = contents(directory)
    call(capsys, "run", f"resume={directory}", *also).refuses(code, *words)
    assert contents(directory) == before


def test_a_configuration_of_another_version_is_refused(capsys, here, whole):
    directory = killed(whole, here / "run", keep=(30,))
    config = yaml.safe_load((directory / "resolved.yaml").read_text())
    (directory / "resolved.yaml").write_text(yaml.safe_dump({**config, "version": 99}))
    unchanged(capsys, directory, 2, "version=99", "version 2")


def test_a_configuration_of_version_1_is_refused_with_what_has_changed_since(capsys, here, whole):
    directory = killed(whole, here / "run", keep=(30,))
    config = yaml.safe_load((directory / "resolved.yaml").read_text())
    adapter = {"entry": "compander", "include": [], "exclude": ["head"]}
    old = {**config, "version": 1, "adapter": adapter}
    (directory / "resolved.yaml").write_text(yaml.safe_dump(old))
    unchanged(capsys, directory, 2, "written by an earlier Poise (version 1)", "include and exclude",
              "target_modules and exclude_modules", "null", "run it again from its overrides")
    call(capsys, "report", directory).is_done()


@pytest.mark.parametrize("text", ["", "seed: [", "- 1", "\x00", "recipe: {entry: classify}\nversion: 1\n"])
def test_a_damaged_configuration_is_refused(capsys, here, whole, text):
    directory = killed(whole, here / "run", keep=(30,))
    (directory / "resolved.yaml").write_text(text)
    before = contents(directory)
    refused = call(capsys, "run", f"resume={directory}")
    assert refused.code in (1, 2) and "Traceback" not in refused.err and refused.complaint
    assert contents(directory) == before


@pytest.mark.parametrize("key", ["train", "seed", "version"])
def test_a_configuration_torn_before_a_key_is_refused(capsys, here, whole, key):
    directory = killed(whole, here / "run", keep=(30,))
    text = (directory / "resolved.yaml").read_text()
    (directory / "resolved.yaml").write_text(text[: text.index(f"\n{key}:") + 1])
    before = contents(directory)
    refused = call(capsys, "run", f"resume={directory}")
    assert refused.code in (1, 2), "a default took the place of what was lost"
    assert contents(directory) == before


@pytest.mark.parametrize("change", ["seed=1", "train.lr=0.1", "model=resnet20", "model.hidden=[9]",
                                    "train.steps=80", "threads=2"])
def test_a_change_that_would_change_the_result_is_refused(capsys, here, whole, change):
    directory = killed(whole, here / "run", keep=(30,))
    allowed = ("tracker", "tag", "train.log_every", "train.keep", "train.checkpoint_every")
    unchanged(capsys, directory, 2, change, *allowed, also=(change,))


@pytest.mark.parametrize("change", ["train.keep=3", "train.checkpoint_every=5", "tag=later"])
def test_a_change_that_cannot_change_the_result_is_taken(capsys, here, whole, change):
    directory = killed(whole, here / "run", keep=(30,))
    call(capsys, "run", "resume=run", change).is_done()
    assert result(directory) == result(whole)


@pytest.mark.parametrize(
    "change, words",
    [
        ("train.keep=x", ["keep", "'x'", "int"]),
        ("train.keep=0", ["keep", "0", ">= 1"]),
        ("tag=1,2", ["tag=1,2"]),
        ("tracker=nope", ["'nope'", "tensorboard"]),
        ("tracker.nope.deeper=1", ["tracker.nope.deeper"]),
        ("tag.deeper=1", ["tag.deeper"]),
        ("train.keep", ["train.keep", "KEY=VALUE"]),
    ],
)
def test_a_change_that_means_nothing_is_refused(capsys, here, whole, change, words):
    directory = killed(whole, here / "run", keep=(30,))
    unchanged(capsys, directory, 2, *words, also=(change,))


def test_a_finished_run_is_not_resumed(capsys, here, whole):
    shutil.copytree(whole, here / "run")
    unchanged(capsys, here / "run", 1, "done", "nothing to resume")


@pytest.mark.parametrize("name", ["missing", "", "empty", "file"])
def test_where_there_is_no_run_nothing_is_resumed(capsys, here, name):
    (here / "empty").mkdir()
    (here / "file").write_text("precious")
    before = contents(here)
    refused = call(capsys, "run", f"resume={name}")
    assert refused.code in (1, 2) and "Traceback" not in refused.err
    assert (name or "resume=") in refused.complaint
    assert contents(here) == before
