"""Packed matrices: rows made in C against those made in torch, and products against dense ones.

Run: python benchmarks/packed_rows/run.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from poise.cli.doctor import vector_units
from poise.quantizers import Affine, kernel, matrix

SIZE, ROWS = 2048, (1, 16, 128)
DTYPES = (torch.bfloat16, torch.float32)
LARGE = matrix.LARGE


def in_torch(work: Callable[[], object]) -> Callable[[], object]:
    """Return the same work without C."""

    def without() -> object:
        matrix.LARGE = 1 << 60
        try:
            return work()
        finally:
            matrix.LARGE = LARGE

    return without


def ways(bits: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = Affine(bits, group=64).quantize(weight)
    assert torch.equal(packed.dequantize(), in_torch(packed.dequantize)())
    found = {"rows, C": packed.dequantize, "rows, torch": in_torch(packed.dequantize)}
    for rows in ROWS:
        x = torch.randn(rows, SIZE).to(dtype)
        found |= {f"product of {rows}, kernel c": partial(packed.prepared("c").matmul, x),
                  f"product of {rows}, rows": partial(packed.matmul, x),
                  f"product of {rows}, dense": partial(torch.nn.functional.linear, x, weight)}
        if bits == 4:
            found[f"product of {rows}, kernel torch"] = partial(packed.prepared("torch").matmul, x)
    return found


def measure(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median time of each in milliseconds; the order turns about."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for n in range(rounds + 1):
        for name in list(work) if n % 2 else reversed(work):
            started = time.perf_counter()
            work[name]()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(statistics.median(t[1:]), 3) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if (it := kernel.kernel()) is None:
        raise SystemExit(f"skipped: {kernel.status()}")
    result: dict[str, object] = {"size": SIZE, "threads": 1, "vector_units": vector_units(),
                                 "kernel_units": it.units, "ms": {}}
    for dtype in DTYPES:
        for bits in (2, 3, 4, 8):
            name = f"{str(dtype).removeprefix('torch.')}, {bits} bits"
            result["ms"][name] = measure(ways(bits, dtype), args.rounds)  # type: ignore[index]
            print(name, result["ms"][name], flush=True)  # type: ignore[index]
    target = Path(__file__).parent / "results" / "latest.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
