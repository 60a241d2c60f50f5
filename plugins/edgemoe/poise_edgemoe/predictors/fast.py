"""Counts and chances of a layer in one call of C each: what `blocks` and `routing` do in NumPy."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poise.native import Loaded, built
from poise_edgemoe.predictors.blocks import SLOW, SMOOTHED, Factored, Usual
from poise_edgemoe.predictors.past import KEPT, Past

SOURCE = Path(__file__).with_name("counts.c")
Curve = tuple[np.ndarray, np.ndarray]


class _Counts(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p)
          for n in ("k", "counts", "tokens", "rate", "both", "visits", "used", "sizes")),
        *((n, ctypes.c_int64) for n in ("layers", "experts")),
        *((n, ctypes.c_double) for n in ("smoothed", "slow")), ("kept", ctypes.c_double * len(KEPT)),
    ]


class _Library:
    def __init__(self, path: Path) -> None:
        library, pointer, number = ctypes.CDLL(str(path)), ctypes.c_void_p, ctypes.c_int64
        self.note, self.chances = library.poise_note, library.poise_chances
        self.note.argtypes, self.note.restype = [pointer, number, pointer, number], None
        self.chances.argtypes = [
            pointer, number, number, pointer, number, number, pointer, pointer, pointer, number,
            ctypes.c_double, pointer, pointer, pointer]
        self.chances.restype = number


_LOADED = Loaded(lambda: _Library(built(SOURCE, "edgemoe")))


class Fast:
    """Counts of a running predictor, in the same arrays.

    Parameters
    ----------
    usual, factored : Usual, Factored or None
        Its blocks.
    past : Past
        Which it has from now on.
    """

    def __init__(self, library: _Library, usual: Usual, factored: Factored | None, past: Past) -> None:
        self.library, self.past = library, past
        layers, experts = usual.counts.shape
        self._used = np.zeros((layers, experts), dtype=np.int32)
        self._sizes = np.zeros(layers, dtype=np.int32)
        self._room = np.zeros(3 * experts)
        self._experts, self._chances = np.zeros(experts, dtype=np.int32), np.zeros(experts)
        held = [usual.k, usual.counts, usual.tokens, past.rate]
        held += [factored.both, factored.visits] if factored else [None, None]
        self._held = [*held, self._used, self._sizes]  # as long as C has their addresses
        self._state = _Counts(*(None if a is None else a.ctypes.data for a in self._held), layers, experts,
                              SMOOTHED, SLOW, (ctypes.c_double * len(KEPT))(*KEPT[:, 0]))
        self._at = ctypes.addressof(self._state)
        self._out = [a.ctypes.data for a in (self._room, self._experts, self._chances)]

    def note(self, n: int, experts: Sequence[int]) -> None:
        """Count what layer n uses, ascending."""
        given = array("i", experts)
        self.library.note(self._at, n, given.buffer_info()[0], len(given))
        self.past.used[n] = tuple(experts)

    def chances(
        self, n: int, ahead: int, weights: np.ndarray, factored: bool, named: Sequence[int] | None,
        curve: Curve, least: float,
    ) -> list[tuple[int, float]]:
        """Return experts of layer n that have at least some chance, each with it.

        Parameters
        ----------
        named : list of int, optional
            By the next router, where it was asked.
        """
        given = array("i", named or ())
        found = self.library.chances(
            self._at, n, ahead, weights.ctypes.data, factored, len(given), given.buffer_info()[0],
            curve[0].ctypes.data, curve[1].ctypes.data, len(curve[0]), least, *self._out)
        return list(zip(self._experts[:found].tolist(), self._chances[:found].tolist()))


def fast(usual: Usual, factored: Any, past: Past) -> Fast | None:
    """Return counts in C over the arrays of blocks; None where there is no compiler."""
    library = _LOADED.get()
    return None if library is None else Fast(library, usual, factored, past)
