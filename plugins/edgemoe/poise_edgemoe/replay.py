"""Recorded routing put into an engine: experts are used as another model used them, token by token.

Hits, reads and waiting of a model with random weights are then those of routing as it occurs, and the
simulator's, use by use: `simulate(state.trace.prompt + state.trace.decode, ..., pins=True)` counts the same
as long as there is room for all that a token uses of a layer. Where there is not, the engine keeps those
that come last, and it counts the same on `engine.cache.recorded`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from poise.errors import ConfigError
from poise_edgemoe.cache.policy import Key
from poise_edgemoe.cache.traces import RoutingTrace, tokens_of
from poise_edgemoe.engine import Engine

Token = list[list[int]]  # by layer, experts in ascending order


def mapped(trace: RoutingTrace, layers: int, experts: int) -> RoutingTrace:
    """Return a trace as a model of another shape follows it.

    Layer m of the model does what layer floor(m L / layers) of the trace's L did: evenly spaced ones where
    the model has fewer, neighbours alike where it has more. Expert e becomes e mod `experts`; those that
    become one are used once.

    Raises
    ------
    ConfigError
        For sizes that are no whole numbers >= 1.
    """
    for name, size in (("layers", layers), ("experts", experts)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name}={size!r} is not allowed: it must be a whole number >= 1")
    prompt, decode = (_tokens(keys, trace.layers, layers, experts) for keys in (trace.prompt, trace.decode))
    read = _mapped(trace.prompt_tokens, trace.layers, layers, experts)
    bytes_ = tuple(trace.layer_bytes[m * trace.layers // layers] for m in range(layers))
    return RoutingTrace(layers, experts, bytes_, _uses(prompt), _uses(decode),
                        tuple(tuple(map(tuple, token)) for token in read),
                        trace.looked if (layers, experts) == (trace.layers, trace.experts) else ())


class Replay:
    """Where an engine is in a trace.

    Attributes
    ----------
    trace : RoutingTrace
        In the engine's shape: what `simulate` counts the same hits on.
    tokens : int
        Calls of one token a row so far: recorded tokens that were used.
    """

    def __init__(self, trace: RoutingTrace, layers: int, experts: int) -> None:
        self.trace = mapped(trace, layers, experts)
        self.tokens = 0
        self._prompt = [e for (e,) in zip(*_tokens(trace.prompt, trace.layers, layers, experts))]
        self._decode = _tokens(trace.decode, trace.layers, layers, experts)
        self._now: Token | None = None  # of the prompt
        self._time = 1

    def begin(self, time: int) -> None:
        """Say that the model is called with that many tokens a row."""
        self._now, self._time = None, time
        if time == 1:
            self._now = self._decode[self.tokens % len(self._decode)]
            self.tokens += 1

    def choose(self, layer: int, rows: int, top: int) -> Tensor:
        """Return the experts of some tokens in a layer, (rows of the batch x time, k).

        Of a prompt, k is `top`: less where fewer experts were used, more where all would not have a turn.
        The last turns are in ascending order, as in the trace: an engine looks at them.
        """
        if self._now is not None:
            used = np.array([self._now[layer]] * rows, dtype=np.int64)
            return torch.from_numpy(used)  # torch.tensor of a list takes ten times as long
        used = torch.tensor(self._prompt[layer] if self._prompt else [], dtype=torch.long)
        k = min(len(used), max(top, -(-len(used) // self._time)))
        turn = (torch.arange(self._time * k) - self._time * k) % max(1, len(used))
        return used[turn].view(self._time, k).repeat(rows // self._time, 1)


class Recorded:
    """Asks a router as a predictor would, and says what was recorded instead."""

    def __init__(self, entrance: Any, state: Replay, layer: int) -> None:
        self.entrance, self.state, self.layer = entrance, state, layer

    def chosen(self, hidden: Tensor) -> Tensor:
        """Return what the router of the recorded model said, for each row."""
        rows = len(self.entrance.chosen(hidden))
        token = self.state.trace.looked[(self.state.tokens - 1) % len(self.state.trace.looked)]
        return torch.tensor([token[self.layer]] * rows)


@contextmanager
def replay(engine: Engine, trace: RoutingTrace) -> Iterator[Replay]:
    """Let an engine use the experts of a trace, whatever its routers say, until the end of the block.

    A call of the model with one token a row uses, for each row, the experts of the next recorded token;
    after the last, the first follows. A call with more, a prompt or a chunk of one, uses all experts of the
    recorded prompt, dealt out over its tokens in turn. All experts of a token weigh the same. Layers and
    numbers of experts are mapped as `mapped` says. An engine with `prefetch="oracle"` and the mapped trace
    then knows what comes, and a predictor
    that asks routers hears what those of the trace's model said, where it is recorded and of this shape.

    Raises
    ------
    ConfigError
        For a trace without decoded tokens, or an encoder-decoder.
    """
    layers = engine.index.layers
    if engine.model.config.is_encoder_decoder:
        raise ConfigError(f"{engine.index.family} is an encoder-decoder: traces are replayed in decoders")
    if not trace.decode:
        raise ConfigError("the trace has no decoded tokens: nothing could be replayed after a prompt")
    if engine.ahead is not None:
        engine.ahead.token = 0  # an oracle begins anew, too
    state = Replay(trace, len(layers), min(len(layer.experts) for layer in layers))
    look = getattr(engine.ahead.source, "look", None) if engine.ahead is not None else None
    asked = None if look is None else look.found
    if look is not None and state.trace.looked:
        look.found = [Recorded(one, state, n) for n, one in enumerate(look.found)]
    hook = engine.model.register_forward_pre_hook(_begins(state), with_kwargs=True)
    for module in engine.experts:
        module.chooser = state.choose
    try:
        yield state
    finally:
        hook.remove()
        if look is not None:
            look.found = asked
        for module in engine.experts:
            module.chooser = None


def _begins(state: Replay) -> Any:
    def hook(module: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        state.begin(named["input_ids"].shape[1])

    return hook


def _tokens(keys: Sequence[Key], of: int, layers: int, experts: int) -> list[Token]:
    """Take uses in `of` layers apart into tokens, which end where the layer number falls, and map each."""
    return _mapped(tokens_of(keys, of), of, layers, experts)


def _mapped(tokens: Sequence[Sequence[Sequence[int]]], of: int, layers: int, experts: int) -> list[Token]:
    found = [[sorted({e % experts for e in used}) for used in token] for token in tokens]
    return [[token[m * of // layers] for m in range(layers)] for token in found]


def _uses(tokens: list[Token]) -> tuple[Key, ...]:
    return tuple((m, e) for token in tokens for m, used in enumerate(token) for e in used)
