"""An expert in planes put together: the bytes that an ordinary store has."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poise.native import Loaded, built
from poise_edgemoe.store.index import LINE, LOW, Index, padded, payload

SOURCE = Path(__file__).with_name("planes.c")



@dataclass(frozen=True)
class Folded:
    """Where one matrix lies in the bytes of an expert: its planes as stored, and whole.

    Parameters
    ----------
    high, low : int
        Where its planes begin in the expert as it is stored.
    codes : int
        Bytes of the codes in each.
    rest : int
        Bytes of scales, minima and bias.
    at, nbytes : int
        Where the whole matrix begins when it is put together, and how long it is.
    half : int
        Bits of half a code.
    """

    high: int
    low: int
    codes: int
    rest: int
    at: int
    nbytes: int
    half: int


def fold(
    index: Index, n: int, e: int, found: Mapping[str, Mapping[str, Any]], half: Mapping[str, int]
) -> dict[str, Folded]:
    """Return where the matrices of an expert lie, by part.

    Parameters
    ----------
    found : mapping
        Part to where each tensor of the whole matrix lies (`places`).
    half : mapping
        Part to bits of half a code.
    """
    stored, made, at = index.layers[n].experts[e], {}, 0
    first = next(iter(stored.values())).offset
    for part, whole in found.items():
        codes, nbytes = whole["codes"][1] // 2, payload(dict(whole))
        rest = nbytes - min(begin for name, (begin, *_) in whole.items() if name != "codes")
        made[part] = Folded(stored[part].offset - first, stored[part + LOW].offset - first, codes, rest, at,
                            nbytes, half[part])
        at += padded(nbytes)
    return made


def put_together(parts: Mapping[str, Folded], stored: memoryview, place: memoryview) -> None:
    """Write an expert into a place as an ordinary store has it; `stored`, its planes, lies elsewhere."""
    source, target = np.frombuffer(stored, np.uint8), np.frombuffer(place, np.uint8)
    for one in parts.values():
        high, low = (source[at: at + one.codes] for at in (one.high, one.low))
        merge(high, low, target[one.at: one.at + 2 * one.codes], one.half)
        begin = one.high + padded(one.codes, LINE)
        target[one.at + one.nbytes - one.rest: one.at + one.nbytes] = source[begin: begin + one.rest]


def merge(high: np.ndarray, low: np.ndarray, codes: np.ndarray, half: int) -> None:
    """Write codes of two halves, packed bytes: n bytes of each make 2 n."""
    if (it := _LOADED.get()) is not None:
        it(high.ctypes.data, low.ctypes.data, codes.ctypes.data, len(high), half)
        return
    table = _table(half)
    made = table[low] | table[high] << half
    codes[0::2], codes[1::2] = made & 255, made >> 8


def _table(half: int) -> np.ndarray:
    """Return what each byte of halves is with room beside each of them."""
    byte = np.arange(256, dtype=np.uint16)
    x = (byte | byte << 4) & 0x0F0F
    return x if half == 4 else (x | x << 2) & 0x3333


def _merger() -> Any:
    function = ctypes.CDLL(str(built(SOURCE, "edgemoe"))).poise_merge
    function.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_size_t, ctypes.c_int]
    function.restype = None
    return function


_LOADED = Loaded(_merger)
