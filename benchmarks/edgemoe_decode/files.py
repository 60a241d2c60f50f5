"""The files that engines run on, made once of one model; whether the GGUF says what the model says."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from make_gguf import names, write_gguf
from measuring import WORKERS

from poise.errors import RunError
from poise_edgemoe import convert
from poise_edgemoe.synthetic import write_olmoe

STORES: dict[str, dict[str, Any]] = {
    "q4": {"bits": 4, "hot": 8}, "q8": {"bits": 8, "scheme": "sym_channel", "hot": 8}, "raw": {"bits": 16}}
FULL = {"vocab": 50304}
SMALL = {"layers": 2, "hidden": 256, "inner": 128, "experts": 16, "top": 4, "vocab": 1024, "context": 1024}
DISK = 24 * 10**9  # bytes of all files in the full form, what accelerate offloads included
CLOSE = 0.03  # of logits, rms; llama.cpp rounds activations to 8 bits: 0.01. A wrong formula gives > 0.1


def prepare(folder: Path, sizes: dict[str, int]) -> dict[str, Path]:
    """Make what is not there yet; return each file and folder by name."""
    found = {name: folder / name for name in ("model", *STORES)} | {"gguf": folder / "model.gguf"}
    if not found["model"].exists():
        write_olmoe(found["model"], **sizes)
    if not found["gguf"].exists():
        write_gguf(found["model"], found["gguf"])
    for name, how in STORES.items():
        if not found[name].exists():
            convert(found["model"], found[name], **how)
    return found


def missing_disk(folder: Path) -> str | None:
    """Say how much room is missing for the full form, with what is there already; None: nothing."""
    there = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    free = shutil.disk_usage(folder).free + there
    if free >= DISK:
        return None
    return f"{folder} has room for {free / 1e9:.0f} GB, and {DISK / 1e9:.0f} are needed"


def check_gguf(python: str, folder: Path) -> float:
    """Return how far llama.cpp's logits are from transformers' on the same dequantized weights.

    The root of the mean square, against the logits' own; on a small model, made as the large one is.

    Raises
    ------
    RunError
        When they are too far: the GGUF would be another model.
    """
    model, target = folder / "small", folder / "small.gguf"
    for old in (model, target):
        if old.exists():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    write_olmoe(model, **SMALL)
    write_gguf(model, target)
    ids = torch.randint(3, SMALL["vocab"], (64,), generator=torch.Generator().manual_seed(0)).tolist()
    asked = {"path": str(target), "group": None, "limit": None, "prompt": ids, "tokens": [], "threads": 1,
             "repack": False, "logits": True}
    done = subprocess.run([python, str(WORKERS / "llama_worker.py"), json.dumps(asked)],
                          capture_output=True, text=True, check=True)
    said = torch.tensor(json.loads(done.stdout.splitlines()[-1])["logits"])
    with torch.no_grad():
        want = dequantized(model, target)(torch.tensor([ids])).logits[0, -1]
    distance = float((said - want).square().mean().sqrt() / want.std())
    if distance > CLOSE:
        raise RunError(f"llama.cpp's logits on {target} are {distance:.3f} from the model's, more than "
                       f"{CLOSE}: it is another model, look into make_gguf.py")
    return distance


def dequantized(model: Path, target: Path) -> Any:
    """Return transformers' model with the weights that a GGUF file holds, in fp32."""
    made = transformers.OlmoeForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    stored = {t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type)))
              for t in gguf.GGUFReader(target).tensors}
    state, layers = made.state_dict(), made.config.num_hidden_layers
    with torch.no_grad():
        for theirs, ours in names(layers):
            state[ours].copy_(stored.pop(theirs).view(state[ours].shape))
        for n in range(layers):
            gate, up, down = (stored.pop(f"blk.{n}.ffn_{p}_exps.weight") for p in ("gate", "up", "down"))
            state[f"model.layers.{n}.mlp.experts.gate_up_proj"].copy_(torch.cat([gate, up], 1))
            state[f"model.layers.{n}.mlp.experts.down_proj"].copy_(down)
    assert not stored, sorted(stored)
    return made
