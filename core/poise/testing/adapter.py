"""What every adapter keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from poise.testing.faults import expect, expect_json, expect_methods, expect_refusal
from poise.walk import weights

ULPS = 4
_METHODS = ("model", "trainable", "optimizer", "fold", "unfold", "folded_state_dict", "state_dict",
            "load_state_dict", "detach", "report")


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a small network of linears with biases and a norm."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 8)]
    return nn.Sequential(*layers).to(dtype)


def check_adapter(
    adapter: Any, make_model: Callable[[], nn.Module] = small_model, inputs: Tensor | None = None,
    output: Callable[[Any], Tensor] = lambda y: y,
    make_plain: Callable[[], nn.Module] | None = None,
) -> None:
    """Run an adapter through its contract on a small model.

    Parameters
    ----------
    adapter : Adapter
    make_model : callable
        Returns the same fresh model each time.
    inputs : tensor, optional
        What the model is called with.
    output : callable
        Picks the tensor to compare from what the model returns.
    make_plain : callable, optional
        Returns the model that folded checkpoints load into, when it is another than `make_model`'s
        (a quantized base folds into a dense one).

    Raises
    ------
    ContractError
        Naming the first fault.
    """
    expect_methods(adapter, ("attach", "freezes_base"), "the adapter")
    if inputs is None:
        inputs = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    kit = _Kit(adapter, make_model, inputs, output, make_plain or make_model)
    expect_refusal(lambda: adapter.attach(nn.Sequential(nn.Tanh())),
                   "attach to a model without a matching layer is accepted")
    kit.attaching()
    trained = kit.training()
    kit.saving(trained)
    kit.folding(trained)
    kit.detaching(trained)


class _Kit:
    def __init__(
        self, adapter: Any, make: Callable, inputs: Tensor, output: Callable, plain: Callable
    ) -> None:
        self.adapter, self.make, self.inputs, self.output = adapter, make, inputs, output
        self.plain = plain

    def call(self, model: nn.Module) -> Tensor:
        model.eval()
        with torch.no_grad():
            return self.output(model(self.inputs)).clone()

    def attach(self) -> Any:
        attached = self.adapter.attach(self.make())
        expect_methods(attached, _METHODS, "what attach returns")
        return attached

    def attaching(self) -> None:
        before = self.call(self.make())
        attached = self.attach()
        _same(self.call(attached.model), before, "attach changes the output")
        names = [w.name for w in weights(self.make())]
        expect([w.name for w in weights(attached.model)] == names,
               "attach changes the names of the weights")
        expect_json(attached.report(), "report()")
        groups = attached.trainable()
        held = {id(p) for g in groups for p in g["params"]}
        expect(bool(held), "trainable() is empty")
        expect(all(p.requires_grad for g in groups for p in g["params"]),
               "trainable() holds a tensor that does not require a gradient")
        live = {id(p) for p in attached.model.parameters() if p.requires_grad}
        expect(live <= held or not self.adapter.freezes_base,
               "parameters outside trainable() require gradients although the base is frozen")
        optimizer = attached.optimizer(torch.optim.SGD, lr=0.1)
        expect(isinstance(optimizer, torch.optim.Optimizer), "optimizer() returns no torch optimizer")
        driven = {id(p) for g in optimizer.param_groups for p in g["params"]}
        expect(live <= driven, "optimizer() leaves out trainable parameters of the model")

    def training(self) -> Any:
        attached = self.attach()
        model = attached.model
        optimizer = attached.optimizer(torch.optim.SGD, lr=0.05)
        movable = {id(p) for g in attached.trainable() for p in g["params"]}
        still = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in movable}
        base = {w.name: w.read().clone() for w in weights(self.make())}
        before = self.call(model)
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            self.output(model(self.inputs)).square().sum().backward()
            optimizer.step()
        for name, tensor in still.items():
            expect(torch.equal(dict(model.named_parameters())[name], tensor),
                   f"{name} moves although it is not in trainable()")
        if self.adapter.freezes_base:
            for name, tensor in _base(attached).items():
                expect(torch.equal(tensor, base[name]), f"the frozen weight {name} moves in training")
        expect(not torch.equal(self.call(model), before), "training does not change the output")
        return attached

    def saving(self, trained: Any) -> None:
        fresh = self.attach()
        saved = {k: v.clone() for k, v in trained.state_dict().items()}
        expect(bool(saved), "state_dict() is empty")
        if not self.adapter.freezes_base:
            fresh.model.load_state_dict(trained.model.state_dict())
        fresh.load_state_dict(saved)
        expect(torch.equal(self.call(fresh.model), self.call(trained.model)),
               "saving and loading does not restore the output")

    def folding(self, trained: Any) -> None:
        before = self.call(trained.model)
        tensors = {n: p.detach().clone() for n, p in trained.model.state_dict().items()}
        plain = self.plain()
        folded = {k: v.clone() for k, v in trained.folded_state_dict().items()}
        now = trained.model.state_dict()
        expect(now.keys() == tensors.keys() and all(torch.equal(now[k], v) for k, v in tensors.items()),
               "folded_state_dict() changes the live model")
        try:
            plain.load_state_dict(folded)
        except RuntimeError as error:
            expect(False, f"folded_state_dict() is no plain checkpoint: {str(error)[:200]}")
        _same(self.call(plain), before, "the folded checkpoint gives another output")
        trained.fold()
        _same(self.call(trained.model), before, "fold changes the output")
        trained.unfold()
        expect(torch.equal(self.call(trained.model), before) or not self.adapter.freezes_base,
               "unfold does not restore the output")
        _same(self.call(trained.model), before, "unfold does not restore the output")
        after = trained.model.state_dict()
        expect(after.keys() == tensors.keys(), "fold and unfold change the names of the tensors")
        for name, tensor in tensors.items():
            _same(after[name], tensor, f"unfold does not restore {name}")

    def detaching(self, trained: Any) -> None:
        kept = self.call(trained.model)
        model = trained.detach()
        expect(sorted(model.state_dict()) == sorted(self.make().state_dict()),
               "detach does not give a plain model back")
        if self.adapter.freezes_base:
            expect(torch.equal(self.call(model), self.call(self.make())),
                   "detach does not restore the frozen base")
        else:
            _same(self.call(model), kept, "detach changes the output of a reparameterised model")


def _base(attached: Any) -> dict[str, Tensor]:
    return {w.name: w.read() for w in weights(attached.model)}


def _same(got: Tensor, want: Tensor, fault: str) -> None:
    """Equal within a few units in the last place at the scale of the output."""
    if not want.is_floating_point():
        return expect(torch.equal(got, want), fault)
    scale = float(want.abs().max())
    error = float((got - want).abs().max()) if want.numel() else 0.0
    limit = ULPS * torch.finfo(want.dtype).eps * max(scale, 1e-30)
    return expect(error <= limit, f"{fault} (by {error:.2e} at scale {scale:.2e})")
