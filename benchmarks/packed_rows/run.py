"""Packed matrices: rows made in C against those made in torch, and products against dense ones.

Run: python benchmarks/packed_rows/run.py [--rounds 15] [--one-row]
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
from poise.quantizers import Affine, ggml, kernel, matrix
from poise.quantizers.formats import FORMATS
from poise.quantizers.orders import arranged
from poise.registry import build

SIZE, ROWS, ONE_ROW = 2048, (1, 16, 128), (2048, 4096)
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


def of_one_row(size: int) -> dict[str, Callable[[], object]]:
    """Return products of one row, fp32, on every kernel that is here, and dense ones."""
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(size, size, generator=random), torch.randn(1, size, generator=random)
    half, rounded = weight.bfloat16(), x.bfloat16()
    found: dict[str, Callable[[], object]] = {
        "dense fp32": partial(torch.nn.functional.linear, x, weight),
        "dense bf16": partial(torch.nn.functional.linear, rounded, half)}
    for bits in (4, 8):
        packed = Affine(bits, group=64).quantize(weight)
        found[f"c, {bits} bits"] = partial(packed.prepared("c").matmul, x)
        if bits == 4:
            found["torch, 4 bits, bf16"] = partial(packed.prepared("torch").matmul, rounded)
    if ggml.kernel() is None:
        print(ggml.status())
        return found
    for name in FORMATS:
        blocks = build("quantizer", name).quantize(weight)
        found[f"ggml, {name}"] = partial(blocks.prepared("ggml").matmul, x)
        if name == "q4_0":
            eight, _ = arranged(blocks, "ggml")
            found["ggml, q4_0 interleaved"] = partial(eight.prepared("ggml").matmul, x)
            found["rows, q4_0"] = partial(blocks.matmul, x)
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
    parser.add_argument("--one-row", action="store_true", help="products of one row alone, every kernel")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if (it := kernel.kernel()) is None:
        raise SystemExit(f"skipped: {kernel.status()}")
    target = Path(__file__).parent / "results" / ("one_row.json" if args.one_row else "latest.json")
    result: dict[str, object] = {"size": SIZE, "threads": 1, "vector_units": vector_units(),
                                 "kernel_units": it.units, "ms": {}}
    if args.one_row:
        result |= {"size": ONE_ROW, "ggml": getattr(ggml.library(), "version", None)}
        result["ms"] = {str(size): measure(of_one_row(size), args.rounds) for size in ONE_ROW}
        print(json.dumps(result["ms"], indent=1))
    for dtype in () if args.one_row else DTYPES:
        for bits in (2, 3, 4, 8):
            name = f"{str(dtype).removeprefix('torch.')}, {bits} bits"
            result["ms"][name] = measure(ways(bits, dtype), args.rounds)  # type: ignore[index]
            print(name, result["ms"][name], flush=True)  # type: ignore[index]
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
