"""A small model, and an adapter on it: what the checks of adapters are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from poise.testing.faults import expect, expect_methods

ULPS = 4
METHODS = ("model", "name", "adapter", "active", "disable", "trainable", "optimizer", "fold", "unfold",
           "merge", "folded_weights", "folded_state_dict", "state_dict", "load_state_dict", "detach",
           "report")


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a small network of linears with biases and a norm."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 8)]
    return nn.Sequential(*layers).to(dtype)


class Case:
    """An adapter, and how to make the models it is tried on."""

    def __init__(
        self, adapter: Any, make: Callable, inputs: Tensor, output: Callable, plain: Callable
    ) -> None:
        self.adapter, self.make, self.inputs, self.output = adapter, make, inputs, output
        self.plain = plain

    def call(self, model: nn.Module) -> Tensor:
        model.eval()
        with torch.no_grad():
            return self.output(model(self.inputs)).clone()

    def attach(self, model: nn.Module | None = None, **name: str) -> Any:
        attached = self.adapter.attach(self.make() if model is None else model, **name)
        expect_methods(attached, METHODS, "what attach returns")
        return attached

    def trained(self, model: nn.Module | None = None, **name: str) -> Any:
        """Return an adapter after three steps."""
        attached = self.attach(model, **name)
        optimizer = attached.optimizer(torch.optim.SGD, lr=0.05)
        attached.model.train()
        for _ in range(3):
            optimizer.zero_grad()
            self.output(attached.model(self.inputs)).square().sum().backward()
            optimizer.step()
        return attached

    def load_plain(self, tensors: dict[str, Tensor]) -> nn.Module:
        plain = self.plain()
        try:
            plain.load_state_dict(tensors)
        except RuntimeError as error:
            expect(False, f"folded_state_dict() is no plain checkpoint: {str(error)[:200]}")
        return plain


def is_plain(model: nn.Module, fresh: nn.Module, verb: str, types: bool = True) -> None:
    flags = {n: p.requires_grad for n, p in fresh.named_parameters()}
    wrong = [n for n, p in model.named_parameters() if p.requires_grad is not flags.get(n, p.requires_grad)]
    expect(not wrong, f"{verb} leaves requires_grad of {', '.join(wrong[:3])} as it was while attached")
    if types:
        expect([type(m) for m in model.modules()] == [type(m) for m in fresh.modules()],
               f"{verb} leaves layers behind that the plain model does not have")
        hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
        expect(not hooks, f"{verb} leaves forward hooks behind")


def same(got: Tensor, want: Tensor, fault: str) -> None:
    """Equal within a few units in the last place at the scale of the output."""
    if not want.is_floating_point():
        return expect(torch.equal(got, want), fault)
    scale = float(want.detach().abs().max())
    error = float((got - want).detach().abs().max()) if want.numel() else 0.0
    limit = ULPS * torch.finfo(want.dtype).eps * max(scale, 1e-30)
    return expect(error <= limit, f"{fault} (by {error:.2e} at scale {scale:.2e})")
