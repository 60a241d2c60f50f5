"""Two gloo processes with half of the rows each, against one with all: started by test_processes.py."""

from __future__ import annotations

import itertools
import os
import sys

import torch
import torch.distributed as dist
from bone_forms import options, randn
from torch import nn

from poise_bone import Bone

STEPS, LIMIT = 5, 1e-12
FORMS = {"bone": (5, 16), "mini": (4, 8), "bat": (2, 8, 8), "bat_row": (3, 8, 8), "bat_left": (2, 8, 8)}


def fit(call: nn.Module, adapters: list, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for a in adapters for g in a.trainable() for p in g["params"]], lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (call(x) - y).square().mean().backward()
        optimizer.step()


def make() -> tuple[nn.Module, list]:
    """Return a model with a layer of each form, two of them on one weight, and its adapters."""
    torch.manual_seed(0)
    widths = [24, *[16, 24] * 2, 16]
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)]).double()
    places = itertools.cycle(["0", "2", "4"])  # those of 24 inputs and 16 outputs
    return model, [Bone(**options(variant, shape), target_modules=[next(places)]).attach(model, variant)
                   for variant, shape in FORMS.items()]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    x, y, rank = randn(8, 24), randn(8, 16, seed=1), dist.get_rank()
    alone, first = make()
    fit(alone, first, x, y)
    model, second = make()
    rows = slice(4 * rank, 4 * rank + 4)
    fit(nn.parallel.DistributedDataParallel(model), second, x[rows], y[rows])
    for a, b in zip(first, second, strict=True):
        for (key, p), (_, q) in zip(a.tensors(), b.tensors(), strict=True):
            assert p.detach().any(), key
            assert float((p - q).detach().abs().max()) < LIMIT, (a.name, key)
            theirs = [torch.empty_like(q) for _ in range(2)]
            dist.all_gather(theirs, q.detach())
            assert torch.equal(*theirs), (a.name, key)
        print(f"{a.name} equal\n", end="", flush=True)
    dist.barrier()  # neither leaves while the other still talks to it
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that ends beside them
