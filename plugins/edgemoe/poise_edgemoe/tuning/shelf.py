"""The experts of one layer, read from a store when they are asked for, gone when another layer's are.

Training goes up through the layers and down again: the layer at the turn is met twice in a row, and read
once; any other is met again only after all that lie between.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.errors import ConfigError, RunError
from poise_edgemoe.cache.forms import Forms
from poise_edgemoe.store.index import padded, read_index
from poise_edgemoe.store.reader import Reader, Request, mapped

Key = tuple[int, str]  # expert and part


class Shelf:
    """Reads matrices of a store's experts into memory of their own, those of one layer at a time.

    Every byte that is read is checked. A matrix that somebody still holds stays valid when its layer goes.
    Calls from several threads take turns; a process that was forked from one with a shelf cannot use it.

    Parameters
    ----------
    folder : path
        A store.
    direct : bool
        Whether to read past the page cache where the file system allows it.

    Attributes
    ----------
    reads : int
        Matrices that were read.
    """

    def __init__(self, folder: Path | str, *, direct: bool = True) -> None:
        self.folder = Path(folder)
        self.index = read_index(folder)
        if self.index.planes > 1:
            raise ConfigError(f"{folder} holds experts in planes, which are served and not tuned: convert "
                              f"the model with planes=1")
        self._forms = Forms(self.index)
        self.reader = Reader(self.folder, direct=direct)
        weakref.finalize(self, _close, self.reader, os.getpid())
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._layer = -1
        self._asked: dict[Key, Request] = {}
        self._made: dict[Key, tuple[Any, Tensor | None]] = {}
        self._scratch: dict[str, Tensor] = {}
        self.reads = 0

    def announce(self, n: int, experts: Iterable[int]) -> None:
        """Begin to read what a layer will use, in this order; what another layer has left is let go."""
        with self._turn(n):
            self._ask(n, [(e, part) for e in experts for part in self.index.layers[n].experts[e]])

    def matrix(self, n: int, expert: int, part: str) -> tuple[Any, Tensor | None]:
        """Return a stored matrix and its bias, once they are there.

        Raises
        ------
        FileError
            For bytes that cannot be read, or are not those that were written.
        """
        with self._turn(n):
            key = expert, part
            if key not in self._made:
                self._ask(n, [key])
                request = self._asked.pop(key)
                request.wait()
                self._made[key] = self._forms.matrix((n, expert), part, request.part(part))
            return self._made[key]

    def alone(self) -> threading.RLock:
        """Return what is held while somebody uses `scratch`."""
        return self._lock

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory of a shape and type, the same for all of one name: it is written to anew."""
        held, size = self._scratch.get(name), math.prod(shape)
        if held is None or held.dtype != dtype or len(held) < size:
            held = self._scratch[name] = torch.empty(size, dtype=dtype)
        return held[:size].view(*shape)

    def cast(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a matrix in a type, made in scratch where it has another."""
        if matrix.dtype == dtype:
            return matrix
        return self.scratch(f"as {dtype}", tuple(matrix.shape), dtype).copy_(matrix)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the layer whose experts take most."""
        return max(sum(padded(m.nbytes) for one in layer.experts for m in one.values())
                   for layer in self.index.layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shelf:
        return self  # copies of a model read from one store

    # ------------------------------------------------------------ within

    @contextmanager
    def _turn(self, n: int) -> Iterator[None]:
        """Hold the shelf for one call, and a layer on it."""
        if self._pid != os.getpid():
            raise RunError("the streamed model belongs to the process that opened it: open another after a "
                           "fork")
        with self._lock:
            if n != self._layer:
                self._layer, self._asked, self._made = n, {}, {}
            yield

    def _ask(self, n: int, keys: Iterable[Key]) -> None:
        requests = []
        for key in keys:
            if key in self._asked or key in self._made:
                continue
            expert, part = key
            m = self.index.layers[n].experts[expert][part]
            place = memoryview(mapped(padded(m.nbytes)))
            self._asked[key] = Request({part: m}, place, f"expert {expert} in layer {n}")
            requests.append(self._asked[key])
        self.reads += len(requests)
        self.reader.demand(requests)


def _close(reader: Reader, pid: int) -> None:
    if pid == os.getpid():
        reader.close()
