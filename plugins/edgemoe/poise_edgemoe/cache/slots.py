"""Experts in memory under one budget of bytes: who is there, who is being read, who may not leave.

A place is free, or an expert's: being read, because somebody waits for it or as a guess, or there. A guess
takes its place when it is asked for, so that the thread that reads makes no choices.

Memory is mapped in pieces as large as a blob, so that it can be read into past the page cache. A piece goes
from expert to expert of one size; where sizes differ, pieces that are free are unmapped first.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from poise.errors import ConfigError
from poise_edgemoe import fused
from poise_edgemoe.cache.counts import Counts
from poise_edgemoe.cache.forms import Forms, lasting
from poise_edgemoe.cache.policy import Key, Policy
from poise_edgemoe.cache.residents import STAGES, Resident, Stage
from poise_edgemoe.store.index import Index, Matrix, padded
from poise_edgemoe.store.reader import Reader, Request, mapped

WHOLE = True  # whether experts are read in one


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
    whole : bool
        Whether an expert is read in one call, or each of its matrices in one of its own.

    Attributes
    ----------
    announce : callable or None
        Told of a layer and the experts that its router has chosen, once they have been asked for.
    """

    def __init__(
        self, index: Index, reader: Reader, budget: int, policy: Policy, kernel: str = "reference", *,
        whole: bool = WHOLE,
    ) -> None:
        self.index, self.reader, self.policy, self.whole = index, reader, policy, whole
        policy.served = True
        self.forms = Forms(index, kernel)
        if self.forms.fast and (it := fused.library()) is not None:
            policy.search = it.victim
        largest = max(size_of(m) for _, _, m in index.blobs())
        self._stages = [mapped(largest) for _ in range(STAGES)]
        self.budget, self.mapped = budget - STAGES * largest, 0
        self.resident: dict[Key, Resident] = {}
        self._taken = dict.fromkeys(range(policy.layers), 0)  # by layer, or all of it in the first place
        self._free: dict[int, list[mmap.mmap]] = {}
        self._views: dict[int, dict[Any, tuple[Any, Tensor | None]]] = {}  # by place and layout
        self._resize(self.budget)
        if policy.per_layer and self.share < largest:
            raise ConfigError(f"policy={policy.name!r} shares {self.budget / 1e6:.1f} MB among "
                              f"{policy.layers} layers, which leaves no room for an expert of "
                              f"{largest / 1e6:.1f} MB: give more memory, or take another policy")
        self._scratch: dict[str, Tensor] = {}
        self._checked: set[tuple[Key, str]] = set()
        self.counts = Counts(len(index.layers))
        self.announce: Callable[[int, Sequence[int]], None] | None = None
        self._pinned: set[Key] = set()  # of the layer that runs
        self._guesses: set[Key] = set()  # for layers to come, those that were there already included
        self._stray: set[Key] = set()  # wrong guesses whose reading had begun
        self.length = 1  # positions of each row in the running call
        self.recorded: list[Key] | None = None  # uses, in their order, while somebody asks for them

    @property
    def from_base(self) -> int:
        """Uses that were served from a base: none, where there are no bases."""
        return 0

    def planes(self) -> dict[str, Any] | None:
        """Return what bases have served, as plain values; None: the store has none."""
        return None

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
        keys = [(n, e) for e in experts]
        self._pinned = set(keys)
        if self._guesses or self._stray:
            self._drop_guesses(n, self._pinned)
        stage = Stage(self.read, self._ask(n, keys), self._stages)
        try:
            if self.announce is not None:
                self.announce(n, experts)
            yield Held(self, n, stage)
        except BaseException:
            self._forget_failed()
            raise
        finally:
            stage.end()
            self._pinned = set()

    def prefetch(self, key: Key, chance: float) -> bool:
        """Ask for an expert that a layer to come may use, unless it is there; both ways it is held for it.

        It takes a free place, or that of an expert that the policy gives away and that is less likely to
        be used. It is held until its layer is known.

        Returns
        -------
        bool
            Whether it will be read.
        """
        if key in self.resident:
            self._guesses.add(key)
            return False
        place = self._place(key, chance)
        if place is None:
            return False
        self._guesses.add(key)
        self.counts.guesses[key[0]] += 1
        self.policy.added(key)
        self.resident[key] = held = self._requested(key, place)
        held.guessed = held.spare = True
        self.reader.prefetch(held.requests)
        return True

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
        self.announce = None
        for held in self.resident.values():
            held.forget()
        self.resident.clear()
        self._free.clear()
        self._views.clear()
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

    def _drop_guesses(self, n: int, known: set[Key]) -> None:
        """A layer is known: wrong guesses that wait to be read are dropped, and nobody is held for it.

        A prompt ends all guesses: those that a generation has left for later layers would hold its room.
        """
        over = {k for k in self._guesses if k[0] == n or self.length != 1}
        self._guesses -= over
        wrong = [k for k in over - known if k in self.resident]
        self._stray = {k for k in self._stray if k in self.resident and not self.resident[k].ready()}
        for key in wrong:
            held = self.resident[key]
            if held.guessed and self.reader.cancel(held.requests):
                self._evict(key, dropped=True)
            elif not held.ready():
                self._stray.add(key)

    def _ask(self, n: int, keys: list[Key]) -> list[Key]:
        """Count the use of a layer's experts, and see to it that they are read.

        Returns
        -------
        list of Key
            Those that there is no room to keep, in ascending order.
        """
        if all(k in self.resident for k in keys):
            missing = []
        else:
            keys = self._in_order(keys)
            missing = [k for k in keys if k not in self.resident]
        self.used(n, [e for _, e in keys], len(missing))
        for key in keys:
            if key in self.resident and self.resident[key].guessed:
                self._claim(self.resident[key])
        if not missing:
            return missing
        self.counts.demands[n] += 1
        self.counts.blocked[n] += bool(self._stray)
        return sorted(k for k in missing if not self._fetch(k))

    def used(self, n: int, experts: Sequence[int], missing: int = 0) -> None:
        """Count the use of a layer's experts, of which some were not there."""
        self.policy.used_together(n, experts)
        if self.recorded is not None:
            self.recorded += [(n, e) for e in experts]
        self.counts.hits[n] += len(experts) - missing

    def _fetch(self, key: Key) -> bool:
        """Have an expert read that is not there; False: there is no room to keep it."""
        self.counts.misses[key[0]] += 1
        self.counts.needed_bytes[key[0]] += self._size(key)
        place = self._place(key)
        if place is None:
            return False
        self.policy.added(key)
        self.resident[key] = self._begun(key, place)
        return True

    def _begun(self, key: Key, place: mmap.mmap) -> Resident:
        """Have an expert read that somebody waits for."""
        return self.read(key, place)

    def _claim(self, held: Resident) -> None:
        """A guess was right: it goes first if it is not there yet."""
        n, held.guessed = held.key[0], False
        self.counts.used[n] += 1
        self.counts.needed_bytes[n] += len(held.place)
        if not held.ready():
            self.counts.late[n] += 1
            self.reader.promote(held.requests)

    def _place(self, key: Key, chance: float | None = None) -> mmap.mmap | None:
        """Return memory for an expert, evicting where none is left; None: nobody may leave for it.

        Parameters
        ----------
        chance : float, optional
            That a guess is right: it takes no place of an expert that is as likely to be used. Without,
            the expert is needed now.
        """
        size, group = self._size(key), self._group(key)
        while self._taken[group] + size > self.share:
            gone = self._victim(key, chance)
            if gone is None:
                return None
            self._evict(gone)
        self._taken[group] += size
        if not self._free.get(size):
            self._map(size)
        return self._free[size].pop()

    def _map(self, size: int) -> None:
        """Map as many places of a size as there is room for, one beside the other.

        Untouched they take no memory, and neighbours share huge pages: those of 3.5 MB that are mapped
        when they are needed lie in huge pages by 0.4, these by 0.99. What is touched of a neighbour is
        within the budget.
        """
        self._make_room(size)
        count = (self.budget - self.mapped) // size
        self._free[size] = [mapped(size) for _ in range(count)]
        self.mapped += count * size

    def _victim(self, key: Key, chance: float | None) -> Key | None:
        """Return who leaves for an expert. One that is being read would be waited for: rather another."""
        held = self._pinned | self._guesses
        gone = self.policy.victim(key, held | self._stray)
        if chance is not None:
            return gone if gone is not None and self.policy.yields(gone, key, chance) else None
        return self.policy.victim(key, held) if gone is None else gone

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
            self.let_go(self._free[other].pop())
            self.mapped -= other

    def _evict(self, key: Key, dropped: bool = False) -> None:
        self.policy.removed(key)
        held, n = self.resident.pop(key), key[0]
        if held.guessed and (dropped or self.reader.cancel(held.requests)):
            self.counts.cancelled[n] += 1
        elif held.guessed:
            self.counts.wasted[n] += 1
            self.counts.wasted_bytes[n] += len(held.place)
        held.settle()  # memory that is being read into is nobody's yet
        held.forget()
        self._guesses.discard(key)
        self._taken[self._group(key)] -= len(held.place)
        self._free.setdefault(len(held.place), []).append(held.place)

    def _size(self, key: Key) -> int:
        return size_of(self.index.layers[key[0]].experts[key[1]])

    def _group(self, key: Key) -> int:
        return key[0] if self.policy.per_layer else 0

    def read(self, key: Key, place: mmap.mmap) -> Resident:
        """Ask for all matrices of an expert, next."""
        held = self._requested(key, place)
        self.reader.demand(held.requests)
        return held

    def _requested(self, key: Key, place: mmap.mmap) -> Resident:
        """Return an expert with the reads that it takes, which nobody has asked for yet."""
        matrices, view, at, requests = self.index.layers[key[0]].experts[key[1]], memoryview(place), 0, []
        what = f"expert {key[1]} in layer {key[0]}"
        for parts in [matrices] if self.whole else [{part: m} for part, m in matrices.items()]:
            length = size_of(parts)
            check = any((key, part) not in self._checked for part in parts)
            requests.append(Request(parts, view[at: at + length], what, check))
            at += length
        return Resident(key, place, requests)

    def _matrix(self, held: Resident, part: str) -> tuple[Any, Tensor | None]:
        if part not in held.matrices:
            self._await(held, part)
            request = held.request(part)
            self._checked.update((held.key, name) for name in request.matrices)
            held.matrices[part] = self._view(held, part)
        return held.matrices[part]

    def _where(self, key: Key, part: str) -> tuple[int, int]:
        """Return where a matrix begins in its expert's place, and its length."""
        matrices = self.index.layers[key[0]].experts[key[1]]
        return matrices[part].offset - next(iter(matrices.values())).offset, matrices[part].nbytes

    def _view(self, held: Resident, part: str) -> tuple[Any, Tensor | None]:
        """Return a matrix; one that is laid out as another one was in this place before, is that view."""
        at, nbytes = self._where(held.key, part)
        known, layout = self._views.setdefault(id(held.place), {}), (at, self.forms.alike(held.key, part))
        if layout not in known:
            made = self.forms.matrix(held.key, part, memoryview(held.place)[at: at + nbytes])
            if not lasting(made[0]):
                return made
            known[layout] = made
        return known[layout]

    def let_go(self, place: mmap.mmap) -> None:
        """Forget views of a place that is given back: they would hold its memory."""
        self._views.pop(id(place), None)

    def _await(self, held: Resident, part: str) -> None:
        """Return when a matrix is there; reading ahead may fail, and is then made again."""
        started = time.perf_counter()
        if not (there := held.request(part).done.is_set()):
            held.request(part).wait_quietly()
        if held.spare and held.request(part).error is not None:
            held.settle()
            held.requests, held.spare = self.read(held.key, held.place).requests, False
            there = False
        held.request(part).wait()
        if not there:
            self.counts.stall[held.key[0]] += time.perf_counter() - started

    def _forget_failed(self) -> None:
        """Give back places of experts that could not be read, so that the next call reads them again."""
        for key, held in list(self.resident.items()):
            held.settle()
            if any(r.error for r in held.requests):
                self._evict(key)


class Held:
    """The experts of a layer, as long as it is computed.

    Called with expert and part it returns (stored matrix, bias), waiting for it to be read.
    """

    def __init__(self, cache: ExpertCache, n: int, stage: Stage) -> None:
        self.cache, self.n, self.stage = cache, n, stage

    def __call__(self, e: int, part: str) -> tuple[Any, Tensor | None]:
        return self.cache._matrix(self.reach(e), part)

    def reach(self, e: int) -> Resident:
        """Return an expert, which may still be being read."""
        return self.cache.resident.get((self.n, e)) or self.stage.reach((self.n, e))

    def ready(self, e: int) -> bool:
        """Return whether all of an expert is there, so that nobody waits for it."""
        held = self.cache.resident.get((self.n, e))
        return held is not None and held.ready()


def size_of(matrices: dict[str, Matrix]) -> int:
    """Return the bytes of an expert, padded."""
    return sum(padded(m.nbytes) for m in matrices.values())
