"""Code is loaded from files and folders that nobody but this user and root could have changed."""

from __future__ import annotations

import os

import pytest

from poise.errors import FileError
from poise.trust import read_own, refuse_foreign_folder

STRANGER = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def open_to_all(path):
    os.chmod(path, 0o777)


def open_to_another_group(path):
    os.chown(path, -1, STRANGER)
    os.chmod(path, 0o775)


def given_away(path):
    os.chown(path, STRANGER, -1)


CHANGES = [
    (open_to_all, "may be written to by others"),
    pytest.param(open_to_another_group, "may be written to by others", marks=as_root),
    pytest.param(given_away, f"belongs to user {STRANGER}", marks=as_root),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
@pytest.mark.parametrize("depth", [0, 1])
def test_a_folder_that_a_stranger_could_change_is_named(change, words, depth, tmp_path):
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    assert refuse_foreign_folder(folder) == folder.resolve()
    (tmp_path / "link").symlink_to(folder)
    changed = (folder, folder.parent)[depth]
    change(changed)
    for asked in (folder, tmp_path / "link"):
        with pytest.raises(FileError, match=f"^{changed.resolve()} {words}: code is loaded only"):
            refuse_foreign_folder(asked)


def test_what_changes_nothing_of_ours_is_allowed(tmp_path):
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    os.chmod(folder.parent, 0o1777)  # as /tmp
    os.chmod(folder, 0o775)  # for a group of the user's own
    assert refuse_foreign_folder(folder) == folder.resolve()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"file is no folder$"):
        refuse_foreign_folder(tmp_path / "file")


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_file_that_a_stranger_could_change_is_named_and_not_read(change, words, tmp_path):
    path = tmp_path / "code"
    path.write_bytes(b"ours")
    os.chmod(path, 0o664)
    assert read_own(path) == b"ours"
    change(path)
    with pytest.raises(FileError, match=f"^{path} {words}: "):
        read_own(path)


def test_what_is_no_file_is_not_read(tmp_path):
    (tmp_path / "file").write_bytes(b"ours")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, words in {"none": "No such file", "link": "symbolic links", "pipe": "is no regular file",
                        "folder": "is no regular file"}.items():
        with pytest.raises(FileError, match=words):
            read_own(tmp_path / name)
