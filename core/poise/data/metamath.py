"""MetaMathQA: questions made of those of GSM8K and MATH, with worked answers, as one JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from poise.data import packaged
from poise.data.math import read_problems
from poise.data.splits import provenance, read_text, split_rows
from poise.errors import DataError
from poise.interfaces import Example, Splits

MARK = "The answer is:"
_EXPECTED = "one list of {query, response} is expected"


def load(options: Any, seed: int) -> Splits:
    """Read the training file, and GSM8K's test file (or hold out part of the first).

    Raises
    ------
    DataError
        For a missing or empty file, or a row that is no problem, with its number.
    """
    path = place(options)
    rows, digest = _read(path)
    sums = {str(path): digest}
    if options.limit and options.limit < len(rows):
        rows = Random(f"limit {seed}").sample(rows, options.limit)
    held = 0.0 if options.test_path else options.test
    train, validation, test = (
        [rows[i] for i in part]
        for part in split_rows(len(rows), held, options.validation, seed, str(path)))
    if options.test_path:
        test, sums[str(options.test_path)] = read_problems(Path(options.test_path))
    parts = (train, validation, test)
    return Splits(*parts, provenance(
        str(path), packaged.licence_of(path), sums, parts, seed, limit=options.limit,
        test="GSM8K's file" if options.test_path else "held out"))


def place(options: Any) -> Path:
    """Return the training file."""
    return Path(options.path) if options.path else packaged.shared("math/MetaMathQA-395K.json")


def _read(path: Path) -> tuple[list[Example], str]:
    text, digest = read_text(path)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): {_EXPECTED}") from None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds no list of problems: {_EXPECTED}")
    return [_example(row, f"{path} row {n}") for n, row in enumerate(rows)], digest


def _example(row: Any, where: str) -> Example:
    texts = [row.get(key) for key in ("query", "response")] if isinstance(row, dict) else []
    query, response = (t.strip() if isinstance(t, str) else "" for t in texts or (None, None))
    if not query or not response:
        raise DataError(f"{where} needs the keys 'query' and 'response', both text")
    _, mark, final = response.rpartition(MARK)
    return Example(f"{query}\n", response, final.strip().rstrip(".") if mark else "")
