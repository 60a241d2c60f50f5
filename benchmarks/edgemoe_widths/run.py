"""What plans of bits per expert lose at the same bytes, whoever chooses.

Run: python benchmarks/edgemoe_widths/run.py [--model byte_moe|smollm2] [--smoke] [--rounding weighted]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poise.registry import build
from poise_edgemoe import ByteMoE, allocate, convert, profile, split_feed_forward
from poise_edgemoe.plots import plans_against_bytes, width_map
from poise_edgemoe.widths.choice import Limits, table_of
from poise_edgemoe.widths.profile_file import Profile
from poise_edgemoe.widths.verifying import Verifier, verifier

RESULTS = Path(__file__).parent / "results"
AT = (3, 4)  # bits whose uniform bytes are the budget
AROUND = {3: (2, 4), 4: (3, 8)}  # widths that are mixed at random and by frequency
DRAWS = 5  # random plans for each seed


def model_of(name: str, folder: Path, smoke: bool) -> tuple[Any, Any]:
    """Return a model, or a store of it, and its tokenizer."""
    if name == "byte_moe":
        sizes: dict[str, Any] = {"layers": 2, "hidden": 48, "inner": 96, "steps": 60} if smoke else {}
        component = ByteMoE(**sizes)
        return component.build(), component.tokenizer()
    from poise.models import smollm2

    dense = smollm2.load()
    return convert(split_feed_forward(dense), folder / "store", bits=32), smollm2.tokenizer()


def other_plans(found: Profile, budget: int, bits: int, seed: int) -> Iterator[tuple[str, dict[Any, int]]]:
    """Yield plans of two widths around the uniform one, the wider dealt out at random and by frequency."""
    choice = table_of(found, Limits(), "bytes", AROUND[bits])
    low, high = 0, 1
    orders = {"frequency": sorted(range(len(found.entries)), key=lambda x: (-found.entries[x].tokens, x))}
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(1000 * seed + draw)
        orders[f"random {draw}"] = torch.randperm(len(found.entries), generator=generator).tolist()
    for name, order in orders.items():
        chosen = np.full(len(order), low)
        for x in order:  # the first get more bits, as long as they fit
            trial = chosen.copy()
            trial[x] = high
            if choice.table.total(trial)[0] > budget:
                break
            chosen = trial
        yield name.split()[0], choice.bits(chosen)


def rows_of(
    found: Profile, budget_bits: int, seed: int, check: Verifier, figures: Path
) -> list[dict[str, Any]]:
    """Return held-out losses of all ways at the bytes of one uniform width."""
    budget = sum(e.nbytes[budget_bits] for e in found.entries)
    rows = []

    def add(way: str, bits: dict[Any, int]) -> None:
        size = sum(found.entries[x].nbytes[bits[e.layer, e.expert, e.parts[0]]]
                   for x, e in enumerate(found.entries))
        loss = check.full(bits)["held_out"]
        rows.append({"way": way, "at": budget_bits, "seed": seed, "bytes": size, "loss": loss["badness"],
                     "increase": loss["increase"]})

    add("uniform", check.bench.uniform(budget_bits))
    for way, bits in other_plans(found, budget, budget_bits, seed):
        add(way, bits)
    for way in ("paper", "hull", "exact"):
        plan = allocate(found, bytes=budget, method=way, verify=False)
        add(way, {(e.layer, e.expert, p): plan[f"{e.name}.{p}"] for e in found.entries for p in e.parts})
        if seed == 0 and way == "hull":
            width_map(plan, figures / f"widths_at_{budget_bits}.png")
    return rows


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Profile with each seed; return all rows, and the means by way and budget."""
    model, tokenizer = model_of(args.model, folder, args.smoke)
    speeches = build("data", "sotu").load(0).test
    (folder / "text.txt").write_text("\n\n".join(e.completion for e in speeches))
    asked = {"windows": 8, "held_out": 8, "length": 32} if args.smoke else {
        "windows": args.windows, "held_out": args.held_out, "length": 128}
    rows: list[dict[str, Any]] = []
    uniform: list[dict[str, Any]] = []
    for seed in range(1 if args.smoke else args.seeds):
        found = profile(model, folder / "text.txt", seed=seed, rounding=args.rounding, tokenizer=tokenizer,
                        scheme=args.scheme, memory=args.memory, **asked)
        held = found.measured["held_out"]
        uniform = [{"bits": b, "bytes": sum(e.nbytes[b] for e in found.entries),
                    "loss": held[str(b)]["badness"],
                    "increase": held[str(b)]["badness"] - held["reference"]["badness"]}
                   for b in found.widths]
        with ExitStack() as stack:
            check = verifier(stack, found, None, None, None, args.memory, lambda *_: None, needed=True)
            assert check is not None
            for bits in AT:
                rows += rows_of(found, bits, seed, check, folder)
        print(f"seed {seed} done", flush=True)
    means = {bits: {way: statistics.fmean(r["increase"] for r in rows if (r["way"], r["at"]) == (way, bits))
                    for way in dict.fromkeys(r["way"] for r in rows)} for bits in AT}
    return {"model": args.model, "rounding": args.rounding, "scheme": args.scheme, **asked,
            "reference": held["reference"], "uniform": uniform, "mean_increase": means, "rows": rows}


def show(said: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"\nas trained {said['reference']['badness']:.4f} (standard error of the mean "
          f"{said['reference']['standard_error']:.4f})")
    for one in said["uniform"]:
        print(f"uniform {one['bits']:>2}: {one['bytes'] / 1e6:8.3f} MB  loss {one['loss']:.4f}  "
              f"+{1e4 * one['increase']:.1f}e-4")
    for bits, means in said["mean_increase"].items():
        print(f"at the bytes of uniform {bits}: " + ", ".join(
            f"{way} {1e4 * x:.1f}e-4 ({x / means['uniform']:.2f} x)" for way, x in means.items()))


def main() -> None:
    """Measure, print, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="byte_moe", choices=("byte_moe", "smollm2"))
    parser.add_argument("--rounding", default="nearest", choices=("nearest", "weighted"))
    parser.add_argument("--scheme", default="asym_group")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--memory", default=None)
    parser.add_argument("--smoke", action="store_true", help="a small model, few windows; writes nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        said = measure(args, Path(name))
        show(said)
        if not args.smoke:
            tag = f"{args.model}_{args.scheme}_{args.rounding}"
            (RESULTS / f"{tag}.json").write_text(json.dumps(said, indent=1) + "\n")
            every = [{"way": "uniform", **u} for u in said["uniform"] if u["bits"] < 16]
            every += said["rows"]
            plans_against_bytes(every, RESULTS / f"{tag}.png", "held-out loss (nats per token)")
            for bits in AT:
                (RESULTS / f"{tag}_widths_at_{bits}.png").write_bytes(
                    (Path(name) / f"widths_at_{bits}.png").read_bytes())


if __name__ == "__main__":
    main()
