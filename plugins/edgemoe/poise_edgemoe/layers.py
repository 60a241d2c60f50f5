"""A layer with experts as one token goes through it: one call of C, or one before those that must be read.

As many small steps of Python and torch take a millisecond and more: their own memory is cold, since weights
have passed through the processor's caches. A layer is replaced where trials give what it gives; prompts,
several rows, and modules that somebody listens to go through the module.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from poise.quantizers.kernel import KINDS, is_memory, kernel
from poise.quantizers.layers import PackedLinear
from poise_edgemoe.beside import Beside, all_heard
from poise_edgemoe.cache.slots import Held
from poise_edgemoe.fused import (
    Attention,
    Library,
    after_prompt,
    close,
    fuse_modules,
    hides_nothing,
    library,
    readable,
    takes,
)
from poise_edgemoe.layer_parts import LayerCall, Parts, Scratch, Told, layer_call, linear_call, parts_of

TRIALS, LEAST = 64, 16  # tokens whose routing is compared, and how many must have a clear choice
MARGIN = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of logits' deviation
SMALL = 0.05  # what enters a layer in a trial: what is added to it must be seen
NO_MEMORY, DONE = 1, 2  # what C says; 0: a token waits for experts
PARTS = {"gate_up", "down"}  # matrices of an expert
SILU, CLAMPED = 0, 1  # ways to gate: silu(first half) * second half, and gpt-oss's


@dataclass(frozen=True)
class Way:
    """How a layer weighs experts, and gates within one.

    Parameters
    ----------
    of_all : bool
        Whether a weight is an expert's share among all, not among those that are chosen.
    gate : int
        SILU or CLAMPED, this with alpha and limit.
    """

    of_all: bool = False
    gate: int = SILU
    alpha: float = 1.0
    limit: float = 0.0


def fuse_layers(model: Any) -> int:
    """Put fused modules and layers in the place of a causal model's; return how many layers there are."""
    if not fuse_modules(model) or (it := library()) is None or (native := kernel()) is None:
        return 0
    ways: dict[Any, Way | None] = {}
    scratch, made = Scratch(), 0
    for parent in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for name, child in list(parent.named_children()):
            if (layer := _layer(child, it, native.multiplier, scratch)) is None:
                continue
            kind = layer.parts.kind(child)
            if kind not in ways:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    ways[kind] = layer.way(model)
            if (way := ways[kind]) is not None:
                layer.go(way)
                setattr(parent, name, layer)
                made += 1
    return made


def _layer(module: nn.Module, it: Library, multiplier: Any, scratch: Scratch) -> Layer | None:
    parts = parts_of(module)
    if parts is None or not parts.experts.cache.forms.on("c"):
        return None
    layer = Layer(module, it, parts, scratch)
    linears = [linear_call(one, layer.kept, layer.copied) for one in parts.linears()]
    if not all(linears):
        return None
    layer.describe(layer_call(parts, linears, it, multiplier, scratch))
    return layer


class Layer(Beside):
    """A layer with experts, for one token.

    Whom its router would choose can be asked: it is an `Entrance` of `prefetch`, too.
    """

    def __init__(self, module: Any, it: Library, parts: Parts, scratch: Scratch) -> None:
        super().__init__(module)
        self.parts, self._it, self._scratch = parts, it, scratch
        self.kept: list[Any] = []  # whose memory C reads
        self._hidden = len(parts.first._scale)
        self._places = [(holder._modules, name, one, one._forward_pre_hooks, one._forward_hooks)
                        for holder in (module, parts.attention, parts.block)
                        for name, one in holder._modules.items() if one is not None]
        self._entered: Callable[[Tensor], None] | None = None

    def describe(self, told: LayerCall) -> None:
        """Take what C is told, and put beside it where experts are to be found."""
        n = told.router.rows
        self._told, self._attention, self.address = told, told.attention, ctypes.addressof(told)
        self._experts, self._weights = (ctypes.c_int32 * n)(), (ctypes.c_float * n)()
        self._there = (ctypes.c_void_p * n)()
        self._table = ctypes.addressof(self._there)
        told.experts, told.weights = ctypes.addressof(self._experts), ctypes.addressof(self._weights)

    def depends_on(self) -> Iterator[nn.Module]:
        """Yield modules whose work it does; whom experts are chosen by may change."""
        parts = self.parts
        yield from (self._plain[0], parts.block, parts.first, parts.second)
        for part in (parts.attention, parts.router, *parts.experts._like):
            yield from part.modules()

    def renew(self) -> None:
        """See whether all is what it was at the first call."""
        super().renew()
        self._same = self._same and "forward" not in vars(self.parts.experts)

    def forward(
        self, hidden_states: Tensor, *given: Any, position_embeddings: Any = None,
        attention_mask: Tensor | None = None, past_key_values: Any = None, **more: Any,
    ) -> Tensor:
        """Return what leaves the layer, (1, 1, hidden); of several tokens what the module returns."""
        kept = None if past_key_values is None else past_key_values.layers[self.parts.attention.layer_idx]
        if given or kept is None or not self._takes(hidden_states, attention_mask, kept):
            return self._plainly(hidden_states, *given, position_embeddings=position_embeddings,
                                 attention_mask=attention_mask, past_key_values=past_key_values, **more)
        self.tell([readable(t) for t in position_embeddings], kept)
        out = torch.empty_like(hidden_states)
        started = time.perf_counter()
        said = self._it.layer(self.address, hidden_states.data_ptr(), out.data_ptr(), KINDS[out.dtype])
        self._it.seconds += time.perf_counter() - started
        self.go_on(said, hidden_states, out)
        return out

    # ------------------------------------------------------------ an entrance

    def chosen(self, hidden: Tensor) -> Tensor:
        """Return the experts that the router would choose, (rows, k), the likeliest first."""
        x = readable(hidden.flatten(0, -2))
        found = torch.empty(len(x), self._told.chosen, dtype=torch.int32)
        weights = torch.empty(found.shape, dtype=torch.float32)
        for row, experts, shares in zip(x, found, weights):
            self._done(self._it.route(self.address, row.data_ptr(), KINDS[x.dtype], experts.data_ptr(),
                                      shares.data_ptr()))
        return found.gather(1, weights.argsort(1, descending=True))

    def listen(self, entered: Callable[[Tensor], None]) -> None:
        """Have a function called with what enters the norm before the router, (rows, time, hidden)."""
        self._entered = entered

    # ------------------------------------------------------------ a token

    def _takes(self, x: Tensor, mask: Tensor | None, kept: Any) -> bool:
        one = x.numel() == self._hidden and x.dtype in KINDS and is_memory(x)
        return one and takes(kept, 1) and hides_nothing(mask) and not self.changed()

    def changed(self) -> bool:
        """Return whether a module is another one than at first, or somebody listens to it."""
        if not self._same or all_heard():
            return True
        for held, name, one, before, after in self._places:
            if held.get(name) is not one or before or after:
                return True
        return False

    def _plainly(self, *given: Any, **named: Any) -> Tensor:
        hook = None
        if (entered := self._entered) is not None:
            hook = self.parts.second.register_forward_pre_hook(lambda _, x: entered(x[0]))
        try:
            return self._plain[0](*given, **named)
        finally:
            if hook is not None:
                hook.remove()
            self._tell_all()

    def _tell_all(self) -> None:
        """Let C know of experts that a prompt has used: tokens after it find them without Python."""
        stored = self.parts.experts
        for e in range(len(self._there)):
            held = stored.cache.resident.get((stored.number, e))
            if held is not None and held.told is None and held.matrices.keys() >= PARTS:
                held.told = Told(self._there, e, held.matrices["gate_up"], held.matrices["down"])

    def tell(self, angles: list[Tensor], kept: Any) -> None:
        """Say where the token is, and whether nobody has to be asked for experts that are there.

        Parameters
        ----------
        angles : list of Tensor
            As C reads them; they must live until the layer is computed.
        """
        told, stored = self._told, self.parts.experts
        told.threads, self._angles = torch.get_num_threads(), angles
        Attention.tell(self._attention, angles, kept, KINDS[torch.float32])
        free = self._entered is None and stored.chooser is None and stored.cache.announce is None
        told.there = self._table if free else None

    def go_on(self, said: int, x: Tensor, out: Tensor) -> None:
        """Do what C has left: count experts that it has used, or have them there, and write what leaves."""
        self._done(said == NO_MEMORY)
        if said == DONE:
            self.count()
            return
        every, weights, count = self._mixture(x)
        kind = KINDS[out.dtype]
        self._it.after(self.address, every.data_ptr(), weights, count, out.data_ptr(), kind)

    def count(self) -> None:
        """Count experts that C has used."""
        stored = self.parts.experts
        stored.cache.used(stored.number, self._experts[: self._told.chosen])

    def _mixture(self, x: Tensor) -> tuple[Tensor, Any, int]:
        """Return outputs of experts, in ascending order, their weights, and how many there are."""
        stored = self.parts.experts
        experts, weights = self._experts[: self._told.chosen], self._weights
        if stored.chooser is not None:
            experts = sorted(stored.chooser(stored.number, 1, len(experts))[0].tolist())
            weights = (ctypes.c_float * len(experts))(*[1 / max(1, len(experts))] * len(experts))
        every = self._scratch("every", max(1, len(experts)) * self._hidden)
        if self._entered is not None:
            self._entered(self._scratch("state", self._hidden).to(x.dtype, copy=True).view(1, 1, -1))
        with stored.cache.layer(stored.number, experts) as held:
            places = [self._told_of(held, e).address if held.ready(e) else 0 for e in experts]
            if ready := [n for n, place in enumerate(places) if place]:
                self._put_outputs(ready, [places[n] for n in ready], every)
            for n in (n for n, place in enumerate(places) if not place):
                self._put_outputs([n], [self._told_of(held, experts[n]).address], every)
        return every, weights, len(experts)

    def _told_of(self, held: Held, e: int) -> Told:
        """Return what C is told of an expert, once it is there."""
        resident = held.reach(e)
        if resident.told is None:
            resident.told = Told(self._there, e, held(e, "gate_up"), held(e, "down"))
        return resident.told

    def _put_outputs(self, rows: list[int], experts: list[int], every: Tensor) -> None:
        n = len(rows)
        started = time.perf_counter()
        told, rows_ = (ctypes.c_void_p * n)(*experts), (ctypes.c_int32 * n)(*rows)
        failed = self._it.outputs(self.address, told, rows_, n, every.data_ptr())
        self._it.seconds += time.perf_counter() - started
        self._done(failed)

    def _done(self, failed: bool | int) -> None:
        if failed:
            raise MemoryError("there is no memory for a token's numbers")

    # ------------------------------------------------------------ trials

    @torch.no_grad()
    def way(self, model: Any) -> Way | None:
        """Return how to do what the module does; None: it does something else."""
        before = [one.packed.kernel for one in self._packed()]
        found = [way for way in self._gates() if self._routes_alike(way) and self._agrees(model, way)]
        for one, kernel_ in zip(self._packed(), before, strict=True):
            one.packed.kernel = kernel_
        return found[0] if found else None

    def go(self, way: Way) -> None:
        """Compute in this way."""
        told = self._told
        told.of_all, told.gate, told.alpha, told.limit = way.of_all, way.gate, way.alpha, way.limit
        for one in self._packed():
            one.packed.kernel = "c"  # small ones too: a prompt's products are a token's

    def _packed(self) -> list[PackedLinear]:
        return [one for one in self.parts.linears() if isinstance(one, PackedLinear)]

    def _gates(self) -> Iterator[Way]:
        """Yield ways that gate as the experts do."""
        (like,), dtype = self.parts.experts._like, self.parts.first.weight.dtype
        made = 3 * torch.randn(1, 64, dtype=dtype)
        alpha, limit = (float(getattr(like, name, 1.0)) for name in ("alpha", "limit"))
        for way in (Way(gate=SILU), Way(gate=CLAMPED, alpha=alpha, limit=limit)):
            self.go(way)
            x, y = made.float(), torch.empty(1, 32)
            self._it.gated(self.address, x.data_ptr(), y.data_ptr(), 32)
            gate = getattr(like, "_apply_gate", None)
            if gate is not None and close(y.to(dtype), gate(made)):
                yield from (replace(way, of_all=of_all) for of_all in (False, True))

    def _routes_alike(self, way: Way) -> bool:
        """Return whether experts and weights are the router's, wherever its choice is clear."""
        self.go(way)
        x = torch.randn(TRIALS, self._hidden, dtype=self.parts.first.weight.dtype)
        try:
            entering = self.parts.second.forward(x)
            logits, weights, index = self.parts.router(entering)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
        k, ordered = index.shape[1], logits.float().sort(-1, descending=True).values
        ordered = torch.nn.functional.pad(ordered, (0, 1), value=-torch.inf)
        apart = ordered[:, k - 1] - ordered[:, k]
        clear = torch.where(apart > MARGIN[x.dtype] * logits.float().std())[0].tolist()
        return len(clear) >= LEAST and all(self._routes(x[t], index[t], weights[t]) for t in clear)

    def _routes(self, x: Tensor, index: Tensor, weights: Tensor) -> bool:
        self._done(self._it.route(self.address, x.data_ptr(), KINDS[x.dtype], self._told.experts,
                                  self._told.weights))
        index, order = index.sort()
        got = torch.tensor(self._weights[: len(index)]).to(x.dtype)  # Mixtral's own stay float
        return self._experts[: len(index)] == index.tolist() and close(got, weights[order].to(x.dtype))

    def _agrees(self, model: Any, way: Way) -> bool:
        """Return whether all but experts is the module's, for a token after a short prompt."""
        self.go(way)
        found: list[Tensor] = []
        mixed = SMALL * torch.randn(1, self._hidden, dtype=self.parts.first.weight.dtype)
        x, normed = SMALL * torch.randn(1, 5, self._hidden, dtype=mixed.dtype), list[Tensor]()
        try:
            with self.without_experts(mixed, normed):
                for module in (self._plain[0], self):
                    found += after_prompt(module, model, self.parts.attention.layer_idx, x)
                    found.append(normed.pop())
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            return False  # a module that is called in another way
        half = len(found) // 2
        return all(close(a, b) for a, b in zip(found[half:], found[:half]))

    @contextmanager
    def without_experts(self, mixed: Tensor, normed: list[Tensor]) -> Iterator[None]:
        """Take (1, hidden) for what experts make of a token, and note of each call what they are given."""

        def instead(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            normed.append(hidden[-1:].clone())
            return mixed.expand(len(hidden), -1)

        def mixture(x: Tensor) -> tuple[Tensor, Any, int]:
            normed.append(self._scratch("normed", self._hidden)[None].to(x.dtype, copy=True))
            return mixed.float(), (ctypes.c_float * 1)(1.0), 1

        stored = self.parts.experts
        stored.forward, self._mixture = instead, mixture  # type: ignore[method-assign]
        try:
            yield
        finally:
            del stored.forward, self._mixture
