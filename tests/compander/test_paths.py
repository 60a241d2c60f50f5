"""The fast and the reference path train the same numbers, whatever the rule."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from cases import some
from networks import Tied, X, Y, largest_difference, loss_of, steady, train
from torch import nn

from poise.errors import FileError, RunError
from poise_compander import WeightCompander, native
from poise_compander.functions import FUNCTIONS

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
RULES = {
    "sgd": (SGD, {"lr": 0.05}),
    "momentum": (SGD, {"lr": 0.02, "momentum": 0.9}),
    "dampened": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}),
    "nesterov": (SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "adam": (Adam, {"lr": 0.003, "betas": (0.8, 0.95)}),
    "amsgrad": (Adam, {"lr": 0.003, "amsgrad": True}),
    "adamw": (AdamW, {"lr": 0.003}),
    "adamw_amsgrad": (AdamW, {"lr": 0.003, "amsgrad": True}),
}
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}
DECAY = 0.02


def batches(seed=2):
    """Return a loss with new noisy rows at every call: on the same few rows a network of this size comes to
    fit them all, and there every rounding grows, whatever the path."""
    generator = torch.Generator().manual_seed(seed)

    def loss(model):
        x = torch.randn(32, 6, generator=generator, dtype=torch.float64)
        y = torch.sin(x[:, :3]) + torch.randn(32, 3, generator=generator, dtype=torch.float64)
        return loss_of(model, x, y)

    return loss


def trained(path, steps, rule, dtype=torch.float64, make=steady, loss=None, more=None, **options):
    """Return w of all layers and every plain parameter after some steps."""
    model = make().to(dtype)
    attached = WeightCompander(path=path, a=0.9, b=0.6, **options).attach(model)
    cls, numbers = RULES[rule]
    optimizer = attached.optimizer(cls, weight_decay=DECAY, **numbers | (more or {}))
    loss = loss or batches()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert attached.options.path == path
    return {n: attached.w(n).double().clone() for n in attached.companded} | {
        f"{i}.bias": m.bias.detach().double().clone() for i, m in enumerate(model) if hasattr(m, "bias")
    } | {n: p.detach().double() for n, p in attached.state_dict().items() if "raw" in n}


def check_equal(steps, rule, dtype=torch.float64, **options):
    fast, reference = (trained(path, steps, rule, dtype, **options) for path in ("fast", "reference"))
    start = trained("fast", 0, rule, dtype, **options)
    assert largest_difference(fast, start) > 0.02  # it did train
    assert largest_difference(fast, reference) < LIMITS[dtype]


CASES = list(product(FUNCTIONS, RULES, ("w", "v")))
FEW = CASES[::3]
few = pytest.mark.parametrize(("function", "rule", "decay_on"), FEW)
all_of_them = pytest.mark.parametrize(("function", "rule", "decay_on"), CASES)


@pytest.fixture(params=["C kernel", "torch"])
def kernel(request, monkeypatch):
    """Take steps by either kernel."""
    if request.param == "torch":
        monkeypatch.setattr(native, "kernel", lambda: None)
    elif native.kernel() is None:
        pytest.skip(f"no C kernel here: {native.why_not()}")
    return request.param


@few
def test_both_paths_train_the_same_weights(function, rule, decay_on, kernel):
    check_equal(50, rule, function=function, decay_on=decay_on)


@pytest.mark.parametrize("function, rule, decay_on", some(FEW, keep=FEW[::3]))
def test_both_paths_train_the_same_weights_and_pairs(function, rule, decay_on):
    for learn, guard in (("layer", "softplus"), ("network", "exp"), ("layer", "none")):
        check_equal(50, rule, function=function, decay_on=decay_on, learn=learn, guard=guard)


@pytest.mark.slow
@all_of_them
@pytest.mark.parametrize("dtype", LIMITS)
def test_both_paths_after_500_steps(function, rule, decay_on, dtype, kernel):
    check_equal(500, rule, dtype, function=function, decay_on=decay_on)


@pytest.mark.slow
@all_of_them
@pytest.mark.parametrize("learn", ["layer", "network"])
@pytest.mark.parametrize("guard", ["softplus", "exp"])
def test_both_paths_with_learned_pairs_after_500_steps(function, rule, decay_on, learn, guard):
    check_equal(500, rule, function=function, decay_on=decay_on, learn=learn, guard=guard)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_float32_too(rule):
    check_equal(100, rule, torch.float32)


# ------------------------------------------------------------------ what a training loop does


@pytest.mark.parametrize("decay_on, rule", some(
    product(["w", "v"], RULES), keep=[*product(["w"], RULES)][::2] + [*product(["v"], RULES)][1::3]))
def test_clipping_is_taken_on_the_gradient_of_w(rule, decay_on):
    for learn in ("none", "layer"):
        check_equal(50, rule, decay_on=decay_on, learn=learn, more={"max_grad_norm": 0.2})


def test_clipping_is_that_of_torch_on_the_plain_network():
    """The first SGD step moves biases by what torch's clip_grad_norm_ would leave of their gradient."""
    model, plain = steady(), steady()
    attached = WeightCompander(a=0.9, b=0.6).attach(model)
    optimizer = attached.optimizer(SGD, lr=1.0, max_grad_norm=0.1)
    for m in (model, plain):
        loss_of(m).backward()
    optimizer.step()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    assert torch.allclose(model[0].bias, steady()[0].bias - plain[0].bias.grad, rtol=1e-12)


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_groups_have_their_own_options(rule):
    groups = [{"params": ["0.*"], "lr": 0.004, "weight_decay": 0.1},
              {"params": ["*.bias"], "weight_decay": 0.0}]
    check_equal(50, rule, more={"groups": groups})
    model = steady()
    optimizer = WeightCompander().attach(model).optimizer(SGD, lr=0.1, weight_decay=0.5, groups=groups)
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = {n: (by_id[id(p)]["lr"], by_id[id(p)]["weight_decay"]) for n, p in model.named_parameters()}
    assert found == {"0.weight": (0.004, 0.1), "0.bias": (0.004, 0.1), "2.weight": (0.1, 0.5),
                     "2.bias": (0.1, 0.0)}


def tied_loss(model):
    ids = torch.arange(10)
    return nn.functional.cross_entropy(model(ids), ids.flip(0))


@pytest.mark.parametrize("rule", ["momentum", "adam", "adamw"])
def test_tied_weights_stay_tied(rule):
    check_equal(50, rule, make=Tied, loss=tied_loss)
    for path in ("fast", "reference"):
        model = Tied().double()
        before = tied_loss(model)
        attached = WeightCompander(path=path).attach(model)
        assert torch.allclose(tied_loss(model), before, rtol=1e-12)
        optimizer = attached.optimizer(SGD, lr=0.5)
        tied_loss(model).backward()
        optimizer.step()
        assert torch.equal(model[0].weight, model[2].weight) and tied_loss(model) < before
        attached.detach()
        assert model[0].weight is model[2].weight or torch.equal(model[0].weight, model[2].weight)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_accumulated_gradients_are_one_gradient(rule):
    def halves(model):
        return 0.5 * (loss_of(model, X[:8], Y[:8]) + loss_of(model, X[8:], Y[8:]))

    for path in ("fast", "reference"):
        whole = trained(path, 30, rule, loss=loss_of)
        model = steady()
        attached = WeightCompander(path=path, a=0.9, b=0.6).attach(model)
        optimizer = attached.optimizer(RULES[rule][0], weight_decay=DECAY, **RULES[rule][1])
        for _ in range(30):
            optimizer.zero_grad()
            for part in (slice(0, 8), slice(8, 16)):
                (0.5 * loss_of(model, X[part], Y[part])).backward()
            optimizer.step()
        assert max(float((attached.w(n) - whole[n]).abs().max()) for n in attached.companded) < 1e-12
    check_equal(30, rule, loss=halves)


@pytest.mark.parametrize("path", ["fast", "reference"])
@pytest.mark.parametrize("learn", ["none", "layer"])
@pytest.mark.parametrize("rule", ["nesterov", "amsgrad", "adamw"])
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_training_goes_on_bit_for_bit_after_saving(path, learn, rule, order):
    def start():
        model = steady()
        attached = WeightCompander(path=path, learn=learn, a=0.9, b=0.6).attach(model)
        return model, attached, attached.optimizer(RULES[rule][0], weight_decay=DECAY, **RULES[rule][1])

    def go(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    model, attached, optimizer = start()
    go(model, optimizer, 20)
    saved = copy.deepcopy((model.state_dict(), attached.state_dict(), optimizer.state_dict()))
    go(model, optimizer, 20)
    again, attached_again, optimizer_again = start()
    loads = [lambda: again.load_state_dict(saved[0]), lambda: attached_again.load_state_dict(saved[1]),
             lambda: optimizer_again.load_state_dict(saved[2])]
    for load in loads if order == "model first" else loads[::-1]:
        load()
    go(again, optimizer_again, 20)
    for name in attached.companded:
        assert torch.equal(attached.w(name), attached_again.w(name))
        assert torch.equal(attached.v(name), attached_again.v(name))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize("learn", ["layer", "network"])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adamw"])
def test_model_and_optimizer_are_all_that_training_needs_to_go_on(learn, rule):
    """On the fast path too, where neither holds a and b as a parameter of the model."""
    def start():
        model = steady()
        attached = WeightCompander(learn=learn, a=0.9, b=0.6).attach(model)
        return model, attached, attached.optimizer(RULES[rule][0], weight_decay=DECAY, **RULES[rule][1])

    model, attached, optimizer = start()
    train(model, optimizer, 10)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 10)
    for order in (0, 1), (1, 0):
        again, attached_again, optimizer_again = start()
        for i in order:  # torch's optimizers go on with the very tensors they are given
            (again, optimizer_again)[i].load_state_dict(copy.deepcopy(saved[i]))
        train(again, optimizer_again, 10)
        for own, other in zip(attached.pairs, attached_again.pairs):
            assert own.numbers() == other.numbers() != (0.9, 0.6)
        for name in attached.companded:
            assert torch.equal(attached.w(name), attached_again.w(name))
            assert torch.equal(attached.v(name), attached_again.v(name))
    without = copy.deepcopy(saved[1])
    for state in without["state"].values():
        state.pop("value", None)
    with pytest.raises(FileError, match="no values of the learned pairs"):
        start()[2].load_state_dict(without)


def test_a_foreign_write_is_reported_until_it_is_taken_over():
    model = steady()
    attached = WeightCompander().attach(model)
    optimizer = attached.optimizer(SGD, lr=0.1)
    with torch.no_grad():
        model[0].weight.mul_(0.9)
    for _ in range(3):
        with pytest.raises(RunError, match="written to"):
            loss_of(model)
        with pytest.raises(RunError, match="written to"):
            optimizer.step()
    attached.refresh()
    train(model, optimizer, 1)


def test_a_closure_and_a_scheduler_work_as_with_torch():
    for path in ("fast", "reference"):
        model = steady()
        attached = WeightCompander(path=path).attach(model)
        optimizer = attached.optimizer(SGD, lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        losses = []
        for _ in range(5):
            losses.append(float(optimizer.step(closure).detach()))
            scheduler.step()
        assert losses == sorted(losses, reverse=True) and optimizer.param_groups[0]["lr"] == 0.1 / 32


def test_maximize_climbs_on_both_paths():
    for learn, decay_on in product(("none", "layer", "network"), ("w", "v")):
        options = {"learn": learn, "decay_on": decay_on}
        check_equal(20, "momentum", more={"maximize": True, "lr": 0.01}, **options)
        check_equal(20, "adam", more={"maximize": True}, **options)


# ------------------------------------------------------------------ kernels


def test_results_do_not_depend_on_threads():
    def result(threads):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 700), nn.Tanh(), nn.Linear(700, 3))
        attached = WeightCompander().attach(model)
        optimizer = attached.optimizer(SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
        x = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            optimizer.zero_grad()
            gradient = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
            for p, g in zip(model.parameters(), gradient):
                p.grad = fixed.setdefault(p.shape, g) if len(fixed) < 4 else fixed[p.shape]
            torch.set_num_threads(threads)
            optimizer.step()
            torch.set_num_threads(1)
        return [x(n).clone() for x in (attached.v, attached.w) for n in attached.companded]

    fixed, before = {}, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = result(1)
        assert all(torch.equal(a, b) for a, b in zip(first, result(2)))
        assert all(torch.equal(a, b) for a, b in zip(first, result(4)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rule", [SGD, torch.optim.AdamW], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("filters", [(3, 3), (1, 1), (1, 3), (3, 1)], ids=lambda k: f"{k[0]}x{k[1]}")
def test_convolutions_in_any_memory_format(memory_format, rule, filters):
    """Filters of 1 x 1 too: their strides are ambiguous, and torch writes them in several ways."""
    def result(path):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, filters), nn.Tanh(), nn.Conv2d(4, 1, filters),
                              nn.Conv2d(1, 2, 1)).double()
        model = model.to(memory_format=memory_format)
        attached = WeightCompander(path=path, bound_policy="grow").attach(model)
        optimizer = attached.optimizer(rule, lr=0.01, **({"momentum": 0.9} if rule is SGD else {}))
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        return {n: attached.w(n) for n in attached.companded}

    assert largest_difference(result("fast"), result("reference")) < 1e-12
