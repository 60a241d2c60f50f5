"""Experts in memory under one budget of bytes: who is there, who is being read, who may not leave.

Memory is mapped in pieces as large as a blob, so that it can be read into past the page cache. A piece goes
from expert to expert of one size; where sizes differ, pieces that are free are unmapped first.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from poise.errors import ConfigError, FileError
from poise.quantizers.matrix import PackedMatrix, refusal
from poise_edgemoe.cache.policy import Key, Policy
from poise_edgemoe.store.index import Index, Matrix, padded, payload, places
from poise_edgemoe.store.reader import Reader, Request, mapped
from poise_edgemoe.store.schemes import Raw, read_quantizer

STAGES = 2  # blobs that are read though there is no room to keep them


@dataclass
class Resident:
    """An expert that has its place, read or being read.

    Parameters
    ----------
    requests : dict
        Part to the reading of it.
    matrices : dict
        Part to (stored matrix, bias or None), views of the place, made when it is first used.
    """

    key: Key
    place: mmap.mmap
    requests: dict[str, Request]
    matrices: dict[str, tuple[Any, Tensor | None]] = field(default_factory=dict)


class Forms:
    """Makes matrices of bytes, as the index says.

    Parameters
    ----------
    index : Index
    kernel : str
        Of matrices that are packed; "auto" is the fastest one that takes them.

    Attributes
    ----------
    fast : bool
        Whether they are multiplied without being made in full.
    slow : str
        Why not, though they could be.
    """

    def __init__(self, index: Index, kernel: str = "reference") -> None:
        self.dtype = getattr(torch, index.dtype)
        self.index = index
        self._quantizers = [read_quantizer(q, "the index") for q in index.quantizers]
        self._kernels: dict[tuple[int, int], str] = {}  # by form and columns
        self.slow = ""
        if kernel != "reference":
            self._choose(kernel)
        self.fast = bool(self._kernels)
        self._known: dict[tuple[int, str, int], tuple[Any, dict[str, Any], tuple[int, int]]] = {}
        for n, e, parts in index.blobs():
            for part, m in parts.items():
                if payload(self._layout(n, part, m.form)[1]) != m.nbytes:
                    raise FileError(f"the index is wrong: {part} of expert {e} in layer {n} cannot have "
                                    f"{m.nbytes} bytes in its form")

    def matrix(self, key: Key, part: str, buffer: memoryview) -> tuple[Any, Tensor | None]:
        """Return the stored matrix and its bias, views of a buffer."""
        form = self.index.layers[key[0]].experts[key[1]][part].form
        quantizer, found, shape = self._layout(key[0], part, form)
        tensors = {name: torch.frombuffer(buffer, dtype=dtype, count=size // dtype.itemsize, offset=at)
                   .view(dims) for name, (at, size, dims, dtype) in found.items()}
        bias = tensors.pop("bias", None)
        matrix = quantizer.from_tensors(tensors, shape, self.dtype)
        kernel = self._kernels.get((form, shape[1]))
        return matrix if kernel is None else matrix.prepared(kernel), bias

    def _choose(self, kernel: str) -> None:
        """See which forms a kernel takes; raise for those that one asked for by name does not."""
        found = {(m.form, self.index.layers[n].shapes[part][1], part)
                 for n, _, parts in self.index.blobs() for part, m in parts.items()}
        for form, columns, part in sorted(found):
            quantizer = self._quantizers[form]
            why = _refusal(quantizer, columns, self.dtype, kernel)
            if why and kernel != "auto":
                raise ConfigError(f"kernel={kernel} cannot be used with this store: {part}: {why}; "
                                  f"kernel=auto takes what there is")
            if not why:
                self._kernels[form, columns] = "c" if kernel == "auto" else kernel
            elif not isinstance(quantizer, Raw):
                self.slow = self.slow or why

    def _layout(self, n: int, part: str, form: int) -> tuple[Any, dict[str, Any], tuple[int, int]]:
        if (n, part, form) not in self._known:
            layer, quantizer = self.index.layers[n], self._quantizers[form]
            out, columns = layer.shapes[part]
            raw = self.index.quantizers[form]["entry"] == "raw"
            shape = (columns, out) if layer.transposed and raw else (out, columns)
            bias = (out, self.dtype) if part in layer.biased else None
            found = places(quantizer.layout(shape, self.dtype), bias)
            self._known[n, part, form] = quantizer, found, shape
        return self._known[n, part, form]


class ExpertCache:
    """Keeps experts that were used, as many as fit, and reads those that are asked for.

    Parameters
    ----------
    index, reader
        Of one store.
    budget : int
        Bytes of experts, those being streamed (`STAGES` of the largest) included.
    policy : Policy
        Says who leaves.
    kernel : str
        Of packed matrices.
    """

    def __init__(
        self, index: Index, reader: Reader, budget: int, policy: Policy, kernel: str = "reference"
    ) -> None:
        self.index, self.reader, self.policy = index, reader, policy
        policy.served = True
        self.forms = Forms(index, kernel)
        largest = max(size_of(m) for _, _, m in index.blobs())
        self._stages = [mapped(largest) for _ in range(STAGES)]
        self.budget, self.mapped = budget - STAGES * largest, 0
        self.resident: dict[Key, Resident] = {}
        self._taken = dict.fromkeys(range(policy.layers), 0)  # by layer, or all of it in the first place
        self._free: dict[int, list[mmap.mmap]] = {}
        self._resize(self.budget)
        if policy.per_layer and self.share < largest:
            raise ConfigError(f"policy={policy.name!r} shares {self.budget / 1e6:.1f} MB among "
                              f"{policy.layers} layers, which leaves no room for an expert of "
                              f"{largest / 1e6:.1f} MB: give more memory, or take another policy")
        self._scratch: dict[str, Tensor] = {}
        self._checked: set[tuple[Key, str]] = set()
        self.hits = self.misses = 0
        self.stalled = 0.0  # seconds in which computing waited for reading
        self.length = 1  # positions of each row in the running call
        self.recorded: list[Key] | None = None  # uses, in their order, while somebody asks for them

    @contextmanager
    def layer(self, n: int, experts: Sequence[int]) -> Iterator[Held]:
        """Hold the experts of a layer for as long as it is computed.

        Parameters
        ----------
        experts
            In the order of their last use: where there is no room for all, the latest are kept.

        Yields
        ------
        Held
            Experts that there is no room for are to be asked for in ascending order; each is gone when the
            next but one is.
        """
        pinned = {(n, e) for e in experts}
        streamed = sorted(k for k in self._in_order([(n, e) for e in experts]) if not self._keep(k, pinned))
        stage = Stage(self, streamed, self._stages)
        try:
            yield Held(self, n, stage)
        except BaseException:
            self._forget_failed()
            raise
        finally:
            stage.end()

    @contextmanager
    def lent(self, nbytes: int) -> Iterator[None]:
        """Do with that much less room, for as long as somebody else needs it."""
        nbytes = min(nbytes, self.budget)
        self._resize(self.budget - nbytes)
        try:
            yield
        finally:
            self._resize(self.budget + nbytes)

    def scratch(self, name: str, like: Any) -> Tensor:
        """Return memory of that shape and type, the same for all of one name: it is written to anew."""
        size = like.shape[0] * like.shape[1]
        held = self._scratch.get(name)
        if held is None or held.dtype != like.dtype or len(held) < size:
            held = self._scratch[name] = torch.empty(size, dtype=like.dtype)
        return held[:size].view(*like.shape)

    def next_token(self) -> None:
        """Say that a token, or the prompt as a whole, is over."""
        self.policy.next_token()

    def close(self) -> None:
        """Let go of all memory; the reader must have ended."""
        self.resident.clear()
        self._free.clear()
        self._scratch.clear()
        self._stages.clear()

    def _in_order(self, keys: list[Key]) -> list[Key]:
        """Return keys as they are used; those that there is no room for beside later ones come last."""
        room, passed = self.share - sum(self._size(k) for k in keys if k in self.resident), []
        for key in reversed(keys):
            if key not in self.resident and self._size(key) > room:
                passed.append(key)
            elif key not in self.resident:
                room -= self._size(key)
        return [k for k in keys if k not in passed] + passed[::-1]

    def _keep(self, key: Key, pinned: set[Key]) -> bool:
        """Count the use of an expert, and see to it that it is read; False: there is no room to keep it."""
        self.policy.used(key)
        if self.recorded is not None:
            self.recorded.append(key)
        if key in self.resident:
            self.hits += 1
            return True
        self.misses += 1
        place = self._place(key, pinned)
        if place is None:
            return False
        self.policy.added(key)
        self.resident[key] = self.read(key, place)
        return True

    def _place(self, key: Key, pinned: set[Key]) -> mmap.mmap | None:
        """Return memory for an expert, evicting where none is left; None: all that is there is pinned."""
        size, group = self._size(key), self._group(key)
        while self._taken[group] + size > self.share:
            gone = self.policy.victim(key, pinned)
            if gone is None:
                return None
            self._evict(gone)
        self._taken[group] += size
        if self._free.get(size):
            return self._free[size].pop()
        self._make_room(size)
        self.mapped += size
        return mapped(size)

    def _resize(self, budget: int) -> None:
        """Keep to another budget: experts leave as they would for new ones, and free places go."""
        self.budget = budget
        self.share = budget // self.policy.layers if self.policy.per_layer else budget
        for group in self._taken:
            while self._taken[group] > self.share:
                gone = self.policy.victim((group, 0))
                assert gone is not None
                self._evict(gone)
        self._make_room(0)

    def _make_room(self, size: int) -> None:
        """Give free places back to the system until one of that size may be mapped."""
        while self.mapped + size > self.budget:
            other = next(s for s, places in self._free.items() if places)
            self._free[other].pop()
            self.mapped -= other

    def _evict(self, key: Key) -> None:
        self.policy.removed(key)
        held = self.resident.pop(key)
        for request in held.requests.values():
            request.wait_quietly()  # memory that is being read into is nobody's yet
        held.matrices.clear()
        self._taken[self._group(key)] -= len(held.place)
        self._free.setdefault(len(held.place), []).append(held.place)

    def _size(self, key: Key) -> int:
        return size_of(self.index.layers[key[0]].experts[key[1]])

    def _group(self, key: Key) -> int:
        return key[0] if self.policy.per_layer else 0

    def read(self, key: Key, place: mmap.mmap) -> Resident:
        """Ask for all matrices of an expert, one after the other."""
        matrices, view, at, requests = self.index.layers[key[0]].experts[key[1]], memoryview(place), 0, {}
        for part, m in matrices.items():
            what = f"{part} of expert {key[1]} in layer {key[0]}"
            length = padded(m.nbytes)
            requests[part] = Request(m, view[at: at + length], what, (key, part) not in self._checked)
            at += length
        self.reader.demand(list(requests.values()))
        return Resident(key, place, requests)

    def _matrix(self, held: Resident, part: str) -> tuple[Any, Tensor | None]:
        if part not in held.matrices:
            request = held.requests[part]
            if not request.done.is_set():
                started = time.perf_counter()
                request.done.wait()
                self.stalled += time.perf_counter() - started
            request.wait()
            self._checked.add((held.key, part))
            held.matrices[part] = self.forms.matrix(held.key, part, request.buffer)
        return held.matrices[part]

    def _forget_failed(self) -> None:
        """Give back places of experts that could not be read, so that the next call reads them again."""
        for key, held in list(self.resident.items()):
            for request in held.requests.values():
                request.wait_quietly()
            if any(r.error for r in held.requests.values()):
                self._evict(key)


def _refusal(quantizer: Any, columns: int, dtype: torch.dtype, kernel: str) -> str:
    """Return why a kernel does not take matrices of a quantizer, or nothing."""
    if isinstance(quantizer, Raw):
        return "its weights are not packed"
    tensors = {name: torch.zeros(shape, dtype=kind)
               for name, (shape, kind) in quantizer.layout((16, columns), dtype).items()}
    like = quantizer.from_tensors(tensors, (16, columns), dtype)
    if not isinstance(like, PackedMatrix):
        return f"no kernel multiplies a {type(like).__name__}"
    return refusal(like, kernel)


class Held:
    """The experts of a layer, as long as it is computed.

    Called with expert and part it returns (stored matrix, bias), waiting for it to be read.
    """

    def __init__(self, cache: ExpertCache, n: int, stage: Stage) -> None:
        self.cache, self.n, self.stage = cache, n, stage

    def __call__(self, e: int, part: str) -> tuple[Any, Tensor | None]:
        held = self.cache.resident.get((self.n, e)) or self.stage.reach((self.n, e))
        return self.cache._matrix(held, part)

    def ready(self, e: int) -> bool:
        """Return whether all of an expert is there, so that nobody waits for it."""
        held = self.cache.resident.get((self.n, e))
        return held is not None and all(r.done.is_set() for r in held.requests.values())


class Stage:
    """Experts that pass through without being kept, read one ahead of the one in use."""

    def __init__(self, cache: ExpertCache, keys: list[Key], places: list[mmap.mmap]) -> None:
        self.cache, self.keys, self.places = cache, keys, places
        self.at, self.held = -1, {}
        for n in range(min(STAGES, len(keys))):
            self.held[keys[n]] = cache.read(keys[n], places[n])

    def reach(self, key: Key) -> Resident:
        """Return an expert; the one before it is gone, and the one after the next is asked for."""
        n = self.keys.index(key)
        if n > self.at:
            self.at = n
            if n >= 1:
                self.held.pop(self.keys[n - 1], None)
            if n >= 1 and n + 1 < len(self.keys):
                following = self.keys[n + 1]
                self.held[following] = self.cache.read(following, self.places[(n + 1) % STAGES])
        return self.held[key]

    def end(self) -> None:
        """Wait for what is still being read: its memory is used again."""
        for held in self.held.values():
            for request in held.requests.values():
                request.wait_quietly()
        self.held.clear()


def size_of(matrices: dict[str, Matrix]) -> int:
    """Return the bytes of an expert, padded."""
    return sum(padded(m.nbytes) for m in matrices.values())
