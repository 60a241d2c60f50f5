"""Bone on a model of OLMoE's shape, its experts too: in memory, and over stores of 32, 16 and 4 bits.

Run: python benchmarks/edgemoe_tuning/run.py FOLDER [--layers 3 --length 256 --steps 5 --r 8]

Each way is a process of its own with one thread; all take the same steps on the same ids, and compute in
float32. What is made in FOLDER is used again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from poise.files import write_json
from poise_edgemoe import convert
from poise_edgemoe.synthetic import write_olmoe

HERE = Path(__file__).parent
WAYS = ("in memory", "32 bits", "16 bits", "4 bits")
TERMS = ("hot", "layer", "adapter", "grown")


def prepared(folder: Path, layers: int, way: str) -> dict[str, Any]:
    """Return what a way trains on; write it the first time."""
    model = folder / f"model{layers}"
    if not model.exists():
        print(f"writing {model}", file=sys.stderr)
        write_olmoe(model, layers=layers, vocab=4096)
    if way == "in memory":
        return {"path": str(model)}
    bits = int(way.split(maxsplit=1)[0])
    store = folder / f"store{layers}-{bits}"
    if not store.exists():
        print(f"writing {store}", file=sys.stderr)
        convert(model, store, bits=bits, hot="bf16" if bits == 32 else "raw")
    return {"store": str(store)}


def measured(given: dict[str, Any]) -> dict[str, Any]:
    """Return what a process says that trains."""
    done = subprocess.run([sys.executable, str(HERE / "worker.py"), json.dumps(given)],
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{given}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    for name, default in (("layers", 3), ("length", 256), ("steps", 5), ("r", 8), ("repeats", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--variant", default="bone")
    options = vars(parser.parse_args())
    folder, layers, repeats = options.pop("folder"), options.pop("layers"), options.pop("repeats")
    ways = {way: prepared(folder, layers, way) for way in WAYS}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(repeats):  # interleaved: the machine may be busy with something else for a while
        for way, where in ways.items():
            found[way].append(measured({**where, **options}))
            print(way, found[way][-1], file=sys.stderr, flush=True)
    write_json(HERE / "results.json", {"layers": layers, **options, "ways": found})
    print("| | " + " | ".join((*TERMS, "beside", "seconds a step", "last loss")) + " |")
    print("|---" * (len(TERMS) + 4) + "|")
    for way, runs in found.items():
        best = min(runs, key=lambda one: one["seconds"])
        beside = best["grown"] - best["hot"] - best["layer"] - best["adapter"]
        cells = [f"{n / 1e6:,.0f} MB" for n in (*(best[name] for name in TERMS), beside)]
        cells += [f"{best['seconds']:.1f}", f"{best['losses'][-1]:.6f}"]
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
