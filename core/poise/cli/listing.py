"""`poise list` and `poise describe`: the registry in words. Imports nothing heavy."""

from __future__ import annotations

import sys

from poise.errors import ConfigError
from poise.registry import KINDS, installed
from poise.registry import describe as describe_entry


def main(argv: list[str]) -> int:
    """Print entries: `poise list [KIND]`."""
    if len(argv) > 1 or any(a.startswith("-") for a in argv):
        raise ConfigError(f"usage: poise list [KIND], one of {', '.join(KINDS)}")
    lines, kind = [], None
    for entry in installed().entries(argv[0] if argv else None):
        if entry.kind != kind:
            kind = entry.kind
            lines.append(f"{kind}:")
        tasks = f" ({', '.join(entry.tasks)})" if entry.tasks else ""
        lines.append(f"  {entry.name:<18} {entry.summary}{tasks} [{entry.plugin}]")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def describe(argv: list[str]) -> int:
    """Print one entry: `poise describe KIND NAME`."""
    if len(argv) != 2:
        raise ConfigError("usage: poise describe KIND NAME, for example: poise describe adapter bone")
    sys.stdout.write(describe_entry(*argv) + "\n")
    return 0
