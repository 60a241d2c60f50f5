"""A layer beside the product of one weight."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import ConfigError
from poise.holding import tensor_of
from poise.quantizers import PackedLinear
from poise.walk import Product, Weight, dense_linear, held

FOLDED = "folded"  # key of a state dict, there while a layer is folded
_PIECE = {"cpu": 1 << 21, "other": 1 << 23}  # weights changed at a time


def _in_full(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a layer's method compute in the types of its weights: autocast would round them for good."""

    @functools.wraps(method)
    def whole(layer: Any, *given: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return method(layer, *given)

    return whole


class AdaptedLayer(nn.Module):
    """Calls the layer that it replaces, its child `base`, and changes the result.

    A subclass has parameters of its own and two methods: `output(x, y)` gives the changed product and
    `changed(W)` the changed weight (out, in); both say the same. One whose product is no function of that
    of the weight before has `product(x)` in place of `output`. Everything else is here: the walk sees the
    weight beneath, and adapters on one weight act in the order in which they were attached.

    Parameters
    ----------
    base : nn.Module
        A linear, a packed one, one expert's product, or an earlier adapter's layer (`Weight.layer`).
    """

    base: nn.Module
    row_block: int | None = None
    """Output rows that change together, so that `changed` takes any whole blocks of them with the number of
    the first as its second argument; None: it takes the whole weight only."""
    guided = False
    """Whether the change is a function of the weight, so that it is another one over other adapters."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapter, self.active = "default", True
        self.place = ""  # the weight's name in the model
        self.freezes: object | None = None  # for whom the base is frozen
        self._before: tuple[Any, ...] = ()  # what `unfold` puts back, and what it must find

    # ------------------------------------------------------------ what a method says

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the product with the changed weight, given x (..., in) and that of the weight before."""
        raise NotImplementedError

    def changed(self, W: Tensor, first: int = 0) -> Tensor:
        """Return the changed weight (out, in), rounded once to the type of W; see `row_block`."""
        raise NotImplementedError

    def change_into(self, out: Tensor, W: Tensor, first: int) -> None:
        """Write `changed(W, first)` to `out`; a method may do it without a tensor between."""
        out.copy_(self.changed(W, first))

    def product(self, x: Tensor) -> Tensor:
        """Return the product with the changed weight, with the bias of the layer beneath."""
        return self.output(x, self.base(x))

    # ------------------------------------------------------------ what a model may ask of a linear

    @property
    def weight(self) -> Product:
        """Stands for the matrix in its own product; `weight_beneath` and `folded_weight()` hold values."""
        return Product(self)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer beneath, which `forward` adds."""
        return getattr(self.base, "bias", None)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.weight_beneath.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.weight_beneath.shape[0]

    # ------------------------------------------------------------ what follows

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the weight as it is now, shape (..., out)."""
        return self.product(x) if self.acts else self.base(x)

    @property
    def folded(self) -> bool:
        """Whether the weight beneath holds the change already."""
        return bool(self._before)

    @property
    def acts(self) -> bool:
        """Whether the change is made here: it is active, and not in the weight already."""
        return self.active and not self.folded

    @property
    def weight_beneath(self) -> Weight:
        """The weight that all adapters here act on."""
        return next(held(self.base, ""))

    def beneath(self, rows: slice | None = None) -> Tensor:
        """Return the weight (out, in), or some of its rows, as the earlier adapters leave it."""
        if isinstance(self.base, AdaptedLayer):
            return self.base.altered(rows) if self.base.acts else self.base.beneath(rows)
        return self.weight_beneath.read(rows)

    def altered(self, rows: slice | None = None) -> Tensor:
        """Return the weight (out, in), or some of its rows, as this adapter leaves it."""
        if rows is None:
            return self.changed(self.beneath())
        if self.row_block is None:
            return self.changed(self.beneath())[rows]
        first = rows.start - rows.start % self.row_block
        last = min(self.out_features, rows.stop + -rows.stop % self.row_block)
        wide = self.changed(self.beneath(slice(first, last)), first)
        return wide[rows.start - first: rows.stop - first]

    @_in_full
    def folded_weight(self) -> Tensor:
        """Return the weight (out, in) with the change in it, as `fold` writes it."""
        return self.weight_beneath.read() if self.folded else self.altered()

    def chain(self) -> Iterator[AdaptedLayer]:
        """Yield this layer and the earlier adapters' ones, the last attached first."""
        layer: nn.Module = self
        while isinstance(layer, AdaptedLayer):
            yield layer
            layer = layer.base

    def over(self) -> list[str]:
        """Return the earlier adapters on whose changes this one's depends, in their order."""
        beneath = [one.adapter for one in self.chain() if one is not self and (one.acts or one.folded)]
        return beneath[::-1] if self.guided else []

    def held_weights(self, path: str) -> Iterator[Weight]:
        """Yield the weight beneath, for the walk."""
        for weight in held(self.base, path):
            yield replace(weight, adapters=(*weight.adapters, self.adapter))

    def own(self) -> dict[str, Tensor]:
        """Return the method's own tensors, without those of `base`."""
        tensors: dict[str, Tensor] = dict(self.named_parameters(recurse=False))
        tensors |= dict(self.named_buffers(recurse=False))
        for name, child in self.named_children():
            if name != "base":
                tensors |= {f"{name}.{k}": v for k, v in child.state_dict(keep_vars=True).items()}
        return tensors

    def own_parameters(self) -> list[nn.Parameter]:
        """Return what trains of the method."""
        return [t for t in self.own().values() if isinstance(t, nn.Parameter)]

    def trained(self) -> list[Tensor]:
        """Return the tensors that the change depends on and that train."""
        return [p for p in self.own_parameters() if p.requires_grad]

    @torch.no_grad()
    @_in_full
    def fold(self) -> nn.Parameter | None:
        """Put the change into the weight beneath; a packed layer makes room for a plain one, whose weight
        is returned, since nobody has frozen it yet.

        The weight before is kept: subtracting the change would not restore it bit for bit.
        """
        if self.folded:
            return None
        *_, first = self.chain()
        if (weight := self.weight_beneath).stored is None:
            self._before = *self._fold_plain(weight), self._own_marks()
            return None
        before: Any = first.base
        first.base = plain = _dense(before, self.altered())
        self._before = before, _fingerprint(self.weight_beneath.read()), self._own_marks()
        return plain.weight

    def _fold_plain(self, weight: Weight) -> tuple[Tensor, Tensor]:
        """Write the changed weight; return the one before, and what tells whether it is written to."""
        target = weight.read()
        _refuse_unwritable(target, self.place)
        if self.row_block is not None and _is_view(target, tensor_of(weight)):
            return _change_in_place(target, self.row_block, self.change_into)
        before = target.clone()
        try:
            weight.write(self.changed(before))
        except BaseException:  # whole or not there
            weight.write(before)
            raise
        return before, _fingerprint(weight.read())

    def forget(self) -> None:
        """Drop what `unfold` needs: the change stays."""
        self._before = (None, None, None) if self.folded else ()

    def unfold(self) -> None:
        """Restore the weight beneath exactly as it was before `fold`."""
        if not self.folded:
            return
        before, *_ = self._before
        *_, first = self.chain()
        if isinstance(before, nn.Module):
            first.base = before
        else:
            self.weight_beneath.write(before)
        self._before = ()

    @property
    def untouched(self) -> bool:
        """Whether a folded weight is as `fold` left it, so that `unfold` loses nothing."""
        if not self.folded:
            return True
        mark = self._before[1]
        return mark is not None and torch.equal(_fingerprint(self.weight_beneath.read()), mark)

    @property
    def retrained(self) -> bool:
        """Whether what trains is other than what `fold` put into the weight."""
        marks = self._before[2] if self.folded else []
        return self.folded and (marks is None or not all(map(torch.equal, self._own_marks(), marks)))

    def _own_marks(self) -> list[Tensor]:
        return [_fingerprint(torch.atleast_2d(t.detach()).flatten(1)) for t in self.own().values()]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.folded:  # a weight that holds the change is not to be read as one that does not
            destination[prefix + FOLDED] = torch.ones((), dtype=torch.bool)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        there = prefix + FOLDED in state_dict
        own = {k: v for k, v in state_dict.items() if k != prefix + FOLDED} if there else state_dict
        super()._load_from_state_dict(own, prefix, *rest)
        if there != self.folded:
            said = ("folded", "not folded") if there else ("not folded", "folded")
            rest[-1].append(f"{self.adapter}: {self.place} is {said[0]} in the state and {said[1]} here: "
                            f"call {'fold' if there else 'unfold'}() first")

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLayer:
        if not self.folded:
            return super()._apply(fn, recurse)
        # what is kept moves and is cast with the model; what was written to meanwhile stays so. The weight
        # beneath may be cast after this layer: an expert's parameter is another module's
        mark = _fingerprint(fn(self.weight_beneath.read())) if self.untouched else None
        retrained, (before, *_) = self.retrained, self._before
        super()._apply(fn, recurse)
        if before is not None:
            before = before._apply(fn) if isinstance(before, nn.Module) else fn(before)
        self._before = before, mark, None if retrained else self._own_marks()
        return self


def _dense(packed: Any, matrix: Tensor) -> Any:
    """Return a plain layer with another matrix in the place of a packed one."""
    return packed.dense(matrix) if isinstance(packed, PackedLinear) else dense_linear(packed, matrix)


def _refuse_unwritable(target: Tensor, place: str) -> None:
    """Raise `ConfigError` for a weight that nobody can write to element by element."""
    if any(size > 1 and not stride for size, stride in zip(target.shape, target.stride(), strict=True)):
        why = "is expanded: many of its numbers are one in memory"
    elif target.is_inference() and not torch.is_inference_mode_enabled():
        why = "was made in torch.inference_mode(), and can be changed there only"
    else:
        return
    raise ConfigError(f"{place} {why}: give it memory of its own, nn.Parameter(weight.detach().clone())")


def _change_in_place(
    target: Tensor, block: int, change_into: Callable[[Tensor, Tensor, int], None]
) -> tuple[Tensor, Tensor]:
    """Change a weight, some rows at a time; return the one before, and a fingerprint of the new.

    A piece is kept, changed and summed before the next, which finds some of it in the cache.
    """
    before, sums, touched = torch.empty_like(target), [], 0
    try:
        for rows in _pieces(target, block):
            touched, piece = rows.stop, target[rows]
            change_into(piece, before[rows].copy_(piece), rows.start)
            sums.append(_sums(piece))
    except BaseException:  # whole or not there
        target[:touched].copy_(before[:touched])
        raise
    return before, _joined(sums)


def _fingerprint(matrix: Tensor) -> Tensor:
    """Return numbers that tell of other values, bit for bit.

    They are sums of words by row and by column, since a sum forgets the order.
    """
    return _joined([_sums(matrix[rows]) for rows in _pieces(matrix, 1)])


def _sums(piece: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of a piece's words by row and by column, modulo 2^64."""
    width = max(w for w in (1, 2, 4, 8) if not piece.shape[1] * piece.element_size() % w)
    words = piece.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width])
    return words.sum(1), words.sum(0)


def _joined(sums: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sums of a whole from those of its pieces."""
    if len(sums) == 1:
        return torch.cat(sums[0])
    return torch.cat([*(rows for rows, _ in sums), torch.stack([columns for _, columns in sums]).sum(0)])


def _pieces(matrix: Tensor, block: int) -> Iterator[slice]:
    """Yield slices of whole blocks of rows."""
    budget = _PIECE.get(matrix.device.type, _PIECE["other"])
    step = block * max(1, budget // (block * max(1, matrix.shape[1])))
    for start in range(0, len(matrix), step):
        yield slice(start, min(start + step, len(matrix)))


def _is_view(tensor: Tensor, of: Tensor | None) -> bool:
    return of is not None and tensor.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


def refuse_inactive(layer: AdaptedLayer, verb: str) -> None:
    """Raise `ConfigError` where folding would change what the model computes."""
    if not layer.active:
        raise ConfigError(f"{layer.adapter}: it is not active, and {verb} would change the output: set "
                          f"active = True first")


def freezers(model: nn.Module) -> set[object]:
    """Return the holders for whom adapters' layers on a model need its base frozen."""
    held = {m.freezes for m in model.modules() if isinstance(m, AdaptedLayer)}
    return held - {None}


def adapter_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that belong to adapters' layers."""
    return {id(p) for m in model.modules() if isinstance(m, AdaptedLayer) for p in m.own_parameters()}
