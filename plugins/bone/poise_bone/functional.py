"""The updates as plain functions of tensors, and their algebra.

Shapes: x (..., i), W (o, i), and the block that trains:

    bone      (r, o)         dW[p, j] = D[j mod r, p]
    bone_out  (N, i)         dW[p, j] = D[n(p), j], n(p) the shard of output p
    mini      (r, m)         dW[p, j] = D[j mod r, p mod m]
    bat       (o/r, r, r)    dW[a, b] = W[a, b] B[a] + B[a]         blocks of r x r: a of outputs,
    bat_row   (i/r, r, r)    dW[a, b] = W[a, b] B[b] + B[b]         b of inputs
    bat_left  (o/r, r, r)    dW[a, b] = B[a]^T W[a, b] + B[a]^T
    bone_free (p, q, r, r)   dW[a, b] = W[a, b] B[a mod p, b mod q] + B[a mod p, b mod q]

Source: arXiv 2409.15371 v12, eq. 2-6 (bone, bone_out); its versions 1 to 7 (bat); the form of each is that
of released code, where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from poise.errors import ConfigError
from poise_bone.variants import ADDED, VARIANTS

MAX_CONDITION = 1e4  # of I + B, beyond which fp32 loses half its digits


# ------------------------------------------------------------------ pieces


def shard_sum(x: Tensor, r: int) -> Tensor:
    """Return S = sum over blocks of x's last axis, shape (..., r); a last block is zero-padded.

    Half-precision inputs are summed in fp32.
    """
    missing = -x.shape[-1] % r
    padded = F.pad(x, (0, missing)) if missing else x
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return padded.unflatten(-1, (-1, r)).sum(-2, dtype=wide)


def tiled(t: Tensor, columns: int) -> Tensor:
    """Return t (..., r) repeated along its last axis, cut to that many columns."""
    return t.repeat(*[1] * (t.ndim - 1), -(-columns // t.shape[-1]))[..., :columns]


def shards(out_features: int, n: int, device: torch.device | None = None) -> Tensor:
    """Return the shard of each output, (o,): n runs, longer by one at first where n does not divide o."""
    short, longer = divmod(out_features, n)
    sizes = torch.full((n,), short, device=device)
    sizes[:longer] += 1
    return torch.arange(n, device=device).repeat_interleave(sizes, output_size=out_features)


# ------------------------------------------------------------------ the change of a weight


def _bone(W: Tensor, D: Tensor, rows: slice, o: int, beta: float) -> Tensor:
    """bone, and mini: a block of m columns of D is repeated over the outputs."""
    t, columns = _tile(D, rows), W.shape[1]
    if not beta or columns % t.shape[1]:
        shared = tiled(t, columns)
        return W + shared if beta else shared
    return (W.unflatten(1, (-1, t.shape[1])) + t.unsqueeze(1)).flatten(1)


def _bone_out(W: Tensor, D: Tensor, rows: slice, o: int, beta: float) -> Tensor:
    shared = D[shards(o, len(D), D.device)[rows]]
    return W + shared if beta else shared


def _tile(D: Tensor, rows: slice) -> Tensor:
    """Return what is added to every block of columns of some output rows, (rows, r), dense: torch turns
    only a dense matrix fast, and a strided operand makes a sum six times as slow."""
    m = D.shape[1]
    inside = rows.stop <= m
    columns = D[:, rows if inside else torch.arange(rows.start, rows.stop, device=D.device) % m]
    return columns.contiguous().T.contiguous()


def _bat(W: Tensor, B: Tensor, rows: slice, o: int, beta: float) -> Tensor:
    r = B.shape[-1]
    B = B[rows.start // r: rows.stop // r]
    V = W.reshape(len(B), -1, r)  # no copy: a block's rows and its columns' blocks are neighbours
    out = torch.baddbmm(V, V, B, beta=beta).view(len(B), r, -1, r)
    if torch.is_grad_enabled():
        return (out + B.unsqueeze(2)).view(W.shape)
    return out.add_(B.unsqueeze(2)).view(W.shape)


def _bat_row(W: Tensor, B: Tensor, rows: slice, o: int, beta: float) -> Tensor:
    r = B.shape[-1]
    V = W.reshape(len(W), -1, r).transpose(0, 1)
    out = torch.baddbmm(V, V, B, beta=beta).transpose(0, 1)
    return (out.reshape(-1, r, len(B), r) + B.transpose(0, 1)).reshape(W.shape)


def _bat_left(W: Tensor, B: Tensor, rows: slice, o: int, beta: float) -> Tensor:
    r, columns = B.shape[-1], W.shape[1]
    left = B[rows.start // r: rows.stop // r].mT
    V = W.reshape(len(left), r, columns)
    return (torch.baddbmm(V, left, V, beta=beta) + tiled(left, columns)).reshape(W.shape)


def _bone_free(W: Tensor, B: Tensor, rows: slice, o: int, beta: float) -> Tensor:
    p, q, r, _ = B.shape
    a = torch.arange(rows.start // r, rows.stop // r, device=B.device) % p
    b = torch.arange(W.shape[1] // r, device=B.device) % q
    every = B[a][:, b]
    V = W.reshape(len(a), r, len(b), r).transpose(1, 2)
    out = V @ every + every
    return ((V + out) if beta else out).transpose(1, 2).reshape(W.shape)


_CHANGES: dict[str, Callable[[Tensor, Tensor, slice, int, float], Tensor]] = {
    "bone": _bone, "mini": _bone, "bone_out": _bone_out, "bat": _bat, "bat_row": _bat_row,
    "bat_left": _bat_left, "bone_free": _bone_free,
}


def change_rows(
    W: Tensor, block: Tensor, variant: str, first: int, out_features: int, *, added: bool = True
) -> Tensor:
    """Return some output rows of the changed weight, or of the change alone, in the wider type of the two.

    Parameters
    ----------
    W : Tensor, (rows, i)
        Output rows from `first` on; whole blocks of r where the variant has blocks of outputs.
    added : bool
        Whether W itself is in the result.
    """
    wide = torch.promote_types(W.dtype, block.dtype)
    rows = slice(first, first + len(W))
    with torch.autocast(W.device.type, enabled=False):
        return _CHANGES[variant](W.to(wide), block.to(wide), rows, out_features, 1.0 if added else 0.0)


def add_rows(out: Tensor, W: Tensor, block: Tensor, first: int) -> bool:
    """Write `change_rows` of bone or mini to `out`, which is not W; False, and nothing, where that takes
    more than one sum."""
    r = len(block)
    if W.shape[1] % r or len({out.dtype, W.dtype, block.dtype}) > 1:
        return False
    tile = _tile(block, slice(first, first + len(W)))
    torch.add(W.unflatten(1, (-1, r)), tile.unsqueeze(1), out=out.unflatten(1, (-1, r)))
    return True


def pull_bat(W: Tensor, G: Tensor, r: int) -> Tensor:
    """Return dB[a] = sum over b of W[a, b]^T G[a, b] + G[a, b], for the gradient G of changed rows."""
    n = len(W) // r
    product = torch.bmm(W.reshape(n, -1, r).mT.to(G.dtype), G.view(n, -1, r))
    return product + G.view(n, r, -1, r).sum(2)


def delta(weight: Tensor, block: Tensor, variant: str = "bone") -> Tensor:
    """Return the change of a weight (o, i), in at least fp32.

    Raises
    ------
    ConfigError
        For an unknown variant, or a block whose shape does not fit the weight.
    """
    check_block(tuple(weight.shape), tuple(block.shape), variant)
    return change_rows(weight, _wide(block), variant, 0, len(weight), added=False)


def changed(weight: Tensor, block: Tensor, variant: str = "bone") -> Tensor:
    """Return the weight with its change: added in at least fp32 and rounded once to the weight's type."""
    check_block(tuple(weight.shape), tuple(block.shape), variant)
    return change_rows(weight, _wide(block), variant, 0, len(weight)).to(weight.dtype)


def forward(
    x: Tensor, weight: Tensor, block: Tensor, variant: str = "bone", bias: Tensor | None = None
) -> Tensor:
    """Return x W'^T + bias, the reference: it builds the changed weight W'."""
    return F.linear(x, changed(weight, block, variant).to(x.dtype), bias)


def restored(weight: Tensor, block: Tensor, variant: str = "bone") -> Tensor:
    """Return the weight before its change, by formula: exact up to rounding, where I + B is well
    conditioned.

    Raises
    ------
    ConfigError
        Where I + B is too near to a singular matrix (condition number above 1e4).
    """
    return changed(weight, inverse(_wide(block), variant), variant)


def _wide(block: Tensor) -> Tensor:
    return block.to(torch.promote_types(block.dtype, torch.float32))


# ------------------------------------------------------------------ algebra of blocks


def compose(first: Tensor, second: Tensor, variant: str = "bone") -> Tensor:
    """Return the block of one adapter that acts as `first`, then `second` on the weight it leaves.

    Additive forms add. The weight-guided ones act as (W + J)(I + B) - J, with J an identity in every block:
    B = B1 + B2 + B1 B2.
    """
    _check_same([first, second], "composed")
    with torch.autocast(first.device.type, enabled=False):
        return first + second if _is_added(variant) else first + second + first @ second


def inverse(block: Tensor, variant: str = "bone") -> Tensor:
    """Return the block that undoes a block: -D, or (I + B)^-1 - I.

    Raises
    ------
    ConfigError
        Where I + B is too near to a singular matrix (condition number above 1e4).
    """
    if _is_added(variant):
        return -block
    near = torch.eye(block.shape[-1], dtype=block.dtype, device=block.device) + block
    worst = float(torch.linalg.cond(near).max()) if torch.isfinite(near).all() else math.nan
    if not worst <= MAX_CONDITION:
        raise ConfigError(f"a block has no usable inverse: I + B has the condition number {worst:.1e}, "
                          f"allowed is {MAX_CONDITION:.0e}: keep the weight before the change instead")
    return torch.linalg.solve(near, -block)


def combine(blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the block of the weighted sum of changes, each of the same weight: all forms are linear in
    theirs.

    Raises
    ------
    ConfigError
        When shapes differ, or the numbers of blocks and of weights; for a weight that is no finite number.
    """
    if len(blocks) != len(weights) or not blocks:
        raise ConfigError(f"{len(blocks)} blocks and {len(weights)} weights: give one weight for each "
                          f"block")
    if odd := [w for w in weights if not isinstance(w, (int, float)) or not math.isfinite(w)]:
        raise ConfigError(f"a weight of {odd[0]!r} is not allowed: it must be a finite number")
    _check_same(blocks, "combined")
    return sum((w * b for w, b in zip(weights[1:], blocks[1:])), weights[0] * blocks[0])


def _check_same(blocks: Sequence[Tensor], verb: str) -> None:
    if len({tuple(b.shape) for b in blocks}) > 1:
        found = ", ".join(str(tuple(b.shape)) for b in blocks)
        raise ConfigError(f"blocks of shapes {found} cannot be {verb}: they must have one shape and "
                          f"variant")


def to_lora(
    weight: Tensor, block: Tensor, variant: str = "bone", rank: int | None = None
) -> tuple[Tensor, Tensor, float]:
    """Return A (k, i) and B (o, k) of a LoRA of scaling 1, and its relative error in the Frobenius norm.

    bone and mini: A is the identity tiled over the inputs, B = D^T (k = r); bone_out: A = D, B says whose
    shard an output is in. These are exact, unless a lower rank is asked for. The weight-guided forms have
    full rank: `rank` singular directions of the change are kept.

    Raises
    ------
    ConfigError
        For a weight-guided form without a rank, and a rank that is no number from 1 on.
    """
    o, i = weight.shape
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank={rank!r} is not allowed: it must be a whole number >= 1")
    if rank is None and not _is_added(variant):
        raise ConfigError(f"the change of {variant} has full rank: give the rank that the LoRA shall have")
    if _is_added(variant) and (rank is None or rank >= len(block)):
        return *_exact_lora(block, variant, o, i), 0.0
    change = delta(weight, block, variant)
    U, s, V = torch.linalg.svd(change, full_matrices=False)
    root = s[:rank].sqrt()
    lost = float(s[rank:].square().sum().sqrt() / s.square().sum().sqrt().clamp_min(1e-30))
    return root[:, None] * V[:rank], U[:, :rank] * root, lost


def _exact_lora(D: Tensor, variant: str, o: int, i: int) -> tuple[Tensor, Tensor]:
    if variant == "bone_out":
        return D, F.one_hot(shards(o, len(D), D.device), len(D)).to(D.dtype)
    E = tiled(torch.eye(len(D), dtype=D.dtype, device=D.device), i)
    return E, (D if variant == "bone" else tiled(D, o)).T.contiguous()


# ------------------------------------------------------------------ shapes


def block_shape(
    variant: str, out_features: int, in_features: int, r: int, mini_r: int | None = None,
    tiles: tuple[int, int] = (1, 1),
) -> tuple[int, ...]:
    """Return the shape of the block that trains; its product is the number of parameters.

    Raises
    ------
    ConfigError
        Where the block does not fit a layer of this size, with what would.
    """
    o, i = out_features, in_features
    _refuse_misfit(variant, o, i, r, mini_r, tiles)
    shapes = {
        "bone": (r, o), "bone_out": (r, i), "mini": (r, mini_r or 1), "bat": (o // r, r, r),
        "bat_row": (i // r, r, r), "bat_left": (o // r, r, r), "bone_free": (*tiles, r, r),
    }
    return shapes[variant]


def n_parameters(
    variant: str, out_features: int, in_features: int, r: int, mini_r: int | None = None,
    tiles: tuple[int, int] = (1, 1),
) -> int:
    """Return how many parameters train in one layer."""
    return math.prod(block_shape(variant, out_features, in_features, r, mini_r, tiles))


def check_block(weight: tuple[int, ...], block: tuple[int, ...], variant: str) -> None:
    """Raise `ConfigError` where a block of this shape does not belong to a weight (o, i)."""
    _is_added(variant)
    ranks = {"bone": 2, "bone_out": 2, "mini": 2, "bone_free": 4}
    if len(weight) != 2 or len(block) != ranks.get(variant, 3):
        raise ConfigError(f"{variant}: a block of shape {block} is none for a weight of shape {weight}: it "
                          f"has {ranks.get(variant, 3)} dimensions, and the weight two")
    r = block[0] if variant in ADDED else block[-1]
    mini_r = block[1] if variant == "mini" else None
    tiles = (block[0], block[1]) if variant == "bone_free" else (1, 1)
    wanted = block_shape(variant, weight[0], weight[1], r, mini_r, tiles)
    if block != wanted:
        raise ConfigError(f"{variant}: a block of shape {block} does not fit a weight of shape {weight}, "
                          f"which has {wanted}")


def _is_added(variant: str) -> bool:
    if variant not in VARIANTS:
        raise ConfigError(f"variant={variant!r} is not allowed: it must be one of {', '.join(VARIANTS)}")
    return variant in ADDED


def _refuse_misfit(
    variant: str, o: int, i: int, r: int, mini_r: int | None, tiles: tuple[int, int]
) -> None:
    """Raise `ConfigError` for sizes that do not go together."""
    _is_added(variant)
    side, limit = ("outputs", o) if variant == "bone_out" else ("inputs", i)
    if not 1 <= r <= limit:
        raise ConfigError(f"r={r} must lie between 1 and the {limit} {side}: "
                          f"{'lower' if r > 1 else 'raise'} r")
    if variant == "mini" and (mini_r is None or mini_r < 1 or o % mini_r):
        raise ConfigError(f"mini_r={mini_r} must divide the {o} outputs")
    whole = {"bat": (o, i), "bat_row": (o, i), "bone_free": (o, i), "bat_left": (o,)}.get(variant, ())
    if any(n % r for n in whole):
        fitting = _divisors(math.gcd(*whole))
        near = [d for d in fitting if d <= r][-3:] + [d for d in fitting if d > r][:2]
        raise ConfigError(f"r={r} must divide {' and '.join(map(str, whole))} in {variant}: "
                          f"{', '.join(map(str, near))} would")
    if variant == "bone_free" and not (1 <= tiles[0] <= o // r and 1 <= tiles[1] <= i // r):
        raise ConfigError(f"tiles={tuple(tiles)} must lie between (1, 1) and ({o // r}, {i // r}), the "
                          f"blocks of "
                          f"outputs and of inputs")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
