"""A conversion that is cut short goes on and ends with the same bytes; two to one place do not meet."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from cases import some
from moe_models import contents, names, saved

from poise.errors import ConfigError, FileError
from poise_edgemoe.store import writer
from poise_edgemoe.store.index import read_index
from poise_edgemoe.store.writer import convert

KILLED = """
import sys, time
from poise_edgemoe.store import writer, writing
real = writing._planes
def slowly(*given):
    time.sleep(0.02)
    return real(*given)
writing._planes = slowly
writer.convert(sys.argv[1], sys.argv[2], bits=4, group=8)
"""


@pytest.mark.parametrize("kills", some([1, 20], keep=[1]))
def test_a_conversion_that_is_killed_goes_on_and_ends_with_the_same_bytes(kills, tmp_path):
    source = saved(tmp_path / "model", "olmoe", num_hidden_layers=4)
    want = contents(convert(source, tmp_path / "whole", group=8))
    draw, ended = random.Random(0), 0
    for k in range(kills):
        store = tmp_path / f"store{k}"
        run = subprocess.Popen([sys.executable, "-c", KILLED, str(source), str(store)],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        partial = tmp_path / f"store{k}.partial"
        while not partial.exists() and run.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.5))
        run.send_signal(signal.SIGKILL)
        run.wait()
        if store.exists():
            ended += 1
        else:
            with pytest.raises(FileError, match="is no store"):
                read_index(partial)
            convert(source, store, bits=4, group=8)
        assert contents(store) == want and not partial.exists()
    assert ended < kills


def test_what_was_begun_for_other_options_is_begun_again(tmp_path, monkeypatch):
    source = saved(tmp_path / "model", "mixtral")
    real = writer.write_layer

    def fails(*given):
        if given[1].path.startswith("model.layers.1"):
            raise OSError(28, "No space left on device")
        return real(*given)

    monkeypatch.setattr(writer, "write_layer", fails)
    with pytest.raises(FileError, match="No space left on device: free some room and convert again"):
        convert(source, tmp_path / "store", bits=4, group=8)
    monkeypatch.setattr(writer, "write_layer", real)
    convert(source, tmp_path / "store", bits=8, group=8)
    convert(source, tmp_path / "other", bits=8, group=8)
    assert contents(tmp_path / "store") == contents(tmp_path / "other")


def test_a_conversion_that_ended_before_its_last_step_is_finished(tmp_path, monkeypatch):
    source = saved(tmp_path / "model", "mixtral")
    want = contents(convert(source, tmp_path / "whole", group=8))
    unlink, rename = writer.Path.unlink, os.rename

    def keeps_its_journal(path, **more):
        if path.name == writer.JOURNAL:
            raise OSError(5, "Input/output error")
        unlink(path, **more)

    def stays(old, new):
        if str(new).endswith("stays"):
            raise OSError(5, "Input/output error")
        rename(old, new)

    for name, owner, fails in (("unlink", writer.Path, keeps_its_journal), ("rename", os, stays)):
        store = tmp_path / f"{name} stays"
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(FileError, match="Input/output error"):
                convert(source, store, group=8)
        convert(source, store, group=8)
        assert contents(store) == want and read_index(store)


@pytest.mark.parametrize("left", [".hot.killed", ".config.json.killed", ".lock", "tokenizer.json"])
def test_what_a_killed_conversion_was_just_writing_is_no_part_of_a_store(left, tmp_path):
    source = saved(tmp_path / "model", "mixtral")
    want = contents(convert(source, tmp_path / "whole", group=8))
    partial = tmp_path / "store.partial"
    if left.startswith(".hot"):
        (partial / left).mkdir(parents=True)
        (partial / left / "0").write_bytes(b"half")
    else:
        partial.mkdir()
        (partial / left).write_text("{")
    assert contents(convert(source, tmp_path / "store", group=8)) == want


def test_two_conversions_to_one_place_do_not_meet(tmp_path, monkeypatch):
    source = saved(tmp_path / "model", "mixtral")
    want = contents(convert(source, tmp_path / "whole", group=8))
    with open(tmp_path / "store.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(FileError, match="store is being written by another conversion"):
            convert(source, tmp_path / "store", group=8)
        assert names(tmp_path) == {"model", "whole", "store.lock"}
    rename, tried = os.rename, []

    def meanwhile(old, new):
        if str(new).endswith("store"):
            with pytest.raises(FileError, match="is being written by another conversion"):
                convert(source, tmp_path / "store", bits=8, group=8)
            tried.append(new)
        rename(old, new)

    monkeypatch.setattr(os, "rename", meanwhile)
    convert(source, tmp_path / "store", group=8)  # where a killed one has left its lock
    assert tried and contents(tmp_path / "store") == want
    assert names(tmp_path) == {"model", "whole", "store"}


def test_a_store_that_another_conversion_has_ended_meanwhile_stays(tmp_path, monkeypatch):
    source, opened, ended = saved(tmp_path / "model", "mixtral"), writer.open_source, []

    def slow(model):
        if not ended:
            ended.append(True)
            convert(source, tmp_path / "store", bits=8, group=8)
        return opened(model)

    monkeypatch.setattr(writer, "open_source", slow)
    with pytest.raises(ConfigError, match="store exists: remove it first"):
        convert(source, tmp_path / "store", bits=4, group=8)
    assert ended and {q["bits"] for q in read_index(tmp_path / "store").quantizers} == {8}
    assert names(tmp_path) == {"model", "store"}


def test_a_lock_that_was_removed_while_one_waited_for_it_is_not_held(tmp_path, monkeypatch):
    source, flock, removed = saved(tmp_path / "model", "mixtral"), fcntl.flock, []

    def late(handle, how):
        if not removed:
            removed.append((tmp_path / "store.lock").unlink())
        elif len(removed) == 1:
            removed.append((tmp_path / "store.lock").stat().st_ino == os.fstat(handle).st_ino)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    convert(source, tmp_path / "store", group=8)
    assert removed == [None, True] and names(tmp_path) == {"model", "store"}


def test_of_many_conversions_at_once_one_succeeds(tmp_path):
    source = saved(tmp_path / "model", "mixtral")
    want, said = contents(convert(source, tmp_path / "whole", group=8)), []

    def one():
        try:
            said.append(convert(source, tmp_path / "store", group=8))
        except (ConfigError, FileError) as error:
            said.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [s for s in said if isinstance(s, str)]
    assert len(said) == 6 and len(refused) == 5
    assert all("is being written by another" in s or "store exists" in s for s in refused)
    assert contents(tmp_path / "store") == want and names(tmp_path) == {"model", "whole", "store"}
