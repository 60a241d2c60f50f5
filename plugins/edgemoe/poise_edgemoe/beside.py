"""Modules of ours in the place of transformers', as long as these are what they were when tried."""

from __future__ import annotations

from collections.abc import Iterable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

# of a module's attributes, those that say what it computes
OPTIONS = (int, float, str, torch.dtype, FunctionType, MethodType)


class Beside(nn.Module):
    """Stands for a module, which keeps its weights and their names.

    A prompt goes through the module, and a token must not go through weights that the module has no
    more: `renew` is called before every prompt. Numbers of which C has copies are copied anew; where
    anything else has been replaced, cast or set (`looks`), tokens go through the module as well.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for own in ("_parameters", "_buffers", "_modules"):
            setattr(self, own, getattr(module, own))
        self._plain = (module,)
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._seen: list[Any] | None = None
        self._same = True  # as when it was tried

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_plain"][0], name)

    def depends_on(self) -> Iterable[nn.Module]:
        """Return modules whose work it does."""
        return self._plain[0].modules()

    def copied(self, own: Tensor) -> Tensor:
        """Return numbers as floats in memory of their own, which `renew` copies again."""
        made = own.detach().to(torch.float32, copy=True).contiguous()
        self._copies.append((made, own.detach()))
        return made

    def renew(self) -> None:
        """See whether all is what it was at the first call."""
        now = [looks(module) for module in self.depends_on()]
        if self._seen is None:
            self._seen = now
        self._same = now == self._seen
        with torch.inference_mode():  # copies may have been made there
            for made, own in self._copies:
                made.copy_(own)


def looks(module: nn.Module) -> tuple[Any, ...]:
    """Return what a module is but for numbers in its weights: kind, options, where weights lie."""
    module = module._plain[0] if isinstance(module, Beside) else module
    weights = [(t.data_ptr(), t.dtype, t.shape)
               for held in (module._parameters, module._buffers) for t in held.values() if t is not None]
    return type(module), [one for one in vars(module).items() if isinstance(one[1], OPTIONS)], weights


def renew(model: nn.Module) -> None:
    """See, before a prompt, whether a model's modules are what they were."""
    for module in model.modules():
        if isinstance(module, Beside):
            module.renew()


def heard(module: Any) -> bool:
    """Return whether somebody listens to a module: what is done in its place would not be heard."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def all_heard() -> bool:
    """Return whether somebody listens to all modules."""
    return bool(_has_any_global_hook())
