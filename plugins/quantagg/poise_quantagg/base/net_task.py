"""What the neural base models minimise, for the batched trainer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from poise_quantagg.training import Batch, mlp, mlp_init, pinball

_CLIP, _VARIANCE = 1e-3, 1e-6
_SCORED_LEVELS = 9  # of a simultaneous network, whose validation needs one pass per level
_SCORE_NUMBERS = 1 << 22


class NetTask:
    """Losses and validation scores of C networks of one kind and shape.

    Parameters
    ----------
    data : list of (X (n, d), y (n,))
        Each member's rows in its own units; members of one part share arrays.
    held_out : list of int64 tensors
        Rows of the validation score.
    shape : (width, depth)
    parts : list of int
        The part of each member, so that shared arrays are held once.
    """

    undecayed: frozenset[str] = frozenset()
    scores_start = True

    def __init__(
        self, kind: str, data, held_out, levels: np.ndarray, hubers, shape, dtype: torch.dtype, *,
        parts, sample_weight=None,
    ) -> None:
        self.kind, self.dtype = kind, dtype
        places = {part: i for i, part in enumerate(dict.fromkeys(parts))}
        unique = {places[part]: data[c] for c, part in enumerate(parts)}
        self.x = torch.stack([torch.as_tensor(unique[i][0], dtype=dtype) for i in range(len(places))])
        self.y = torch.stack([torch.as_tensor(unique[i][1], dtype=dtype) for i in range(len(places))])
        self.part = torch.tensor([places[part] for part in parts])
        self.levels = torch.as_tensor(np.asarray(levels), dtype=dtype)
        self.huber = torch.tensor(hubers, dtype=dtype)[:, None, None]
        size = max(len(h) for h in held_out)
        self.held = torch.stack([torch.nn.functional.pad(h, (0, size - len(h))) for h in held_out])
        self.counts = torch.stack([(torch.arange(size) < len(h)).to(dtype) for h in held_out])
        self.weight = None
        if sample_weight is not None:
            self.weight = torch.as_tensor(np.asarray(sample_weight), dtype=dtype)
            self.counts = self.counts * self.weight[self.held]
        width, depth = shape
        inputs = self.x.shape[2] + (kind == "simultaneous")
        outputs = {"gaussian": 2, "simultaneous": 1, "multi": len(self.levels)}[kind]
        self.sizes = (inputs, *[width] * depth, outputs)

    def init(self, member: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return one member's layers; a multi-quantile output starts at the target's quantiles."""
        params = mlp_init(self.sizes, generator)
        if self.kind == "multi":
            # of a standard normal: the target has mean 0 and variance 1
            last = f"b{len(self.sizes) - 2}"
            params[last] = params[last] + torch.special.ndtri(self.levels.double())
        return params

    def loss(self, params, batch: Batch, alive: Tensor) -> Tensor:
        """Return the mean training loss of each member's batch, shape (C,)."""
        part = self.part[alive][:, None]
        x, y = self.x[part, batch.rows], self.y[part, batch.rows]
        if self.kind == "simultaneous":
            assert batch.uniforms is not None
            tau = batch.uniforms.clamp(_CLIP, 1 - _CLIP)
            out = mlp(params, torch.cat([x, tau[..., None] - 0.5], dim=2), batch.masks)
            loss = pinball(y[..., None] - out, tau[..., None], self.huber[alive]).squeeze(-1)
        else:
            out = mlp(params, x, batch.masks)
            if self.kind == "gaussian":
                loss = gaussian_loss(out, y)
            else:
                loss = pinball(y[..., None] - out, self.levels, self.huber[alive]).mean(dim=2)
        if self.weight is not None:
            loss = loss * self.weight[batch.rows]
        return loss.mean(dim=1)

    def score(self, params, alive: Tensor) -> Tensor:
        """Return the mean pinball loss over levels on each member's held-out rows, shape (C,)."""
        inner = self.held.shape[1] * max(self.sizes) * (
            _SCORED_LEVELS if self.kind == "simultaneous" else 1)
        size = max(1, _SCORE_NUMBERS // max(1, inner))
        parts = [self._score({k: v[i : i + size] for k, v in params.items()}, alive[i : i + size])
                 for i in range(0, len(alive), size)]
        return torch.cat(parts)

    def _score(self, params, alive: Tensor) -> Tensor:
        rows, part = self.held[alive], self.part[alive][:, None]
        x, y = self.x[part, rows], self.y[part, rows]
        levels = self.levels
        if self.kind == "simultaneous":
            step = max(1, len(levels) // _SCORED_LEVELS)
            levels = levels[step // 2 :: step]
            wide = torch.cat([
                x[:, :, None].expand(-1, -1, len(levels), -1),
                (levels - 0.5)[None, None, :, None].expand(*x.shape[:2], -1, 1)], dim=3)
            q = mlp(params, wide.flatten(1, 2)).view(*x.shape[:2], len(levels))
        elif self.kind == "gaussian":
            out = mlp(params, x)
            sigma = torch.sqrt(torch.nn.functional.softplus(out[..., 1]) + _VARIANCE)
            q = out[..., :1] + sigma[..., None] * torch.special.ndtri(levels)
        else:
            q = mlp(params, x)
        loss = pinball(y[..., None] - q, levels).mean(dim=2)
        count = self.counts[alive]
        return (loss * count).sum(dim=1) / count.sum(dim=1).clamp_min(1e-12)


def gaussian_loss(out: Tensor, y: Tensor) -> Tensor:
    """Return the Gaussian negative log likelihood (..., B) of outputs (..., B, 2) at y (..., B)."""
    variance = torch.nn.functional.softplus(out[..., 1]) + _VARIANCE
    return 0.5 * (variance.log() + (y - out[..., 0]) ** 2 / variance)
