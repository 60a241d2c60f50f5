"""The paper's baselines on the same engine, kernels and reader (EdgeMoE section IV-A).

| name | experts | in memory |
|---|---|---|
| IO-FREE | as trained | all, read before the first token |
| IO-QFREE | quantized | all, read before the first token |
| IO-EXP | as trained | those of one token in one layer, or what `memory` leaves; no prefetch |
| IO-QEXP | quantized | the same |
| STI | any | none is kept: all of every layer pass through a buffer, in order, for every token |

STI is alike, not the same: the original also chooses a width for every piece by its importance.
"""

from __future__ import annotations

import mmap
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from poise.errors import ConfigError
from poise_edgemoe.budget import Budget, parse_bytes, plan_memory
from poise_edgemoe.cache.planes import aside
from poise_edgemoe.cache.policy import Key, Policy
from poise_edgemoe.cache.slots import STAGES, ExpertCache, Held, Resident, size_of
from poise_edgemoe.engine import Engine
from poise_edgemoe.loading import read_config
from poise_edgemoe.store.index import Index, read_index
from poise_edgemoe.store.reader import Reader, mapped

BASELINES = ("IO-FREE", "IO-QFREE", "IO-EXP", "IO-QEXP", "STI")
TRAINED = {"IO-FREE": True, "IO-QFREE": False, "IO-EXP": True, "IO-QEXP": False}  # not quantized


def open_baseline(
    name: str, path: Path | str, memory: str | int | None = None, context: int | None = None,
    batch: int = 1, kernel: str = "auto",
) -> Engine:
    """Open a store as a baseline.

    Parameters
    ----------
    name : str
        One of `BASELINES`.
    path : path
        A store: with experts as trained (`bits=16` or 32) for IO-FREE and IO-EXP, quantized for IO-QFREE
        and IO-QEXP.
    memory : str or int, optional
        Most bytes that the engine holds, as `Engine.open` has it. None, for IO-EXP and IO-QEXP: room for as
        many experts as a token uses in a layer, so that none is there when it is used again; for STI: room
        for two.
    context, batch, kernel
        As `Engine.open` has them.

    Raises
    ------
    ConfigError
        For another name, a store of the other kind, `memory` where all experts are kept, or too little.
    """
    if name not in BASELINES:
        raise ConfigError(f"baseline={name!r} is not allowed: it must be one of {', '.join(BASELINES)}")
    index = read_index(path)
    if name == "STI" and index.planes > 1:
        raise ConfigError(f"baseline=STI does not fit the store {path}, whose experts lie in planes: "
                          f"convert it with planes=1")
    if TRAINED.get(name, _trained(index)) != _trained(index):
        wanted = "as trained (convert with bits=16)" if TRAINED[name] else "quantized (convert with bits=4)"
        raise ConfigError(f"baseline={name} does not fit the store {path}: it needs experts {wanted}")
    if name in ("IO-FREE", "IO-QFREE"):
        if memory is not None:
            raise ConfigError(f"memory={memory} has no effect: {name} keeps all experts; leave it out")
        return _with_all(Engine.open(path, context=context, batch=batch, kernel=kernel))
    kind = StreamingEngine if name == "STI" else Engine
    kept = 0 if name == "STI" else getattr(read_config(Path(path)), "num_experts_per_tok", 1)
    return kind(Path(path), budget_of(path, index, kept, memory, context, batch), "lru", kernel=kernel)


def _trained(index: Index) -> bool:
    return all(form["entry"] == "raw" for form in index.quantizers)


def budget_of(
    path: Path | str, index: Index, kept: int, memory: str | int | None, context: int | None,
    batch: int = 1, learned: int = 0,
) -> Budget:
    """Return a budget for so many experts, or for what `memory` leaves; it has room for a whole prompt.

    `learned`: bytes of a predictor.
    """
    whole = plan_memory(path, context=context, batch=batch, learned=learned)
    rest, largest = whole.total - whole.experts, max(size_of(m) for _, _, m in index.blobs())
    least = rest + aside(index, 0.0) + kept * largest
    given = least if memory is None else parse_bytes(memory)
    if given < least:
        raise ConfigError(f"memory={memory} is too small: the smallest workable value is "
                          f"{-(-least // 10**6)}MB (all but experts {rest / 1e6:.1f}, {kept} experts "
                          f"of {largest / 1e6:.1f}, those being read {aside(index, 0.0) / 1e6:.1f})")
    return replace(whole, experts=min(whole.experts, given - rest))


def _with_all(engine: Engine) -> Engine:
    """Read every expert; none of it counts as use."""
    cache = engine.cache
    for n, layer in enumerate(engine.index.layers):
        with cache.layer(n, range(len(layer.experts))) as get:
            for e in range(len(layer.experts)):
                for part in layer.shapes:
                    get(e, part)
    cache.counts.clear()
    return engine


class Stream(ExpertCache):
    """Keeps no expert: all of them pass through its room, layer by layer, as often as the layer runs.

    Reading goes on as far ahead as there is room, beyond the end of a layer and of a token, whoever is
    asked for: the buffer of STI, which knows no experts.
    """

    def __init__(
        self, index: Index, reader: Reader, budget: int, policy: Policy, kernel: str = "auto"
    ) -> None:
        super().__init__(index, reader, budget, policy, kernel)
        self._order = [(n, e) for n, layer in enumerate(index.layers) for e in range(len(layer.experts))]
        self._next = 0  # to be read, a place in the order
        self._ahead: deque[Resident] = deque()  # read or being read, in order
        self._largest = max(size_of(m) for _, _, m in index.blobs())
        self._empty: list[mmap.mmap] = []
        self._room = STAGES + self.budget // self._largest

    @contextmanager
    def layer(self, n: int, experts: Sequence[int]) -> Iterator[Held]:
        """Let all experts of a layer pass by; those that are asked for in ascending order can be had."""
        self.counts.misses[n] += len(experts)
        if self.recorded is not None:
            self.recorded += [(n, e) for e in experts]
        last = len(self.index.layers[n].experts) - 1
        try:
            yield Passing(self, n)
        finally:
            self._reach((n, last))
            self._pass()

    @contextmanager
    def lent(self, nbytes: int) -> Iterator[None]:
        """Do with that much less room: what is farthest ahead is read again."""
        self._room = STAGES + max(0, self.budget - nbytes) // self._largest
        while len(self._ahead) > self._room:
            gone = self._ahead.pop()
            gone.settle()
            gone.forget()
            self.let_go(gone.place)
            self._next = (self._next - 1) % len(self._order)
        while len(self._empty) > max(0, self._room - len(self._ahead)):
            self.let_go(self._empty.pop())
        try:
            yield
        finally:
            self._room = STAGES + self.budget // self._largest

    def close(self) -> None:
        """Let go of all memory; the reader must have ended."""
        for held in self._ahead:
            held.forget()
        self._ahead.clear()
        self._empty.clear()
        super().close()

    def _reach(self, key: Key) -> Resident:
        """Return an expert; those before it have passed."""
        self._read_on()
        while self._ahead[0].key != key:
            self._pass()
        return self._ahead[0]

    def _pass(self) -> None:
        """Wait until the next expert is read, whether it was asked for or not, and let it go."""
        held, started = self._ahead[0], time.perf_counter()
        held.settle()
        for request in held.requests:
            if request.error is None:
                self._checked.update((held.key, part) for part in request.matrices)
        self.counts.stall[held.key[0]] += time.perf_counter() - started
        held.forget()
        self._empty.append(self._ahead.popleft().place)
        self._read_on()

    def _read_on(self) -> None:
        """Ask for as many of the next experts as there is room for."""
        while len(self._ahead) < min(self._room, len(self._order)):
            place = self._empty.pop() if self._empty else mapped(self._largest)
            self._ahead.append(self.read(self._order[self._next], place))
            self._next = (self._next + 1) % len(self._order)


class Passing(Held):
    """The experts of a layer as they pass by: none of them is there before the one in front has gone."""

    def __init__(self, cache: Stream, n: int) -> None:
        self.cache, self.n = cache, n

    def reach(self, e: int) -> Resident:
        """Return an expert; those before it have passed."""
        return self.cache._reach((self.n, e))

    def ready(self, e: int) -> bool:
        """Return False: they are taken one after the other."""
        return False


class StreamingEngine(Engine):
    """An engine through whose memory all experts pass, for every token."""

    cache_type = Stream
