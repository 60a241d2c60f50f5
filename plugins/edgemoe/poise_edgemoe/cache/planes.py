"""Experts in two planes: whole as in an ordinary store, or their bases at once and the rest behind.

A miss of a decoded token may be served from its base, as long as the allowance is not used up. That is said
when the expert is asked for, before anything is read: what is served so depends on who was missing, and on
no delay. Any later use of the expert has all of it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from poise.errors import ConfigError, FileError
from poise_edgemoe.cache.allowance import Allowance
from poise_edgemoe.cache.policy import Key, Policy
from poise_edgemoe.cache.residents import STAGES, Resident
from poise_edgemoe.cache.slots import ExpertCache, Held, size_of
from poise_edgemoe.store.folding import Folded, fold, put_together
from poise_edgemoe.store.index import LINE, LOW, Index, padded
from poise_edgemoe.store.reader import Reader, Request, mapped


@dataclass
class Apart(Resident):
    """An expert whose base is read first, and the rest behind it: two requests.

    Parameters
    ----------
    coarse : bool
        Whether the use that runs is served from the base.
    whole : bool
        Whether its planes have been put together.
    """

    coarse: bool = True
    whole: bool = False

    def ready(self) -> bool:
        """Return whether all of it is there: a base is computed by itself."""
        return not self.coarse and super().ready()


class PlanedCache(ExpertCache):
    """Keeps experts of a store in two planes, put together.

    Whole experts are read in one, and put together by the reader. It has one blob of memory to read them
    into, and another one, if bases are served, for scales of a base and to put together what came apart.

    Parameters
    ----------
    share : float
        Of expert uses, that bases may serve.
    """

    def __init__(
        self, index: Index, reader: Reader, budget: int, policy: Policy, kernel: str = "reference", *,
        share: float = 0.0,
    ) -> None:
        largest = max(size_of(m) for _, _, m in index.blobs())
        super().__init__(index, reader, budget - aside(index, share) + STAGES * largest, policy, kernel)
        if share and (why := self.forms.refuses_bases()):
            raise ConfigError(f"base_share={share} cannot be used with {why}: leave it out, or take "
                              f"kernel=reference")
        self.allowance = Allowance(share)
        self.dropped = 0  # refinements that nobody read before their expert left
        self._through = memoryview(mapped(largest))
        self._room = memoryview(mapped(_room(index))) if share else None
        self._folds: dict[tuple[int, ...], dict[str, Folded]] = {}  # by layer and forms
        self._coarse: list[Apart] = []  # of the layer that runs
        self._used: Apart | None = None  # whose base is in use

    @property
    def from_base(self) -> int:
        """Uses that were served from a base."""
        return self.allowance.taken

    def planes(self) -> dict[str, Any]:
        """Return what bases have served."""
        return {**self.allowance.said(), "dropped": self.dropped}

    @contextmanager
    def layer(self, n: int, experts: Sequence[int]) -> Iterator[Held]:
        """Hold the experts of a layer for as long as it is computed."""
        with super().layer(n, experts) as held:
            try:
                yield held
            finally:
                self._end_bases()

    def used(self, n: int, experts: Sequence[int], missing: int = 0) -> None:
        """Count the use of a layer's experts; prompts neither earn nor take."""
        super().used(n, experts, missing)
        if self.length == 1:
            self.allowance.earn(len(experts))

    def close(self) -> None:
        """Let go of all memory; the reader must have ended."""
        self._used, self._coarse = None, []
        super().close()
        self._through, self._room = memoryview(b""), None

    def _ask(self, n: int, keys: list[Key]) -> list[Key]:
        self._end_bases()
        for key in keys:
            held = self.resident.get(key)
            if isinstance(held, Apart) and not held.whole:  # somebody waits for the rest now
                self.reader.promote(held.requests[1:])
        return super()._ask(n, keys)

    def _begun(self, key: Key, place: mmap.mmap) -> Resident:
        """Have an expert read that somebody waits for: all of it, or its base first."""
        if self.length != 1 or not self.allowance.take():
            return super()._begun(key, place)
        matrices, view = self.index.layers[key[0]].experts[key[1]], memoryview(place)
        base = {part: m for part, m in matrices.items() if not part.endswith(LOW)}
        low = {part: m for part, m in matrices.items() if part.endswith(LOW)}
        end, after = size_of(base), size_of(base) + size_of(low)
        requests = [self._request(key, base, view[:end]), self._request(key, low, view[end:after])]
        held = Apart(key, place, requests)
        self._coarse.append(held)
        self.reader.demand(held.requests[:1])
        self.reader.prefetch(held.requests[1:])
        return held

    def _requested(self, key: Key, place: mmap.mmap) -> Resident:
        matrices = self.index.layers[key[0]].experts[key[1]]
        length = size_of(matrices)
        request = self._request(key, matrices, memoryview(place)[:length])
        request.through, request.then = self._through[:length], partial(put_together, self._fold(key))
        return Resident(key, place, [request])

    def _request(self, key: Key, matrices: dict[str, Any], buffer: memoryview) -> Request:
        check = any((key, part) not in self._checked for part in matrices)
        return Request(matrices, buffer, f"expert {key[1]} in layer {key[0]}", check)

    def _matrix(self, held: Resident, part: str) -> tuple[Any, Tensor | None]:
        if isinstance(held, Apart) and not held.whole:
            if held.coarse:
                return self._base(held, part)
            self._complete(held)
        return super()._matrix(held, part)

    def _base(self, held: Apart, part: str) -> tuple[Any, Tensor | None]:
        """Return a matrix of an expert's base; that of the base before it is gone."""
        if self._used is not held:
            self._end_use()
            self._used = held
        if part not in held.matrices:
            self._await(held, part)
            request, at = held.requests[0], 0
            self._checked.update((held.key, name) for name in request.matrices)
            assert self._room is not None
            for name in request.matrices:
                room = torch.frombuffer(self._room, dtype=torch.float32, offset=at)
                held.matrices[name] = made = self.forms.base(held.key, name, request.part(name), room)
                at += padded(8 * made[0].scale.numel(), LINE)
        return held.matrices[part]

    def _complete(self, held: Apart) -> None:
        """Put an expert's planes together where it lies, once the rest is there."""
        self._end_use()
        base, rest = held.requests
        self._await(held, next(iter(base.matrices)))
        try:
            self._await(held, next(iter(rest.matrices)))
        except FileError:  # it was read behind, and is read again now that somebody needs it
            held.requests[1] = self._request(held.key, rest.matrices, rest.buffer)
            self.reader.demand(held.requests[1:])
            self._await(held, next(iter(rest.matrices)))
        self._checked.update((held.key, name) for request in held.requests for name in request.matrices)
        length = sum(len(request.buffer) for request in held.requests)
        assert self._room is not None
        self._room[:length] = memoryview(held.place)[:length]
        put_together(self._fold(held.key), self._room, memoryview(held.place))
        held.whole = True
        for part in self._fold(held.key):
            held.matrices[part] = self._view(held, part)

    def _end_use(self) -> None:
        """Let go of the base that is in use: its scales' memory is used again."""
        if self._used is not None:
            self._used.forget()
            self._used = None

    def _end_bases(self) -> None:
        """Bases have served the use that they were taken for."""
        self._end_use()
        for held in self._coarse:
            held.coarse = False
        self._coarse.clear()

    def _evict(self, key: Key, dropped: bool = False) -> None:
        held = self.resident[key]
        if isinstance(held, Apart) and not held.whole and self.reader.cancel(held.requests[1:]):
            self.dropped += 1
        super()._evict(key, dropped)

    def _where(self, key: Key, part: str) -> tuple[int, int]:
        return self._fold(key)[part].at, self._fold(key)[part].nbytes

    def _fold(self, key: Key) -> dict[str, Folded]:
        kind = (key[0], *(m.form for m in self.index.layers[key[0]].experts[key[1]].values()))
        if kind not in self._folds:
            self._folds[kind] = fold(self.index, *key, self.forms.whole(key), self.forms.halves(key))
        return self._folds[kind]


def aside(index: Index, share: float) -> int:
    """Return the bytes beside experts that are kept: for those being read, and put together."""
    largest = max(size_of(m) for _, _, m in index.blobs())
    more = 0 if index.planes == 1 else largest + (_room(index) if share else 0)
    return STAGES * largest + more


def _room(index: Index) -> int:
    """Return the bytes of the largest expert, or of the scales of its base if they take more."""
    most = 0
    for n, _, parts in index.blobs():
        scales = 0
        for part, (rows, columns) in index.layers[n].shapes.items():
            group = index.quantizers[parts[part].form].get("group", 64)
            scales += padded(8 * rows * (-(-columns // group) if group > 0 else 1), LINE)
        most = max(most, size_of(parts), scales)
    return most
