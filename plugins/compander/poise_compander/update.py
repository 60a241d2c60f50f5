"""One optimizer step on companded weights, in torch: the rule itself, and the oracle of the C kernel.

The model holds w = Psi(v), autograd gives g = dL/dw, and v is state of the optimizer. A step reads g, v and
the moments, and writes v, the moments and the new w.

Sources: arXiv 2306.16993 section III-C (L2 on w through the chain rule); the adaptive rule on dL/dw with
its step times Psi' is powerpropagation's, which the paper adopts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise_compander.functions import Function

CHUNK = 1 << 15  # elements worked on at a time: the temporaries of a chunk stay in the cache


@dataclass(frozen=True)
class Step:
    """The numbers of one step of one weight.

    Parameters
    ----------
    a, b : float or tensor (1,)
        What Psi is at v now.
    a_next, b_next : float or tensor (1,)
        What Psi is after the step; the same unless a and b are learned.
    scale : float
        Factor on the gradient (clipping, maximize).
    count : int
        Steps taken so far, this one included.
    adaptive, decoupled, decay_on_v : bool
    """

    a: Any
    b: Any
    a_next: Any
    b_next: Any
    lr: float
    weight_decay: float
    count: int
    scale: float = 1.0
    adaptive: bool = False
    decoupled: bool = False
    decay_on_v: bool = False
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    amsgrad: bool = False


def update(function: Function, step: Step, w: Tensor, v: Tensor, g: Tensor, moments: list[Tensor]) -> None:
    """Take the step, in place.

    Parameters
    ----------
    w, v, g : tensors of one shape
        w is written, never read where the decay does not need it.
    moments : list of tensors of that shape
        SGD: [momentum] or []; Adam: [mean, square] or [mean, square, largest square].
    """
    slope = function.derivative(v, step.a, step.b)
    if step.scale != 1.0:
        g = g * step.scale
    decay = step.weight_decay
    if step.adaptive:
        if decay and not step.decoupled:
            g = g + decay * (v / slope if step.decay_on_v else w)
        move = slope * _adam(step, g, moments)
        if decay and step.decoupled:
            move = move + decay * (v if step.decay_on_v else slope * w)
    else:
        if decay and not step.decay_on_v:
            g = g + decay * w
        move = g * slope
        if decay and step.decay_on_v:
            move = move + decay * v
        if moments:
            move = _momentum(step, move, moments[0])
    v.sub_(step.lr * move)
    w.copy_(function.forward(v, step.a_next, step.b_next))


def _momentum(step: Step, move: Tensor, mean: Tensor) -> Tensor:
    if step.count == 1:
        mean.copy_(move)
    else:
        mean.mul_(step.momentum).add_(move, alpha=1 - step.dampening)
    return move + step.momentum * mean if step.nesterov else mean


def _adam(step: Step, g: Tensor, moments: list[Tensor]) -> Tensor:
    mean, square = moments[:2]
    mean.lerp_(g, 1 - step.beta1)
    square.mul_(step.beta2).addcmul_(g, g, value=1 - step.beta2)
    if step.amsgrad:
        torch.maximum(moments[2], square, out=moments[2])
        square = moments[2]
    correction = math.sqrt(1 - step.beta2**step.count)
    return mean / (1 - step.beta1**step.count) / (square.sqrt() / correction + step.eps)


def sums(function: Function, step: Step, w: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Return (dL/da, dL/db) of one weight, float64, shape (2,): sum g w / a and -sum g v Psi'(v) / b."""
    g = g * step.scale
    if step.weight_decay and not step.decay_on_v and not step.decoupled:
        g = g + step.weight_decay * w
    by_a, by_b = function.by_a(v, step.a, step.b), function.by_b(v, step.a, step.b)
    return torch.stack([(g * by_a).sum(dtype=torch.float64), (g * by_b).sum(dtype=torch.float64)])


def in_chunks(
    function: Function, step: Step, w: Tensor, v: Tensor, g: Tensor, moments: list[Tensor]
) -> None:
    """Take the step a chunk at a time, on flat views: the fallback without a compiler."""
    for start in range(0, w.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        update(function, step, w[part], v[part], g[part], [m[part] for m in moments])


def compiled(
    function: Function, step: Step, w: Tensor, v: Tensor, g: Tensor, moments: list[Tensor]
) -> None:
    """Take the step by a fused kernel of torch.compile: for devices without a C kernel."""
    _compiled(function, step, w, v, g, moments)


def _compiled(*arguments: Any) -> None:
    global _update
    if _update is None:
        _update = torch.compile(update, dynamic=True)
    _update(*arguments)


_update: Any = None
