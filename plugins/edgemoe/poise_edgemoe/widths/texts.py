"""Calibration and held-out windows of a text: from different halves of it, none of them overlapping.

A paragraph (what blank lines set apart) is never in both halves: neighbouring text makes what was measured
look better than it is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.errors import ConfigError, DataError

MOST_TEXT = 1 << 30  # bytes


@dataclass(frozen=True)
class Windows:
    """Tokens to measure on, each window one longer than what is fed.

    Parameters
    ----------
    calibration, held_out : Tensor, (windows, length + 1)
    checksum : str
        Of the text, or of the tokens.
    """

    calibration: Tensor
    held_out: Tensor
    checksum: str


def windows_of(
    data: Any, tokenizer: Any, vocab: int, *, windows: int, held_out: int, length: int, seed: int
) -> Windows:
    """Return windows of a text file, or of tokens.

    Parameters
    ----------
    data : path or Tensor
        A text file in UTF-8, or token ids (tokens,).
    tokenizer : Tokenizer or None
        Needed for text.
    vocab : int
        Tokens are below it.
    windows, held_out : int
        How many of each; the seed draws those of the first half, those of the second are spread evenly.

    Raises
    ------
    DataError
        For data that are missing, empty, too few, no text, or not of this vocabulary.
    ConfigError
        For text without a tokenizer.
    """
    if isinstance(data, (str, Path)):
        text, checksum = _read(Path(data))
        if tokenizer is None:
            raise ConfigError(f"{data} is text, and the model has no tokenizer: put its tokenizer.json "
                              f"into the folder, or give tokenizer=, or token ids")
        halves = [torch.tensor(tokenizer.encode(half), dtype=torch.long) for half in in_halves(text)]
    else:
        ids = _ids(data)
        checksum = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        halves = [ids[: len(ids) // 2], ids[len(ids) // 2:]]
    for half in halves:
        if len(half) and not 0 <= int(half.min()) <= int(half.max()) < vocab:
            raise DataError(f"the data hold token {int(half.max())}, and the model knows {vocab}: give its "
                            f"own tokenizer")
    first = _slots(halves[0], length, windows, "the first half, for calibration,")
    second = _slots(halves[1], length, held_out, "the second half, which is held out,")
    drawn = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))[:windows]
    spread = torch.linspace(0, len(second) - 1, held_out).long()
    return Windows(first[drawn], second[spread], checksum)


def in_halves(text: str) -> tuple[str, str]:
    """Return two halves of a text, cut after the blank line nearest to its middle, if there is one."""
    middle = len(text) // 2
    before, after = text.rfind("\n\n", 0, middle), text.find("\n\n", middle)
    cuts = [c + 2 for c in (before, after) if c >= 0]
    near = [c for c in cuts if abs(c - middle) <= len(text) // 4]
    cut = min(near, key=lambda c: abs(c - middle)) if near else middle
    return text[:cut], text[cut:]


def _read(path: Path) -> tuple[str, str]:
    try:
        if path.stat().st_size > MOST_TEXT:
            raise DataError(f"{path} has {path.stat().st_size} bytes: give a part of it, at most "
                            f"{MOST_TEXT}")
        raw = path.read_bytes() if path.is_file() else None
        text = None if raw is None else raw.decode()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    if raw is None or text is None:
        raise DataError(f"{path} is no regular file: give a text file")
    if not text.strip():
        raise DataError(f"{path} is empty: give a text to calibrate on")
    return text, hashlib.sha256(raw).hexdigest()


def _ids(data: Any) -> Tensor:
    if not isinstance(data, Tensor) or data.ndim != 1 or data.is_floating_point():
        raise DataError(f"data are a {type(data).__name__}: give a text file, or token ids as a tensor "
                        f"(tokens,)")
    if not len(data):
        raise DataError("data are empty: give tokens to calibrate on")
    return data.long()


def _slots(ids: Tensor, length: int, count: int, what: str) -> Tensor:
    """Return all windows that lie one after the other, (n, length + 1)."""
    n = len(ids) // (length + 1)
    if n < count:
        raise DataError(f"{what} has {len(ids)} tokens, and {count} windows of {length} need "
                        f"{count * (length + 1)}: give more text, or fewer or shorter windows")
    return ids[: n * (length + 1)].view(n, length + 1)
