"""Sub-commands that plugins bring: a component each, its options read from the command line.

An entry of the kind `command` maps verbs to components, `{"convert": "poise_edgemoe.commands:Convert"}`;
`poise moe convert …` builds the component from its arguments and calls `run() -> exit code`. A field
without a default is an argument by position, every other one an option: `max_new_tokens` is
`--max-new-tokens`. Help, types, ranges and defaults are those of the fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import types
import typing
from typing import Any, NoReturn

from poise.errors import ConfigError, nearest
from poise.options import allowed, default_of, make, option_fields, type_name
from poise.registry import Entry


def carry_out(entry: Entry, argv: list[str]) -> int:
    """Build the component that a verb names, from the arguments behind it, and run it.

    Raises
    ------
    ConfigError
        For an unknown verb or option, a missing argument, a wrong type, a value out of range.
    """
    name, verbs = entry.name, list(entry.verbs)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(entry))
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in entry.verbs:
        raise ConfigError(f"{name} has no verb {verb!r}{nearest(verb, verbs)} (have: {', '.join(verbs)})")
    component = entry.load(verb)
    if "-h" in rest or "--help" in rest:
        print(parser_of(component, f"{name} {verb}").format_help().rstrip())
        return 0
    return int(parsed(component, rest, f"{name} {verb}").run() or 0)


def overview(entry: Entry) -> str:
    """Return what `poise NAME --help` prints: the verbs, each with the first line of its component."""
    lines = [f"usage: poise {entry.name} VERB [ARGUMENTS]", "", entry.summary, ""]
    width = max(map(len, entry.verbs))
    lines += [f"  {verb:<{width}}  {_sentence(entry.load(verb))}" for verb in entry.verbs]
    return "\n".join([*lines, "", f"poise {entry.name} VERB --help says what a verb takes."])


def parsed(component: type, argv: list[str], where: str) -> Any:
    """Return the component, built from command-line arguments."""
    parser = parser_of(component, where)
    given, rest = parser.parse_known_args(argv)
    if rest:
        known = [flag(f.name) for f in option_fields(component) if not _positional(f)]
        word = rest[0].partition("=")[0]
        what = "takes no option" if word.startswith("-") else "takes no further argument"
        have = ", ".join(known) or "none"
        raise ConfigError(f"{where} {what} {rest[0]!r}{nearest(word, known)} (options: {have})")
    return make(component, vars(given), where)


def parser_of(component: type, where: str) -> argparse.ArgumentParser:
    """Return the parser whose arguments are the fields of a component."""
    parser = _Parser(prog=f"poise {where}", description=_sentence(component), allow_abbrev=False)
    hints = typing.get_type_hints(component)
    for field in option_fields(component):
        _add(parser, field, hints[field.name])
    return parser


def flag(name: str) -> str:
    """Return how an option is written: `x_y` is `--x-y`."""
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog.removeprefix('poise ')}: {message} ({self.prog} --help)")


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    kinds = _kinds(hint)
    about: dict[str, Any] = {"help": _help(field, hint).replace("%", "%%")}
    if bool in kinds:
        about["action"] = argparse.BooleanOptionalAction
    else:
        about |= {"type": _reader(kinds), "metavar": field.name.upper()}
        if typing.get_origin(_plain(hint)) is list:
            about["action"] = "append"
    if _positional(field):
        del about["metavar"]
        parser.add_argument(field.name, **about)
        return
    parser.add_argument(flag(field.name), dest=field.name, default=argparse.SUPPRESS, **about)


def _positional(field: dataclasses.Field) -> bool:
    return default_of(field) is dataclasses.MISSING


def _plain(hint: Any) -> Any:
    """Return an annotation without its None, where one other type is left."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [a for a in typing.get_args(hint) if a is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def _kinds(hint: Any) -> tuple[type, ...]:
    """Return the types that one value may have, in the order in which they are tried."""
    hint = _plain(hint)
    if typing.get_origin(hint) is list:
        return _kinds(typing.get_args(hint)[0])
    found = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return tuple(t for t in (bool, int, float, str) if t in found)


def _reader(kinds: tuple[type, ...]) -> Any:
    """Return a function from a word to the first of some types that takes it."""

    def read(word: str) -> Any:
        for kind in kinds:
            try:
                return kind(word)
            except ValueError:
                continue
        raise argparse.ArgumentTypeError(f"{word!r} is no {' or '.join(k.__name__ for k in kinds)}")

    return read


def _help(field: dataclasses.Field, hint: Any) -> str:
    default = default_of(field)
    extra = [x for x in (allowed(field), field.metadata.get("unit", "")) if x]
    if default is not dataclasses.MISSING and default not in (None, [], False):
        extra.append(f"default {default}")
    kind = "" if _kinds(hint) in ((str,), (bool,)) else type_name(_plain(hint))
    inside = "; ".join(filter(None, [kind, *extra]))
    return f"{field.metadata.get('help', '')} [{inside}]" if inside else field.metadata.get("help", "")


def _sentence(component: type) -> str:
    return (inspect.getdoc(component) or "").partition("\n")[0]
