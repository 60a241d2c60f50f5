"""Trains a model in a process of its own, over a store or in memory, and says what memory that took.

Run by run.py and by a test: python worker.py '{"store": STORE, "length": 128, "r": 8, ...}'
"""

from __future__ import annotations

import json
import sys
import time

import torch

torch.set_num_threads(1)
given = json.loads(sys.argv[1])


def status(key):
    with open("/proc/self/status") as f:
        return int(next(x for x in f if x.startswith(key)).split()[1]) * 1024


def peak_from_here():
    from poise_edgemoe.loading import give_back

    give_back()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def opened():
    """Return the model, and the bytes of its hot weights and of its largest layer's experts."""
    if given.get("path"):
        from poise.models.components import CausalLM

        model = CausalLM(path=given["path"], dtype="float32").build()
        model.set_experts_implementation("eager")
        return model, sum(p.nbytes for p in model.parameters()), 0
    from poise_edgemoe.tuning.model import open_streamed, shelf_of

    model = open_streamed(given["store"], dtype="float32", recompute=given.get("recompute", True))
    return model, sum(p.nbytes for p in model.parameters()), shelf_of(model).layer_bytes


def train(model, attached, steps):
    """Return losses and seconds of some steps."""
    optimizer = attached.optimizer(torch.optim.AdamW, lr=1e-3)
    losses, seconds = [], []
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        ids = torch.randint(3, model.config.vocab_size, (1, given["length"]), generator=draw)
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return losses, seconds


def warmed():
    """Train a small model first: what libraries set up is no model's."""
    from poise.testing.families import tiny
    from poise_bone import Bone

    model = tiny("olmoe").train()
    train(model, Bone(r=4).attach(model), 1)


def main():
    from poise_bone import Bone

    warmed()
    base = status("VmRSS")
    peak_from_here()
    model, hot, layer = opened()
    loaded = status("VmHWM") - base
    adapter = Bone(r=given["r"], variant=given["variant"], exclude_modules=given.get("exclude"))
    attached = adapter.attach(model.train())
    peak_from_here()
    losses, seconds = train(model, attached, given["steps"])
    adapter = 4 * attached.report()["bytes"]  # parameters, gradients, two moments
    print(json.dumps({
        "loaded": loaded, "grown": status("VmHWM") - base, "hot": hot, "layer": layer, "adapter": adapter,
        "losses": losses, "seconds": sorted(seconds)[len(seconds) // 2]}))


main()
