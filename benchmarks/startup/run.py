"""How fast the shell answers, as ratios to `python -c pass` and to `import torch`.

Run: python benchmarks/startup/run.py [--rounds 11]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
PYTHON, POISE = sys.executable, str(BIN / "poise")
COMMANDS = {
    "pass": [PYTHON, "-c", "pass"],
    "list": [POISE, "list"],
    "describe": [POISE, "describe", "quantizer", "affine"],
    "cfg_job": [POISE, "run", "--cfg", "job"],
    "import_torch": [PYTHON, "-c", "import torch"],
    "import_torch_and_bone": [PYTHON, "-c", "import torch, poise_bone; poise_bone.Bone(r=4)"],
    "import_quantagg": [PYTHON, "-c", "import poise_quantagg, sys; assert 'torch' not in sys.modules"],
}
RATIOS = {
    "list / pass": ("list", "pass", 10.0),
    "describe / pass": ("describe", "pass", 10.0),
    "cfg_job / import_torch": ("cfg_job", "import_torch", None),
    "import_torch_and_bone / import_torch": ("import_torch_and_bone", "import_torch", 1.10),
    "import_quantagg / pass": ("import_quantagg", "pass", None),
}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    for command in COMMANDS.values():
        seconds(command)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for i in range(args.rounds):
        names = list(COMMANDS) if i % 2 == 0 else list(reversed(COMMANDS))
        for name in names:
            times[name].append(seconds(COMMANDS[name]))
    result = {"median_ms": {n: 1e3 * statistics.median(t) for n, t in times.items()}, "ratios": {}}
    for label, (a, b, limit) in RATIOS.items():
        pairs = [x / y for x, y in zip(times[a], times[b], strict=True)]
        result["ratios"][label] = {"median": statistics.median(pairs), "limit": limit}
    target = Path(__file__).parent / "results" / "latest.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
