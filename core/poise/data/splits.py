"""What all sources share: reading whole files, splitting by seed, provenance."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.errors import ConfigError, DataError, FileError
from poise.files import read_regular

if TYPE_CHECKING:
    import numpy as np

MOST_BYTES = 1 << 32  # of a file, which is read whole
MOST_UNPACKED = 1 << 30  # of what a gzip holds
_BLOCK = 1 << 20


def read_bytes(path: Path | str) -> tuple[bytes, str]:
    """Read a file whole, unpacking `.gz`; return the content and the file's own SHA-256.

    Raises
    ------
    DataError
        For what is missing, unreadable, empty, no regular file or larger than `MOST_BYTES`, for a
        truncated or damaged gzip, and for one that holds more than `MOST_UNPACKED`.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist: check `path`")
    try:
        raw = read_regular(path, MOST_BYTES)
    except FileError as error:
        raise DataError(str(error)) from None
    if not raw:
        raise DataError(f"{path} is empty")
    digest = hashlib.sha256(raw).hexdigest()
    return (_unpacked(raw, path) if path.suffix == ".gz" else raw), digest


def _unpacked(raw: bytes, path: Path) -> bytes:
    """Return what a gzip holds, block by block: a few bytes may stand for more than any memory."""
    blocks, size = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as f:
            while block := f.read(_BLOCK):
                blocks.append(block)
                size += len(block)
                if size > MOST_UNPACKED:
                    raise DataError(f"{path} unpacks to more than {MOST_UNPACKED} bytes: check that it is "
                                    f"the right file, and unpack it before")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}): fetch or compress it again") from None
    if not size:
        raise DataError(f"{path} is empty inside its gzip")
    return b"".join(blocks)


def read_text(path: Path | str) -> tuple[str, str]:
    """Read a UTF-8 text file (or `.gz`); return the text and the file's SHA-256.

    Raises
    ------
    DataError
        As `read_bytes`, and for bytes that are not UTF-8.
    """
    raw, digest = read_bytes(path)
    try:
        return raw.decode("utf-8-sig"), digest
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, or check that it is "
            f"the right file"
        ) from None


def check_fractions(component: Any) -> None:
    """Refuse fractions `test` and `validation` that leave nothing to train on."""
    total = component.test + component.validation
    if total >= 1:
        raise ConfigError(
            f"{type(component).__name__}: test={component.test} and validation="
            f"{component.validation} sum to {total:g}; they must sum to less than 1"
        )


def held_out(n: int, fraction: float) -> int:
    """Return how many of n a fraction is: rounded down, at least one unless it is zero."""
    # 0.29 * 100 is a hair below 29
    return max(1, int(fraction * n + 1e-9)) if fraction else 0


def split_rows(
    n: int, test: float, validation: float, seed: int, what: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split 0..n-1 at random into (train, validation, test) indices, each sorted.

    A fraction above zero gets at least one row.

    Raises
    ------
    DataError
        When no row is left to train on.
    """
    import numpy as np

    n_test, n_validation = held_out(n, test), held_out(n, validation)
    if n - n_test - n_validation < 1:
        raise DataError(
            f"{what} has {n} row{'s' * (n != 1)}: too few to hold out {n_test} for test and "
            f"{n_validation} for validation"
        )
    order = np.random.default_rng(seed).permutation(n)
    parts = np.split(order, [n_test, n_test + n_validation])
    return np.sort(parts[2]), np.sort(parts[1]), np.sort(parts[0])


def provenance(
    source: str, licence: str, files: dict[str, str], parts: Sequence[Any],
    seed: int, **handled: Any,
) -> dict[str, Any]:
    """Return what a run records about its data, as plain JSON values.

    Parameters
    ----------
    source, licence : str
    files : dict
        SHA-256 by path, of the files that were read.
    parts : (train, validation, test)
        Only their lengths are used.
    handled
        What was done to the data.
    """
    names = ("train", "validation", "test")
    return {
        "source": source, "licence": licence, "sha256": files,
        "sizes": {k: len(v) for k, v in zip(names, parts)}, "seed": seed, "handled": handled,
    }
