"""Stands in for a block's experts: the same arithmetic as transformers' loop, with matrices of a cache.

Every expert's output is added in ascending order of experts, so that nothing depends on which of them was
read first (the order is that of transformers' `eager` implementation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.quantizers.matrix import multiply_stacked
from poise.quantizers.sliced import SlicedMatrix, multiply
from poise_edgemoe.cache.slots import ExpertCache, Held
from poise_edgemoe.loading import give_back
from poise_edgemoe.store.schemes import RawMatrix

FEW = 4  # tokens of which experts are computed together, and that leave little behind
Routed = tuple[int, Tensor, Tensor]  # expert, its tokens, which of a token's experts it is


class StoredExperts(nn.Module):
    """Takes the place of a module with fused experts, or of Switch Transformers' dictionary of them.

    Parameters
    ----------
    like : nn.Module
        The module, its parameters on the meta device: it keeps its activation.
    number : int
        Of the block among those with experts.
    cache : ExpertCache

    Attributes
    ----------
    chooser : callable or None
        In place of the router: given the layer, the number of tokens and k, it returns experts (tokens, k),
        which all weigh the same.
    done : callable or None
        Called when the experts of a prompt are computed.
    """

    def __init__(self, like: nn.Module, number: int, cache: ExpertCache) -> None:
        super().__init__()
        self._like = (like,)  # in a tuple: its empty parameters are no part of the model
        self.number, self.cache = number, cache
        self.transposed = cache.index.layers[number].transposed
        self.switch = isinstance(like, nn.ModuleDict)
        self.chooser: Callable[[int, int, int], Tensor] | None = None
        self.done: Callable[[], None] | None = None

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of experts, (tokens, hidden).

        Parameters
        ----------
        hidden_states : Tensor, (tokens, hidden)
        index : Tensor
            Experts of each token, (tokens, k); of Switch Transformers one-hot, (tokens, 1, experts).
        weights : Tensor, (tokens, k)
        """
        if self.chooser is not None:
            index = self.chooser(self.number, len(hidden_states), index.shape[1])
            weights = weights.new_full(index.shape, 1 / max(1, index.shape[1]))
        if len(hidden_states) == 1 and self.cache.forms.fast and not self.switch:
            return self._of_one_token(hidden_states, index, weights)
        out = torch.zeros_like(hidden_states)
        routed = self._routed(index)
        with self.cache.layer(self.number, self._by_last_use(routed)) as held:
            if self.cache.forms.fast and len(out) <= FEW:
                self._add_together(routed, hidden_states, weights, held, out)
            else:
                for e, token, slot in routed:
                    (y,) = self._experts([e], [hidden_states[token]], held)
                    out.index_add_(0, token, (y * weights[token, slot, None]).to(out.dtype))
        if len(out) > FEW:
            give_back()
        if self.done is not None:
            self.done()
        return out

    def _of_one_token(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the same, (1, hidden), with as few small steps as can be."""
        chosen = sorted(zip(index[0].tolist(), weights[0].tolist(), strict=True))
        experts = [e for e, _ in chosen]
        every = hidden.new_empty((len(experts), hidden.shape[1]))
        with self.cache.layer(self.number, experts) as held:
            for group in self._groups(experts, held):
                self._put_outputs(every, group, [experts[n] for n in group], hidden, held)
        shares = torch.tensor([[w for _, w in chosen]], dtype=torch.float32)
        return (shares @ every.float()).to(hidden.dtype)

    def _put_outputs(
        self, every: Tensor, rows: list[int], experts: list[int], x: Tensor, held: Held
    ) -> None:
        """Write what experts make of one token into rows."""
        first = [held(e, "gate_up") for e in experts]
        inner = x.new_empty((len(rows), first[0][0].shape[0]))
        if not multiply_stacked([w for w, _ in first], x, inner, range(len(rows))):
            every[rows] = torch.cat(self._experts(experts, [x] * len(rows), held))
            return
        hidden = self._like[0]._apply_gate(_all_plus(inner, first))  # type: ignore[operator]
        second = [held(e, "down") for e in experts]
        if not multiply_stacked([w for w, _ in second], hidden, every, rows):
            every[rows] = torch.cat(self._products([(h, *w) for h, w in zip(hidden.split(1), second)]))
        elif second[0][1] is not None:
            every[rows] = _all_plus(every[rows], second)

    def _add_together(
        self, routed: list[Routed], hidden: Tensor, weights: Tensor, held: Held, out: Tensor
    ) -> None:
        """Add the outputs of experts for few tokens, whichever is there first, in one order."""
        experts, xs = [e for e, _, _ in routed], [hidden[token] for _, token, _ in routed]
        every = torch.cat(self._in_groups(experts, xs, held))
        token, slot = torch.cat([t for _, t, _ in routed]), torch.cat([s for _, _, s in routed])
        weighted = every.float() * weights[token, slot, None].float()
        out += torch.zeros_like(out, dtype=torch.float32).index_add_(0, token, weighted).to(out.dtype)

    def _in_groups(self, experts: list[int], xs: list[Tensor], held: Held) -> list[Tensor]:
        """Return the outputs of experts: of those that are there at once, then of each of the others."""
        found: dict[int, Tensor] = {}
        for group in self._groups(experts, held):
            found |= zip(group, self._experts([experts[n] for n in group], [xs[n] for n in group], held))
        return [found[n] for n in range(len(experts))]

    def _groups(self, experts: list[int], held: Held) -> Iterator[list[int]]:
        """Yield which of the experts to compute next: those that are there, then each of the others."""
        ready = [n for n, e in enumerate(experts) if held.ready(e)]
        if ready:
            yield ready
        yield from ([n] for n in range(len(experts)) if n not in ready)

    def _routed(self, index: Tensor) -> list[Routed]:
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

    def _by_last_use(self, routed: list[Routed]) -> list[int]:
        """Return experts, those that only early tokens of a prompt use before those of the last ones."""
        length = self.cache.length
        if length == 1:
            return [e for e, _, _ in routed]
        last = {e: int((token % length).max()) for e, token, _ in routed}
        return sorted(last, key=lambda e: (last[e], e))

    def _experts(self, experts: list[int], xs: list[Tensor], held: Held) -> list[Tensor]:
        """Return the output of each expert for rows of its own, (rows, hidden)."""
        (like,) = self._like
        if self.switch:
            first, second = "wi", "wo"
            act: Any = like[f"expert_{experts[0]}"].act  # type: ignore[index]
        else:
            first, second, act = "gate_up", "down", like._apply_gate
        rows = [len(x) for x in xs]
        inner = self._products([(x, *held(e, first)) for e, x in zip(experts, xs)])
        hidden = act(inner[0] if len(inner) == 1 else torch.cat(inner)).split(rows)
        return self._products([(x, *held(e, second)) for e, x in zip(experts, hidden)])

    def _products(self, of: list[tuple[Tensor, Any, Tensor | None]]) -> list[Tensor]:
        """Return x W^T + bias for each (x, W, bias)."""
        if not self.cache.forms.fast:
            return [self._product(*one) for one in of]
        quick = [isinstance(w, SlicedMatrix) and w.fits(x) for x, w, _ in of]
        made = iter(multiply([(w, x) for (x, w, _), q in zip(of, quick) if q]))
        return [_plus(next(made), one[2]) if q else self._product(*one) for one, q in zip(of, quick)]

    def _product(self, x: Tensor, stored: Any, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias in the expression that transformers uses: another one rounds otherwise."""
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
        if not isinstance(stored, SlicedMatrix):
            return stored.dequantize()
        return stored.dequantize_into(self.cache.scratch("dense", stored))


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def _all_plus(y: Tensor, stored: list[tuple[Any, Tensor | None]]) -> Tensor:
    """Return y, a row for each matrix, plus biases where there are some."""
    biases = [bias for _, bias in stored if bias is not None]
    return y + torch.stack(biases) if biases else y


def put_experts(model: nn.Module, cache: ExpertCache) -> list[StoredExperts]:
    """Put stored experts in the place of a model's own, which lie nowhere; return them."""
    made = []
    for number, layer in enumerate(cache.index.layers):
        path, _, name = layer.path.rpartition(".")
        parent = model.get_submodule(path)
        made.append(StoredExperts(parent.get_submodule(name), number, cache))
        setattr(parent, name, made[-1])
    return made
