"""What can go wrong, as types; each carries the exit code of `poise`.

Every message is one line that says what was given, where, what is allowed and how to mend it.
Wrong choices and wrong data are `ValueError`s too, which is what scikit-learn's users catch.
"""

from __future__ import annotations

import re

_BREAKS = re.compile(r"[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")


class PoiseError(Exception):
    """Any failure that Poise explains in one line: line breaks of what it quotes are written as escapes."""

    exit_code = 1

    def __init__(self, *told: object) -> None:
        super().__init__(*(_one_line(t) if isinstance(t, str) else t for t in told))


def _one_line(text: str) -> str:
    return _BREAKS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


class ConfigError(PoiseError, ValueError):
    """A choice that cannot be carried out: unknown name, wrong type, out of range, task mismatch."""

    exit_code = 2


class NameClash(ConfigError):
    """A name that two entries claim; nobody can say which one is meant."""


class MissingExtra(ConfigError):
    """An optional dependency is absent; the message names the extra that brings it."""


class DataError(PoiseError, ValueError):
    """Input data that cannot be used: missing, empty, truncated, not finite."""


class FileError(PoiseError):
    """A file of our own that is torn, altered or of another version."""


class RunError(PoiseError):
    """A run that cannot start, continue or finish."""


def require(module: str, extra: str):
    """Import an optional module, or raise `MissingExtra` naming the extra that installs it.

    Raises
    ------
    MissingExtra
        When the top-level package of `module` is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".", maxsplit=1)[0]:
            raise
        package = module.split(".", maxsplit=1)[0]
        raise MissingExtra(
            f"needs {package}, which is not installed: pip install 'poise[{extra}]'"
        ) from None


def nearest(word: str, known: list[str]) -> str:
    """Return "; did you mean 'x'?" for the known word nearest to `word`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
