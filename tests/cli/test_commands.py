"""A plugin's command: verbs are components, their fields the arguments; every error is one line."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.cli import commands
from poise.cli.main import main
from poise.errors import ConfigError
from poise.options import check_options, option
from poise.registry import Registry, describe
from poise.registry import installed as real

SEEN = []


@dataclass(frozen=True)
class Pack:
    """Pack a model. More words."""

    model: str = option(help="what is packed")
    store: str = option(help="where it goes")
    bits: int = option(4, "bits of a weight", low=2, high=8, unit="bits")
    hot: int | str = option("bf16", "the rest", choices=("bf16", 8, 4))
    top_p: float | None = option(None, "share, 5 % say", above=0, high=1)
    stop: list[str] = option([], "what ends a text")
    sizes: list[int] = option([1], "numbers", low=1)
    dry_run: bool = option(False, "only say what would be done")

    def __post_init__(self) -> None:
        check_options(self)

    def run(self) -> int:
        """Remember what was asked."""
        SEEN.append(self)
        return 3


@dataclass(frozen=True)
class Look:
    """Look inside."""

    def run(self) -> None:
        """Do nothing."""


@pytest.fixture
def registry(monkeypatch):
    made = Registry("ours")
    made.add("command", "box", {"pack": f"{__name__}:Pack", "look": f"{__name__}:Look"}, "boxes of weights")
    made.merge(real())
    monkeypatch.setattr("poise.registry._installed", made)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Pack.__module__])
    SEEN.clear()
    return made


def poise(capsys, *argv):
    """Return exit code, stdout and stderr."""
    code = main(list(argv))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_verb_builds_its_component_and_its_number_is_the_exit_code(registry, capsys):
    assert poise(capsys, "box", "pack", "m", "s")[0] == 3
    assert SEEN.pop() == Pack("m", "s")
    words = "--bits 8 m --hot=4 s --top-p 0.5 --stop a --stop b --sizes 3 --dry-run"
    assert main(["box", "pack", *words.split()]) == 3
    assert SEEN.pop() == Pack("m", "s", 8, 4, 0.5, ["a", "b"], [3], True)
    assert poise(capsys, "box", "pack", "m", "s", "--hot", "bf16", "--no-dry-run")[0] == 3
    assert SEEN.pop() == Pack("m", "s", dry_run=False)
    assert poise(capsys, "box", "look") == (0, "", "")


@pytest.mark.parametrize(("argv", "words"), [
    (["pakc"], "poise: box has no verb 'pakc'; did you mean 'pack'? (have: pack, look)"),
    (["pack", "m"], "poise: box pack: the following arguments are required: store"),
    (["pack", "m", "s", "t"], "takes no further argument 't'"),
    (["pack", "m", "s", "--bit", "4"], "takes no option '--bit'; did you mean '--bits'?"),
    (["pack", "m", "s", "--top_p", "1"], "takes no option '--top_p'; did you mean '--top-p'?"),
    (["pack", "m", "s", "--bits", "many"], "argument --bits: 'many' is no int"),
    (["pack", "m", "s", "--bits"], "argument --bits: expected one argument"),
    (["pack", "m", "s", "--bits", "9"], "Pack.bits=9 is not allowed: it must be >= 2 and <= 8"),
    (["pack", "m", "s", "--hot", "5"], "Pack.hot=5 is not allowed: it must be one of bf16, 8, 4"),
    (["pack", "m", "s", "--top-p", "nan"], "Pack.top_p=nan is not allowed"),
    (["look", "x"], "takes no further argument 'x' (options: none)"),
])
def test_a_wrong_word_is_one_line_with_what_would_do(registry, capsys, argv, words):
    code, out, err = poise(capsys, "box", *argv)
    assert code == 2 and not out and not SEEN
    assert err.startswith("poise: ") and err.count("\n") == 1 and words in err


def test_help_says_what_the_fields_say(registry, capsys):
    code, out, _ = poise(capsys, "--help")
    assert code == 0 and "box" in out and "boxes of weights [ours]" in out
    for argv in ([], ["--help"], ["help"]):
        code, out, _ = poise(capsys, "box", *argv)
        assert code == 0 and "pack  Pack a model. More words." in out and "look  Look inside." in out
    code, out, _ = poise(capsys, "box", "pack", "--help")
    assert code == 0 and not SEEN
    flat = " ".join(out.split())
    for words in ("what is packed", "--bits BITS", "bits of a weight [int; >= 2 and <= 8; bits; default 4]",
                  "one of bf16, 8, 4; default bf16", "share, 5 % say", "--dry-run, --no-dry-run"):
        assert words in flat
    text = describe("command", "box")
    assert "poise box pack" in text and "bits: int = 4" in text and "model: str = required" in text
    assert "box" in "".join(poise(capsys, "list", "command")[1])


def test_a_command_names_verbs_and_nothing_else_does():
    for kind, component in (("command", "m:main"), ("command", {}), ("adapter", {"a": "m:A"})):
        with pytest.raises(ConfigError, match="a command names its verbs"):
            Registry("ours").add(kind, "x", component)


def test_a_verb_that_does_not_load_is_named(registry, capsys):
    registry.add("command", "gone", {"go": "no_such_module:Go"}, "")
    code, _, err = poise(capsys, "gone", "go")
    assert code == 2 and "command=gone of plugin 'ours' does not load (no_such_module:Go)" in err


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6), max_size=4))
def test_whatever_is_typed_is_a_component_or_a_refusal_in_words(words):
    try:
        made = commands.parsed(Pack, words, "box pack")
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert made.model in words and made.store in words
