"""Stands in for a block's experts: the same arithmetic as transformers' loop, with matrices of a cache.

Every expert's output is added in ascending order of experts, so that nothing depends on which of them was
read first (the order is that of transformers' `eager` implementation).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.quantizers.matrix import PackedMatrix
from poise_edgemoe.cache.slots import ExpertCache, Get
from poise_edgemoe.loading import give_back
from poise_edgemoe.store.schemes import RawMatrix

FEW = 4  # tokens that leave too little behind to be worth a call


class StoredExperts(nn.Module):
    """Takes the place of a module with fused experts, or of Switch Transformers' dictionary of them.

    Parameters
    ----------
    like : nn.Module
        The module, its parameters on the meta device: it keeps its activation.
    number : int
        Of the block among those with experts.
    cache : ExpertCache
    """

    def __init__(self, like: nn.Module, number: int, cache: ExpertCache) -> None:
        super().__init__()
        self._like = (like,)  # in a tuple: its empty parameters are no part of the model
        self.number, self.cache = number, cache
        self.transposed = cache.index.layers[number].transposed
        self.switch = isinstance(like, nn.ModuleDict)

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of experts, (tokens, hidden).

        Parameters
        ----------
        hidden_states : Tensor, (tokens, hidden)
        index : Tensor
            Experts of each token, (tokens, k); of Switch Transformers one-hot, (tokens, 1, experts).
        weights : Tensor, (tokens, k)
        """
        out = torch.zeros_like(hidden_states)
        routed = self._routed(index)
        with self.cache.layer(self.number, self._by_last_use(routed)) as get:
            for e, token, slot in routed:
                y = self._expert(hidden_states[token], e, get) * weights[token, slot, None]
                out.index_add_(0, token, y.to(out.dtype))
        if len(out) > FEW:
            give_back()
        return out

    def _routed(self, index: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Return (expert, its tokens, which of a token's experts it is), in ascending order of experts."""
        if self.switch:
            chosen = index.permute(2, 1, 0)
            used = [e for e in range(len(chosen)) if chosen[e].any()]
        else:
            chosen = None
            used = torch.unique(index).tolist()
        found = []
        for e in used:
            slot, token = torch.where((index == e).T if chosen is None else chosen[e])
            found.append((e, token, slot))
        return found

    def _by_last_use(self, routed: list[tuple[int, Tensor, Tensor]]) -> list[int]:
        """Return experts, those that only early tokens of a prompt use before those of the last ones."""
        length = self.cache.length
        if length == 1:
            return [e for e, _, _ in routed]
        last = {e: int((token % length).max()) for e, token, _ in routed}
        return sorted(last, key=lambda e: (last[e], e))

    def _expert(self, x: Tensor, e: int, get: Get) -> Tensor:
        (like,) = self._like
        if self.switch:
            own: Any = like[f"expert_{e}"]  # type: ignore[index]
            h = own.act(self._product(x, *get(e, "wi")))
            return self._product(h, *get(e, "wo"))
        h = like._apply_gate(self._product(x, *get(e, "gate_up")))  # type: ignore[operator]
        return self._product(h, *get(e, "down"))

    def _product(self, x: Tensor, stored: Any, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias, in the expression that transformers uses: another one rounds otherwise."""
        matrix = self._dense(stored)
        if not self.transposed:
            return F.linear(x, matrix, bias)
        if not isinstance(stored, RawMatrix):
            matrix = self.cache.scratch("transposed", matrix.T).copy_(matrix.T)
        return x @ matrix if bias is None else x @ matrix + bias

    def _dense(self, stored: Any) -> Tensor:
        """Return a matrix in full, in memory that the next one is written to as well.

        Matrices that come and go leave an allocator's memory in pieces, hundreds of megabytes of it.
        """
        if not isinstance(stored, PackedMatrix):
            return stored.dequantize()
        return stored.dequantize_into(self.cache.scratch("dense", stored))


def put_experts(model: nn.Module, cache: ExpertCache) -> list[StoredExperts]:
    """Put stored experts in the place of a model's own, which lie nowhere; return them."""
    made = []
    for number, layer in enumerate(cache.index.layers):
        path, _, name = layer.path.rpartition(".")
        parent = model.get_submodule(path)
        made.append(StoredExperts(parent.get_submodule(name), number, cache))
        setattr(parent, name, made[-1])
    return made
