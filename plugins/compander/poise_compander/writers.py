"""Who writes to companded weights: whose optimizer steps what is held.

torch's fused optimizers do not raise a tensor's version, by which the fast path tells of other writers: a
hook on all of torch's optimizers raises it for them.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from poise.holding import who_holds


class _Foreign:
    """Raises the version of held weights that another optimizer steps."""

    def __init__(self) -> None:
        self.attachments = 0
        self.own: WeakSet[torch.optim.Optimizer] = WeakSet()
        self.harmless: WeakKeyDictionary[torch.optim.Optimizer, tuple[int, int]] = WeakKeyDictionary()

    def watch(self) -> None:
        """Be called after every step of every optimizer from now on."""
        if not self.attachments:
            register_optimizer_step_post_hook(self)
        self.attachments += 1

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen = self.attachments, sum(len(group["params"]) for group in optimizer.param_groups)
        if optimizer in self.own or self.harmless.get(optimizer) == seen:
            return
        stepped = [p for group in optimizer.param_groups for p in group["params"]
                   if who_holds(p) == "compander"]
        for p in stepped:
            if p.grad is not None:
                torch.autograd.graph.increment_version(p)
        if not stepped:
            self.harmless[optimizer] = seen  # looking again at each step would cost others time


_foreign = _Foreign()


def watch() -> None:
    """Look at the steps of all optimizers from now on, but for those that are trusted."""
    _foreign.watch()


def trust(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of an attachment write: it keeps v and w together itself."""
    _foreign.own.add(optimizer)
