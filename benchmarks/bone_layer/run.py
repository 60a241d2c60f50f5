"""One layer with an adapter: time of forward and forward + backward, bytes kept, peak of temporaries.

Run: python benchmarks/bone_layer/run.py [--rounds 30] [--sizes 1024 2048] [--tokens 1 64 1024] [--device
cpu] (needs peft)
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import torch
from torch import Tensor, nn

from poise_bone import Bone

R = 64
LIBC = ctypes.CDLL(None)
PEFT: dict[str, Callable[[int], Any]] = {
    "peft bat": lambda n: peft.MissConfig(r=R, target_modules=["0"], init_weights="bat"),
    "peft miss": lambda n: peft.MissConfig(r=R, target_modules=["0"]),
    # r (in + out) parameters against r * out: half of r on a square layer
    "LoRA": lambda n: peft.LoraConfig(r=R // 2, lora_alpha=R, target_modules=["0"]),
}
OURS = {"bat": "bat", "bat_row": "bat_row", "bat_left": "bat_left", "bone": "bone"}


def arms(n: int, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return a square layer by arm; blocks are not zero, so that nothing is skipped."""
    found: dict[str, nn.Module] = {}
    for name in ("base", *OURS, *PEFT):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(n, n, bias=False)).to(device, dtype)
        if name in OURS:
            Bone(r=R, variant=OURS[name]).attach(model)
        elif name in PEFT:
            model = peft.get_peft_model(model, PEFT[name](n))  # type: ignore[arg-type]
        else:
            model.requires_grad_(False)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.01)
        found[name] = model
    return found


def step(model: nn.Module, x: Tensor, dy: Tensor, backward: bool) -> None:
    """One forward pass, or one of both."""
    if not backward:
        with torch.no_grad():
            model(x)
        return
    x.grad = None
    model.zero_grad(set_to_none=True)
    model(x).backward(dy)


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def give_back() -> None:
    """Return freed memory to the system, so that no arm pays for what another left behind."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def times(models: dict[str, nn.Module], n: int, tokens: int, backward: bool, rounds: int, device: str,
          dtype: torch.dtype) -> dict[str, list[float]]:
    """Return seconds of each arm, one of each a round, in an order that turns."""
    x = torch.randn(tokens, n, device=device, dtype=dtype, requires_grad=backward)
    dy = torch.randn(tokens, n, device=device, dtype=dtype)
    found: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for k in range(rounds + 2):
        for name in names[k % len(names):] + names[: k % len(names)]:
            wait(device)
            give_back()
            started = time.perf_counter()
            step(models[name], x, dy, backward)
            wait(device)
            if k >= 2:
                found[name].append(time.perf_counter() - started)
    return found


def kept(model: nn.Module, n: int, tokens: int) -> int:
    """Return the bytes that autograd keeps apart from x, W and what trains."""
    x = like(model, tokens, n).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(found.values())


def like(model: nn.Module, *shape: int) -> Tensor:
    """Return random numbers of the type and place of a model's weights."""
    p = min(model.parameters(), key=lambda p: p.element_size())  # what trains may have a wider type
    return torch.randn(*shape, device=p.device, dtype=p.dtype)


def peak(model: nn.Module, n: int, tokens: int) -> int:
    """Return the peak of what both passes allocate, in bytes, without y, dx and the gradients."""
    x, dy = like(model, tokens, n).requires_grad_(), like(model, tokens, n)
    step(model, x, dy, backward=True)
    x.grad = None
    model.zero_grad(set_to_none=True)
    most = peak_on_gpu(model, x, dy) if x.is_cuda else peak_on_cpu(model, x, dy)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return most - 2 * x.numel() * x.element_size() - trained


def peak_on_gpu(model: nn.Module, x: Tensor, dy: Tensor) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(x).backward(dy)
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(model: nn.Module, x: Tensor, dy: Tensor) -> int:
    with torch.profiler.profile(profile_memory=True) as trace:
        model(x).backward(dy)
    events: Any = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def compared(found: dict[str, list[float]]) -> dict[str, float]:
    """Return medians of paired ratios to PEFT's bat and to LoRA."""
    return {f"{name} / "
            f"{ref}": statistics.median(a / b for a, b in zip(found[name], found[ref], strict=True))
            for ref in ("peft bat", "LoRA") for name in found if name != ref}


def timed(
    models: dict[str, nn.Module], n: int, tokens: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time every arm forward, and forward and backward."""
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    rows = []
    for backward in (False, True):
        rounds = max(5, options.rounds * (4 if tokens < 1024 else 1) // (1 if n < 2048 else 2))
        found = times(models, n, tokens, backward, rounds, options.device, dtype)
        ms = {name: 1e3 * statistics.median(v) for name, v in found.items()}
        rows.append({"n": n, "tokens": tokens, "backward": backward, "ms": ms, "ratios": compared(found)})
        print(summary(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Time every arm, print ratios, and write `results/latest.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for n in options.sizes:
        models = arms(n, options.device, torch.float32 if options.device == "cpu" else torch.bfloat16)
        for tokens in options.tokens:
            rows += timed(models, n, tokens, options)
        for name, model in models.items():
            if name != "base":
                weight = sum(p.numel() * p.element_size() for p in models["base"].parameters())
                rows.append({"n": n, "arm": name, "kept": {t: kept(model, n, t) for t in (1, 64, 1024)},
                             "peak": peak(model, n, 1024), "weight": weight})
                print(rows[-1], flush=True)
    out = Path(__file__).with_name("results") / ("latest.json" if options.device == "cpu" else "gpu.json")
    out.parent.mkdir(exist_ok=True)
    on_cpu = options.device == "cpu"
    machine = torch.backends.cpu.get_cpu_capability() if on_cpu else torch.cuda.get_device_name()
    out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def summary(row: dict[str, Any]) -> str:
    """Return one line of the ratios that have a target."""
    r = row["ratios"]
    return (f"{row['n']:5d} T={row['tokens']:5d} {'f+b' if row['backward'] else 'fwd'}"
            f"  peft bat / bat {1 / r['bat / peft bat']:5.2f}  row / LoRA {r['bat_row / LoRA']:.3f}"
            f"  left / LoRA {r['bat_left / LoRA']:.3f}  bone / LoRA {r['bone / LoRA']:.3f}"
            f"  miss / LoRA {r['peft miss / LoRA']:.3f}   peft bat {row['ms']['peft bat']:.2f} ms, LoRA "
            f"{row['ms']['LoRA']:.2f} ms")


if __name__ == "__main__":
    main()
