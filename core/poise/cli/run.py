"""`poise run`: Hydra's grammar, resume, sweeps; what is printed before and after."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from poise.errors import ConfigError

_SHOWING = ("--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--resolve", "--package",
            "-p", "--shell-completion", "-sc")
_CFG = ("job", "hydra", "all")
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_VALUES = {"--cfg": _CFG, "-c": _CFG, "--info": _INFO, "-i": _INFO}
_SWEEPING = ("--multirun", "-m")
_FORCE = "force_resume"


def main(argv: list[str]) -> int:
    """Run, resume, sweep, or show a configuration; return the exit code."""
    from poise import compose

    if any(a.split("=")[0] in _SHOWING for a in argv):
        _check_shown(argv)
        compose.show(argv)
        return 0
    flags = [a for a in argv if a.startswith("-")]
    sweep = any(f in _SWEEPING for f in flags)
    for flag in flags:
        if flag not in _SWEEPING:
            raise ConfigError(
                f"no flag {flag!r}; there are --multirun, --cfg job|hydra|all, "
                f"--info defaults|searchpath|plugins, --help"
            )
    overrides = [a for a in argv if not a.startswith("-")]
    if resume := [o for o in overrides if o.startswith("resume=")]:
        return _resume(resume[-1].partition("=")[2], [o for o in overrides if o not in resume])
    outcomes = compose.run_all(overrides, sweep=sweep, announce=announce)
    return _conclude(outcomes)


def _check_shown(argv: list[str]) -> None:
    """Refuse a value of --cfg or --info that does not exist, in one line."""
    for i, item in enumerate(argv):
        flag, has, value = item.partition("=")
        allowed = _VALUES.get(flag)
        if allowed is None:
            continue
        value = value if has else argv[i + 1] if i + 1 < len(argv) else ""
        if value not in allowed and (value or flag in ("--cfg", "-c")) and "=" not in value:
            raise ConfigError(f"{flag} {value}: allowed is {', '.join(allowed)}")


def _resume(directory: str, others: list[str]) -> int:
    from poise.compose import parse_changes
    from poise.runs.execute import execute
    from poise.runs.records import SWEEP
    from poise.runs.resume import resumed
    from poise.runs.sweeps import finish

    changes = dict(parse_changes(others))
    force = changes.pop(_FORCE, False)
    if not isinstance(force, bool):
        raise ConfigError(f"{_FORCE}={force}: allowed is true or false")
    if (Path(directory) / SWEEP).is_file():
        return _conclude(finish(Path(directory), changes, force))
    built = resumed(directory, changes, force)
    announce(built.config, Path(directory))
    return _conclude([execute(built, directory, resume=True)])


def announce(config: Any, directory: Path) -> None:
    """Print the configuration as a tree, and where the run writes."""
    from rich.tree import Tree

    from poise.cli.console import console

    tree = Tree(f"[bold]{config.tag}[/bold]  {directory}")
    for key, value in config.plain().items():
        if isinstance(value, dict):
            head = value.get("entry", "")
            if head == "none":
                continue
            options = ", ".join(f"{k}={v}" for k, v in value.items() if k != "entry")
            branch = tree.add(f"{key}: [bold]{head}[/bold]" if head else f"{key}:")
            if options:
                branch.add(options)
        elif key not in ("version", "tag"):
            tree.add(f"{key}: {value}")
    console(stderr=True).print(tree)


def _conclude(outcomes: list[Any]) -> int:
    from poise.report.loading import load
    from poise.report.tables import report
    from poise.runs.records import SWEEP

    directories = [o.run.directory for o in outcomes]
    print(report(load(directories)))
    for outcome in outcomes:
        if outcome.error is not None:
            print(f"poise: {_sentence(outcome)}", file=sys.stderr)
    root = directories[0] if len(directories) == 1 else directories[0].parent
    if any(o.error for o in outcomes) and (root / SWEEP).is_file():
        print(f"poise: try what is missing again with: poise run resume={shlex.quote(str(root))}",
              file=sys.stderr)
    print(f"records: {root}")
    return max((o.exit_code for o in outcomes), default=0)


def _sentence(outcome: Any) -> str:
    from poise.errors import PoiseError

    directory = outcome.run.directory
    if outcome.exit_code == 130:
        return f"interrupted; continue with: poise run resume={shlex.quote(str(directory))}"
    if isinstance(outcome.error, PoiseError):
        return " ".join(str(outcome.error).split())
    return (
        f"{type(outcome.error).__name__}: {outcome.error} (the traceback is in "
        f"{directory}/traceback.txt)"
    )
