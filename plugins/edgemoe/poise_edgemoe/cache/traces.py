"""Recorded routing: which experts a model used, token by token."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from poise.errors import DataError
from poise.files import write_bytes
from poise_edgemoe.cache.policy import Key

Row = tuple[int, int, int]  # step, layer, expert
ByToken = tuple[tuple[tuple[int, ...], ...], ...]

_COLUMNS = ("turn", "phase", "step", "layer", "expert")
_PROMPT, _DECODE, _LOOKED = 0, 1, 2


@dataclass(frozen=True)
class RoutingTrace:
    """One prompt and what was decoded after it, as uses of (MoE layer, expert).

    Attributes
    ----------
    layers
        MoE layers; layers without experts are not counted.
    experts
        Experts of a layer.
    layer_bytes
        Bytes of one expert, by MoE layer.
    prompt
        By layer the experts that any token of the prompt used, ascending, each once: one token.
    decode
        By token and layer the experts used, ascending.
    prompt_tokens
        By token of the prompt and layer the experts used, where it was recorded so; the last layer may have
        the last token only.
    looked
        By decoded token and layer the experts that the layer's router named when it was asked a layer too
        early, the likeliest first, none for layer 0; where it was recorded.
    model
        Of which routers it is (`store.routers.routers_hash`), where that is known.
    """

    layers: int
    experts: int
    layer_bytes: tuple[int, ...]
    prompt: tuple[Key, ...]
    decode: tuple[Key, ...]
    prompt_tokens: ByToken = ()
    looked: ByToken = ()
    model: str | None = None

    @property
    def expert_bytes(self) -> int:
        """Return the bytes of a slot that holds any expert: those of the largest."""
        return max(self.layer_bytes)


def tokens_of(keys: Sequence[Key], layers: int) -> list[list[list[int]]]:
    """Return by token and layer the experts used; a token ends where the layer number falls."""
    found: list[list[list[int]]] = []
    before = layers
    for layer, e in keys:
        if layer < before:
            found.append([[] for _ in range(layers)])
        found[-1][layer].append(e)
        before = layer
    return found


def read_trace(path: Path | str) -> RoutingTrace:
    """Read a routing trace as BigMoeOnEdge records it (gzip).

    Comment lines give the bytes of an expert (`# layer=0 expert_bytes=3059712`) and the number of experts
    (`n_expert=128`); then comes a table with the columns turn, phase (0: prompt, 1: decode), step (token),
    layer and expert. Others are not looked at. Ours have `# routers=HASH` too, and rows of a phase 2: what
    the router of a layer said a layer too early.

    Raises
    ------
    DataError
        For a file that is missing, not gzip, cut off, without rows, columns or bytes of a layer; for a cell
        that is no whole number from 0, an expert beyond their number, or more than one turn.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
            return _read(enumerate(lines, 1), str(path))
    except EOFError:
        raise DataError(f"{path} is cut off: the gzip stream does not end; copy it again") from None
    except (OSError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a routing trace (csv.gz): {error}") from None


def write_trace(path: Path | str, trace: RoutingTrace) -> None:
    """Write a routing trace so that `read_trace` reads the same.

    Raises
    ------
    FileError
        When the file cannot be written.
    """
    lines = [f"# n_expert={trace.experts}"]
    lines += [] if trace.model is None else [f"# routers={trace.model}"]
    lines += [f"# layer={n} expert_bytes={size}" for n, size in enumerate(trace.layer_bytes)]
    lines.append(",".join(_COLUMNS))
    # in pieces or not, what is not known token by token is one: steps are tokens
    whole = trace.prompt_tokens or [[sorted({e for m, e in trace.prompt if m == n})
                                     for n in range(trace.layers)]]
    phases: tuple[tuple[int, Sequence[Sequence[Sequence[int]]]], ...] = (
        (_PROMPT, whole), (_DECODE, tokens_of(trace.decode, trace.layers)), (_LOOKED, trace.looked))
    for phase, tokens in phases:
        lines += [f"0,{phase},{step},{n},{e}" for step, token in enumerate(tokens)
                  for n, used in enumerate(token) for e in used]
    write_bytes(path, gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))


def _read(lines: Iterator[tuple[int, str]], path: str) -> RoutingTrace:
    comments, header = [], None
    for _, line in lines:
        if not line.startswith("#"):
            header = line.rstrip("\r\n").split(",")
            break
        comments.append(line)
    if header is None:
        raise DataError(f"{path} has no table: needs a line of columns {', '.join(_COLUMNS)}, and rows")
    if missing := [c for c in _COLUMNS if c not in header]:
        raise DataError(f"{path}: column {missing[0]!r} is missing, there are {', '.join(header)}")
    rows = list(_rows(lines, header, path))
    if not rows:
        raise DataError(f"{path} has no rows")
    if turns := {row[0] for row in rows} - {rows[0][0]}:
        raise DataError(f"{path} has turns {rows[0][0]} and {min(turns)}: one turn is read, split the file")
    return _trace(rows, "".join(comments), path)


def _rows(lines: Iterator[tuple[int, str]], header: list[str], path: str) -> Iterator[tuple[int, ...]]:
    """Yield (turn, phase, step, layer, expert) of every row."""
    at = [header.index(c) for c in _COLUMNS]
    for number, line in lines:
        cells = line.rstrip("\r\n").split(",")
        if len(cells) != len(header):
            raise DataError(f"{path}, line {number}: {len(cells)} cells for {len(header)} columns")
        for i, column in zip(at, _COLUMNS):
            if not (cells[i].isascii() and cells[i].isdigit() and len(cells[i]) < 10):
                raise DataError(
                    f"{path}, line {number}: {column} is {cells[i]!r}, needs a whole number from 0"
                )
        row = tuple(int(cells[i]) for i in at)
        if row[1] not in (_PROMPT, _DECODE, _LOOKED):
            raise DataError(f"{path}, line {number}: phase is {row[1]}, needs 0 (prompt), 1 (decode) or 2 "
                            f"(what the next router said)")
        yield row


def _trace(rows: list[tuple[int, ...]], comments: str, path: str) -> RoutingTrace:
    """Return the trace; layers are numbered anew, from 0, since those without experts have no rows."""
    found = {int(i): int(b) for i, b in re.findall(r"\blayer=(\d+) expert_bytes=(\d+)", comments)}
    layers = sorted({layer for *_, layer, _ in rows})
    if bare := [i for i in layers if not found.get(i)]:
        raise DataError(f"{path}: no comment '# layer={bare[0]} expert_bytes=N' gives its experts' bytes")
    largest = max(expert for *_, expert in rows)
    told = re.search(r"\bn_expert=(\d+)", comments)
    experts = int(told[1]) if told else largest + 1
    if largest >= experts:
        raise DataError(f"{path}: expert {largest} is beyond n_expert={experts}")
    place = {layer: i for i, layer in enumerate(layers)}
    steps = {phase: sorted({(step, place[i], j) for _, p, step, i, j in rows if p == phase})
             for phase in (_PROMPT, _DECODE)}
    said = [(step, place[i], j) for _, p, step, i, j in rows if p == _LOOKED]  # in the router's order
    looked = _by_token(said, len(layers), steps[_DECODE]) if said else ()
    uses = tuple((n, e) for _, n, e in steps[_DECODE])
    prompt = sorted({key[1:] for key in steps[_PROMPT]})
    single = len({step for step, *_ in steps[_PROMPT]}) < 2
    read = () if single else _by_token(steps[_PROMPT], len(layers), steps[_PROMPT])
    routers = re.search(r"\brouters=([0-9a-f]+)", comments)
    return RoutingTrace(
        len(layers), experts, tuple(found[i] for i in layers), tuple(prompt), uses, read, looked,
        routers and routers[1])


def _by_token(rows: list[Row], layers: int, like: list[Row]) -> ByToken:
    """Return experts by token and layer, of the tokens that there are in `like`."""
    found: dict[int, list[list[int]]] = {step: [[] for _ in range(layers)] for step, *_ in like}
    for step, n, e in rows:
        if step in found:
            found[step][n].append(e)
    return tuple(tuple(tuple(used) for used in token) for token in found.values())
