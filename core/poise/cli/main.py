"""`poise`: from argv to one sub-command, a module here with `main(argv) -> int`, or a plugin's verbs."""

from __future__ import annotations

import sys

COMMANDS = {
    "run": "compose a run from named choices and carry it out",
    "list": "what is installed, by kind",
    "describe": "options, defaults and units of one entry: poise describe KIND NAME",
    "report": "table of runs: varied choices by metrics",
    "compare": "what differs between two runs",
    "demo": "a short form of every experiment, and one page about them",
    "doctor": "versions, threads, memory, extras, packaged data",
    "data": "which data are here, their licences, how to get the rest",
}


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; return the exit code (0, 1 failed, 2 wrong usage, 130 interrupted)."""
    from poise.errors import PoiseError
    from poise.streams import fit_streams

    fit_streams()
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except PoiseError as error:
        print(f"poise: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        print(f"poise: {error}" if error.args else "poise: interrupted", file=sys.stderr)
        return 130


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        from poise.version import __version__

        print(f"poise {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name in COMMANDS:
        import importlib

        module = {"list": "listing", "describe": "listing"}.get(name, name)
        command = importlib.import_module(f"poise.cli.{module}")
        return (command.describe if name == "describe" else command.main)(rest)
    return _plugin_command(name, rest)


def _plugin_command(name: str, argv: list[str]) -> int:
    from poise.errors import ConfigError, nearest
    from poise.registry import installed

    brought = [e.name for e in installed().entries("command")]
    if name not in brought:
        known = [*COMMANDS, *brought]
        raise ConfigError(f"no command {name!r}{nearest(name, known)} (have: {', '.join(known)})")
    from poise.cli.commands import carry_out

    return carry_out(installed().get("command", name), argv)


def _help() -> str:
    from poise.registry import installed

    lines = ["usage: poise COMMAND [ARGUMENTS]", ""]
    lines += [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    lines += [f"  {e.name:<10} {e.summary} [{e.plugin}]" for e in installed().entries("command")]
    return "\n".join([*lines, "", "poise run --help explains how a run is composed."])


if __name__ == "__main__":
    sys.exit(main())
