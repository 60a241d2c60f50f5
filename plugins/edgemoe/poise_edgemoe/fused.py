"""One token's way through a layer in few calls: norms and attention in C, over keys as they are kept.

transformers makes some eighty small operations of it, a microsecond or ten each, and reads keys in half
precision slowly. A module is replaced where a trial gives what it gives; prompts go through the module.
"""

from __future__ import annotations

import ctypes
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from poise.native import Loaded, built, team
from poise.quantizers.kernel import KINDS, is_memory, watched
from poise.quantizers.layers import PackedLinear
from poise.quantizers.sliced import SlicedMatrix, multiply
from poise_edgemoe.beside import Beside, all_heard, heard

if TYPE_CHECKING:
    from poise_edgemoe.kv import KeptLayer

SOURCE = Path(__file__).with_name("fused.c")
FEW = 4  # rows of a norm, beyond which torch is as fast
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx", "scaling")
GRAIN = 1 << 18  # numbers of keys and values for each thread
CLOSE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest number of a trial


class AttentionCall(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("q", "k", "v", "keys", "values", "out", "q_norm", "k_norm",
                                         "cosine", "sine", "sinks")),
        *((n, ctypes.c_size_t) for n in ("rows", "heads", "kv_heads", "width", "context", "at",
                                         "q_norm_width", "k_norm_width", "angle_stride")),
        *((n, ctypes.c_float) for n in ("scaling", "q_eps", "k_eps")),
        *((n, ctypes.c_int) for n in ("kind", "kept_kind", "angle_kind")),
    ]


class Library:
    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self.team, self.seconds = team(), 0.0  # in attention and layers so far
        for name, arguments in {
            "attend": [pointer, number, pointer],
            "norm": [pointer, pointer, pointer, size, size, ctypes.c_float, number],
            "layer": [pointer, pointer, pointer, number],
            "layers": [pointer, number, pointer, number, pointer],
            "route": [pointer, pointer, number, pointer, pointer],
            "gated": [pointer, pointer, pointer, size],
            "outputs": [pointer, pointer, pointer, number, pointer],
            "after": [pointer, pointer, pointer, number, pointer, number],
        }.items():
            function = getattr(library, f"poise_{name}")
            function.argtypes = arguments
            setattr(self, name, function)
        self._victim = library.poise_victim
        self._victim.argtypes = [*[pointer] * 3, *[ctypes.c_long] * 2, pointer, ctypes.c_long]
        self._victim.restype = ctypes.c_long

    def victim(
        self, scores: np.ndarray, resident: np.ndarray, last: np.ndarray, among: range,
        pinned: Sequence[int],
    ) -> int | None:
        """Do what `cache.policy.leaves` does, in one pass."""
        scores = np.ascontiguousarray(scores, dtype=np.float64)
        held = array("i", pinned)
        found = self._victim(scores.ctypes.data, resident.ctypes.data, last.ctypes.data, among.start,
                             among.stop, held.buffer_info()[0], len(held))
        return None if found < 0 else found


_LOADED = Loaded(lambda: Library(built(SOURCE, "edgemoe")))


def library() -> Library | None:
    """Return the library, built at the first call; None where it cannot be had."""
    return _LOADED.get()


def seconds() -> float:
    """Return the time that attention of tokens has taken in this process."""
    it = _LOADED.made()
    return it.seconds if it is not None else 0.0


def fuse_modules(model: Any) -> int:
    """Put fused modules in the place of a causal model's attention and norms; return how many there are.

    Those that compute something else stay: each class is tried once, with the same numbers always.
    """
    it, config = library(), model.config
    if it is None or config.is_encoder_decoder or next(model.parameters()).dtype not in KINDS:
        return 0
    tried: dict[Any, bool] = {}
    made = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fused = _fused(child, it)
            if fused is None:
                continue
            kind = type(child), tuple(p.shape for p in child.parameters(recurse=False)), slides(child)
            if kind not in tried:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    tried[kind] = fused.agrees(model)
            if tried[kind]:
                setattr(parent, name, fused)
                made += 1
    return made


def slides(module: Any) -> bool:
    """Return whether attention looks back over a window only."""
    return getattr(module, "sliding_window", None) is not None


def _fused(module: nn.Module, it: Library) -> Norm | Attention | None:
    if type(module).__name__.endswith("RMSNorm") and _eps(module) is not None:
        return Norm(module, it)
    if all(hasattr(module, name) for name in ATTENTION):
        return Attention(module, it)
    return None


def _eps(norm: Any) -> float | None:
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) and isinstance(getattr(norm, "weight", None), Tensor) else None


class Norm(Beside):
    """Root mean square norm of few rows."""

    def __init__(self, module: Any, it: Library) -> None:
        super().__init__(module)
        self._it, self._eps, self._scale = it, _eps(module), self.copied(module.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the norm of each row, (..., hidden)."""
        x, width = hidden_states, len(self._scale)
        if (x.shape[-1] != width or x.numel() > FEW * width or not self._same or not is_memory(x)
                or x.dtype not in KINDS):
            return self._plain[0](x)  # which refuses rows of another width: C would take others together
        y = torch.empty_like(x)
        if self._it.norm(x.data_ptr(), y.data_ptr(), self._scale.data_ptr(), x.numel() // width, width,
                         self._eps, KINDS[x.dtype]):
            raise MemoryError("there is no memory for a norm")
        return y

    def agrees(self, model: Any) -> bool:
        """Return whether it does what the module does."""
        x = 3 * torch.randn(2, len(self._scale), dtype=self.weight.dtype)
        return close(self(x), self._plain[0](x))


class Attention(Beside):
    """Attention of one token of each row."""

    def __init__(self, module: Any, it: Library) -> None:
        super().__init__(module)
        self._it = it
        self._norms = [self._norm(getattr(module, name, None)) for name in ("q_norm", "k_norm")]
        sinks = getattr(module, "sinks", None)
        self._sinks = None if sinks is None else self.copied(sinks)

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Tensor | None = None,
        past_key_values: Any = None, **more: Any,
    ) -> Any:
        """Return (rows, 1, hidden) and no weights; prompts, and what has a mask, go through the module."""
        kept = past_key_values.layers[self.layer_idx] if past_key_values is not None else None
        one = (self._same and hidden_states.shape[1] == 1 and not watched()
               and hides_nothing(attention_mask) and not all_heard()
               and not any(heard(module) for module in self._modules.values()))
        if kept is None or not (one and takes(kept, len(hidden_states))):
            return self._plain[0](hidden_states=hidden_states, position_embeddings=position_embeddings,
                                  attention_mask=attention_mask, past_key_values=past_key_values, **more)
        x = hidden_states[:, 0]
        out = self._attend(self._projected(x), position_embeddings, kept)
        return self.o_proj(out)[:, None], None

    def _norm(self, norm: Any) -> tuple[Tensor | None, float]:
        eps = _eps(norm)
        return (None, 0.0) if eps is None else (self.copied(norm.weight), eps)

    def _projected(self, x: Tensor) -> list[Tensor]:
        layers = [self.q_proj, self.k_proj, self.v_proj]
        if not all(isinstance(one, PackedLinear) for one in layers):
            return [one(x).contiguous() for one in layers]
        stored = [one.packed.prepared() for one in layers]
        if not all(isinstance(w, SlicedMatrix) for w in stored):
            return [one(x).contiguous() for one in layers]
        made = multiply([(w, x) for w in stored])
        return [y if one.bias is None else y + one.bias for y, one in zip(made, layers)]

    def _attend(self, projected: list[Tensor], angles: Any, kept: KeptLayer) -> Tensor:
        q, k, v = projected
        out, angles = torch.empty_like(q), [readable(t) for t in angles]
        told, at = self.call([t.data_ptr() for t in (q, k, v, out)], len(q)), kept.get_seq_length()
        self.tell(told, angles, kept, KINDS[q.dtype])
        work = 2 * k.numel() * (at + 1)
        threads = max(1, min(torch.get_num_threads(), work // GRAIN))
        started = time.perf_counter()
        failed = self._it.attend(ctypes.addressof(told), threads, self._it.team)
        self._it.seconds += time.perf_counter() - started
        if failed:
            raise MemoryError("there is no memory for attention scores")
        return out

    def call(self, places: Sequence[int], rows: int) -> AttentionCall:
        """Return what C is told of it; places of queries, keys, values and what comes out."""
        (q_norm, q_eps), (k_norm, k_eps) = self._norms
        heads, kv_heads = (one.out_features // self.head_dim for one in (self.q_proj, self.k_proj))
        q, k, v, out = places
        return AttentionCall(
            q=q, k=k, v=v, out=out, q_norm=address(q_norm), k_norm=address(k_norm),
            sinks=address(self._sinks), rows=rows, heads=heads, kv_heads=kv_heads, width=self.head_dim,
            q_norm_width=_length(q_norm), k_norm_width=_length(k_norm), scaling=self.scaling,
            q_eps=q_eps, k_eps=k_eps)

    @staticmethod
    def tell(told: AttentionCall, angles: Any, kept: KeptLayer, kind: int) -> None:
        """Say where the next token is: its angles, (rows or 1, 1, width), and the place of its keys."""
        cosine, sine = angles
        keys, values, told.at = kept.grow()
        told.keys, told.values, told.context = keys.data_ptr(), values.data_ptr(), keys.shape[2]
        told.cosine, told.sine = cosine.data_ptr(), sine.data_ptr()
        told.angle_stride = cosine.shape[-1] if len(cosine) > 1 else 0
        told.kind, told.kept_kind, told.angle_kind = kind, KINDS[keys.dtype], KINDS[cosine.dtype]

    @torch.no_grad()
    def agrees(self, model: Any) -> bool:
        """Return whether it does what the module does, for a token after a short prompt."""
        from poise_edgemoe.kv import KeptLayer, kept_cache

        if not isinstance(kept_cache(model.config, 8).layers[self.layer_idx], KeptLayer):
            return False  # of a window that slides: nothing would be tried
        rotary = rotary_of(model)
        if rotary is None or self._clipped() or not self._turns(rotary, model):
            return False
        x = torch.randn(2, 5, model.config.hidden_size, dtype=next(model.parameters()).dtype)
        try:
            mine, its = (after_prompt(m, model, self.layer_idx, x) for m in (self, self._plain[0]))
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            return False  # a module that is called in another way
        return all(close(a, b) for a, b in zip(mine, its))

    def _turns(self, rotary: Any, model: Any) -> bool:
        """Return whether angles are of all pairs (i, i + half) of a head: C reads as many."""
        x = torch.zeros(1, 1, model.config.hidden_size)
        angles = rotary(x, torch.zeros(1, 1, dtype=torch.long))
        return isinstance(angles, tuple) and angles[0].shape[-1] in (self.head_dim, self.head_dim // 2)

    def _clipped(self) -> bool:
        return getattr(getattr(self._plain[0], "config", None), "clip_qkv", None) is not None


def rotary_of(model: Any) -> Any:
    """Return the module that makes angles of positions."""
    return next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)


def after_prompt(module: Any, model: Any, layer: int, x: Tensor) -> list[Tensor]:
    """Return what a module makes of a token after a prompt, and the keys and values that it has kept.

    Parameters
    ----------
    layer : int
        Of attention, as the module calls it.
    x : Tensor, (rows, 5, hidden)
    """
    from poise_edgemoe.kv import kept_cache

    rotary, cache = rotary_of(model), kept_cache(model.config, 8)
    for part, at in ((x[:, :4], range(4)), (x[:, 4:], range(4, 5))):
        out = module(
            hidden_states=part.contiguous(), past_key_values=cache,
            position_embeddings=rotary(part, torch.arange(at.start, at.stop)[None]),
            attention_mask=causal(part) if len(at) > 1 else None)[0]
    return [out, cache.layers[layer].keys, cache.layers[layer].values]


def hides_nothing(mask: Tensor | None) -> bool:
    """Return whether a mask hides none of what is kept."""
    if mask is None:
        return True
    return bool(mask.all() if mask.dtype == torch.bool else not mask.any())


def takes(kept: Any, rows: int) -> bool:
    """Return whether kept keys have room for a token of so many rows."""
    return hasattr(kept, "has_room") and kept.has_room(rows)


def causal(x: Tensor) -> Tensor:
    n = x.shape[1]
    return torch.full((1, 1, n, n), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)


def close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors agree, to what their type allows."""
    return a.shape == b.shape and bool(((a - b).abs().max() <= CLOSE[b.dtype] * b.abs().max()).item())


def readable(t: Tensor) -> Tensor:
    """Return a tensor as C reads it."""
    return t if t.is_contiguous() and t.dtype in KINDS else t.float().contiguous()


def address(t: Tensor | None) -> int | None:
    """Return where a tensor lies; None: nowhere."""
    return None if t is None else t.data_ptr()


def _length(t: Tensor | None) -> int:
    return 0 if t is None else len(t)
