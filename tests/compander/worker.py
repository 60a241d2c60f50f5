"""Two gloo processes with half of the rows each, against one with all: started by test_torch.py."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch
import torch.distributed as dist
from networks import X, Y
from torch import nn

from poise_compander import WeightCompander

STEPS, LIMIT = 20, 1e-12


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def fit(call, attached, x, y) -> None:
    optimizer = attached.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01,
                                   max_grad_norm=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (call(x) - y).square().mean().backward()
        optimizer.step()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check(kind: str, path: str, learn: str) -> None:
    rank = dist.get_rank()
    options = WeightCompander(path=path, learn=learn, a=0.9, b=0.6)
    alone = make()
    reference = options.attach(alone)
    fit(alone, reference, X, Y)
    model = make()
    rows = slice(8 * rank, 8 * rank + 8)
    if kind == "ddp":
        attached = options.attach(model)
        fit(nn.parallel.DistributedDataParallel(model), attached, X[rows], Y[rows])
    else:
        from torch.distributed.fsdp import fully_shard

        if path == "reference":  # parametrizations are made before sharding, v is what is sharded
            attached = options.attach(model)
            fully_shard(model)
        else:  # v follows the shards of w
            fully_shard(model)
            attached = options.attach(model)
        fit(model, attached, X[rows], Y[rows])
    for name in reference.companded:
        difference = float((whole(model[int(name)].weight) - reference.w(name)).abs().max())
        assert difference < LIMIT, f"{name}: {difference}"
        assert attached.scales(name).numbers() is not None
    pairs = zip(attached.pairs, reference.pairs, strict=True)
    for mine, theirs in pairs:
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert float((whole(p) - q.detach()).abs().max()) < LIMIT, (p, q)
    print(f"{kind}-{path}-{learn} equal\n", end="", flush=True)


def leave() -> NoReturn:
    """End this process with status 0 beside threads of gloo, without the interpreter's own end.

    torch keeps the process group beyond `destroy_process_group`: as default arguments of
    `torch.distributed.nn.functional`, where that is imported after the group is made, and in DTensor's
    caches. Its threads live on, and one that asks for Python's lock while the interpreter ends aborts the
    process ("terminate called without an active exception").
    """
    dist.barrier()  # neither leaves while the other still talks to it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for case in sys.argv[1:]:
        check(*case.split("-"))
    leave()
