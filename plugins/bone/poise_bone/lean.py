"""Exact products with a weight-guided change, which keep nothing for the backward pass but x, W and B.

A chunk of output rows of the changed weight is built, used and dropped; the backward pass builds it again.
For few tokens the change goes to x instead, and no changed weight is built at all.

Source: derived here; the plain form is `functional.forward`. For T tokens, P = o i weights and blocks of r,
in multiplications and additions: recomputed 2TP + 2rP forward and 4TP + 4rP backward, factored 4TP and 6TP;
plain 2TP + 2rP and 4TP + 2rP, with two copies of the weight kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from poise.errors import RunError

CHUNK = {"cpu": 1 << 18, "other": 1 << 23}  # weights built at a time: on a CPU what stays in its cache
FACTORED = 1 << 22  # numbers of x changed at a time


# a compiled model calls these as they are: what they build, and when, is their point
_apart: Any = torch.compiler.disable(lambda function, *arguments: function(*arguments))


@dataclass(frozen=True)
class Rows:
    """The weight whose product is made, as rows that can be built when they are needed.

    Parameters
    ----------
    shape : (out, in)
    dtype : torch.dtype
        Of the weight beneath.
    block : int
        Rows that are built together; it divides `out`.
    beneath : callable
        Output rows (a slice) of the weight before the change; differentiable in `others`.
    change : callable
        The changed rows, from those before, the part of the block they depend on, and the number of the
        first.
    pull : callable or None
        The gradient of that part, from the rows before and the gradient of the changed ones; None:
        autograd's.
    part : callable
        The part of the block that rows (a slice) depend on, as an index of it.
    others : tuple of Tensor
        What trains beneath, of earlier adapters.
    base : callable or None
        x to the product before the change, with the bias; None where the change alone is made.
    version : callable
        Something that differs when the weight beneath has been written to.
    views : bool
        Whether `beneath` returns a view of the weight, rather than building rows.
    packed : bool
        Whether the weight beneath is packed, and so takes inputs of any real type.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    block: int
    beneath: Callable[[slice], Tensor]
    change: Callable[[Tensor, Tensor, int], Tensor]
    pull: Callable[[Tensor, Tensor], Tensor] | None
    part: Callable[[slice], slice]
    others: tuple[Tensor, ...]
    base: Callable[[Tensor], Tensor] | None
    version: Callable[[], Any]
    views: bool
    packed: bool
    name: str

    def chunks(self, budget: int) -> Iterator[slice]:
        """Yield slices of whole blocks of rows, of at most `budget` weights where one block is not more."""
        out, columns = self.shape
        step = self.block * max(1, budget // (self.block * columns))
        for start in range(0, out, step):
            yield slice(start, min(out, start + step))

    def built(self, rows: slice, block: Tensor) -> Tensor:
        """Return changed rows."""
        return self.change(self.beneath(rows), block[self.part(rows)], rows.start)


def recomputed(x: Tensor, block: Tensor, rows: Rows, bias: Tensor | None = None) -> Tensor:
    """Return x W'^T + bias, shape (..., out), building W' chunk by chunk, in the backward pass again.

    Raises
    ------
    RunError
        In the backward pass, when the weight beneath has been written to since.
    """
    return _product(_Recomputed, x, block, rows, bias)


def suits_factored(x: Tensor, block: Tensor, rows: Rows) -> bool:
    """Tell whether `factored` is the faster form: for few tokens, and nothing that trains beneath.

    An accelerator builds a weight of one chunk sooner than it starts the many small products.
    """
    few = math.prod(x.shape[:-1]) <= block.shape[-1] // 2
    small = x.device.type != "cpu" and rows.shape[0] * rows.shape[1] <= CHUNK["other"]
    return few and not small and not rows.others


def factored(x: Tensor, block: Tensor, rows: Rows, bias: Tensor | None = None) -> Tensor:
    """Return the same for bat's column form, by z[a] = x + x B[a]^T and y[a] = z[a] W[a]^T + S B[a]^T.

    Raises
    ------
    RunError
        In the backward pass, when the weight beneath has been written to since.
    """
    assert not rows.others, "what trains beneath is only in the recomputed form"
    return _product(_Factored, x, block, rows, bias)


def _product(function: Any, x: Tensor, block: Tensor, rows: Rows, bias: Tensor | None) -> Tensor:
    """Call a function on x as (T, in), in the type that autocast would make the product in."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != rows.dtype and not (rows.packed and x.is_floating_point()):
        F.linear(x, rows.beneath(slice(0, rows.block)))  # torch's own error: these types do not go together
    bias = None if bias is None else bias.to(x.dtype)
    # for one token, to prepare a backward pass would cost as much as the arithmetic
    call = function.apply if torch.is_grad_enabled() else function.value
    y = _apart(call, x.reshape(-1, x.shape[-1]), block, bias, rows, *rows.others)
    return y.view(*x.shape[:-1], y.shape[-1])


def _as_they_are(x: Tensor) -> AbstractContextManager[Any]:
    """Let no product in here be made in another type."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _budget(x: Tensor) -> int:
    return CHUNK.get(x.device.type, CHUNK["other"])


def _factored_budget(rows: Rows, x: Tensor) -> int:
    """Return weights at a time: the changed inputs of their blocks stay small, and rows that are built."""
    budget = max(1, FACTORED // max(1, len(x))) * rows.block
    return budget if rows.views else min(budget, _budget(x))


def _unchanged(x: Tensor, block: Tensor, rows: Rows) -> Tensor | None:
    """Return the product before the change, bit for bit, where the block is zero.

    Products of parts may round otherwise than that of the whole. Elsewhere than on a CPU to look would mean
    to wait for the device.
    """
    if rows.base is None or x.device.type != "cpu":
        return None
    # one column answers at once for a block that has trained
    return None if block[..., 0].any() or block.any() else rows.base(x)


def _refuse_written(ctx: Any) -> None:
    if ctx.rows.version() != ctx.version:
        raise RunError(f"the weight of {ctx.rows.name} was changed between the forward pass and its "
                       f"backward pass (folded, or written to): call backward() first")


class _Blockwise(torch.autograd.Function):
    """x[t, b] B[b] for every token t and block b; torch's bmm with a result laid out as x is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, B)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.bmm(x.transpose(0, 1), B, out=y.transpose(0, 1))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, B = ctx.saved_tensors
        dx = blockwise(dy, B.mT) if ctx.needs_input_grad[0] else None
        dB = torch.bmm(x.permute(1, 2, 0), dy.transpose(0, 1)) if ctx.needs_input_grad[1] else None
        return dx, dB


def blockwise(x: Tensor, B: Tensor) -> Tensor:
    """Return x[t, b] B[b], shape (T, n, r), for x (T, n, r) and B (n, r, r); B in the type of x."""
    y: Any = _Blockwise.apply(x, B.to(x.dtype))
    return y


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, block: Tensor, bias: Tensor | None, rows: Rows, *others: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, block, *others)
        ctx.rows, ctx.version, ctx.bias = rows, rows.version(), bias is not None
        return _Recomputed.value(x, block, bias, rows)

    @staticmethod
    def value(x: Tensor, block: Tensor, bias: Tensor | None, rows: Rows, *others: Tensor) -> Tensor:
        chunks = list(rows.chunks(_budget(x)))
        with _as_they_are(x):
            if len(chunks) == 1:
                return F.linear(x, rows.built(chunks[0], block).to(x.dtype), bias)
            if (y := _unchanged(x, block, rows)) is not None:
                return y
            y = x.new_empty(len(x), rows.shape[0])
            for c in chunks:
                W = rows.built(c, block).to(x.dtype).mT
                if bias is None:
                    torch.mm(x, W, out=y[:, c])
                else:
                    torch.addmm(bias[c], x, W, out=y[:, c])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_written(ctx)
        x, block, *others = ctx.saved_tensors
        rows: Rows = ctx.rows
        wanted = ctx.needs_input_grad
        dx: Tensor | None = None
        d_block = torch.zeros_like(block) if wanted[1] else None
        d_others = [torch.zeros_like(t) for t in others]
        with _as_they_are(x):
            for c in rows.chunks(_budget(x)):
                W = _chunk_backward(rows, c, x, dy[:, c], block, d_block, others, d_others)
                dx = _plus_product(dx, dy[:, c], W.to(x.dtype)) if wanted[0] else None
                del W  # before the next rows are built
        bias = dy.sum(0) if ctx.bias and wanted[2] else None
        return (None if dx is None else dx.to(x.dtype)), d_block, bias, None, *d_others


def _chunk_backward(
    rows: Rows, c: slice, x: Tensor, dy: Tensor, block: Tensor, d_block: Tensor | None,
    others: list[Tensor], d_others: list[Tensor],
) -> Tensor:
    """Add the share of some output rows to the gradients of what trains; return these rows, changed."""
    part = block[rows.part(c)].detach()
    if rows.pull is not None and not others:
        below = rows.beneath(c)
        if d_block is not None:
            d_block[rows.part(c)].add_(rows.pull(below, dy.mT @ x))
        return rows.change(below, part, c.start)
    part.requires_grad_(d_block is not None)
    needed = [t for t in (part, *others) if t.requires_grad]
    with torch.enable_grad():
        W = rows.change(rows.beneath(c), part, c.start)
    if not needed:
        return W
    G = (dy.mT @ x).to(W.dtype)
    found = list(torch.autograd.grad(W, needed, G, allow_unused=True))
    if d_block is not None:
        d_block[rows.part(c)].add_(found.pop(0))
    totals = [d for t, d in zip(others, d_others, strict=True) if t.requires_grad]
    for total, one in zip(totals, found, strict=True):
        if one is not None:
            total.add_(one)
    return W.detach()


def _plus_product(total: Tensor | None, dy: Tensor, W: Tensor) -> Tensor:
    """Return total + dy W; parts are summed at least in fp32: half precision would lose bits with each."""
    if total is None:
        return dy @ W
    if total.dtype == dy.dtype and dy.element_size() >= 4:
        return total.addmm_(dy, W)
    return total.float().add_(dy @ W)


class _Factored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
        ctx.save_for_backward(x, block)
        ctx.rows, ctx.version, ctx.bias = rows, rows.version(), bias is not None
        return _Factored.value(x, block, bias, rows)

    @staticmethod
    def value(x: Tensor, block: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
        with _as_they_are(x):
            if (y := _unchanged(x, block, rows)) is not None:
                return y
            B = block.to(x.dtype)
            T, r = len(x), B.shape[-1]
            blocks = x.view(T, x.shape[1] // r, r)
            S = blocks.sum(1)
            y = x.new_empty(T, rows.shape[0])
            for c in rows.chunks(_factored_budget(rows, x)):
                part = B[rows.part(c)]
                W = rows.beneath(c).to(x.dtype).reshape(len(part), r, -1)
                # every block of x times every B[a]^T, as one product
                z = (blocks.reshape(-1, r) @ part.reshape(-1, r).T).view(*blocks.shape[:2], len(part), r)
                z = (z + blocks.unsqueeze(2)).permute(2, 0, 1, 3).reshape(len(part), *x.shape)
                out = torch.baddbmm(S @ part.mT, z, W.mT)
                y[:, c] = out.transpose(0, 1).flatten(1)
        return y if bias is None else y.add_(bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_written(ctx)
        x, block = ctx.saved_tensors
        rows: Rows = ctx.rows
        with _as_they_are(x):
            B = block.to(x.dtype)
            T, r = len(x), B.shape[-1]
            blocks = x.view(T, x.shape[1] // r, r)
            S, dB = blocks.sum(1), torch.empty_like(B)
            dx = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            for c in rows.chunks(_factored_budget(rows, x)):
                where = rows.part(c)
                part = B[where]
                W = rows.beneath(c).to(x.dtype).reshape(len(part), r, -1)
                d = dy[:, c].reshape(T, len(part), r).transpose(0, 1)  # (g, T, r)
                u = torch.bmm(d, W).view(len(part), -1, r)  # (g, T i/r, r)
                dx += torch.baddbmm(u, u, part).sum(0).view(x.shape)
                dx.view(blocks.shape).add_(torch.bmm(d, part).sum(0).unsqueeze(1))
                dB[where] = u.mT @ blocks.reshape(-1, r) + d.mT @ S
        bias = dy.sum(0) if ctx.bias and ctx.needs_input_grad[2] else None
        return dx.to(x.dtype), dB.to(block.dtype), bias, None
