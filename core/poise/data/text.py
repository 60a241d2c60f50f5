"""Plain text as examples with empty prompts."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from poise.data import packaged
from poise.data.splits import held_out, provenance, read_text, split_rows
from poise.errors import DataError
from poise.interfaces import Example, Splits


def cut(text: str, chunk: int) -> list[Example]:
    """Cut a text into examples of `chunk` characters (the last may be shorter); 0 keeps it whole.

    Joined, the completions are the text again.
    """
    step = chunk or max(len(text), 1)
    return [Example("", text[i : i + step]) for i in range(0, len(text), step)]


def load_text(options, seed: int) -> Splits:
    """Split a file into three contiguous parts, then into chunks.

    Raises
    ------
    DataError
        For a file that is missing, empty, not UTF-8, or too short to split.
    """
    path = place(options)
    text, digest = read_text(path)
    text = text[: options.limit] if options.limit else text
    n = len(text)
    n_test, n_validation = held_out(n, options.test), held_out(n, options.validation)
    cut_1, cut_2 = n - n_test - n_validation, n - n_test
    if cut_1 < 1:
        raise DataError(f"{path} has {n} characters: too few to split")
    parts = [cut(t, options.chunk) for t in (text[:cut_1], text[cut_1:cut_2], text[cut_2:])]
    return Splits(parts[0], parts[1], parts[2], provenance(
        str(path), packaged.licence_of(path), {str(path): digest}, parts, seed,
        characters=n, chunk=options.chunk, split="contiguous",
    ))


def place(options) -> Path:
    """Return the file that is read."""
    return Path(options.path) if options.path else packaged.shared("text/tinyshakespeare.txt")


def load_sotu(options, seed: int) -> Splits:
    """Split the packaged speeches by seed, then each speech into chunks.

    Raises
    ------
    DataError
        When the package is absent, or a speech is not the one its manifest lists.
    """
    speeches = _speeches(options.related)
    names = sorted(speeches)
    if options.limit and options.limit < len(names):
        import numpy as np

        kept = np.random.default_rng([seed, 1]).choice(len(names), options.limit, replace=False)
        names = [names[i] for i in sorted(kept)]
    rows = split_rows(len(names), options.test, options.validation, seed, "sotu")
    parts = [
        [example for i in part for example in cut(speeches[names[i]], options.chunk)]
        for part in rows
    ]
    entry = packaged.PACKAGES["sotu"]
    return Splits(parts[0], parts[1], parts[2], provenance(
        entry.distribution, entry.licence, dict(entry.files), parts, seed,
        speeches=dict(zip(("train", "validation", "test"), map(len, rows))), chunk=options.chunk,
    ))


def _speeches(related: bool) -> dict[str, str]:
    """Return the checked text of each speech by its identifier."""
    manifest, table = packaged.verified("sotu")
    known = json.loads(manifest.read_text())["files"]
    found = {}
    for row in csv.DictReader(io.StringIO(table.read_text())):
        if not related and row["is_sotu"] != "True":
            continue
        path = manifest.parent / "speeches" / f"{row['fileid']}.txt"
        text, digest = read_text(path)
        if digest != known[row["fileid"]]["parsed_text_sha256"]:
            raise DataError(f"{path} is altered: {packaged.HOW} --force-reinstall")
        found[row["fileid"]] = text
    return found
