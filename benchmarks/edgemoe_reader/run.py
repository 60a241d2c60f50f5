"""How fast experts are read: into pages and into huge pages, against bare preadv and dd, in GB/s.

Run: python benchmarks/edgemoe_reader/run.py [--rounds 11] [--folder FOLDER] [--gigabytes 2]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import statistics
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from poise_edgemoe.store.index import EXPERTS, Matrix
from poise_edgemoe.store.reader import Reader, Request, mapped

SIZES = (1, 4, 16)  # MiB of a blob
EACH = 128 << 20  # bytes of a measurement
PIECE = 1 << 24
RATIOS = {
    "huge pages / pages": ("reader, huge pages", "reader, pages"),
    "reader / preadv": ("reader, huge pages", "preadv, huge pages"),
    "reader / dd": ("reader, huge pages", "dd"),
    "direct / through the cache": ("reader, huge pages", "reader, through the cache"),
}


def write(folder: Path, size: int) -> bytes:
    """Write a file of a piece of random bytes, repeated, not in the page cache; return the piece."""
    piece = random.Random(0).randbytes(PIECE)
    with open(folder / EXPERTS, "wb") as f:
        for _ in range(size // PIECE):
            f.write(piece)
        f.flush()
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return piece


class Ways:
    """Ways to read blobs of one size from random places, each into one buffer that it keeps."""

    def __init__(self, folder: Path, size: int, piece: bytes) -> None:
        self.path, self.size, self.piece = folder / EXPERTS, size, piece
        self.places = self.path.stat().st_size // size
        self.pages, self.huge = mmap.mmap(-1, size), mapped(size)
        self.direct, self.cached = Reader(folder), Reader(folder, direct=False)
        self.handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        self.draw = random.Random(size)
        self.all: dict[str, Callable[[], None]] = {
            "reader, pages": lambda: self.read(self.direct, self.pages),
            "reader, huge pages": lambda: self.read(self.direct, self.huge),
            "reader, huge pages, checksums": lambda: self.read(self.direct, self.huge, check=True),
            "reader, through the cache": lambda: self.read(self.cached, self.huge),
            "preadv, pages": lambda: self.preadv(self.pages),
            "preadv, huge pages": lambda: self.preadv(self.huge),
            "dd": self.dd,
        }

    def offsets(self) -> list[int]:
        return [self.size * self.draw.randrange(self.places) for _ in range(EACH // self.size)]

    def read(self, reader: Reader, into: mmap.mmap, check: bool = False) -> None:
        for at in self.offsets():
            crc = zlib.crc32(self.piece[at % PIECE:][: self.size]) if check else 0
            request = Request({"": Matrix(at, self.size, 0, crc)}, memoryview(into), "a blob", check)
            reader.demand([request])
            request.wait()

    def preadv(self, into: mmap.mmap) -> None:
        for at in self.offsets():
            os.preadv(self.handle, [into], at)

    def dd(self) -> None:
        """Read in a row, what dd can; a whole process, of some milliseconds."""
        first = self.draw.randrange(self.places - EACH // self.size)
        subprocess.run(["dd", f"if={self.path}", "of=/dev/null", f"bs={self.size}", f"skip={first}",
                        f"count={EACH // self.size}", "iflag=direct"], check=True, capture_output=True)

    def close(self) -> None:
        self.direct.close()
        self.cached.close()
        os.close(self.handle)


def measure(folder: Path, size: int, piece: bytes, rounds: int) -> dict[str, list[float]]:
    """Return GB/s of each way in each round; the order turns about."""
    ways = Ways(folder, size, piece)
    if not ways.direct.direct:
        print(f"{folder} is on a file system without direct reads: all is read through the page cache")
    rates: dict[str, list[float]] = {name: [] for name in ways.all}
    for n in range(rounds):
        for name in list(ways.all) if n % 2 == 0 else reversed(ways.all):
            started = time.perf_counter()
            ways.all[name]()
            rates[name].append(EACH / (time.perf_counter() - started) / 1e9)
    ways.close()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--gigabytes", type=int, default=2)
    args = parser.parse_args()
    result: dict[str, dict] = {"gigabytes_per_second": {}, "ratios": {}}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        piece = write(Path(folder), args.gigabytes << 30)
        for mebibytes in SIZES:
            rates = measure(Path(folder), mebibytes << 20, piece, args.rounds)
            key = f"{mebibytes} MiB"
            medians = {name: round(statistics.median(r), 2) for name, r in rates.items()}
            pairs = {label: [a / b for a, b in zip(rates[x], rates[y], strict=True)]
                     for label, (x, y) in RATIOS.items()}
            result["gigabytes_per_second"][key] = medians
            result["ratios"][key] = {label: round(statistics.median(p), 2) for label, p in pairs.items()}
            print(key, medians, result["ratios"][key], flush=True)
    target = Path(__file__).parent / "results" / "latest.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
