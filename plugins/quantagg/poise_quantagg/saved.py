"""What is read from files, whose checksums say that they are whole and not that they are right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from poise.errors import FileError
from poise_quantagg.checks import is_number

MOST = 10**7  # features, or models x levels: more would be a slip, or an attack on the memory


def number(values: Mapping[str, Any], name: str, low: int, high: int = MOST) -> int:
    """Return a whole number from `low` to `high`.

    Raises
    ------
    FileError
        For anything else.
    """
    value = values.get(name)
    if not is_number(value) or not low <= value <= high:
        raise FileError(f"{name} is {str(value)[:40]!r}: allowed is a whole number from {low} to {high}")
    return value


def words(values: Mapping[str, Any], name: str) -> list[str]:
    """Return a list of distinct strings; `FileError` for anything else."""
    found = values.get(name)
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found) \
            or len(set(found)) != len(found):
        raise FileError(f"{name} is {str(found)[:40]!r}: allowed is a list of distinct names")
    return found


def array(
    arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int | None, ...], kind: str = "f", *,
    infinite: bool = False,
) -> np.ndarray:
    """Return an array of a shape (None: any length), of NumPy's kind of numbers, all of them finite.

    Raises
    ------
    FileError
        For an array that is missing or another one.
    """
    if name not in arrays:
        raise FileError(f"the array {name} is missing")
    found = arrays[name]
    fits = len(found.shape) == len(shape) and all(b is None or a == b for a, b in zip(found.shape, shape))
    if not fits or found.dtype.kind != kind:
        wanted = ", ".join("any" if b is None else str(b) for b in shape)
        raise FileError(f"the array {name} has shape {found.shape} and dtype {found.dtype}: expected "
                        f"({wanted}) and the kind {kind!r}")
    if np.isnan(found).any() or not (infinite or np.isfinite(found).all()):
        raise FileError(f"the array {name} holds values that are not finite")
    return found


def atoms(arrays: Mapping[str, np.ndarray], name: str = "atoms") -> np.ndarray:
    """Return values and their reach, (2, k), as `atoms.atoms_of` makes them."""
    found = array(arrays, name, (2, None))
    if (np.diff(found[0]) <= 0).any() or (found[1] < 0).any():
        raise FileError(f"the array {name} holds values that do not increase, or a negative reach")
    return found
