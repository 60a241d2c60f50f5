"""Where tables are printed: as wide as the terminal, and wide enough for a pipe or a file."""

from __future__ import annotations

import sys
from typing import Any

PIPE_WIDTH = 200


def console(stderr: bool = False) -> Any:
    """Return a rich console for stdout or stderr."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH)
