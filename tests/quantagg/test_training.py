"""Batched training: each member's result is that of plain torch on its own, and of no company."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from torch.nn import functional as F

from poise_quantagg import scores
from poise_quantagg.aggregators import search
from poise_quantagg.aggregators.fine import FineHead, train_fine
from poise_quantagg.aggregators.gates import GateConfig, GateTask, Rows, start_logits
from poise_quantagg.base.net_task import NetTask, gaussian_loss
from poise_quantagg.base.nets import NetRegressor
from poise_quantagg.training import (
    CHUNK,
    Batch,
    Members,
    Schedule,
    Stream,
    batch_size,
    mlp,
    mlp_init,
    pinball,
    train,
)

SAME = 1e-9  # of parameters of size 1, in float64
STEPS = [50, pytest.param(500, marks=pytest.mark.slow)]
KINDS = ("gaussian", "simultaneous", "multi")
LEVELS = np.arange(1, 20) / 20


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def table(n=120, d=3, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    y = X[:, 0] + np.exp(0.5 * X[:, 1]) * rng.normal(size=n)
    return X, (y - y.mean()) / y.std()


def alike(own, other):
    assert own.keys() == other.keys()
    for name, value in own.items():
        assert torch.allclose(value, other[name], rtol=SAME, atol=SAME), name


# ------------------------------------------------------------------ plain torch, one by one


class Plain(torch.nn.Module):
    """The same network of torch's own layers, from a member's first parameters."""

    def __init__(self, params):
        super().__init__()
        depth = len(params) // 2
        self.layers = torch.nn.ModuleList()
        for k in range(depth):
            layer = torch.nn.Linear(*params[f"W{k}"].shape, dtype=torch.float64)
            layer.weight.data, layer.bias.data = params[f"W{k}"].T.clone(), params[f"b{k}"].clone()
            self.layers.append(layer)

    def forward(self, x, masks):
        for k, layer in enumerate(self.layers):
            if masks is not None and 0 < k < len(self.layers) - 1:
                x = x * masks[k - 1]
            x = layer(x)
            if k < len(self.layers) - 1:
                x = F.elu(x)
        return x

    def params(self):
        return {f"{n}{k}": t for k, layer in enumerate(self.layers)
                for n, t in (("W", layer.weight.T.detach()), ("b", layer.bias.detach()))}


def alone(task, members, member, schedule, forward):
    """Train one member by torch.optim.Adam on the batches of its own stream; return parameters."""
    start = task.init(member, torch.Generator().manual_seed(members.seeds[member]))
    net = Plain(start) if "W0" in start else None
    logits = None if net else torch.nn.Parameter(start["logits"].clone())
    decay, last = members.weight_decay[member], len(start) // 2 - 1
    if net:
        spared = [net.layers[-1].bias] if f"b{last}" in task.undecayed else []
        rest = [w for w in net.parameters() if all(w is not s for s in spared)]
        groups = [{"params": rest, "weight_decay": decay}, {"params": spared, "weight_decay": 0.0}]
    else:
        groups = [{"params": [logits]}]
    optimizer = torch.optim.Adam(groups, lr=members.lr[member], amsgrad=schedule.amsgrad)
    stream, chunk = Stream(members, member, torch.float64), min(CHUNK, schedule.eval_every)
    for step in range(schedule.max_steps):
        if step % chunk == 0:
            rows, masks, uniforms = stream.draw(chunk)
        at = step % chunk
        optimizer.zero_grad()
        forward(net or logits, rows[at], masks[at] if masks is not None and stream.rate else None,
                None if uniforms is None else uniforms[at]).backward()
        optimizer.step()
    return net.params() if net else {"logits": logits.detach()}


def net_loss(task, member):
    """Return the loss of one batch of a base network, written for one network."""
    x, y = task.x[task.part[member]], task.y[task.part[member]]
    huber = task.huber[member, 0]

    def forward(net, rows, masks, uniforms):
        if task.kind == "gaussian":
            out = net(x[rows], masks)
            variance = F.softplus(out[:, 1]) + 1e-6
            return F.gaussian_nll_loss(out[:, 0], y[rows], variance, eps=0)
        if task.kind == "multi":
            return pinball(y[rows, None] - net(x[rows], masks), task.levels, huber).mean()
        tau = uniforms.clamp(1e-3, 1 - 1e-3)[:, None]
        out = net(torch.cat([x[rows], tau - 0.5], dim=1), masks)
        return pinball(y[rows, None] - out, tau, huber).mean()

    return forward


def net_problem(kind, steps, depth=3, width=16):
    """Return six members: two folds x three configurations that differ in all that may differ."""
    (X, y), other = table(), table(seed=1)
    folds = [torch.arange(0, 90), torch.arange(30, 120)]
    members = Members(
        seeds=list(range(6)), rows=folds * 3, batch_size=batch_size(120),
        lr=[1e-3, 1e-3, 3e-3, 3e-4, 1e-2, 1e-3],
        weight_decay=[1e-5, 1e-5, 0.0, 1e-2, 1e-7, 1e-5], dropout=[0.0, 0.0, 0.1, 0.1, 0.05, 0.3],
        width=width, masks=depth - 1, uniforms=kind == "simultaneous")
    held = [torch.arange(90, 120), torch.arange(0, 30)] * 3
    task = NetTask(kind, [(X, y), other] * 3, held, LEVELS, [0.0, 0.0, 0.01, 0.01, 0.0, 0.5],
                   (width, depth), torch.float64, parts=[0, 1] * 3)
    return task, members, Schedule(steps, steps, 10**9, amsgrad=True)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_networks_trained_together_are_those_of_plain_torch(kind, steps):
    task, members, schedule = net_problem(kind, steps)
    trained = train(task, members, schedule, dtype=torch.float64)
    assert trained.step.tolist() == [steps] * 6, "the parameters compared must be the last ones"
    for c in range(6):
        alike(trained.params[c], alone(task, members, c, schedule, net_loss(task, c)))


def gate_problem(resolution, local, steps, *, levels=LEVELS, amsgrad=False, **more):
    """Return four gates from equal weights, which are better after any number of steps."""
    (X, y), n, width, depth = table(), 120, 8, 2
    rng = np.random.default_rng(2)
    p, m = 3, len(levels)
    Z = y[:, None, None] * np.array([0.9, 0.5, 0.0])[:, None] + 0.4 * rng.normal(size=(n, p, 1))
    Z = Z + ndtri(levels) * np.array([0.4, 0.8, 1.0])[:, None]
    configs = [GateConfig(width if local else 0, depth, 0.0, 1e-3, 0.0, w, d)
               for w, d in ((0.0, 0.0), (1.0, 0.01), (5.0, 0.05), (0.5, 0.1))]
    shape = {"coarse": (p,), "medium": (p, m), "fine": (m, p * m)}[resolution]
    rows = Rows(Z[:90], y[:90], X[:90]), Rows(Z[90:], y[90:], X[90:])
    task = GateTask(resolution, *rows, levels, configs, np.zeros(shape), torch.float64, **more)
    members = Members(
        seeds=[5, 6, 7, 8],
        rows=[torch.arange(90), torch.arange(10, 90), torch.arange(80), torch.arange(90)],
        batch_size=32, lr=[1e-3, 1e-3, 3e-3, 5e-4], weight_decay=[1e-7, 1e-2, 0.0, 0.0],
        dropout=[0.0, 0.1, 0.1, 0.05] if local else [], width=width if local else 0,
        masks=depth - 1 if local else 0)
    return task, members, Schedule(steps, steps, 10**9, amsgrad=amsgrad)


def gate_loss(task, member):
    """Return the loss of one batch of one gate: softmax, weighted sum, pinball, all-pairs penalty."""
    p, m = task.p, task.m

    def forward(gate, rows, masks, uniforms):
        Z, y = task.Z[rows], task.y[rows]
        logits = gate(task.X[rows], masks) if isinstance(gate, Plain) else gate.expand(len(rows), -1)
        if task.resolution == "coarse":
            q = torch.einsum("bp,bpm->bm", logits.softmax(1), Z)
        elif task.resolution == "medium":
            q = torch.einsum("bpm,bpm->bm", logits.view(-1, p, m).softmax(1), Z)
        else:
            q = torch.einsum("bkv,bv->bk", logits.view(-1, m, p * m).softmax(2), Z.flatten(1))
        extra = 0.0
        if task.penalty:
            unit = {"constant": 1.0, "distance": 0.01 * (task.levels[None] - task.levels[:, None])}
            margin = task.margin[member] * unit[task.penalty]
            pairs = torch.triu(torch.relu(q[:, :, None] - q[:, None, :] + margin), 1)
            extra = task.strength[member] * pairs.sum() / (len(rows) * m * (m - 1) / 2)
        return pinball(y[:, None] - q, task.levels).mean() + extra

    return forward


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("penalty", [None, "constant", "distance"])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("resolution", ["coarse", "medium"])
def test_gates_trained_together_are_those_of_plain_torch(resolution, local, penalty, steps):
    task, members, schedule = gate_problem(resolution, local, steps, penalty=penalty)
    trained = train(task, members, schedule, dtype=torch.float64)
    assert trained.step.tolist() == [steps] * 4
    for c in range(4):
        alike(trained.params[c], alone(task, members, c, schedule, gate_loss(task, c)))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_global_fine_and_amsgrad(amsgrad):
    task, members, schedule = gate_problem("fine", False, 50, amsgrad=amsgrad)
    trained = train(task, members, schedule, dtype=torch.float64)
    for c in range(4):
        alike(trained.params[c], alone(task, members, c, schedule, gate_loss(task, c)))


# ------------------------------------------------------------------ local fine, in chunks


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("how", [{}, {"penalty": "constant"}, {"isotonize": "sort"}, {"rank": 3}])
def test_fine_in_chunks_is_plain_autograd(monkeypatch, how, steps):
    levels = np.arange(1, 8) / 8
    task, members, schedule = gate_problem("fine", True, steps, levels=levels, **how)
    monkeypatch.setattr("poise_quantagg.aggregators.fine._CHUNK_NUMBERS", 2 * 8 * 21)  # two levels a chunk
    chunked = train_fine(task, members, schedule, torch.float64)
    together = train(task, members, schedule, dtype=torch.float64)
    assert chunked.step.tolist() == together.step.tolist() == [steps] * 4
    assert chunked.score == pytest.approx(together.score.numpy(), rel=SAME)
    for c in range(4):
        alike(chunked.params[c], together.params[c])
        if "isotonize" not in how and "rank" not in how:
            alike(chunked.params[c], alone(task, members, c, schedule, gate_loss(task, c)))


def test_the_fine_head_has_the_gradient_of_autograd():
    g = torch.Generator().manual_seed(0)
    W, b, h, Z, grad = (torch.randn(shape, generator=g, dtype=torch.float64)
                        for shape in ((7, 8, 21), (7, 21), (5, 8), (5, 21), (5, 7)))
    h.requires_grad_()
    direct = torch.einsum("kbv,bv->bk", (torch.einsum("bh,khv->kbv", h, W) + b[:, None]).softmax(2), Z)
    head = FineHead(W.clone(), b.clone())
    with torch.no_grad():
        q, kept = head.forward(h, Z, keep=True)
        back = head.backward(h, Z, q, kept, grad, 1, 0.0, 0.0)
    assert torch.allclose(q, direct, rtol=1e-12)
    assert torch.allclose(back, torch.autograd.grad(direct, h, grad)[0], rtol=1e-10)


# ------------------------------------------------------------------ company


def chosen(members, keep):
    """Return the same members without the others."""
    lists = {f.name: [getattr(members, f.name)[c] for c in keep] for f in dataclasses.fields(members)
             if isinstance(getattr(members, f.name), list) and getattr(members, f.name)}
    return dataclasses.replace(members, **lists)


@pytest.mark.parametrize("kind", KINDS)
def test_members_stop_by_themselves_and_company_makes_no_difference(kind):
    """Some stop early; those beside them, and those left, get what they would get alone."""
    task, members, _ = net_problem(kind, 1, depth=2)
    members = dataclasses.replace(members, lr=[1e-3, 0.3, 3e-3, 3e-4, 0.1, 1e-3])  # two that overshoot
    schedule = Schedule(max_steps=400, eval_every=20, patience=60)
    told = []
    trained = train(task, members, schedule, dtype=torch.float64, progress=lambda *a: told.append(a))
    assert len(set(trained.steps_run.tolist())) > 1, "no member stopped before the others"
    assert all(run == 400 or run - at == 60 for run, at in zip(trained.steps_run, trained.step))
    assert [left for _, left in told] == sorted((left for _, left in told), reverse=True)
    for c in range(6):
        part = NetTask(kind, [(task.x[k].numpy(), task.y[k].numpy()) for k in [task.part[c]]],
                       [task.held[c]], LEVELS, [float(task.huber[c])], (16, 2), torch.float64, parts=[0])
        single = train(part, chosen(members, [c]), schedule, dtype=torch.float64)
        assert single.step[0] == trained.step[c] and single.steps_run[0] == trained.steps_run[c]
        assert float(single.score[0]) == pytest.approx(float(trained.score[c]), rel=1e-8)
        for name, value in single.params[0].items():
            assert torch.allclose(value, trained.params[c][name], rtol=1e-8, atol=1e-8)


def test_the_best_weights_are_kept_and_not_the_last_ones():
    task, members, _ = net_problem("multi", 1, depth=2)
    members = dataclasses.replace(members, lr=[0.1] * 6)
    trained = train(task, members, Schedule(200, 10, 10**9), dtype=torch.float64)
    stacked = {k: torch.stack([p[k] for p in trained.params]) for k in trained.params[0]}
    again = task.score(stacked, torch.arange(6))
    assert torch.allclose(again, trained.score)
    assert (trained.step < 200).any()


class Fragile(NetTask):
    """A task whose members turn NaN at will."""

    broken = ()

    def loss(self, params, batch, alive):
        factor = [math.nan if int(c) in self.broken else 1.0 for c in alive]
        return super().loss(params, batch, alive) * torch.tensor(factor)


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_that_turns_nan_leaves_and_harms_no_other(kind):
    task, members, _ = net_problem(kind, 1)
    schedule = Schedule(60, 20, 10**9)
    whole = train(task, members, schedule, dtype=torch.float64)
    fragile = task
    fragile.__class__, fragile.broken = Fragile, (1, 4)
    hurt = train(fragile, members, schedule, dtype=torch.float64)
    for c in range(6):
        if c in fragile.broken:
            assert hurt.step[c] == 0 and hurt.steps_run[c] == 20
            assert math.isfinite(hurt.score[c]) and all(t.isfinite().all() for t in hurt.params[c].values())
        else:
            alike(hurt.params[c], whole.params[c])


def test_all_members_nan_is_an_end_and_a_search_says_so():
    task, members, _ = net_problem("multi", 1)
    task.y *= float("nan")
    trained = train(task, members, Schedule(60, 20, 10**9), dtype=torch.float64)
    assert trained.steps_run.tolist() == [20] * 6 and not trained.score.isfinite().any()
    gates, members, schedule = gate_problem("fine", True, 20, levels=np.arange(1, 4) / 4)
    gates.held[1][:] = float("nan")
    assert not train_fine(gates, members, schedule, torch.float64).score.isfinite().any()


# ------------------------------------------------------------------ streams


def test_a_stream_does_not_depend_on_how_it_is_read():
    _, members, _ = net_problem("simultaneous", 1)
    once, often = (Stream(members, 2, torch.float64) for _ in range(2))
    whole = once.draw(30)
    parts = [often.draw(k) for k in (1, 4, 20, 5)]
    for own, pieces in zip(whole, zip(*parts)):
        assert torch.equal(own, torch.cat(pieces))


def test_an_epoch_visits_every_row_once_and_dropout_keeps_the_mean():
    _, members, _ = net_problem("multi", 1)
    rows, masks, _ = Stream(members, 5, torch.float64).draw(90)
    size = members.batch
    assert rows.flatten()[: 90 * (90 * size // 90)].bincount(minlength=120)[30:].unique().tolist() == [size]
    assert set(masks.unique().tolist()) == {0.0, 1 / 0.7}
    assert masks.mean().item() == pytest.approx(1, abs=0.01)


def test_members_of_one_seed_are_equal_and_of_two_are_not():
    task, members, schedule = net_problem("multi", 20)
    same = dataclasses.replace(members, seeds=[3] * 6, lr=[1e-3] * 6, weight_decay=[0.0] * 6,
                               dropout=[0.1] * 6)
    task.huber *= 0
    trained = train(task, same, schedule, dtype=torch.float64)
    alike(trained.params[0], trained.params[2])
    other = train(task, dataclasses.replace(same, seeds=[3, 3, 4, 3, 3, 3]), schedule, dtype=torch.float64)
    assert not torch.allclose(other.params[0]["W0"], other.params[2]["W0"])


# ------------------------------------------------------------------ losses


def test_huber_pinball_by_hand():
    u = torch.tensor([-2.0, -0.1, 0.0, 0.1, 2.0], dtype=torch.float64)
    a, tau = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    h = torch.tensor([1.75, 0.01, 0.0, 0.01, 1.75], dtype=torch.float64)
    assert torch.allclose(pinball(u, tau, a), h * torch.tensor([0.7, 0.7, 0.3, 0.3, 0.3]).double())
    assert torch.allclose(pinball(u, tau, a * 0), torch.maximum(tau * u, (tau - 1) * u))
    assert torch.autograd.gradcheck(lambda x: pinball(x, tau, a), (u[[0, 1, 3, 4]].requires_grad_(),))
    both = pinball(u[None].expand(2, -1), tau, torch.tensor([[0.0], [0.5]]).double())
    assert torch.allclose(both[0], pinball(u, tau)) and torch.allclose(both[1], pinball(u, tau, a))


def test_the_gaussian_loss_is_torchs():
    g = torch.Generator().manual_seed(0)
    out, y = torch.randn(3, 7, 2, generator=g), torch.randn(3, 7, generator=g)
    variance = F.softplus(out[..., 1]) + 1e-6
    expected = F.gaussian_nll_loss(out[..., 0], y, variance, reduction="none", eps=0)
    assert torch.allclose(gaussian_loss(out, y), expected)


def test_row_weights_scale_losses_and_scores():
    X, y = table()
    rows, held, w = torch.arange(90), torch.arange(90, 120), np.random.default_rng(0).uniform(0, 2, 120)
    tasks = [NetTask("multi", [(X, y)], [held], LEVELS, [0.0], (8, 2), torch.float64, parts=[0],
                     sample_weight=s) for s in (None, np.full(120, 3.0), w)]
    params = {k: v[None] for k, v in mlp_init(tasks[0].sizes, torch.Generator().manual_seed(0)).items()}
    batch = Batch(rows[None], None, None)
    one, three, some = (t.loss(params, batch, torch.tensor([0])) for t in tasks)
    assert torch.allclose(three, 3 * one)
    q = mlp(params, tasks[0].x)[0]
    losses = pinball(tasks[0].y[0][:, None] - q, tasks[0].levels).mean(1).numpy()
    assert float(some) == pytest.approx((losses[:90] * w[:90]).mean())
    scores = [float(t.score(params, torch.tensor([0]))) for t in tasks]
    assert scores[0] == pytest.approx(scores[1]) == pytest.approx(losses[90:].mean())
    assert scores[2] == pytest.approx(np.average(losses[90:], weights=w[90:]))


@pytest.mark.parametrize("penalty", ["constant", "adaptive", "distance"])
def test_the_penalty_reaches_the_parameters(penalty):
    """The gradient is that of finite differences, and the penalty changes it."""
    profile = np.sort(np.random.default_rng(0).normal(size=len(LEVELS)))
    task, _, _ = gate_problem("medium", True, 1, penalty=penalty, profile=profile)
    task.strength *= 100
    params = task.init(1, torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(2)
    params = {k: (v + torch.randn(v.shape, generator=g, dtype=torch.float64))[None].requires_grad_()
              for k, v in params.items()}
    batch = Batch(torch.arange(20)[None], None, None)
    loss = lambda p: task.loss(p, batch, torch.tensor([1])).sum()  # noqa: E731
    grads = torch.autograd.grad(loss(params), list(params.values()))
    step = {k: 1e-6 * torch.randn(v.shape, generator=g, dtype=torch.float64) for k, v in params.items()}
    with torch.no_grad():
        up, down = (loss({k: v + sign * step[k] for k, v in params.items()}) for sign in (1, -1))
    slope = sum(float((a * b).sum()) for a, b in zip(grads, step.values()))
    assert float(up - down) / 2 == pytest.approx(slope, rel=1e-4)
    task.penalty = None
    plain = torch.autograd.grad(loss(params), list(params.values()))
    assert not torch.allclose(plain[-1], grads[-1])


@pytest.mark.parametrize("resolution", ["coarse", "medium", "fine"])
def test_starting_logits_are_the_starting_weights(resolution):
    rng = np.random.default_rng(0)
    w = {"coarse": rng.dirichlet(np.ones(3)), "medium": rng.dirichlet(np.ones(3), size=19).T,
         "fine": rng.dirichlet(np.ones(57), size=19)}[resolution]
    logits = start_logits(w, axis=1 if resolution == "fine" else 0)
    axis = 1 if resolution == "fine" else 0
    soft = np.exp(logits) / np.exp(logits).sum(axis=axis, keepdims=True)
    assert soft == pytest.approx(0.95 * w + 0.05 / w.shape[axis])


# ------------------------------------------------------------------ the search around it


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_returns_a_network_for_each_part(kind):
    X, y = table(200)
    model = NetRegressor(levels=LEVELS.tolist(), kind=kind, n_iter=3, width=16, depth=2, max_steps=250)
    parts = [np.arange(0, 150), np.arange(50, 200)]
    first, second = model.fit_many(X, y, None, parts)
    assert all(fitted.best_params_["width"] == 16 for fitted in (first, second))
    q, other = first.predict_quantiles(X), second.predict_quantiles(X)
    assert q.dtype == np.float64 and q.shape == (200, 19) and not np.allclose(q, other)
    marginal = np.quantile(y, LEVELS)
    for predicted in (q, other):
        assert scores.pinball(y, predicted, LEVELS) < scores.pinball(y, marginal + 0 * q, LEVELS)


def test_draws_are_distinct_points_of_the_papers_spaces():
    options = search.SearchOptions("medium", True, penalty="constant", n_iter=10_000)
    drawn = search.draw(options)
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 3 * 2 * 5 * 5
    assert search.draw(dataclasses.replace(options, n_iter=20)) == drawn[:20]
    assert len(search.draw(search.SearchOptions("coarse", False, n_iter=20))) == 2
