"""The pair (a, b) of a function: fixed, or learned behind a guard that keeps it positive."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from poise_compander.functions import Function

# from the trained number to a positive one, and back
_GUARDS = {
    "softplus": (nn.functional.softplus, lambda x: x + math.log(-math.expm1(-x))),
    "exp": (torch.exp, math.log),
    "none": (lambda raw: raw, lambda x: x),  # the paper: a or b may cross zero
}


class Scales(nn.Module):
    """(a, b) of one layer, or of all layers of a network.

    Learned numbers have shape (1,): sharded training refuses scalars. What the pair belongs to is a buffer
    of bytes, so that a checkpoint of another function or another fixed pair is refused and not misread.

    Parameters
    ----------
    function : Function
    a, b : float
        Where they start.
    learn : bool
    guard : {"softplus", "exp", "none"}
    dtype : torch.dtype
        Of the learned numbers.
    """

    spec: Tensor

    def __init__(self, function: Function, a: float, b: float, learn: bool = False,
                 guard: str = "softplus", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.function, self.guard, self.learned = function, guard, learn
        self.fixed = (a, b)
        said: dict[str, Any] = {"function": function.name}
        if learn:
            back = _GUARDS[guard][1]
            self.raw_a = nn.Parameter(torch.tensor([back(a)], dtype=dtype))
            self.raw_b = nn.Parameter(torch.tensor([back(b)], dtype=dtype))
            said["guard"] = guard
        else:
            said |= {"a": a, "b": b}
        self.register_buffer("spec", _bytes(said))

    @property
    def a(self) -> Any:
        """a: a number, or a tensor of shape (1,) that is learned."""
        return _GUARDS[self.guard][0](self.raw_a) if self.learned else self.fixed[0]

    @property
    def b(self) -> Any:
        """b: a number, or a tensor of shape (1,) that is learned."""
        return _GUARDS[self.guard][0](self.raw_b) if self.learned else self.fixed[1]

    def numbers(self) -> tuple[float, float]:
        """Return (a, b) as plain numbers."""
        return (number(self.a), number(self.b)) if self.learned else self.fixed

    def mismatch(self, saved: Tensor) -> str:
        """Return what differs from a saved `spec`, in words; empty when nothing does."""
        if torch.equal(saved.cpu(), self.spec.cpu()):
            return ""
        return (f"saved with {_words(saved)}, here {_words(self.spec)}: attach with the options it was "
                f"saved with")

    def _load_from_state_dict(self, state_dict, prefix, meta, strict, missing, unexpected, errors) -> None:
        saved = state_dict.get(f"{prefix}spec")
        if isinstance(saved, Tensor) and (fault := self.mismatch(saved)):
            errors.append(f"compander, {prefix.rpartition('.parametrizations.')[0]}: {fault}")
            return
        super()._load_from_state_dict(state_dict, prefix, meta, strict, missing, unexpected, errors)


def number(x: Tensor) -> float:
    """Return a tensor of one element as a plain number, a sharded one too."""
    x = x.detach()
    return float(x.full_tensor() if hasattr(x, "full_tensor") else x)  # type: ignore[operator]


def _bytes(value: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(value, sort_keys=True).encode()), dtype=torch.uint8)


def _words(spec: Tensor) -> str:
    try:
        said = json.loads(bytes(spec.cpu().tolist()))
        return ", ".join(f"{key}={value}" for key, value in said.items())
    except ValueError:
        return "something unreadable"
