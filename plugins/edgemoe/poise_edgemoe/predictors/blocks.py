"""What chances are made of: blocks of numbers for each expert of a layer, from counts that go on growing.

A block says some numbers (features) of every expert of a layer that is to come, and learns from what layers
then use. Logarithms of probabilities and of their ratios: a logistic regression adds them up.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np

from poise_edgemoe.predictors.past import BEFORE, HALF_LIVES, Past

SMOOTHED = 4.0  # visits that a shorter key, or the share of all tokens, counts as
SLOW = 0.01  # what a rate of late counts as at least


class Block(Protocol):
    """Some numbers of every expert."""

    features: ClassVar[int]

    def of(self, n: int, past: Past, ahead: int) -> np.ndarray:
        """Return numbers of the experts of layer n, (features, experts), `ahead` layers before it runs."""
        ...

    def learn(self, n: int, experts: list[int], past: Past) -> None:
        """Count what layer n uses; `past` does not know of it yet."""
        ...

    def tensors(self) -> dict[str, np.ndarray]:
        """Return what it has counted."""
        ...

    def read(self, tensors: dict[str, np.ndarray]) -> None:
        """Take what another has counted."""
        ...


class Usual:
    """How often an expert is used, of all tokens and of late.

    Parameters
    ----------
    k : float array, (layers,)
        Experts that a token uses: what all experts share where nothing was counted.
    """

    features: ClassVar[int] = 1 + len(HALF_LIVES)

    def __init__(self, k: np.ndarray, experts: int) -> None:
        self.k = k.astype(np.float64)
        self.counts = np.zeros((len(k), experts))
        self.tokens = np.zeros(len(k))

    def share(self, n: int | np.ndarray) -> np.ndarray:
        """Return the share of tokens that use each expert of a layer, or of some, smoothed towards all
        alike."""
        alike = self.k[n] / self.counts.shape[1]
        return (self.counts[n] + SMOOTHED * alike[..., None]) / (self.tokens[n] + SMOOTHED)[..., None]

    def of(self, n: int, past: Past, ahead: int) -> np.ndarray:
        return self.numbers(n, past.rate[n])

    def numbers(self, n: int | np.ndarray, rate: np.ndarray) -> np.ndarray:
        """Return logarithms of the shares and of rates of late (..., half-lives, experts)."""
        return np.log(np.concatenate([self.share(n)[..., None, :], rate + SLOW], -2))

    def copy(self) -> Usual:
        """Return another that has counted the same."""
        own = Usual(self.k, self.counts.shape[1])
        own.counts, own.tokens = self.counts.copy(), self.tokens.copy()
        return own

    def learn(self, n: int, experts: list[int], past: Past) -> None:
        self.counts[n, experts] += 1
        self.tokens[n] += 1

    def tensors(self) -> dict[str, np.ndarray]:
        return {"counts": self.counts, "tokens": self.tokens}

    def read(self, tensors: dict[str, np.ndarray]) -> None:
        self.counts, self.tokens = tensors["counts"], tensors["tokens"]


class Factored:
    """How much each expert that was used before raises the chance of one: log P(e | e') / P(e), summed.

    The paper's key is the set of experts of two layers; where a token uses more than one, there are too
    many sets. Here each expert counts for itself: of the three layers before, and of the same layer a token
    ago. Source: ours (after EdgeMoE section III-C1).
    """

    features: ClassVar[int] = BEFORE + 1

    def __init__(self, usual: Usual) -> None:
        layers, experts = usual.counts.shape
        self.usual = usual
        self.both = np.zeros((self.features, layers, experts, experts), dtype=np.float32)
        self.visits = np.zeros((self.features, layers, experts), dtype=np.float32)

    def of(self, n: int, past: Past, ahead: int) -> np.ndarray:
        p = self.usual.share(n).astype(np.float32)
        sources, experts, sizes = _flat(past.before(n, ahead))
        said = np.zeros((self.features, len(p)), dtype=np.float32)
        if len(experts):
            visits = self.visits[sources, n, experts][:, None] + SMOOTHED
            ratios = np.log((self.both[sources, n, experts] + SMOOTHED * p) / (visits * p))
            starts = np.cumsum([0, *sizes[:-1]])
            some = np.array(sizes) > 0
            said[some] = np.add.reduceat(ratios, starts[some])
        return said

    def learn(self, n: int, experts: list[int], past: Past) -> None:
        sources, seen, _ = _flat(past.before(n))
        if len(seen):
            self.both[sources[:, None], n, seen[:, None], np.array(experts, dtype=np.int64)] += 1
            self.visits[sources, n, seen] += 1

    def tensors(self) -> dict[str, np.ndarray]:
        return {"both": self.both, "visits": self.visits}

    def read(self, tensors: dict[str, np.ndarray]) -> None:
        self.both, self.visits = tensors["both"], tensors["visits"]


def _flat(before: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return source and number of every expert that was used before, and how many each source has."""
    sizes = [len(used) for used in before]
    experts = np.array([e for used in before for e in used], dtype=np.int64)
    return np.repeat(np.arange(len(before)), sizes), experts, sizes


class Looked:
    """What the next router says of what enters the layer that runs; by the place that it gives an expert.

    Attributes
    ----------
    ranks : mapping of int to list of int
        By layer to come, the experts that were named, the likeliest first. Set by whoever has looked.
    """

    features: ClassVar[int] = 2

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.ranks: dict[int, list[list[int]]] = {}

    def of(self, n: int, past: Past, ahead: int) -> np.ndarray:
        said = np.zeros((self.features, self.experts))
        for row in self.ranks.get(n, ()) if ahead == 1 else ():
            place = np.zeros(self.experts)
            place[row] = 1 / np.arange(1, len(row) + 1)
            said[0, row] = 1
            said[1] = np.maximum(said[1], place)
        return said

    def learn(self, n: int, experts: list[int], past: Past) -> None:
        self.ranks.pop(n, None)

    def tensors(self) -> dict[str, np.ndarray]:
        return {}

    def read(self, tensors: dict[str, np.ndarray]) -> None:
        self.ranks = {}


def flattened(name: str, block: Any) -> dict[str, np.ndarray]:
    """Return a block's arrays by name, as one file has them."""
    return {f"{name}.{key}": value for key, value in block.tensors().items()}
