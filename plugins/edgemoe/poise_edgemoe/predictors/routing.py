"""A predictor of the experts of layers to come, and of who is used again soon; it learns as it runs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from poise.errors import ConfigError
from poise_edgemoe.predictors.blocks import Block, Factored, Looked, Usual
from poise_edgemoe.predictors.chances import Curve
from poise_edgemoe.predictors.fast import Fast, fast
from poise_edgemoe.predictors.past import Past
from poise_edgemoe.predictors.policy import Predicted
from poise_edgemoe.predictors.tables import PathTable

if TYPE_CHECKING:
    from poise_edgemoe.prefetch import LookAhead, Seen

LEAST = 0.15  # chance of an expert that is spoken of: less is never worth a read
AHEAD = 2  # layers that are spoken of, where nobody looks into hidden states
METHODS: dict[str, tuple[str, ...]] = {
    "table": ("path",), "factored": ("usual", "factored"), "both": ("usual", "path", "factored"),
    "lookahead": ("usual", "looked"), "combined": ("usual", "factored", "looked"),
    "all": ("usual", "path", "factored", "looked"),
}
ORDER = ("usual", "path", "factored", "looked")


def blocks_for(names: Iterable[str], k: np.ndarray, experts: int) -> dict[str, Block]:
    """Return blocks that have counted nothing, in their order; shares are always counted."""
    usual = Usual(k, experts)
    made: dict[str, Block] = {"usual": usual}
    named = set(names)
    if "path" in named:
        made["path"] = PathTable(usual)
    if "factored" in named:
        made["factored"] = Factored(usual)
    if "looked" in named:
        made["looked"] = Looked(experts)
    return made


class FromRouting:
    """Predicts from routing; a source for `Engine.open(prefetch=...)`, and what policy "predicted" asks.

    An engine takes a copy, which goes on counting what the model uses.

    Parameters
    ----------
    blocks : dict of Block
        By name, in their order.
    methods : list of list of str
        By layers ahead, 1 first, and by layer: which of `METHODS` is taken.
    weights : list of list of float array
        Of these: of 1 first, then of the features of each block.
    curves : list of pair of float array, (knots,)
        By layers ahead: scores, rising, and the chances that they mean.
    again : float array
        Weights of 1 and `Usual`'s features: whether an expert is used again soon.
    model : str, optional
        Of the routers that the traces are of (`store.routers.routers_hash`).
    """

    def __init__(
        self, blocks: dict[str, Block], methods: Sequence[Sequence[str]],
        weights: Sequence[Sequence[np.ndarray]], curves: Sequence[Curve], again: np.ndarray,
        model: str | None = None,
    ) -> None:
        self.blocks, self.methods, self.weights = blocks, methods, weights
        self.curves, self.again, self.model = curves, again, model
        self.usual: Usual = blocks["usual"]  # type: ignore[assignment]
        self.layers, self.experts = self.usual.counts.shape
        self.past = Past(self.layers, self.experts)
        self.look: LookAhead | None = None
        self._fast: Fast | None = None  # of a copy that runs, where there is a compiler

    @property
    def depth(self) -> int:
        """Of how many layers to come it speaks."""
        return len(self.methods)

    @property
    def looks(self) -> bool:
        """Whether it asks the next router too."""
        return any("looked" in METHODS[m] for by_layer in self.methods for m in by_layer)

    @property
    def nbytes(self) -> int:
        """What an engine's copy of it takes."""
        counts = sum(a.nbytes for block in self.blocks.values() for a in block.tensors().values())
        return counts + self.past.rate.nbytes

    def chances(self, n: int, past: Past, ahead: int = 1) -> np.ndarray:
        """Return the chance that each expert of layer n is used when it runs next, (experts,)."""
        w, method = self.weights[ahead - 1][n], METHODS[self.methods[ahead - 1][n]]
        x = np.concatenate([self.blocks[name].of(n, past, ahead) for name in ORDER if name in method])
        return np.interp(w[0] + w[1:] @ x, *self.curves[ahead - 1])

    def candidates(self, layer: int, seen: Seen) -> Iterable[tuple[int, float]]:
        """Return experts that have some chance, each with it."""
        ahead, named = (layer - seen.layer - 1) % self.layers + 1, []
        if ahead == 1 and self.look is not None and seen.hidden is not None and layer > seen.layer:
            named = self.look.found[layer].chosen(seen.hidden).tolist()
        method = METHODS[self.methods[ahead - 1][layer]]
        if self._fast is not None and "path" not in method and len(named) < 2:
            return self._fast.chances(
                layer, ahead, self.weights[ahead - 1][layer], "factored" in method,
                named[0] if named and "looked" in method else None, self.curves[ahead - 1], LEAST)
        if named:
            looked: Any = self.blocks["looked"]
            looked.ranks[layer] = named
        chances = self.chances(layer, self.past, ahead)
        return [(int(e), float(chances[e])) for e in np.flatnonzero(chances >= LEAST)]

    def note(self, n: int, experts: Sequence[int]) -> None:
        """Learn what layer n uses."""
        used = sorted(experts)
        for name, block in self.blocks.items():
            if self._fast is None or name not in ("usual", "factored"):
                block.learn(n, used, self.past)
        (self._fast or self.past).note(n, used)

    def started(self) -> FromRouting:
        """Return a copy that has seen nothing of what runs."""
        own = copy.copy(self)
        own.blocks = blocks_for(self.blocks, self.usual.k, self.experts)
        for name, block in own.blocks.items():
            block.read({key: a.copy() for key, a in self.blocks[name].tensors().items()})
        own.usual = own.blocks["usual"]  # type: ignore[assignment]
        own.past, own.look = Past(self.layers, self.experts), None
        own._fast = fast(own.usual, own.blocks.get("factored"), own.past)
        if isinstance(table := own.blocks.get("path"), PathTable):
            table.most = 0  # what it takes was counted to the memory
        return own

    def policy(self, encoder: Iterable[int] = ()) -> Predicted:
        """Return a policy: who is least likely to be used soon leaves."""
        if list(encoder):
            raise ConfigError("policy=predicted: an encoder-decoder's routing is not predicted; take "
                              "expected")
        return Predicted(self.usual, self.again)

    def check(self, layers: int, experts: int, model: str | None) -> None:
        """Refuse a model whose routing it does not know.

        Raises
        ------
        ConfigError
        """
        if (self.layers, self.experts) != (layers, experts):
            raise ConfigError(f"the predictor is of another model: it has {self.layers} layers of "
                              f"{self.experts} experts, the store {layers} of {experts}; fit one to "
                              f"routing of this store (poise moe fit)")
        if None not in (model, self.model) and model != self.model:
            raise ConfigError("the predictor is of another model: routers differ; fit one to routing of "
                              "this store (poise moe fit)")

    def said(self) -> Mapping[str, Any]:
        """Return in short what it is made of, as plain values."""
        return {"layers": self.layers, "experts": self.experts, "model": self.model,
                "methods": [list(by_layer) for by_layer in self.methods], "nbytes": self.nbytes}
