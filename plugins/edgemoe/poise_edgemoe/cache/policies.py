"""The eviction policies of an expert cache (EdgeMoE section III-C2, and ours).

An engine and the simulator use the same objects; see `Policy` for how they are called.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from poise.errors import ConfigError, nearest
from poise_edgemoe.cache.policy import Key, Policy

DEFAULT_POLICY = "expected"
PREDICTED = "predicted"  # of a predictor that was fitted (`poise_edgemoe.predictors`)
Frequencies = Mapping[Key, float] | np.ndarray


class LRU(Policy):
    """The least recently used goes first. Below one token's working set it never hits (a cyclic scan)."""

    name = "lru"

    def scores(self) -> np.ndarray:
        return -self._last


class LayerLRU(LRU):
    """The least recently used of the layer goes first; each layer has equal room."""

    name, layered, per_layer = "layer_lru", True, True


class LFU(Policy):
    """The least often used since the start goes first, counting uses in and out of the cache."""

    name = "lfu"

    def __init__(self, layers: int, experts: int):
        super().__init__(layers, experts)
        self._count = np.zeros((layers, experts), dtype=np.int64)

    def used(self, key: Key) -> None:
        super().used(key)
        self._count[key] += 1

    def scores(self) -> np.ndarray:
        return -self._count


class LayerLFU(LFU):
    """The least often used of the layer goes first; each layer has equal room."""

    name, layered, per_layer = "layer_lfu", True, True


class Static(Policy):
    """The lowest given frequency goes first; what is used changes nothing."""

    name = "static"

    def __init__(self, layers: int, experts: int, frequencies: Frequencies | None = None):
        super().__init__(layers, experts)
        if frequencies is None:
            raise ConfigError("policy 'static' needs frequencies: {(layer, expert): uses per token}")
        self._frequency = frequency_array(frequencies, layers, experts)

    def yields(self, gone: Key, key: Key, chance: float) -> bool:
        """Return whether `gone` is used less often than the guess is right."""
        return bool(self._frequency[gone] < chance)

    def scores(self) -> np.ndarray:
        return -self._frequency


class _ByDistance(Policy):
    """A policy that knows how many MoE layers lie between the layer that runs and an expert's.

    `encoder` names layers of an encoder. They are over before decoding starts: their experts leave
    before all others, and S counts the other layers only.
    """

    layered = True
    forward = True

    def __init__(self, layers: int, experts: int, encoder: Collection[int] = ()):
        super().__init__(layers, experts)
        if bad := [i for i in encoder if i not in range(layers)]:
            raise ConfigError(f"encoder names layer {bad[0]!r}: layers are 0 to {layers - 1}")
        self._encoder = sorted(set(encoder))
        self.S = max(layers - len(self._encoder), 1)
        decoder = np.ones(layers, dtype=np.int64)
        decoder[self._encoder] = 0
        place = np.where(decoder, decoder.cumsum() - 1, -1)  # in the decoder, -1: before it
        ahead = place - place[:, None]
        self._distance = (((ahead if self.forward else -ahead) - 1) % self.S + 1.0)[:, :, None]

    def distance(self) -> np.ndarray:
        """Return each layer's distance d in MoE layers, 1 to S (the current layer's), shape (layers, 1)."""
        return self._distance[self.layer]

    def scores(self) -> np.ndarray:
        scores = self.decoder_scores()
        if self._encoder:
            scores[self._encoder] = np.inf
        return scores

    def decoder_scores(self) -> np.ndarray:
        """Return the scores of a model without encoder, a new array (layers, experts) or (layers, 1)."""
        raise NotImplementedError


class ForwardLRU(_ByDistance):
    """The layer that is farthest ahead goes first, inside it the least recently used."""

    name = "fld_lru"

    def decoder_scores(self) -> np.ndarray:
        return self.distance()


class ByWait(_ByDistance):
    """The longest expected time to the next use goes first: d + S (1/p - 1), in MoE layers.

    p is the chance that a token uses an expert, as a policy knows it.
    """

    floor = 1e-4  # of p

    def __init__(self, layers: int, experts: int, encoder: Collection[int] = ()):
        super().__init__(layers, experts, encoder)
        self._wait = np.full((layers, experts), self.S * (1 / self.floor - 1))

    def yields(self, gone: Key, key: Key, chance: float) -> bool:
        """Return whether the next use of `gone` is expected after that of a guess."""
        self._settle()
        away = self.distance()[:, 0]
        score = np.inf if gone[0] in self._encoder else self._wait[gone] + away[gone[0]]
        return bool(score > away[key[0]] + self._waits(chance))

    def decoder_scores(self) -> np.ndarray:
        self._settle()
        return self._wait + self.distance()

    def _settle(self) -> None:
        """Put down uses that were noted: waits are asked for."""

    def _waits(self, rate: Any) -> Any:
        return self.S * (1 / np.maximum(rate, self.floor) - 1)


class Expected(ByWait):
    """The longest expected time to the next use goes first; see `ByWait`.

    p is the expert's use rate per token: an exponential average that starts at 0, in which a use counts
    at once and the past is decayed between tokens. Counting at the end of a token, or a half-life of 64
    tokens, loses to LRU on real traces.
    """

    name = "expected"
    half_life = 16  # tokens

    def __init__(self, layers: int, experts: int, encoder: Collection[int] = ()):
        super().__init__(layers, experts, encoder)
        self._kept = 0.5 ** (1 / self.half_life)
        self._rate = np.zeros((layers, experts))
        self._noted: list[tuple[int, Sequence[int]]] = []  # uses of a layer's experts, not put down yet

    def used(self, key: Key) -> None:
        self._settle()
        super().used(key)
        self._rate[key] += 1 - self._kept
        self._wait[key] = self._waits(self._rate[key])

    def used_together(self, layer: int, experts: Sequence[int]) -> None:
        if any(layer == n for n, _ in self._noted):
            self._settle()
        if experts:
            self._noted.append((layer, tuple(experts)))

    def added(self, key: Key) -> None:
        self._settle()
        super().added(key)

    def _settle(self) -> None:
        """Put down uses that were noted: of several layers in one, as long as nobody asks for scores."""
        if not self._noted:
            return
        if len(self._noted) == 1:  # few numbers, one by one, are faster than arrays of them
            (noted,) = self._noted
            self._noted.clear()
            return self._put_down(*noted)
        for n, experts in self._noted:
            if n != self.layer:
                self.layer, self._began = n, self._time
            self._time += len(experts)
        at = tuple(np.array(one, dtype=np.int64) for one in zip(
            *((n, e) for n, experts in self._noted for e in experts)))
        self._noted.clear()
        self._last[at] = np.arange(self._time - len(at[0]), self._time) + 1
        np.add.at(self._rate, at, 1 - self._kept)  # one that is named twice was used twice
        self._wait[at] = self._waits(self._rate[at])

    def _put_down(self, n: int, experts: Sequence[int]) -> None:
        if n != self.layer:
            self.layer, self._began = n, self._time
        last, rate, wait, more = self._last[n], self._rate[n], self._wait[n], 1 - self._kept
        for e in experts:
            self._time += 1
            last[e], rate[e] = self._time, (r := rate.item(e) + more)
            wait[e] = self.S * (1 / max(r, self.floor) - 1)

    def next_token(self) -> None:
        self._settle()
        super().next_token()
        self._rate *= self._kept
        self._wait = self._waits(self._rate)


class PaperIntent(_ByDistance):
    """The paper's score L = -f / d with d as its prose has it: layers until the expert's layer runs again.

    f is how often an expert is used per token. `freq_source`: "offline" takes `frequencies` as they are;
    "online" an exponential average with a half-life of 256 tokens; "mixed" that average, starting from
    `frequencies` (0 without).
    """

    name = "paper_intent"
    half_life = 256  # tokens

    def __init__(
        self, layers: int, experts: int, frequencies: Frequencies | None = None,
        freq_source: Literal["offline", "online", "mixed"] = "mixed", encoder: Collection[int] = (),
    ):
        super().__init__(layers, experts, encoder)
        if freq_source not in ("offline", "online", "mixed"):
            raise ConfigError(f"freq_source={freq_source!r}: offline, online or mixed")
        if freq_source == "offline" and frequencies is None:
            raise ConfigError("freq_source='offline' needs frequencies: {(layer, expert): uses per token}")
        self._kept = 0.5 ** (1 / self.half_life)
        self._online = freq_source != "offline"
        known = {} if frequencies is None or freq_source == "online" else frequencies
        self._frequency = frequency_array(known, layers, experts)

    def used(self, key: Key) -> None:
        super().used(key)
        if self._online:
            self._frequency[key] += 1 - self._kept

    def next_token(self) -> None:
        super().next_token()
        if self._online:
            self._frequency *= self._kept

    def yields(self, gone: Key, key: Key, chance: float) -> bool:
        """Return whether `gone` is used less often than the guess is right."""
        return bool(self._frequency[gone] < chance)

    def decoder_scores(self) -> np.ndarray:
        return self._frequency / -self.distance()


class PaperLiteral(PaperIntent):
    """The paper's score as printed: d counts the layers since the expert's layer ran.

    It keeps the layers just executed and drops those about to run; the printed 0 of the current layer
    is S here.
    """

    name = "paper_literal"
    forward = False


POLICIES: dict[str, type[Policy]] = {
    p.name: p
    for p in (Expected, ForwardLRU, LRU, LayerLRU, LFU, LayerLFU, Static, PaperLiteral, PaperIntent)
}


def make_policy(name: str = DEFAULT_POLICY, *, layers: int, experts: int, **options: Any) -> Policy:
    """Return a policy by name for `layers` MoE layers of `experts` experts, its cache empty.

    `options` are those of the policy's class: `frequencies`, `freq_source`, `encoder`.

    Raises
    ------
    ConfigError
        For an unknown name, an option that the policy does not have, or a value it does not allow.
    """
    check_policy(name, options)
    return POLICIES[name](layers, experts, **options)


def check_policy(name: str, options: Iterable[str] = ()) -> None:
    """Refuse an unknown name, or an option that the policy does not have, before there are any layers.

    Raises
    ------
    ConfigError
    """
    names = [*POLICIES, PREDICTED]
    if name not in names:
        raise ConfigError(f"policy={name!r} is none of {', '.join(names)}{nearest(name, names)}")
    if name == PREDICTED and not list(options):
        raise ConfigError("policy='predicted' asks a predictor: make it of one, predictor.policy()")
    names, known = list(POLICIES), [] if name == PREDICTED else options_of(POLICIES[name])
    if bad := [o for o in options if o not in known]:
        has = f"has {', '.join(known)}" if known else "has no options"
        others = [n for n in names if bad[0] in options_of(POLICIES[n])]
        more = f"; leave it out, or take {' or '.join(others)}" if others else ""
        raise ConfigError(f"policy {name!r} has no option {bad[0]!r}: it {has}{more}")


def options_of(policy: type[Policy]) -> list[str]:
    """Return the names of a policy's options."""
    return list(inspect.signature(policy).parameters)[2:]


def frequency_array(frequencies: Frequencies, layers: int, experts: int) -> np.ndarray:
    """Return frequencies as a new array (layers, experts); a mapping's missing experts have 0.

    Raises
    ------
    ConfigError
        For another shape, an expert that does not exist, or a value that is negative or not finite.
    """
    values = frequencies
    if isinstance(frequencies, Mapping):
        known = {(i, j) for i in range(layers) for j in range(experts)}
        if unknown := [key for key in frequencies if key not in known]:
            raise ConfigError(f"frequencies name {unknown[0]!r}: there are {layers} x {experts} experts")
        values = [[frequencies.get((i, j), 0) for j in range(experts)] for i in range(layers)]
    try:
        found = np.array(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"frequencies are not numbers: {error}") from None
    if found.shape != (layers, experts):
        raise ConfigError(f"frequencies have the shape {found.shape}: needs {(layers, experts)}")
    if not (np.isfinite(found) & (found >= 0)).all():
        raise ConfigError("frequencies hold a value that is negative or not finite")
    return found
