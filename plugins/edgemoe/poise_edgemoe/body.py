"""A model's layers one after the other for one token: one call of C, as long as experts are there.

What is around them (embedding, angles of positions, the last norm) are the model's own modules.
"""

from __future__ import annotations

import ctypes
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from poise.quantizers.kernel import KINDS, is_memory
from poise_edgemoe.beside import Beside, heard
from poise_edgemoe.fused import Library, close, library, readable, takes
from poise_edgemoe.layers import Layer, fuse_layers

PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}


def fuse(model: Any) -> int:
    """Put what is ours in the place of a causal model's modules; return how many layers are."""
    made = fuse_layers(model)
    if made:
        put_body(model)
    return made


def put_body(model: Any) -> None:
    """Put all of the layers in the place of the model's own body, where a trial agrees."""
    it, name = library(), getattr(model, "base_model_prefix", "")
    inner = getattr(model, name, None)
    if it is None or not isinstance(inner, nn.Module) or {n for n, _ in inner.named_children()} != PARTS:
        return
    layers: Any = inner.layers
    if all(isinstance(one, Layer) for one in layers):
        body = Body(inner, list(layers), it)
        if body.agrees(model):
            setattr(model, name, body)


class Body(Beside):
    """All before the output layer, for one token; prompts and several rows go through the module."""

    def __init__(self, module: Any, layers: list[Layer], it: Library) -> None:
        super().__init__(module)
        self._layers, self._it = tuple(layers), it
        self._addresses = (ctypes.c_void_p * len(layers))(*[one.address for one in layers])
        self._said = ctypes.c_int()
        from transformers.modeling_outputs import MoeModelOutputWithPast

        self._output = MoeModelOutputWithPast

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None,
        inputs_embeds: Tensor | None = None, use_cache: bool | None = None, **more: Any,
    ) -> Any:
        """Return what the module returns: (rows, time, hidden) before the output layer, and the cache."""
        if (input_ids is None or past_key_values is None or any(v is not None and v is not False
                                                                for v in more.values())
                or not (attention_mask is position_ids is inputs_embeds is None)
                or not self._takes(input_ids, past_key_values)):
            return self._plain[0](
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **more)
        x = self.embed_tokens(input_ids).clone()  # it is written to, and may be somebody else's
        self._through(x, past_key_values)
        return self._output(last_hidden_state=self.norm(x), past_key_values=past_key_values)

    def _takes(self, ids: Tensor, cache: Any) -> bool:
        return (self._same and ids.numel() == 1 and is_memory(ids)
                and all(takes(self._kept(cache, one), 1) and not one.changed() for one in self._layers)
                and all(one is held and not heard(one) for one, held in zip(self.layers, self._layers))
                and len(self.layers) == len(self._layers))

    def depends_on(self) -> list[nn.Module]:
        """Return the module alone: those around its layers are called, and layers look after theirs."""
        return [self._plain[0]]

    @staticmethod
    def _kept(cache: Any, layer: Layer) -> Any:
        return cache.layers[layer.parts.attention.layer_idx]

    def _through(self, x: Tensor, cache: Any) -> None:
        """Take what is embedded, (1, 1, hidden), through all layers, in place."""
        at = self._kept(cache, self._layers[0]).get_seq_length()
        angles = [readable(t) for t in self.rotary_emb(x, torch.tensor([[at]]))]
        for layer in self._layers:
            layer.tell(angles, self._kept(cache, layer))
        n, kind, said = 0, KINDS[x.dtype], ctypes.addressof(self._said)
        while n < len(self._layers):
            first, started = n, time.perf_counter()
            place = ctypes.addressof(self._addresses) + n * ctypes.sizeof(ctypes.c_void_p)
            n += self._it.layers(place, len(self._layers) - n, x.data_ptr(), kind, said)
            self._it.seconds += time.perf_counter() - started
            for layer in self._layers[first:n]:
                layer.count()
            if n < len(self._layers):
                self._layers[n].go_on(self._said.value, x, x)
                n += 1

    @torch.no_grad()
    def agrees(self, model: Any) -> bool:
        """Return whether it does what the module does, whatever experts make of a token."""
        from poise_edgemoe.kv import kept_cache

        weight, found = self.embed_tokens.weight, []  # of a packed table it is no tensor
        (rows, width), seeded = weight.shape, torch.Generator().manual_seed(0)
        ids, mixed = torch.arange(2)[None] % rows, torch.randn(1, width, generator=seeded).to(weight.dtype)
        try:
            with ExitStack() as stack:
                for layer in self._layers:
                    stack.enter_context(layer.without_experts(mixed, []))
                for module in (self._plain[0], self):
                    cache = kept_cache(model.config, 4)
                    for at in range(2):
                        out = module(input_ids=ids[:, at: at + 1], past_key_values=cache, use_cache=True)
                    found.append(out.last_hidden_state)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            return False  # a module that is called in another way
        return close(found[1], found[0])
