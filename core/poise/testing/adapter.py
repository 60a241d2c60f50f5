"""What every adapter keeps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from poise.adapters import load_adapter, save_adapter
from poise.errors import ConfigError
from poise.testing.beside import FREEZING, HOLDING
from poise.testing.cases import Case, is_plain, same, small_model
from poise.testing.faults import expect, expect_json, expect_methods, expect_refusal
from poise.walk import checkpoint, weights


def check_adapter(
    adapter: Any, make_model: Callable[[], nn.Module] = small_model, inputs: Tensor | None = None,
    output: Callable[[Any], Tensor] = lambda y: y,
    make_plain: Callable[[], nn.Module] | None = None,
) -> list[str]:
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

    Returns
    -------
    list of str
        The checks that were made, in order.

    Raises
    ------
    ContractError
        Naming the first fault.
    """
    expect_methods(adapter, ("attach", "freezes_base"), "the adapter")
    if inputs is None:
        inputs = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    case = Case(adapter, make_model, inputs, output, make_plain or make_model)
    checks = CHECKS | (FREEZING if adapter.freezes_base else HOLDING)
    return [name for name, check in checks.items() if check(case) is not NotImplemented]


def _matching(case: Case) -> None:
    expect_refusal(lambda: case.adapter.attach(nn.Sequential(nn.Tanh())),
                   "attach to a model without a matching layer is accepted")


def _attaching(case: Case) -> None:
    before = case.call(case.make())
    attached = case.attach()
    same(case.call(attached.model), before, "attach changes the output")
    facts = [(w.name, w.role, w.shape) for w in weights(case.make())]
    expect([(w.name, w.role, w.shape) for w in weights(attached.model)] == facts,
           "attach changes the names of the weights, or their roles or shapes")
    expect_json(attached.report(), "report()")
    expect(attached.name == "default" and attached.active is True,
           "it is not attached as 'default', active, unless another name is given")
    expect(hasattr(attached.adapter, "attach"), "Attached.adapter is not the component that made it")
    if case.make is small_model:
        with torch.no_grad():
            same(attached.model(case.inputs[None])[0], before, "three-dimensional inputs go otherwise")
    _gradients(case, attached)


def _gradients(case: Case, attached: Any) -> None:
    """What comes before an adapted layer still learns: norms and biases that both models have."""
    plain, adapted = (dict(m.eval().named_parameters()) for m in (case.make(), attached.model))
    names = [n for n, p in plain.items() if p.ndim == 1 and n in adapted]
    found = []
    for model, held in ((case.make(), None), (attached.model, adapted)):
        own = held or dict(model.eval().named_parameters())
        flags = {n: own[n].requires_grad for n in names}
        for n in names:
            own[n].requires_grad_(True)
        loss = case.output(model(case.inputs)).square().sum()
        found.append(torch.autograd.grad(loss, [own[n] for n in names], allow_unused=True) if names else ())
        for n in names:
            own[n].requires_grad_(flags[n])
    for name, want, got in zip(names, *found, strict=True):
        expect((want is None) == (got is None), f"it cuts the gradient of {name}")
        if want is not None:
            error = float((want - got).abs().max() / want.abs().max().clamp_min(1e-12))
            expect(error < 1e-3, f"it changes the gradient of {name} at attach (by {error:.1e})")


def _parameters(case: Case) -> None:
    attached = case.attach()
    groups = attached.trainable()
    held = {id(p) for g in groups for p in g["params"]}
    expect(bool(held), "trainable() is empty")
    expect(all(p.requires_grad for g in groups for p in g["params"]),
           "trainable() holds a tensor that does not require a gradient")
    live = {id(p) for p in attached.model.parameters() if p.requires_grad}
    expect(live <= held or not case.adapter.freezes_base,
           "parameters outside trainable() require gradients although the base is frozen")
    optimizer = attached.optimizer(torch.optim.SGD, lr=0.1)
    expect(isinstance(optimizer, torch.optim.Optimizer), "optimizer() returns no torch optimizer")
    expect(isinstance(optimizer, torch.optim.SGD), "optimizer(SGD) returns an optimizer of another class")
    driven = {id(p) for g in optimizer.param_groups for p in g["params"]}
    expect(live <= driven, "optimizer() leaves out trainable parameters of the model")
    groups = case.attach().optimizer(torch.optim.SGD, lr=0.123, momentum=0.7).param_groups
    expect(all(g["momentum"] == 0.7 for g in groups) and any(g["lr"] == 0.123 for g in groups),
           "optimizer() ignores its options")


def _training(case: Case) -> None:
    attached = case.attach()
    movable = {id(p) for g in attached.trainable() for p in g["params"]}
    model = attached.model
    still = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in movable}
    base = {w.name: w.read().clone() for w in weights(case.make())}
    before = case.call(model)
    optimizer = attached.optimizer(torch.optim.SGD, lr=0.05)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        case.output(model(case.inputs)).square().sum().backward()
        optimizer.step()
    for name, tensor in still.items():
        expect(torch.equal(dict(model.named_parameters())[name], tensor),
               f"{name} moves although it is not in trainable()")
    if case.adapter.freezes_base:
        for w in weights(model):
            expect(torch.equal(w.read(), base[w.name]), f"the frozen weight {w.name} moves in training")
    expect(not torch.equal(case.call(model), before), "training does not change the output")


def _saving(case: Case) -> None:
    trained, fresh = case.trained(), case.attach()
    saved = {k: v.clone() for k, v in trained.state_dict().items()}
    expect(bool(saved), "state_dict() is empty")
    if not case.adapter.freezes_base:
        fresh.model.load_state_dict(trained.model.state_dict())
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    first = next(iter(saved))
    for what, other in (("a part of it", {k: v for k, v in saved.items() if k != first}),
                        ("more than it", {**saved, "another": torch.zeros(1)})):
        expect_refusal(lambda other=other: fresh.load_state_dict(other), f"load_state_dict accepts {what}")
        expect(all(torch.equal(before[k], v) for k, v in fresh.state_dict().items()),
               f"load_state_dict refuses {what}, and has changed tensors before")
    fresh.load_state_dict(saved)
    expect(torch.equal(case.call(fresh.model), case.call(trained.model)),
           "saving and loading does not restore the output")


def _checkpoints(case: Case) -> None:
    trained = case.trained()
    before = case.call(trained.model)
    tensors = {n: p.detach().clone() for n, p in trained.model.state_dict().items()}
    folded = {k: v.clone() for k, v in trained.folded_state_dict().items()}
    now = trained.model.state_dict()
    expect(now.keys() == tensors.keys() and all(torch.equal(now[k], v) for k, v in tensors.items()),
           "folded_state_dict() changes the live model")
    same(case.call(case.load_plain(folded)), before, "the folded checkpoint gives another output")
    streamed = list(trained.folded_weights())
    expect(sorted(k for k, _ in streamed) == sorted(folded)
           and all(torch.equal(folded[k], v) for k, v in streamed),
           "folded_weights() does not yield what folded_state_dict() returns, each key once")


def _folding(case: Case) -> None:
    trained = case.trained()
    before = case.call(trained.model)
    tensors = {n: p.detach().clone() for n, p in trained.model.state_dict().items()}
    trained.unfold()
    expect(torch.equal(case.call(trained.model), before), "unfold without fold changes the output")
    trained.fold()
    same(case.call(trained.model), before, "fold changes the output")
    once = {w.name: w.read().clone() for w in weights(trained.model)}
    trained.fold()
    expect(all(torch.equal(w.read(), once[w.name]) for w in weights(trained.model)),
           "a second fold changes the weights")
    trained.unfold()
    expect(torch.equal(case.call(trained.model), before) or not case.adapter.freezes_base,
           "unfold does not restore the output")
    same(case.call(trained.model), before, "unfold does not restore the output")
    after = trained.model.state_dict()
    expect(after.keys() == tensors.keys(), "fold and unfold change the names of the tensors")
    for name, tensor in tensors.items():
        same(after[name], tensor, f"unfold does not restore {name}")


def _merging(case: Case) -> None:
    trained = case.trained()
    before = case.call(trained.model)
    folded = {k: v.clone() for k, v in trained.folded_state_dict().items()}
    live = trained.model
    model = trained.merge()
    expect(model is live, "merge returns another model than the one it was attached to")
    is_plain(model, case.make(), "merge", types=case.plain is case.make)
    same(case.call(model), before, "merge changes the output")
    kept = dict(checkpoint(model))
    expect(kept.keys() == folded.keys(), "merge leaves other weights than folded_weights() yields")
    for name, tensor in folded.items():
        same(kept[name], tensor, f"merge leaves another {name} than folded_weights() yields")
    case.attach(model)  # nothing is left that would refuse it
    folded_first = case.trained()
    folded_first.fold()
    same(case.call(folded_first.merge()), before, "merge after fold changes the output")


def _detaching(case: Case) -> None:
    trained = case.trained()
    kept = case.call(trained.model)
    model = trained.detach()
    expect(sorted(model.state_dict()) == sorted(case.make().state_dict()),
           "detach does not give a plain model back")
    if case.adapter.freezes_base:
        expect(torch.equal(case.call(model), case.call(case.make())),
               "detach does not restore the frozen base")
    else:
        same(case.call(model), kept, "detach changes the output of a reparameterised model")
    is_plain(model, case.make(), "detach")
    if case.adapter.freezes_base:
        folded = case.trained()
        folded.fold()
        expect(torch.equal(case.call(folded.detach()), case.call(case.make())),
               "detach after fold does not restore the frozen base")


class _Named(nn.Module):
    """Two linears whose names an adapter might use for tensors and children of its own."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            self.add_module(name, nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


def _names(case: Case) -> None:
    """Layers called like the adapter's own keys keep their names and values."""
    own = {key.rpartition(".")[2] for key in case.attach().state_dict()}
    names = [n for n in ["base", "database", "original", *sorted(own)] if n.isidentifier()]
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))

    def call(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(x)

    inner = Case(case.adapter, lambda: _Named(names), x, lambda y: y, lambda: _Named(names))
    trained = inner.trained()
    before, plain = call(trained.model), _Named(names)
    folded = dict(trained.folded_state_dict())
    expect(folded.keys() == plain.state_dict().keys(),
           f"layers named {', '.join(names)} lose their names in folded_state_dict()")
    plain.load_state_dict(folded)
    same(call(plain), before, f"layers named {', '.join(names)} lose their values in folded_state_dict()")
    expect(trained.merge().state_dict().keys() == folded.keys(), "merge does not give a plain model back")


def _files(case: Case) -> Any:
    trained = case.trained()
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_adapter(trained, folder)
        except ConfigError:  # a class of no entry: there is nothing that would build it again
            return NotImplemented
        fresh = case.make()
        if not case.adapter.freezes_base:
            fresh.load_state_dict(case.make().state_dict())
        loaded = load_adapter(fresh, folder, "again")
        expect(loaded.name == "again", "load_adapter attaches under another name than asked for")
        want = trained.state_dict()
        expect(all(torch.equal(want[k], v) for k, v in loaded.state_dict().items()),
               "save_adapter and load_adapter do not restore the method's tensors")
        if case.adapter.freezes_base:
            expect(torch.equal(case.call(fresh), case.call(trained.model)),
                   "save_adapter and load_adapter do not restore the output")
    return None


CHECKS: dict[str, Callable[[Case], Any]] = {
    "refuses a model without a matching layer": _matching,
    "attaching changes nothing": _attaching,
    "parameters and optimizer": _parameters,
    "training moves what may move": _training,
    "saving and loading": _saving,
    "plain checkpoints": _checkpoints,
    "fold and unfold": _folding,
    "detach": _detaching,
    "merge": _merging,
    "layers of any name": _names,
    "adapter files": _files,
}
