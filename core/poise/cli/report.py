"""`poise report DIR…`: a table of runs, in the format asked for."""

from __future__ import annotations

import sys
from pathlib import Path

from poise.errors import ConfigError
from poise.files import write_text
from poise.report.loading import Found, load
from poise.report.tables import report

FORMATS = ("terminal", "markdown", "csv", "html")
USAGE = (
    "usage: poise report DIR... [--format terminal|markdown|csv|html] [--metric PATTERN]... "
    "[--out FILE]"
)


def main(argv: list[str]) -> int:
    """Print or write the report of all runs at or below the directories; 1 when one could not be read."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    directories, options = parse(argv, {"--format": "terminal", "--out": ""}, USAGE)
    form = str(options["--format"])
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: allowed is {', '.join(FORMATS)}")
    if not directories:
        raise ConfigError(USAGE)
    metrics = list(options["--metric"])
    out = str(options["--out"])
    found = load(directories)
    _show(found, form, metrics, out)
    for error in found.damaged:
        print(f"poise: left out: {error}", file=sys.stderr)
    return 1 if found.damaged else 0


def _show(found: Found, form: str, metrics: list[str], out: str) -> None:
    if form == "html":
        from poise.report.page import write_page

        target = Path(out or "report.html")
        write_page(target, [("Runs", found)], metrics=metrics)
    elif out:
        target = Path(out)
        write_text(target, report(found, form=form, metrics=metrics) + "\n")
    else:
        print(report(found, form=form, metrics=metrics))
        return
    print(f"report: {target.resolve()}")


def parse(argv: list[str], known: dict[str, str], usage: str):
    """Split argv into positional arguments and `--option value` pairs; `--metric` may repeat."""
    positional: list[str] = []
    options: dict = {**known, "--metric": []}
    items = iter(argv)
    for item in items:
        key, has, value = item.partition("=")
        if not item.startswith("--"):
            positional.append(item)
        elif key not in options:
            raise ConfigError(f"no option {key}; {usage}")
        else:
            value = value if has else next(items, None)
            if value is None:
                raise ConfigError(f"{key} needs a value; {usage}")
            if key == "--metric":
                options[key].append(value)
            else:
                options[key] = value
    return positional, options
