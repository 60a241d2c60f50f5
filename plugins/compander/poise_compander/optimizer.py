"""Optimizers for companded weights, by hooks around a torch optimizer (reference path).

Source: arXiv 2306.16993 section III-C (L2 on w through the chain rule) and the modified adaptive
update of powerpropagation that it adopts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import ConfigError
from poise_compander.parametrization import Psi, l2_term

_ADAPTIVE = (torch.optim.Adam, torch.optim.AdamW)
_DECOUPLED = (torch.optim.AdamW,)


def companded(
    cls: type, groups: list[dict[str, Any]], pairs: list[tuple[Psi, nn.Parameter]],
    options: dict[str, Any],
) -> torch.optim.Optimizer:
    """Build `cls` over the groups so that the v's follow the compander's rule.

    * SGD: the gradient of v gets decay * w * Psi'(v), L2 on w.
    * Adam, AdamW: the rule sees dL/dw (plus decay * w for Adam); its step is multiplied by Psi'(v);
      AdamW's decoupled decay acts on w.

    Raises
    ------
    ConfigError
        For another optimizer.
    """
    if not issubclass(cls, (torch.optim.SGD, *_ADAPTIVE)):
        raise ConfigError(f"compander: no rule for {cls.__name__}; allowed are SGD, Adam, AdamW")
    decay = float(options.get("weight_decay", 0.0))
    optimizer = cls(groups, **options)
    rule = _Adaptive(pairs, decay, issubclass(cls, _DECOUPLED)) if issubclass(cls, _ADAPTIVE) else (
        _Plain(pairs, decay))
    optimizer.register_step_pre_hook(rule.before)
    optimizer.register_step_post_hook(rule.after)
    return optimizer


class _Plain:
    """SGD: autograd has multiplied by Psi' already; only the decay is missing."""

    def __init__(self, pairs: list[tuple[Psi, nn.Parameter]], decay: float) -> None:
        self.pairs, self.decay = pairs, decay

    def before(self, *_: Any) -> None:
        if self.decay:
            for psi, v in self.pairs:
                if v.grad is not None:
                    v.grad.add_(l2_term(psi, v.detach(), self.decay))

    def after(self, *_: Any) -> None:
        pass


class _Adaptive:
    """Adam: gradients with respect to w go in, steps come out times Psi'."""

    def __init__(self, pairs: list[tuple[Psi, nn.Parameter]], decay: float, decoupled: bool) -> None:
        self.pairs, self.decay, self.decoupled = pairs, decay, decoupled
        self._before: list[Tensor] = []

    @torch.no_grad()
    def before(self, *_: Any) -> None:
        self._before = [v.detach().clone() for _, v in self.pairs]
        for psi, v in self.pairs:
            if v.grad is not None:
                v.grad.div_(psi.derivative(v))
                if self.decay and not self.decoupled:
                    v.grad.add_(psi(v), alpha=self.decay)

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rate = self._rates(optimizer)
        for (psi, v), start in zip(self.pairs, self._before, strict=True):
            if v.grad is None:
                continue
            step = v - start
            if self.decay and self.decoupled:
                step.sub_(psi(start), alpha=rate[id(v)] * self.decay)
            v.copy_(start + psi.derivative(start) * step)
        self._before = []

    def _rates(self, optimizer: torch.optim.Optimizer) -> dict[int, float]:
        return {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
