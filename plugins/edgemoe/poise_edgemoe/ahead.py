"""Reads ahead while a token is computed: whom a source names, as far as it is worth reading."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

import numpy as np
from torch import Tensor

from poise.errors import ConfigError
from poise_edgemoe.cache.counts import Counts
from poise_edgemoe.cache.slots import ExpertCache
from poise_edgemoe.prefetch import Entrance, Noted, Predictor, Seen, depth_of
from poise_edgemoe.statistics import Step

WINDOW, LEAST = 512, 64  # tokens that are looked back on, and before a layer is judged
CORE = 0.25  # of the time of a read a core is busy with it, which may be one that computes
TRUST = 4.0  # right guesses that a source begins with
LATELY, SURE = 0.5 ** (1 / 32), 8  # how times are averaged, and after how many tokens they count
WORTH = 0.5  # of the time of reading is what guesses may hide, at most

Guess = tuple[int, float]


class Restraint:
    """Says which guesses are worth reading, by what the last `WINDOW` tokens took (specification, 3.3).

    A guess is read if q / (1 - q) > rho, where rho is the measured chance that a layer that needs a read
    finds a wrong guess being read (1 at first), and `CORE`. q is the chance that the source gives, times
    how often such guesses were right, by layer: those of experts that were not there, read or not.

    A layer is left alone for good once its wrong bytes per needed byte exceed the computing time per
    reading time of what was needed: they cost more than all right ones could give.

    A layer is not asked about either as long as asking takes more time than is to be won: `WORTH` of the
    time in which what it needs of late is read. What is needed is known without asking.

    Attributes
    ----------
    off : set of int
        Layers that are left alone for good.
    idle : set of int
        Layers that are left alone for now.
    """

    def __init__(self, counts: Counts) -> None:
        self.counts, self.rho, self.off, self.idle = counts, 1.0, set[int](), set[int]()
        self._tokens = 0
        self._need, self._asking = (np.zeros(len(counts.hits)) for _ in range(2))  # seconds, of late
        self._rows: deque[np.ndarray] = deque(maxlen=WINDOW)
        self._before = self._counted()
        self._sum = np.zeros((5, len(counts.hits)))
        self._right, self._said = (np.full(len(counts.hits), TRUST) for _ in range(2))

    def chance(self, layer: int, said: float) -> float:
        """Return the chance that a guess is right, of what its source says; 0: it is not worth reading."""
        q = min(1.0, said * float(self._right[layer] / self._said[layer]))
        return q if q > (self.rho + CORE) * (1 - q) else 0.0

    def known(self, layer: int, guesses: Iterable[Guess], experts: Sequence[int]) -> None:
        """Learn from guesses for a layer, of experts that were not there, and what it has used."""
        for e, chance in guesses:
            self._right[layer] += e in experts
            self._said[layer] += chance

    def left(self) -> tuple[list[int], list[int]]:
        """Return the layers that are left alone for good, and for now."""
        return sorted(self.off), sorted(self.idle - self.off)

    def prompt_done(self) -> None:
        """Leave out of account what a prompt has needed: it is no token."""
        self._before = self._counted()

    def asked(self, asking: np.ndarray, per_byte: float) -> None:
        """Look at what a token needed, and at the seconds that asking took, by layer; 0: was not asked."""
        now = self.counts.needed_bytes - self._before[1]
        keep = LATELY if self._tokens else 0.0
        self._tokens += 1
        self._need = keep * self._need + (1 - keep) * now * per_byte
        some = asking > 0
        self._asking[some] = keep * self._asking[some] + (1 - keep) * asking[some]
        if self._tokens >= SURE:
            self.idle = set(np.flatnonzero(self._asking > WORTH * self._need).tolist())

    def token_done(self, computing: float, per_byte: float) -> None:
        """Look at a token.

        Parameters
        ----------
        computing : float
            Seconds that it took, waiting left out.
        per_byte : float
            Seconds in which a byte is read.
        """
        if len(self._rows) == WINDOW:
            self._sum -= self._rows[0]
        now = self._counted()
        self._rows.append(np.vstack([now - self._before, np.full(now.shape[1], computing)]))
        self._sum += self._rows[-1]
        self._before = now
        wasted, needed, demands, blocked, seconds = self._sum
        self.rho = float((1 + blocked.sum()) / (1 + demands.sum()))
        self._right *= 1 - 1 / WINDOW
        self._said *= 1 - 1 / WINDOW
        if len(self._rows) >= LEAST:
            reading = needed.sum() * per_byte
            self.off |= set(np.flatnonzero(wasted * reading > seconds * needed).tolist())

    def _counted(self) -> np.ndarray:
        c = self.counts
        return np.array([c.wasted_bytes, c.needed_bytes, c.demands, c.blocked], dtype=float)


class Ahead:
    """Asks a source for layers after the one that runs, and has guesses read.

    Prompts are left alone: they use nearly all experts, which are read in their order anyway.

    Parameters
    ----------
    found : list of Entrance or None
        Of every block: what enters it is shown to the source.

    Attributes
    ----------
    token : int
        Calls of one token a row that are finished.
    """

    def __init__(
        self, cache: ExpertCache, source: Predictor, found: Sequence[Entrance] | None
    ) -> None:
        self.cache, self.source, self.token = cache, source, 0
        self.restraint = Restraint(cache.counts)
        self._note = source.note if isinstance(source, Noted) else None
        encoder = [layer.encoder for layer in cache.index.layers]
        self._following = following(encoder)
        self._depth = min(depth_of(source), encoder.count(False) or len(encoder))
        self._hidden: Tensor | None = None
        self._said: dict[int, dict[int, float]] = {}  # by layer to come: chances, 0: it was there
        self._sure: set[int] = set()  # layers to come of which all is known, and asked for
        self._asked = {n for n, inside in enumerate(encoder) if not inside} or set(range(len(encoder)))
        self._asking = np.zeros(len(encoder))  # seconds in this token, by the layer that is asked about
        self._alone, self._always = set[int](), bool(getattr(source, "always", False))
        self._asleep = False  # nobody is asked about any layer
        for entrance in found or ():
            entrance.listen(self._enters)
        cache.announce = self.layer_known

    def layer_known(self, n: int, experts: Sequence[int]) -> None:
        """Guess layers after that one, whose experts have been asked for."""
        hidden, self._hidden = self._hidden, None
        said = self._said.pop(n, {})
        self._sure.discard(n)
        if self.cache.length != 1:
            self._said.clear()
            self._sure.clear()
            return
        if self._asleep:
            return
        began = time.perf_counter()
        if said:
            self.restraint.known(n, [(e, chance) for e, chance in said.items() if chance], experts)
        if self._note is not None:
            self._note(n, experts)
        layer, token = n, self.token
        for _ in range(self._depth):
            before, layer = layer, self._following[layer]
            token += layer <= before
            if layer not in self._sure and layer not in self._alone:
                self._guess(layer, Seen(token, n, tuple(experts), hidden))
                began, before = time.perf_counter(), began
                self._asking[layer] += began - before

    def _guess(self, layer: int, seen: Seen) -> None:
        """Have what the source says of a layer read, the likeliest first.

        What it has said before is there, or there was no room for it.
        """
        said = self._said.setdefault(layer, {})
        found = self._checked(layer, self.source.candidates(layer, seen))
        for e, chance in sorted(found, key=lambda guess: -guess[1]):
            there = (layer, e) in self.cache.resident
            if e in said and there:
                continue
            said.setdefault(e, 0.0 if there else chance)
            if chance := self.restraint.chance(layer, chance):
                self.cache.prefetch((layer, e), chance)
        if found and all(chance == 1 and (layer, e) in self.cache.resident for e, chance in found):
            self._sure.add(layer)

    def token_done(self, step: Step) -> None:
        """A call of the model is over."""
        if self.cache.length != 1:
            return self.restraint.prompt_done()
        self.token += 1
        reader = self.cache.reader
        per_byte = reader.seconds / reader.bytes_read if reader.bytes_read else 0.0
        self.restraint.asked(self._asking, per_byte)
        self._asking[:] = 0
        self._alone = set() if self._always else self.restraint.off | self.restraint.idle
        self._asleep = self._alone >= self._asked
        self.restraint.token_done(step.seconds - step.stall_seconds, per_byte)

    def _checked(self, layer: int, guesses: Iterable[Guess]) -> list[Guess]:
        """Return guesses; what names no expert or no chance is refused."""
        if not isinstance(guesses, Iterable):
            raise ConfigError(f"prefetch: {self.source!r} said {guesses!r} of layer {layer}: it must be "
                              f"pairs of an expert and a chance")
        return [self._pair(layer, one) for one in guesses]

    def _pair(self, layer: int, said: Any) -> Guess:
        experts = len(self.cache.index.layers[layer].experts)
        try:
            e, chance = said
            e, chance = index(e), float(chance)  # as policies and places know experts
        except (TypeError, ValueError):
            e, chance = -1, 0.0
        if not (0 <= e < experts and 0 <= chance <= 1):
            raise ConfigError(f"prefetch: {self.source!r} said {said!r} of layer {layer}: it must be pairs "
                              f"of an expert, 0 to {experts - 1}, and a chance, 0 to 1")
        return e, chance

    def _enters(self, hidden: Tensor) -> None:
        alone = self._asleep or self.cache.length != 1
        self._hidden = None if alone else hidden.clone()  # its own to change


def following(encoder: Sequence[bool]) -> list[int]:
    """Return for each MoE layer the one that runs after it; after the last, the decoder's first."""
    first = encoder.index(False) if False in encoder else 0
    return [n + 1 if n + 1 < len(encoder) else first for n in range(len(encoder))]
