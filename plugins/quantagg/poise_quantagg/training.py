"""Many small networks of one shape trained as one: a leading "member" axis on every tensor.

A member is one configuration on one set of rows (a fold). Members differ in seed, rows, learning
rate, weight decay, dropout and whatever a task keeps per member; they share the shape of their
parameters, so a step is a handful of batched products instead of a handful per member. A member's
random numbers come from its own streams, and early stopping masks members out, so its result does
not depend on which others are trained beside it.

One by one, a step of such a network costs about a hundred calls of a few microseconds each around
arithmetic that takes less; in a batch the calls are shared. The bound is the arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8
CHUNK = 25  # steps whose random numbers are drawn at once


@dataclass(frozen=True)
class Schedule:
    """How long to train; steps are optimizer steps.

    Parameters
    ----------
    max_steps : int
    eval_every : int
        Steps between validations, a multiple of nothing in particular.
    patience : int
        Steps without a better validation score after which a member stops.
    amsgrad : bool
    """

    max_steps: int = 20_000
    eval_every: int = 100
    patience: int = 500
    amsgrad: bool = True


@dataclass(frozen=True)
class Members:
    """What tells members apart; lists and vectors have length C.

    Parameters
    ----------
    seeds : list of int, in [0, 2^32)
    rows : list of int64 tensors
        Rows each member trains on.
    batch_size : int
        The smallest of it and the fewest rows is used.
    lr, weight_decay, dropout : sequences of float
    width : int
        Units of a hidden layer, for the dropout masks.
    masks : int
        Hidden layers that have dropout before them.
    uniforms : bool
        Whether the task needs one uniform number per row of a batch.
    """

    seeds: Sequence[int]
    rows: Sequence[Tensor]
    batch_size: int
    lr: Sequence[float]
    weight_decay: Sequence[float]
    dropout: Sequence[float] = ()
    width: int = 0
    masks: int = 0
    uniforms: bool = False

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def batch(self) -> int:
        """Rows of a batch."""
        return min(self.batch_size, *(len(r) for r in self.rows))


@dataclass(frozen=True)
class Batch:
    """Random choices of some steps, member first: rows (C, B), masks (C, masks, B, H), uniforms."""

    rows: Tensor
    masks: Tensor | None
    uniforms: Tensor | None


class Task(Protocol):
    """What the members learn. `alive` lists the members that the leading axis stands for."""

    undecayed: frozenset[str]
    scores_start: bool  # whether the untrained parameters may be what is kept

    def init(self, member: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return one member's parameters."""
        ...

    def loss(self, params: Mapping[str, Tensor], batch: Batch, alive: Tensor) -> Tensor:
        """Return the members' training losses, shape (C,)."""
        ...

    def score(self, params: Mapping[str, Tensor], alive: Tensor) -> Tensor:
        """Return the members' validation scores, shape (C,); smaller is better."""
        ...


@dataclass
class Trained:
    """What training leaves: best parameters by member, with their score and step."""

    params: list[dict[str, Tensor]]
    score: Tensor
    step: Tensor
    steps_run: Tensor = field(default_factory=lambda: torch.zeros(0))


class Stream:
    """One member's random numbers: the order of rows, dropout, uniforms; three generators."""

    def __init__(self, members: Members, member: int, dtype: torch.dtype) -> None:
        self.members, self.dtype = members, dtype
        self.rows = members.rows[member]
        self.rate = members.dropout[member] if members.dropout else 0.0
        seed = members.seeds[member]
        self.order, self.drop, self.uniform = (
            torch.Generator().manual_seed(seed * 3 + k) for k in range(3)
        )
        self.left = torch.empty(0, dtype=torch.int64)

    def draw(self, steps: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return rows (steps, B), masks (steps, masks, B, H) or None, uniforms (steps, B) or None."""
        size = self.members.batch
        while len(self.left) < steps * size:
            epoch = self.rows[torch.randperm(len(self.rows), generator=self.order)]
            self.left = torch.cat([self.left, epoch])
        rows, self.left = self.left[: steps * size].view(steps, size), self.left[steps * size :]
        masks = None
        if self.members.masks:
            shape = (steps, self.members.masks, size, self.members.width)
            if self.rate:
                kept = torch.rand(shape, generator=self.drop) >= self.rate
                masks = kept.to(self.dtype).mul_(1 / (1 - self.rate))
            else:
                masks = torch.ones((), dtype=self.dtype).expand(shape)
        uniforms = None
        if self.members.uniforms:
            uniforms = torch.rand(steps, size, generator=self.uniform, dtype=self.dtype)
        return rows, masks, uniforms


class Batches:
    """The members' streams, read in step."""

    def __init__(self, members: Members, dtype: torch.dtype) -> None:
        self.streams = [Stream(members, c, dtype) for c in range(len(members))]
        self.dropout = any(members.dropout)

    def draw(self, alive: Sequence[int], steps: int) -> list[Batch]:
        """Return the next `steps` batches of the members `alive`."""
        drawn = [self.streams[c].draw(steps) for c in alive]
        rows = torch.stack([d[0] for d in drawn], dim=1)
        masks = [d[1] for d in drawn if d[1] is not None and self.dropout]
        uniforms = [d[2] for d in drawn if d[2] is not None]
        mask, uniform = (torch.stack(part, dim=1) if part else None for part in (masks, uniforms))
        return [
            Batch(rows[t], None if mask is None else mask[t], None if uniform is None else uniform[t])
            for t in range(steps)
        ]


class Stack:
    """The members' parameters: one buffer, a contiguous block (C, ...) per name; Adam's moments beside.

    The update is the kernel of torch's own fused Adam, one pass over memory, called without the wrapper
    around it, which takes longer: a block is cut where the learning rate or the decay changes from one
    member to the next, and the pieces with equal ones form a group.
    """

    def __init__(self, params: Sequence[Mapping[str, Tensor]], task: Task, members: Members,
                 amsgrad: bool) -> None:
        self.undecayed, self.amsgrad = task.undecayed, amsgrad
        self.options = list(zip(members.lr, members.weight_decay))
        self.shapes = {name: tensor.shape for name, tensor in params[0].items()}
        blocks = [torch.stack([one[name] for one in params]) for name in self.shapes]
        self.flat = torch.cat([block.reshape(-1) for block in blocks])
        self.m, self.v, self.top = (torch.zeros_like(self.flat) for _ in range(3))
        self._bind(0)

    def _bind(self, step: int) -> None:
        """Make leaves and the optimizer's pieces, all views of the buffers."""
        self.grad = torch.zeros_like(self.flat)
        self.leaves = {}
        for (name, leaf), grad in zip(self.blocks(self.flat).items(), self.blocks(self.grad).values()):
            self.leaves[name] = leaf.detach().requires_grad_()
            self.leaves[name].grad = grad
        self.step = torch.tensor(float(step))
        self.groups: dict[tuple[float, float], list[list[Tensor]]] = {}
        buffers = [self.blocks(b) for b in (self.flat, self.grad, self.m, self.v, self.top)]
        for name in self.shapes:
            for first, last, (lr, decay) in self._runs():
                group = self.groups.setdefault((lr, 0.0 if name in self.undecayed else decay),
                                               [[] for _ in buffers])
                for pieces, blocks in zip(group, buffers):
                    pieces.append(blocks[name][first:last].reshape(-1))

    def _runs(self) -> list[tuple[int, int, tuple[float, float]]]:
        """Return (first, last, options) of neighbouring members with equal options."""
        cuts = [c for c in range(1, len(self.options)) if self.options[c] != self.options[c - 1]]
        edges = [0, *cuts, len(self.options)]
        return [(i, j, self.options[i]) for i, j in itertools.pairwise(edges)]

    def blocks(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the blocks (C, ...) of a buffer by name, as views."""
        count = len(self.options)
        parts = flat.split([count * shape.numel() for shape in self.shapes.values()])
        return {n: part.view(count, *shape) for (n, shape), part in zip(self.shapes.items(), parts)}

    def keep(self, rows: Tensor, step: int) -> None:
        """Drop all but some members."""
        for name in ("flat", "m", "v", "top"):
            kept = [block[rows].reshape(-1) for block in self.blocks(getattr(self, name)).values()]
            setattr(self, name, torch.cat(kept))
        self.options = [self.options[int(c)] for c in rows]
        self._bind(step)

    def detached(self) -> dict[str, Tensor]:
        """Return the parameters without gradients."""
        return {name: leaf.detach() for name, leaf in self.leaves.items()}

    def update(self) -> None:
        """Take one step of Adam with L2 weight decay and clear the gradients."""
        self.step += 1
        for (lr, decay), (w, grad, m, v, top) in self.groups.items():
            torch._fused_adam_(w, grad, m, v, top if self.amsgrad else [], [self.step] * len(w), lr=lr,
                               beta1=BETAS[0], beta2=BETAS[1], weight_decay=decay, eps=EPS,
                               amsgrad=self.amsgrad, maximize=False)
        self.grad.zero_()


def train(
    task: Task, members: Members, schedule: Schedule, *, dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train all members together; each stops by its own validation score and keeps its best.

    Parameters
    ----------
    progress : callable, optional
        Called with (step, members still training) at every validation.
    """
    count = len(members)
    params = [task.init(c, torch.Generator().manual_seed(members.seeds[c])) for c in range(count)]
    stack = Stack([{k: v.to(dtype) for k, v in one.items()} for one in params], task, members,
                  schedule.amsgrad)
    batches = Batches(members, dtype)
    alive = torch.arange(count)
    best = {name: leaf.detach().clone() for name, leaf in stack.leaves.items()}
    score = torch.full((count,), math.inf, dtype=torch.float64)
    at, run = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    if task.scores_start:
        _validate(task, stack, alive, 0, score, at, best)
    queue: list[Batch] = []
    for step in range(1, schedule.max_steps + 1):
        if not queue:
            queue = batches.draw(alive.tolist(), min(CHUNK, schedule.eval_every))[::-1]
        loss = task.loss(stack.leaves, queue.pop(), alive)
        loss.sum().backward()
        stack.update()
        if step % schedule.eval_every and step != schedule.max_steps:
            continue
        run[alive] = step
        finite = _validate(task, stack, alive, step, score, at, best)
        going = finite & (step - at[alive] < schedule.patience)
        if progress:
            progress(step, int(going.sum()))
        if not going.all():
            alive = alive[going]
            if not len(alive):
                break
            stack.keep(going.nonzero()[:, 0], step)
            queue = [_masked(b, going) for b in queue]
    params = [{name: block[c].clone() for name, block in best.items()} for c in range(count)]
    return Trained(params, score, at, run)


@torch.no_grad()
def _validate(task, stack, alive, step, score, at, best) -> Tensor:
    """Score the members alive, keep what is better; return which are still finite."""
    now = task.score(stack.detached(), alive).to(torch.float64)
    finite = torch.isfinite(now)
    better = finite & (now < score[alive])
    rows = alive[better]
    score[rows], at[rows] = now[better], step
    for name, leaf in stack.leaves.items():
        best[name][rows] = leaf.detach()[better]
    return finite


def _masked(batch: Batch, keep: Tensor) -> Batch:
    masks, uniforms = (None if t is None else t[keep] for t in (batch.masks, batch.uniforms))
    return Batch(batch.rows[keep], masks, uniforms)


# ------------------------------------------------------------------ fully connected networks


def mlp_init(sizes: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
    """Return weights W0, b0, ... of a network with the given layer sizes, uniform +-1/sqrt(in)."""
    params = {}
    for k, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        bound = 1 / math.sqrt(inputs)
        for name, shape in ((f"W{k}", (inputs, outputs)), (f"b{k}", (outputs,))):
            drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
            params[name] = (2 * drawn - 1) * bound
    return params


def mlp(
    params: Mapping[str, Tensor], x: Tensor, masks: Tensor | None = None, headless: bool = False
) -> Tensor:
    """Apply C networks to inputs (C, B, d): ELU between layers, the last layer plain.

    Parameters
    ----------
    masks : tensor, shape (C, hidden - 1, B, H), optional
        Dropout before each hidden layer but the first.
    headless : bool
        All layers are hidden ones: the output layer lies elsewhere.
    """
    depth = sum(name.startswith("W") for name in params)
    for k in range(depth):
        if masks is not None and 0 < k <= masks.shape[1]:
            x = x * masks[:, k - 1]
        x = torch.baddbmm(params[f"b{k}"][:, None], x, params[f"W{k}"])
        if headless or k < depth - 1:
            x = torch.nn.functional.elu(x)
    return x


def pinball(residual: Tensor, levels: Tensor, huber: Tensor | None = None) -> Tensor:
    """Return the pinball loss of residuals (..., m), Huberised within +-huber (spec: code only).

    h(u) = (u^2 / 2 if |u| < a else a (|u| - a / 2)) / a, times the level or its complement; a = 0
    is the plain loss.
    """
    if huber is None or not huber.any():
        # one product: its gradient is a product too, that of a maximum takes several passes
        return residual * torch.where(residual >= 0, levels, levels - 1)
    a = huber.clamp_min(1e-12)
    with torch.no_grad():  # h(u) = c (u - a c / 2) with c = h'(u): a constant c leaves the gradient right
        slope = (residual / a).clamp_(-1, 1)
        bend = slope * (a / 2)
        slope *= torch.where(residual >= 0, levels, 1 - levels)
    return slope * (residual - bend)


def batch_size(n: int) -> int:
    """Return the paper's batch size, 2^(3 + floor(log10 n)): 32 below 1,000 rows, 64 below 10,000."""
    return 2 ** (3 + math.floor(math.log10(max(n, 1))))
