"""A whole fine-tuning step with each adapter: time, peak memory; time to attach, fold and unfold.

Run: python benchmarks/bone_step/run.py [--rounds 2] [--steps 3] [--threads 1] [--device cpu] [--autocast]
On a CPU SmolLM2-135M at 4 x 256 tokens in fp32; on a GPU a LLaMA of 1B random weights at 4 x 1,024 in bf16.
Needs the extras `bone` and `peft`. Every arm runs in a process of its own, in an order that turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

R = 64
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARMS = ("frozen", "full", "bone", "bat", "bat_row", "bat_left", "peft miss", "peft bat", "LoRA", "DoRA",
        "bone, 4 bits", "bat, 4 bits", "bat_row, 4 bits")
LORA_R = {"cpu": 33, "cuda": 34}  # as many parameters as bone with r = 64: + 1.2 and - 0.7 %


def build(device: str) -> tuple[Any, Any, int]:
    """Return the model, a batch of ids, and the model's bytes."""
    import torch

    from poise.registry import build as made

    if device == "cpu":
        model, shape = made("model", "smollm2").build(), (4, 256)
    else:
        large = {"intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000}
        large = {"architecture": "LlamaForCausalLM", "hidden_size": 2048, "overrides": large}
        with torch.device(device):
            model, shape = made("model", "causal_lm", **large).build().to(device, torch.bfloat16), (4, 1024)
        torch.cuda.reset_peak_memory_stats()  # building took room in fp32
    ids = torch.randint(0, 30_000, shape, generator=torch.Generator().manual_seed(0)).to(device)
    return model, ids, sum(p.numel() * p.element_size() for p in model.parameters())


def adapt(model: Any, arm: str, device: str) -> tuple[Any, Any, float]:
    """Return the model with an arm's adapter, what is attached (ours) and the seconds that took."""
    import peft

    from poise.quantizers import Affine, quantize_model
    from poise_bone import Bone

    r = LORA_R[device]
    lora: dict[str, Any] = {"r": r, "lora_alpha": 2 * r, "target_modules": MODULES}
    configs: dict[str, Callable[[], Any]] = {
        "peft miss": lambda: peft.MissConfig(r=R, target_modules=MODULES),
        "peft bat": lambda: peft.MissConfig(r=R, target_modules=MODULES, init_weights="bat"),
        "LoRA": lambda: peft.LoraConfig(**lora),
        "DoRA": lambda: peft.LoraConfig(**lora, use_dora=True),
    }
    started = time.perf_counter()
    attached = None
    if arm in configs:
        model = peft.get_peft_model(model, configs[arm]())
    elif arm == "frozen":
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)  # as little as trains through all layers
    elif arm != "full":
        variant, *packed = arm.split(", ")
        if packed:
            quantize_model(model, Affine(4, 64))
            started = time.perf_counter()
        attached = Bone(r=R, variant=variant).attach(model)
    return model, attached, time.perf_counter() - started


def measure(arm: str, steps: int, threads: int, device: str, autocast: bool) -> dict[str, Any]:
    """Return seconds a step, the growth of memory, and what attaching and folding take."""
    import torch

    torch.set_num_threads(threads)
    model, ids, size = build(device)
    before = memory(device)
    model, attached, seconds = adapt(model.train(), arm, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    times = []
    for _ in range(steps + 1):
        started = now(device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        times.append(now(device) - started)
    grown = memory(device) - before
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"arm": arm, "step": statistics.median(times[1:]), "grown": grown, "model": size,
            "trained": trained, "attach": seconds, **folding(attached, device)}


def now(device: str) -> float:
    """Return the time at which all that was asked of a device is done."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(device: str) -> int:
    """Return the peak so far: of the process, or of what torch allocated on the device."""
    import torch

    if device == "cpu":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return torch.cuda.max_memory_allocated()


def folding(attached: Any, device: str) -> dict[str, float]:
    """Return how long fold and unfold take, in times of cloning the weights, medians of three."""
    import torch

    if attached is None:
        return {}
    layers = attached.layers.values()
    calls: dict[str, Callable[[], Any]] = {
        "clone": lambda: [layer.weight_beneath.read().clone() for layer in layers],
        "fold": attached.fold, "unfold": attached.unfold}
    if attached.adapter.variant == "bat":
        calls["bmm"] = lambda: [torch.bmm(layer.weight_beneath.read().view(len(layer.D), -1, R), layer.D)
                                for layer in layers]
    found: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(3):
            for name, call in calls.items():
                started = now(device)
                kept = call()
                found[name].append(now(device) - started)
                del kept
    clone, *others = (statistics.median(v) for v in found.values())
    return {**dict(zip(list(found)[1:], (t / clone for t in others), strict=True)), "clone_seconds": clone}


def main() -> None:
    """Measure every arm in turn, print one table, and write `results/latest.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", action="store_true", help="to bf16")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.arm, options.steps, options.threads, options.device,
                                 options.autocast)))
        return
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for k in range(options.rounds):
        for n in range(len(ARMS)):
            arm = ARMS[(n + k * len(ARMS) // options.rounds) % len(ARMS)]
            found[arm].append(alone(arm, options))
            print(f"{k + 1}/{options.rounds}", found[arm][-1], file=sys.stderr, flush=True)
    rows = [{key: statistics.median(r[key] for r in runs) if isinstance(value, (int, float)) else value
             for key, value in runs[0].items()} for runs in found.values()]
    for r in rows:
        folds = f"  fold {r['fold']:.2f}x unfold {r['unfold']:.2f}x" if "fold" in r else ""
        print(f"{r['arm']:10} {r['step']:7.2f} s  {r['grown'] / 1e6:7.0f} MB  {r['trained']:12,} trained  "
              f"attach {r['attach']:.2f} s{folds}")
    name = "latest" if options.device == "cpu" else "gpu"
    folder = Path(__file__).with_name("results")
    folder.mkdir(exist_ok=True)
    name += "_autocast.json" if options.autocast else ".json"
    (folder / name).write_text(json.dumps(rows, indent=1) + "\n")


def alone(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure an arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--steps", str(options.steps), "--threads",
               str(options.threads), "--device", options.device]
    command += ["--autocast"] * options.autocast
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{arm}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
