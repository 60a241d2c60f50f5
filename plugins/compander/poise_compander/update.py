"""One optimizer step on companded weights, in torch: the rule itself, and the oracle of the C kernel.

The model owns w = Psi(v), what attach returned owns v, and autograd gives g = dL/dw. A step reads g, v and
the optimizer's moments, and writes v, the moments and the new w.

Sources: arXiv 2306.16993 section III-C (L2 on w through the chain rule); the adaptive rule on dL/dw with
its step times Psi' is powerpropagation's, which the paper adopts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poise_compander.functions import Function

LEAST = 1e-12  # smallest slope that is divided by; as in kernel.c
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
    keep : float
        Factor on what is added to the momentum: 1 at the first step, then 1 - dampening.
    correct1, correct2 : float
        Adam's corrections at step t: 1 - beta1^t, and the root of 1 - beta2^t.
    adaptive, decoupled, decay_on_v : bool
    """

    a: Any
    b: Any
    a_next: Any
    b_next: Any
    lr: Any
    weight_decay: float
    scale: Any = 1.0
    adaptive: bool = False
    decoupled: bool = False
    decay_on_v: bool = False
    momentum: float = 0.0
    nesterov: bool = False
    keep: Any = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    correct1: Any = 1.0
    correct2: Any = 1.0
    eps: float = 1e-8
    amsgrad: bool = False


CHANGING = ("a", "b", "a_next", "b_next", "lr", "scale", "keep", "correct1", "correct2")


class Work(NamedTuple):
    """What one step of one weight is done on: dense tensors of one shape and the same strides.

    w is written, and read only where the decay needs it. Moments: SGD [momentum] or []; Adam [mean, square]
    or [mean, square, largest square].
    """

    step: Step
    w: Tensor
    v: Tensor
    g: Tensor
    moments: Sequence[Tensor]


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
    g = g * step.scale
    decay = step.weight_decay
    if step.adaptive:
        if decay and not step.decoupled:
            g = g + decay * (by_slope(v, slope) if step.decay_on_v else w)
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


def by_slope(x: Tensor, slope: Tensor) -> Tensor:
    """Return x / Psi'(v): what belongs to v, as the adaptive rule on w sees it.

    0 where the slope is smaller than `LEAST`, as far out in tanh and erf: no rule moves such a weight.
    """
    return torch.where(slope.abs() > LEAST, x / slope, 0.0)


def _momentum(step: Step, move: Tensor, mean: Tensor) -> Tensor:
    mean.mul_(step.momentum).add_(step.keep * move)
    return move + step.momentum * mean if step.nesterov else mean


def _adam(step: Step, g: Tensor, moments: list[Tensor]) -> Tensor:
    mean, square = moments[:2]
    mean.lerp_(g, 1 - step.beta1)
    square.mul_(step.beta2).addcmul_(g, g, value=1 - step.beta2)
    if step.amsgrad:
        torch.maximum(moments[2], square, out=moments[2])
        square = moments[2]
    return mean / step.correct1 / (square.sqrt() / step.correct2 + step.eps)


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


def sums_in_chunks(function: Function, step: Step, w: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Return `sums` of flat views, a chunk at a time."""
    parts = zip(w.split(CHUNK), v.split(CHUNK), g.split(CHUNK))
    return torch.stack([sums(function, step, *part) for part in parts]).sum(0)


def compiled(
    function: Function, step: Step, w: Tensor, v: Tensor, g: Tensor, moments: list[Tensor]
) -> None:
    """Take the step by a fused kernel of torch.compile: for devices without a C kernel.

    What changes from step to step goes in as a tensor: as numbers of Python each would compile anew.
    """
    global _compiled
    if _compiled is None:
        _compiled = torch.compile(_with_numbers, dynamic=True)
    changing = torch.tensor([float(getattr(step, name)) for name in CHANGING], dtype=torch.float64)
    rest = replace(step, **dict.fromkeys(CHANGING))
    _compiled(function, rest, changing.to(w.device, w.dtype), w, v, g, moments)


_compiled: Any = None


def _with_numbers(
    function: Function, step: Step, changing: Tensor, w: Tensor, v: Tensor, g: Tensor, moments: list[Tensor]
) -> None:
    update(function, replace(step, **dict(zip(CHANGING, changing.unbind()))), w, v, g, moments)
