"""Records the routing of an engine while it decodes, and what the next routers would have said."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from poise_edgemoe.cache.slots import size_of
from poise_edgemoe.cache.traces import ByToken, RoutingTrace, tokens_of
from poise_edgemoe.engine import Engine
from poise_edgemoe.prefetch import Entrance, Seen


class Listening:
    """Asks the next router and says nothing; a source for an engine that is recorded.

    Attributes
    ----------
    said : dict
        (token, layer) to the experts that the router named, of the first row.
    """

    looks = always = True

    def __init__(self) -> None:
        self.look: Any = None
        self.said: dict[tuple[int, int], tuple[int, ...]] = {}

    def candidates(self, layer: int, seen: Seen) -> Iterable[tuple[int, float]]:
        found: list[Entrance] = self.look.found
        if layer > seen.layer and seen.hidden is not None:
            self.said[seen.token, layer] = tuple(found[layer].chosen(seen.hidden)[0].tolist())
        return []


def recorded(
    engine: Engine, ids: Any, new: int, seed: int = 0, advance: Callable[[], None] = lambda: None
) -> RoutingTrace:
    """Return what a prompt and `new` tokens after it use, and what routers said, if the engine listens.

    Tokens are drawn: the likeliest ones of small models go round in circles. The prompt is taken as it is
    computed: where the limit asks for pieces, each is a token to the cache.
    """
    layers, experts = engine.index.layers, max(len(layer.experts) for layer in engine.index.layers)
    first = engine.ahead.token if engine.ahead is not None else 0
    uses = engine.cache.recorded = []
    try:
        made = engine.stream(ids, new, do_sample=True, seed=seed, stop=[])
        next(made)
        split = len(uses)
        advance()
        for _ in made:
            advance()
    finally:
        engine.cache.recorded = None
    sizes = tuple(max(map(size_of, layer.experts)) for layer in layers)
    decode = tuple(uses[split:])
    looked = _looked(engine, first, len(tokens_of(decode, len(layers))))
    return RoutingTrace(len(layers), experts, sizes, tuple(uses[:split]), decode, looked=looked,
                        model=engine.routers)


def _looked(engine: Engine, first: int, tokens: int) -> ByToken:
    source = engine.ahead.source if engine.ahead is not None else None
    if not isinstance(source, Listening):
        return ()
    return tuple(tuple(source.said.get((first + t, n), ()) for n in range(len(engine.index.layers)))
                 for t in range(tokens))
