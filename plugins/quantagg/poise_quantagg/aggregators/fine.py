"""Local fine gates (the paper's DQA) in chunks of output levels.

The output layer holds m H pm numbers (3.8 million at p = 6, m = 99, H = 64), more than everything
else together, and a step must read them twice, and read and write them with Adam's two moments. So a
chunk of output levels goes through logits, softmax and contraction while it is in the cache, and on
the way back through its gradient and its Adam step (torch's own kernel) at once: the gradient never
goes to memory.

Bytes of one step: 4 m H pm (1 + 1 + 6) with the forward read, the backward read, and w, m, v read and
written; arithmetic: 3 B m H pm multiply-adds, forward and for two gradients. At B = 32 the bytes are
the larger of the two (`benchmarks/local_fine`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from poise_quantagg.training import BETAS, EPS, Batches, Members, Schedule, Stack, Trained, mlp

_CHUNK_NUMBERS = 1 << 18  # weights of the output layer that a chunk holds


class FineHead:
    """The output layer W (m, H, P), b (m, P) with its moments; P = pm input predictions."""

    def __init__(self, W: Tensor, b: Tensor) -> None:
        self.W, self.b = W.contiguous(), b.contiguous()
        self.moments = [torch.zeros_like(t) for t in (self.W, self.W, self.b, self.b)]
        m, H, P = W.shape
        step = max(1, _CHUNK_NUMBERS // (H * P))
        self.chunks = [slice(k, min(m, k + step)) for k in range(0, m, step)]

    def forward(self, h: Tensor, Z: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """Return predictions (B, m) from hidden units (B, H) and Z (B, P), and the weights kept."""
        q = torch.empty(len(h), len(self.W), dtype=h.dtype)
        kept = []
        for part in self.chunks:
            W = self.W[part]
            w = torch.baddbmm(self.b[part][:, None], h.expand(len(W), -1, -1), W)
            w = torch.softmax(w, dim=2)
            q[:, part] = (w * Z).sum(dim=2).T
            if keep:
                kept.append(w)
        return q, kept

    def backward(self, h: Tensor, Z: Tensor, q: Tensor, kept: list[Tensor], grad: Tensor, step: int,
                 lr: float, weight_decay: float) -> Tensor:
        """Update the layer by Adam for the gradient (B, m) of q; return that of h, (B, H)."""
        back = torch.zeros_like(h)
        across = h.T.contiguous()
        steps = torch.tensor(float(step))
        for part, w in zip(self.chunks, kept):
            W = self.W[part]
            # d softmax-weighted sum: w (Z - q), times the gradient of q
            t = (Z - q[:, part].T[:, :, None]).mul_(w).mul_(grad[:, part].T[:, :, None])
            back += torch.bmm(t, W.transpose(1, 2)).sum(dim=0)
            dW, db = torch.matmul(across, t), t.sum(dim=1)
            mW, vW, mb, vb = (t[part] for t in self.moments)
            for value, g, first, second, decay in ((W, dW, mW, vW, weight_decay),
                                                   (self.b[part], db, mb, vb, 0.0)):
                torch._fused_adam_([value], [g], [first], [second], [], [steps], lr=lr, beta1=BETAS[0],
                                   beta2=BETAS[1], weight_decay=decay, eps=EPS, amsgrad=False,
                                   maximize=False)
        return back


def train_fine(task, members: Members, schedule: Schedule, dtype: torch.dtype = torch.float32,
               progress=None) -> Trained:
    """Train local fine gates one by one; the same rules as `training.train`, Adam without AMSGrad.

    Parameters
    ----------
    task : GateTask
        Of resolution fine and local.
    """
    one = [_train_one(task, members, c, schedule, dtype, progress) for c in range(len(members))]
    return Trained(
        [o[0] for o in one], *(torch.tensor([o[k] for o in one], dtype=t)
                               for k, t in ((1, torch.float64), (2, torch.int64), (3, torch.int64))),
    )


def _train_one(task, members: Members, member: int, schedule: Schedule, dtype, progress):
    params = {k: v.to(dtype) for k, v in
              task.init(member, torch.Generator().manual_seed(members.seeds[member])).items()}
    head, trunk_params = split(params, task.m)
    alone = Members(seeds=[members.seeds[member]], rows=[members.rows[member]],
                    batch_size=members.batch_size, lr=[members.lr[member]],
                    weight_decay=[members.weight_decay[member]], dropout=[members.dropout[member]],
                    width=members.width, masks=members.masks)
    trunk = Stack([trunk_params], task, alone, False)
    batches, alive = Batches(alone, dtype), torch.tensor([member])
    best, score, at, step = None, math.inf, 0, 0
    queue: list = []
    for step in range(schedule.max_steps + 1):
        if step % schedule.eval_every == 0 or step == schedule.max_steps:
            now = _score(task, trunk, head)
            if not math.isfinite(now):
                break
            if now < score and (step or task.scores_start):
                score, at, best = now, step, _copy(trunk, head)
            if progress:
                progress(step, 1)
            if step - at >= schedule.patience or step == schedule.max_steps:
                break
        if not queue:
            queue = batches.draw([0], min(25, schedule.eval_every))[::-1]
        _step(task, trunk, head, queue.pop(), step + 1, alone, alive)
    return best or _copy(trunk, head), score, at, step


def split(params: dict[str, Tensor], m: int) -> tuple[FineHead, dict[str, Tensor]]:
    """Take the output layer W (H, m P), b (m P) off a network's parameters."""
    last = len(params) // 2 - 1
    W, b = params[f"W{last}"], params[f"b{last}"]
    P = b.numel() // m
    head = FineHead(W.view(-1, m, P).transpose(0, 1), b.view(m, P))
    return head, {k: v for k, v in params.items() if k not in (f"W{last}", f"b{last}")}


def _copy(trunk: Stack, head: FineHead) -> dict[str, Tensor]:
    params = {name: leaf[0].detach().clone() for name, leaf in trunk.leaves.items()}
    last = len(params) // 2
    params[f"W{last}"] = head.W.transpose(0, 1).reshape(head.W.shape[1], -1).clone()
    params[f"b{last}"] = head.b.reshape(-1).clone()
    return params


def _step(task, trunk: Stack, head: FineHead, batch, step: int, members: Members, alive: Tensor) -> None:
    rows = batch.rows
    h = mlp(trunk.leaves, task.X[rows], batch.masks, headless=True)
    Z = task.Z[rows[0]].flatten(1)
    with torch.no_grad():
        q, kept = head.forward(h[0], Z, keep=True)
    leaf = q.clone()[None].requires_grad_()
    loss = task.objective(leaf, task.y[rows], None if task.s is None else task.s[rows], alive)
    grad, = torch.autograd.grad(loss.sum(), leaf)
    with torch.no_grad():
        back = head.backward(h[0], Z, q, kept, grad[0], step, members.lr[0], members.weight_decay[0])
    h.backward(back[None])
    trunk.update()


@torch.no_grad()
def _score(task, trunk: Stack, head: FineHead) -> float:
    from poise_quantagg import monotone
    from poise_quantagg.training import pinball

    Z, y, X, s = task.held
    total = 0.0
    for i in range(0, len(y), 256):
        part = slice(i, i + 256)
        h = mlp(trunk.leaves, X[part][None], headless=True)[0]
        q, _ = head.forward(h, Z[part].flatten(1), keep=False)
        q = monotone.isotonize(q, task.isotonize or "sort", task.tau)
        loss = pinball(y[part, None] - q, task.levels).mean(dim=1)
        total += float((loss if s is None else loss * s[part]).sum())
    return total / float(len(y) if s is None else s.sum())

