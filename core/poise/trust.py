"""Files from which code is loaded: whose they are, and whether anybody else could have put them there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from poise.errors import FileError


def refuse_foreign_folder(folder: Path) -> Path:
    """Return a folder's resolved path, once nobody but this user and root could change what it leads to.

    Raises
    ------
    FileError
        Naming the component that belongs to somebody else, or that others may write to.
    """
    resolved = Path(os.path.realpath(folder))
    for part in (resolved, *resolved.parents):
        found = os.lstat(part)
        if not stat.S_ISDIR(found.st_mode):
            raise FileError(f"{part} is no folder")
        if found.st_uid not in (0, os.geteuid()):
            raise FileError(f"{part} belongs to user {found.st_uid}: code is loaded only from folders of "
                            f"one's own (set POISE_CACHE)")
        # in a sticky folder (/tmp) others may add names, but neither rename nor remove ours
        if _others_write(found) and not found.st_mode & stat.S_ISVTX:
            raise FileError(f"{part} may be written to by others: code is loaded only from folders of "
                            f"one's own (chmod go-w, or set POISE_CACHE)")
    return resolved


def _others_write(found: os.stat_result) -> bool:
    """Tell whether others may write; a group of the user's own (as umask 002 supposes) is not others."""
    group = found.st_mode & stat.S_IWGRP and found.st_gid not in (0, os.getegid())
    return bool(found.st_mode & stat.S_IWOTH or group)


def read_own(path: Path) -> bytes:
    """Read a regular file of this user's, without following a link.

    Raises
    ------
    FileError
        For a link, anything but a regular file, another owner, or a file that others may write to.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise FileError(f"{path} is no regular file")
    with os.fdopen(handle, "rb") as file:
        if found.st_uid != os.geteuid():
            raise FileError(f"{path} belongs to user {found.st_uid}: only one's own files are loaded")
        if _others_write(found):
            raise FileError(f"{path} may be written to by others: remove it, it is built again")
        return file.read()
