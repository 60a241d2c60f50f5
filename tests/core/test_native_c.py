"""C that is built where it runs: once, whole, this user's, and again where it is not."""

from __future__ import annotations

import ctypes
import os
import stat

import pytest

from poise.native import FAILURES, built, compiler_at_hand, is_whole


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    try:
        compiler_at_hand()
    except RuntimeError as error:
        pytest.skip(str(error))
    path = tmp_path / "two.c"
    path.write_text("int poise_two(void) { return 2; }")
    return path


def test_a_library_is_built_once_and_anew_for_another_source(source):
    path = built(source, "natives")
    assert ctypes.CDLL(str(path)).poise_two() == 2 and is_whole(path.read_bytes())
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    made = path.stat().st_mtime_ns
    assert built(source, "natives") == path and path.stat().st_mtime_ns == made
    source.write_text("int poise_two(void) { return 3; }")
    other = built(source, "natives")
    assert other != path and ctypes.CDLL(str(other)).poise_two() == 3


@pytest.mark.parametrize("spoil", [
    lambda path, data: path.write_bytes(data[:-1]), lambda path, data: path.write_bytes(data[:64]),
    lambda path, data: path.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:]),
    lambda path, data: path.write_bytes(b""), lambda path, data: path.symlink_to("/dev/null"),
    lambda path, data: os.mkfifo(path)], ids=["short", "torn", "a bit", "empty", "link", "fifo"])
def test_what_is_not_whole_or_not_ones_own_is_built_again(spoil, source):
    path = built(source, "natives")
    data = path.read_bytes()
    path.unlink()
    spoil(path, data)
    assert built(source, "natives") == path and is_whole(path.read_bytes())
    assert stat.S_ISREG(os.lstat(path).st_mode)


@pytest.mark.parametrize(("compiler", "words"), [
    ("no-such-compiler", "no-such-compiler is not there"), ("false", "returned non-zero"),
    ("gcc 'x", "No closing quotation")])
def test_what_cannot_be_built_is_said(compiler, words, source, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(FAILURES, match=words):
        built(source, "natives")


def test_a_source_with_a_mistake_is_named_with_the_compilers_last_words(source):
    source.write_text("int poise_two(void) { return; ")
    with pytest.raises(RuntimeError, match="failed: "):
        built(source, "natives")
