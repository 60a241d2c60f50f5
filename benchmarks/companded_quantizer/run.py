"""Error and perplexity of companded levels against uniform ones at equal bits.

Run: python benchmarks/companded_quantizer/run.py [--windows 8] (needs the extra `bone`, and POISE_DATA)
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from torch import Tensor, nn

from poise.data import packaged
from poise.quantizers import quantize_model
from poise.registry import build
from poise.walk import weights

LENGTH = 512
ARMS: dict[str, dict[str, Any]] = {
    "absmax": {}, "affine": {}, "companded": {"sharpness": 1.5}, "companded, sharper": {"sharpness": 2.0},
}


def text(model: str) -> str:
    """Return text that the model was not trained on: Wikipedia, or speeches of the test split."""
    if model == "byte_moe":
        return "".join(e.completion for e in build("data", "sotu").load(0).test[:100])
    return packaged.shared("text/wikitext-2.test.txt").read_text(encoding="utf-8")


@torch.no_grad()
def perplexity(model: nn.Module, windows: list[Tensor]) -> float:
    """Return exp of the mean loss per token, each window on its own."""
    losses = []
    for ids in windows:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        losses.append(float(nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])))
    return math.exp(sum(losses) / len(losses))


def relative_error(model: nn.Module, quantizer: Any, roles: tuple[str, ...]) -> float:
    """Return ||W - W'|| / ||W|| over all weights that are quantized."""
    total = wrong = 0.0
    for w in weights(model):
        if w.role in roles and not w.tied_with:
            dense = w.read().float()
            wrong += float((quantizer.quantize(dense).dequantize() - dense).double().square().sum())
            total += float(dense.double().square().sum())
    return math.sqrt(wrong / total)


def subject(name: str, windows: int) -> tuple[nn.Module, list[Tensor], Any, tuple[str, ...]]:
    """Return a model, held-out windows (1, time), a plan or None, and the roles that are quantized."""
    component = build("model", name)
    model, tokenizer = component.build().eval(), component.tokenizer()
    ids = torch.tensor(tokenizer.encode(text(name)))
    length = min(LENGTH, getattr(component, "length", LENGTH))  # no longer than it was trained on
    parts = [ids[None, i * length:(i + 1) * length] for i in range(windows)]
    if name == "byte_moe":
        return model, parts, "*.experts.*", ("expert",)
    return model, parts, None, ("linear",)


def measure(name: str, windows: int, bits: list[int], groups: list[int]) -> list[dict[str, Any]]:
    model, parts, pattern, roles = subject(name, windows)
    rows: list[dict[str, Any]] = [
        {"model": name, "arm": "as it is", "perplexity": perplexity(model, parts)}]
    print(rows[0], flush=True)
    for group in groups:
        for b in bits:
            for arm, options in ARMS.items():
                entry = arm.partition(",")[0]
                quantizer = build("quantizer", entry, bits=b, group=group, **options)
                packed = copy.deepcopy(model)
                found = quantize_model(packed, quantizer, {pattern: b} if pattern else None)
                stored = found["quantized"].values()
                rows.append({"model": name, "arm": arm, "bits": b, "group": group,
                             "stored_bits": sum(stored) / len(stored),
                             "error": relative_error(model, quantizer, roles),
                             "perplexity": perplexity(packed, parts)})
                print({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in rows[-1].items()},
                      flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 0])
    parser.add_argument("--models", nargs="+", default=["smollm2", "byte_moe"])
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows = [row for name in args.models for row in measure(name, args.windows, args.bits, args.groups)]
    target = Path(__file__).parent / "results" / "latest.json"
    target.parent.mkdir(exist_ok=True)
    rounded = [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
               for row in rows]
    target.write_text(json.dumps({"windows": args.windows, "rows": rounded}, indent=1) + "\n")


if __name__ == "__main__":
    main()
