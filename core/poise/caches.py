"""Where things are kept that can be made again."""

from __future__ import annotations

import functools
import os
import stat
import tempfile
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """Return a folder for things that can be made again, created when missing.

    `POISE_CACHE`, else `XDG_CACHE_HOME/poise`, else `~/.cache/poise`; when that cannot be written,
    a folder of this user in the system's temporary directory: not one that somebody else made there under
    that name, but then one for this process alone.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    chosen = Path(os.environ.get("POISE_CACHE") or Path(home) / "poise", *parts)
    try:
        chosen.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=chosen):
            return chosen
    except OSError:
        fallback = Path(_ours(Path(tempfile.gettempdir(), f"poise-cache-{os.getuid()}")), *parts)
        fallback.mkdir(parents=True, exist_ok=True)
        return fallback


@functools.lru_cache(maxsize=8)
def _ours(named: Path) -> Path:
    named.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = os.lstat(named)
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return named if private else Path(tempfile.mkdtemp(prefix="poise-cache-"))
