"""What was measured so far, line by line, so that work which was killed goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from poise.errors import FileError

NAME = "journal.jsonl"


class Journal:
    """Values by key, kept in a folder; a folder of another request is cleared first.

    Parameters
    ----------
    folder : Path
    request : str
        What two pieces of work with the same results have in common.

    Raises
    ------
    FileError
        For a folder of somebody else's, which is not cleared.
    """

    def __init__(self, folder: Path, request: str) -> None:
        self.path = folder / NAME
        lines = self._lines()
        own = {path.name for path in folder.iterdir()} - {"lock"}
        if own and not lines:
            raise FileError(f"{folder} is in the way: it holds {min(own)}, and nothing that was measured; "
                            f"remove it, or name another file")
        if not lines or lines[0] != {"request": request}:
            for path in folder.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            lines = [{"request": request}]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._known = {line["key"]: line["value"] for line in lines[1:]}

    def _lines(self) -> list[Any]:
        """Return whole lines; one that was being written when the work was killed is left out."""
        found: list[Any] = []
        if self.path.is_file():
            for line in self.path.read_text(errors="replace").splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:
                    break
        return found

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """Return a value, made and written down the first time; always as JSON holds it."""
        if key not in self._known:
            text = json.dumps({"key": key, "value": make()}, allow_nan=False)
            with open(self.path, "a") as f:
                f.write(text + "\n")
                f.flush()
                os.fsync(f.fileno())
            self._known[key] = json.loads(text)["value"]
        return self._known[key]

    def has(self, key: str) -> bool:
        """Return whether a value is there already."""
        return key in self._known
