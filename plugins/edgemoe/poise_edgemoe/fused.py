"""One token's way through a layer in few calls: norms and attention in C, over keys as they are kept.

transformers makes some eighty small operations of it, a microsecond or ten each, and reads keys in half
precision slowly. A module is replaced where a trial gives what it gives; prompts go through the module.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from poise.native import Loaded, built, team
from poise.quantizers.kernel import KINDS, is_memory
from poise.quantizers.layers import PackedLinear
from poise.quantizers.sliced import SlicedMatrix, multiply

if TYPE_CHECKING:
    from poise_edgemoe.kv import KeptLayer

SOURCE = Path(__file__).with_name("fused.c")
FEW = 4  # rows of a norm, beyond which torch is as fast
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx", "scaling")
GRAIN = 1 << 18  # numbers of keys and values for each thread
CLOSE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest number of a trial


class _Attention(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("q", "k", "v", "keys", "values", "out", "q_norm", "k_norm",
                                         "cosine", "sine", "sinks")),
        *((n, ctypes.c_size_t) for n in ("rows", "heads", "kv_heads", "width", "context", "at",
                                         "q_norm_width", "k_norm_width", "angle_stride")),
        *((n, ctypes.c_float) for n in ("scaling", "q_eps", "k_eps")), ("kind", ctypes.c_int),
    ]


class _Library:
    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self.attend, self.norm, self.team = library.poise_attend, library.poise_norm, team()
        self.attend.argtypes = [pointer, number, pointer]
        self.seconds = 0.0  # in attention so far
        self.norm.argtypes = [pointer, pointer, pointer, size, size, ctypes.c_float, number]


_LOADED = Loaded(lambda: _Library(built(SOURCE, "edgemoe")))


def library() -> _Library | None:
    """Return the library, built at the first call; None where it cannot be had."""
    return _LOADED.get()


def seconds() -> float:
    """Return the time that attention of tokens has taken in this process."""
    it = _LOADED.made()
    return it.seconds if it is not None else 0.0


def fuse(model: Any) -> int:
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
            kind = type(child), tuple(p.shape for p in child.parameters(recurse=False)), _slides(child)
            if kind not in tried:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    tried[kind] = fused.agrees(model)
            if tried[kind]:
                setattr(parent, name, fused)
                made += 1
    return made


def _slides(module: Any) -> bool:
    return getattr(module, "sliding_window", None) is not None


def _fused(module: nn.Module, it: _Library) -> Norm | Attention | None:
    if type(module).__name__.endswith("RMSNorm") and _eps(module) is not None:
        return Norm(module, it)
    if all(hasattr(module, name) for name in ATTENTION):
        return Attention(module, it)
    return None


def _eps(norm: Any) -> float | None:
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) and isinstance(getattr(norm, "weight", None), Tensor) else None


class _Beside(nn.Module):
    """Stands for a module, which keeps its weights and their names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for own in ("_parameters", "_buffers", "_modules"):
            setattr(self, own, getattr(module, own))
        self._plain = (module,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_plain"][0], name)


class Norm(_Beside):
    """Root mean square norm of few rows."""

    def __init__(self, module: Any, it: _Library) -> None:
        super().__init__(module)
        self._it, self._eps, self._scale = it, _eps(module), module.weight.detach().float()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the norm of each row, (..., hidden)."""
        x, width = hidden_states, len(self._scale)
        if x.numel() > FEW * width or not is_memory(x) or x.dtype not in KINDS:
            return self._plain[0](x)
        y = torch.empty_like(x)
        if self._it.norm(x.data_ptr(), y.data_ptr(), self._scale.data_ptr(), x.numel() // width, width,
                         self._eps, KINDS[x.dtype]):
            raise MemoryError("there is no memory for a norm")
        return y

    def agrees(self, model: Any) -> bool:
        """Return whether it does what the module does."""
        x = 3 * torch.randn(2, len(self._scale), dtype=self.weight.dtype)
        return _close(self(x), self._plain[0](x))


class Attention(_Beside):
    """Attention of one token of each row."""

    def __init__(self, module: Any, it: _Library) -> None:
        super().__init__(module)
        self._it = it
        self._norms = [_weight(getattr(module, name, None)) for name in ("q_norm", "k_norm")]
        sinks = getattr(module, "sinks", None)
        self._sinks = None if sinks is None else sinks.detach().float()

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Tensor | None = None,
        past_key_values: Any = None, **more: Any,
    ) -> Any:
        """Return (rows, 1, hidden) and no weights; prompts, and what has a mask, go through the module."""
        kept = past_key_values.layers[self.layer_idx] if past_key_values is not None else None
        one = hidden_states.shape[1] == 1 and _hides_nothing(attention_mask)
        if kept is None or not (one and _takes(kept, len(hidden_states))):
            return self._plain[0](hidden_states=hidden_states, position_embeddings=position_embeddings,
                                  attention_mask=attention_mask, past_key_values=past_key_values, **more)
        x = hidden_states[:, 0]
        out = self._attend(self._projected(x), position_embeddings, kept)
        return self.o_proj(out)[:, None], None

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
        cosine, sine = (t.float().reshape(-1, t.shape[-1]) for t in angles)
        keys, values, at = kept.grow()
        out = torch.empty_like(q)
        width, rows = self.head_dim, len(q)
        (q_norm, q_eps), (k_norm, k_eps) = self._norms
        told = _Attention(
            *(t.data_ptr() for t in (q, k, v, keys, values, out)), *map(_address, (q_norm, k_norm)),
            cosine.data_ptr(), sine.data_ptr(), _address(self._sinks), rows, q.shape[1] // width,
            k.shape[1] // width, width, keys.shape[2], at, _length(q_norm), _length(k_norm),
            cosine.shape[1] if len(cosine) > 1 else 0, self.scaling, q_eps, k_eps, KINDS[q.dtype])
        work = 2 * rows * k.shape[1] * (at + 1)
        threads = max(1, min(torch.get_num_threads(), work // GRAIN))
        started = time.perf_counter()
        failed = self._it.attend(ctypes.addressof(told), threads, self._it.team)
        self._it.seconds += time.perf_counter() - started
        if failed:
            raise MemoryError("there is no memory for attention scores")
        return out

    @torch.no_grad()
    def agrees(self, model: Any) -> bool:
        """Return whether it does what the module does, for a token after a short prompt."""
        from poise_edgemoe.kv import KeptLayer, kept_cache

        if not isinstance(kept_cache(model.config, 8).layers[self.layer_idx], KeptLayer):
            return False  # of a window that slides: nothing would be tried
        rotary = next((m for n, m in model.named_modules() if n.endswith("rotary_emb")), None)
        if rotary is None or self._clipped() or not self._turns(rotary, model):
            return False
        x = torch.randn(2, 5, model.config.hidden_size, dtype=next(model.parameters()).dtype)
        found = []
        try:
            for module in (self._plain[0], self):
                cache = kept_cache(model.config, 8)
                for at in (range(4), range(4, 5)):
                    part = x[:, at.start : at.stop]
                    out = module(
                        hidden_states=part, past_key_values=cache,
                        position_embeddings=rotary(part, torch.arange(at.start, at.stop)[None]),
                        attention_mask=_causal(part) if len(at) > 1 else None)[0]
                layer = cache.layers[self.layer_idx]
                found.append((out, layer.keys, layer.values))
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            return False  # a module that is called in another way
        return all(_close(a, b) for a, b in zip(*found))

    def _turns(self, rotary: Any, model: Any) -> bool:
        """Return whether angles are of all pairs (i, i + half) of a head: C reads as many."""
        x = torch.zeros(1, 1, model.config.hidden_size)
        angles = rotary(x, torch.zeros(1, 1, dtype=torch.long))
        return isinstance(angles, tuple) and angles[0].shape[-1] in (self.head_dim, self.head_dim // 2)

    def _clipped(self) -> bool:
        return getattr(getattr(self._plain[0], "config", None), "clip_qkv", None) is not None


def _hides_nothing(mask: Tensor | None) -> bool:
    if mask is None:
        return True
    return bool(mask.all() if mask.dtype == torch.bool else not mask.any())


def _takes(kept: Any, rows: int) -> bool:
    return hasattr(kept, "has_room") and kept.has_room(rows)


def _weight(norm: Any) -> tuple[Tensor | None, float]:
    eps = _eps(norm)
    return (None, 0.0) if eps is None else (norm.weight.detach().float(), eps)


def _causal(x: Tensor) -> Tensor:
    n = x.shape[1]
    return torch.full((1, 1, n, n), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs().max() <= CLOSE[b.dtype] * b.abs().max()).item())


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _length(t: Tensor | None) -> int:
    return 0 if t is None else len(t)
