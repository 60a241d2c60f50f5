"""Who will be needed next: sources of guesses, behind one method.

Sources: EdgeMoE section III-C1 (experts of the next layer are guessed while this one computes); to ask the
next router is Mixtral offloading's way (arXiv 2312.17238).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from poise.errors import ConfigError, DataError, nearest
from poise_edgemoe.cache.policy import Policy
from poise_edgemoe.cache.traces import RoutingTrace, read_trace, tokens_of
from poise_edgemoe.flags import check_trace
from poise_edgemoe.store.index import Index

SOURCES = ("none", "lookahead", "oracle")
NORMS, ROUTERS = ("post_attention_layernorm", "layer_norm"), ("gate", "router")  # as families call them
DEPTH = 2  # layers that the oracle speaks of
START, KEPT = 0.75, 0.5 ** (1 / 64)  # chance of a router's guess at first, and how it is averaged


@dataclass(frozen=True)
class Seen:
    """What is known when the experts of a layer are guessed.

    Parameters
    ----------
    token : int
        Of the layer that is guessed: how many calls of one token a row were finished before its own.
    layer : int
        The MoE layer that runs.
    experts : tuple of int
        That its router has chosen, for all rows.
    hidden : Tensor, (rows, 1, hidden), or None
        What enters the block of this layer, before its norm; None where it cannot be found.
    """

    token: int
    layer: int
    experts: tuple[int, ...]
    hidden: Tensor | None


@runtime_checkable
class Predictor(Protocol):
    """Guesses the experts of a MoE layer before its router speaks; asked while a token is computed.

    With an attribute `depth` it is asked for as many layers after the one that runs, the nearest first;
    without for one. What it has said of a layer stays said until that layer runs. It is not asked where
    that is not worth its time, unless it has an attribute `always` that is true.
    """

    def candidates(self, layer: int, seen: Seen) -> Iterable[tuple[int, float]]:
        """Return experts of `layer`, each with the chance (0 to 1) that any row uses it."""
        ...


@runtime_checkable
class Noted(Protocol):
    """A predictor that is told of every layer of a token, the moment its experts are known."""

    def note(self, n: int, experts: Sequence[int]) -> None:
        """Take note of what layer n uses, of all rows."""
        ...


@runtime_checkable
class Looks(Protocol):
    """A predictor that may ask the next router itself: where it `looks`, `look` is set to what asks."""

    looks: bool
    look: LookAhead | None


@runtime_checkable
class Learned(Protocol):
    """A predictor that was fitted to a model's routing, and of which each engine takes a copy.

    `nbytes`: what a copy takes.
    """

    nbytes: int

    def check(self, layers: int, experts: int, model: str | None) -> None:
        """Refuse a model of other layers, experts or routers."""
        ...

    def started(self) -> Any:
        """Return the copy."""
        ...

    def policy(self, encoder: Iterable[int]) -> Policy:
        """Return an eviction policy that asks it."""
        ...


class Entrance(Protocol):
    """How hidden states enter a block with experts: through a norm, and its router."""

    def chosen(self, hidden: Tensor) -> Tensor:
        """Return the experts that the router would choose, (rows, k); hidden: (rows, 1, width)."""
        ...

    def listen(self, entered: Callable[[Tensor], None]) -> None:
        """Have a function called with what enters the norm, (rows, time, width)."""
        ...


@dataclass(frozen=True)
class Modules:
    """An entrance of two modules."""

    norm: nn.Module
    router: Any
    switch: bool

    def listen(self, entered: Callable[[Tensor], None]) -> None:
        """Have a function called with what enters the norm."""
        self.norm.register_forward_pre_hook(lambda _, given: entered(given[0]))

    def chosen(self, hidden: Tensor) -> Tensor:
        """Return the experts that the router would choose, in its order.

        `forward` and not a call: nobody who listens to the modules is to hear of it.
        """
        x = self.norm.forward(hidden)
        if self.switch:
            return self.router.forward(x)[0].argmax(-1)
        return self.router.forward(x.flatten(0, 1))[-1]


def entrances(model: nn.Module, index: Index) -> list[Entrance] | None:
    """Return the entrance of every block with experts, by the structure of its modules; None: not found."""
    found: list[Any] = []
    for layer in index.layers:
        block, _, _ = layer.path.rpartition(".")
        around, _, _ = block.rpartition(".")
        whole = model.get_submodule(around)
        if hasattr(whole, "chosen"):  # a layer of ours
            found.append(whole)
            continue
        norm, router = _child(whole, NORMS), _child(model.get_submodule(block), ROUTERS)
        if norm is None or router is None:
            return None
        found.append(Modules(norm, router, "wi" in layer.shapes))
    return found


def routers_hash(model: nn.Module, index: Index) -> str | None:
    """Return what tells the routers of a model from others', in 16 bits as they may be stored; None: not
    found."""
    digest = hashlib.sha256()
    for layer in index.layers:
        router = _child(model.get_submodule(layer.path.rpartition(".")[0]), ROUTERS)
        if router is None:
            return None
        for name, tensor in sorted(router.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def predicted_policy(index: Index, prefetch: Any) -> Policy:
    """Return the policy that asks a predictor.

    Raises
    ------
    ConfigError
        Where there is none, or it is of another model.
    """
    if not isinstance(prefetch, Learned):
        raise ConfigError("policy=predicted asks a predictor: give prefetch=predictor (poise_edgemoe."
                          "predictors.fit or load), or without reading ahead policy=predictor.policy()")
    prefetch.check(len(index.layers), max(len(layer.experts) for layer in index.layers), None)
    return prefetch.policy([n for n, layer in enumerate(index.layers) if layer.encoder])


def _child(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    return next((child for name, child in module.named_children() if name in names), None)


class LookAhead:
    """Asks the next layer's router about what enters this layer's block: it changes little on the way.

    What leaves the block is a better guess, and too late: the time in which experts are computed is the
    time to read in. The chance of a guess is how often those of its rank were right, an average over some
    tokens that starts at `START`.
    """

    def __init__(self, found: Sequence[Entrance]) -> None:
        self.found = found
        self._chances: dict[int, list[float]] = {}
        self._said: tuple[int, list[list[int]]] | None = None

    def candidates(self, layer: int, seen: Seen) -> Iterable[tuple[int, float]]:
        """Return what the router says of each row; chances of an expert are summed over rows."""
        self._learn(seen)
        if layer <= seen.layer or seen.hidden is None:
            return []  # of the next token nothing is known yet
        rows = self.found[layer].chosen(seen.hidden).tolist()
        self._said = layer, rows
        chances = self._chances.setdefault(layer, [START] * len(rows[0]))
        sums: dict[int, float] = {}
        for row in rows:
            for e, chance in zip(row, chances, strict=True):
                sums[e] = min(1.0, sums.get(e, 0.0) + chance)
        return sums.items()

    def _learn(self, seen: Seen) -> None:
        if self._said is not None and self._said[0] == seen.layer:
            used, rows, chances = set(seen.experts), self._said[1], self._chances[seen.layer]
            for rank, said in enumerate(zip(*rows, strict=True)):
                right = sum(e in used for e in said) / len(rows)
                chances[rank] = KEPT * chances[rank] + (1 - KEPT) * right
        self._said = None


class Oracle:
    """Knows what comes: recorded routing, whose tokens are used in their order, and then again.

    Parameters
    ----------
    trace : RoutingTrace
        Of the engine's layers and experts.
    """

    depth = DEPTH

    def __init__(self, trace: RoutingTrace) -> None:
        self.tokens = tokens_of(trace.decode, trace.layers)

    def candidates(self, layer: int, seen: Seen) -> Iterable[tuple[int, float]]:
        """Return what the trace says; what follows its last token is not certain before it has begun."""
        at = seen.token % len(self.tokens)
        return [] if layer <= seen.layer and at == 0 else [(e, 1.0) for e in self.tokens[at][layer]]


def check_prefetch(prefetch: Any, trace: RoutingTrace | Path | str | None) -> None:
    """Refuse a source that is none, or one without its trace, or a trace that feeds nobody.

    Raises
    ------
    ConfigError
    """
    if isinstance(prefetch, str):
        if prefetch not in SOURCES:
            raise ConfigError(f"prefetch={prefetch!r} is none of {', '.join(SOURCES)}"
                              f"{nearest(prefetch, list(SOURCES))}")
    elif isinstance(prefetch, type) or not callable(getattr(prefetch, "candidates", None)):
        raise ConfigError(f"prefetch={prefetch!r} is not allowed: it must be one of {', '.join(SOURCES)}, "
                          f"or an object with a method candidates(layer, seen)")
    depth_of(prefetch)
    check_trace(prefetch, "RoutingTrace" if isinstance(trace, RoutingTrace) else trace)


def depth_of(source: Any) -> int:
    """Return of how many layers to come a source is asked."""
    depth = getattr(source, "depth", 1)
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ConfigError(f"prefetch: {source!r} has depth={depth!r}: it must be a whole number >= 1, of "
                          f"layers after the one that runs")
    return depth


def trace_for(index: Index, trace: RoutingTrace | Path | str) -> RoutingTrace:
    """Return the trace that an oracle speaks from.

    Raises
    ------
    ConfigError
        For what is no trace, or an encoder-decoder's store.
    DataError
        For a trace of another model, or one in which no token can be told from the next.
    """
    if any(layer.encoder for layer in index.layers):
        raise ConfigError(f"prefetch=oracle: {index.family} is an encoder-decoder, traces are a decoder's")
    if not isinstance(trace, (RoutingTrace, str, os.PathLike)):
        raise ConfigError(f"trace={trace!r} is not allowed: give a file or a RoutingTrace")
    name, own = ("the trace", trace) if isinstance(trace, RoutingTrace) else (trace, read_trace(trace))
    layers, experts = len(index.layers), max(len(layer.experts) for layer in index.layers)
    if (own.layers, own.experts) != (layers, experts):
        raise DataError(f"{name} is of another model: it has {own.layers} layers of {own.experts} experts, "
                        f"the store {layers} of {experts}; record the store's own, or map it "
                        f"(poise_edgemoe.replay.mapped)")
    if layers == 1 or not own.decode:
        why = "has no decoded tokens" if layers > 1 else "is of one layer: no token's end can be told"
        raise DataError(f"{name} {why}: the oracle cannot follow it")
    return own


def source_of(
    prefetch: str | Predictor, trace: RoutingTrace | None, found: Sequence[Entrance] | None, family: str
) -> Predictor | None:
    """Return who is asked; None: nothing is read ahead.

    Raises
    ------
    ConfigError
        For the look-ahead in a model whose norms and routers are not found.
    """
    if prefetch == "lookahead":
        return _look_ahead(found, family)
    if prefetch == "oracle":
        assert trace is not None
        return Oracle(trace)
    if isinstance(prefetch, str):
        return None
    own: Any = prefetch.started() if isinstance(prefetch, Learned) else prefetch
    looking: Any = own
    if isinstance(own, Looks) and own.looks:
        looking.look = _look_ahead(found, family)
    return looking


def _look_ahead(found: Sequence[Entrance] | None, family: str) -> LookAhead:
    if found is None:
        raise ConfigError(f"prefetch=lookahead: norms and routers of {family} are not found; take "
                          f"prefetch=none")
    return LookAhead(found)
