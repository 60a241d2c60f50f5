"""`poise compare A B`: what differs in configuration and in metrics."""

from __future__ import annotations

from poise.errors import ConfigError

USAGE = "usage: poise compare A B [--format terminal|markdown|csv]"


def main(argv: list[str]) -> int:
    """Print the differences between two runs, or two folders of runs."""
    from poise.cli.report import parse
    from poise.report.tables import compare

    directories, options = parse(argv, {"--format": "terminal"}, USAGE)
    form = str(options["--format"])
    if len(directories) != 2 or form not in ("terminal", "markdown", "csv"):
        raise ConfigError(USAGE)
    print(compare(directories[0], directories[1], form=form, metrics=list(options["--metric"])))
    return 0
