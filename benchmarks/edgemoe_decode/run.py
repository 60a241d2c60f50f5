"""Tokens per second under a memory limit: our engine, the paper's rivals, llama.cpp, accelerate.

Run: python benchmarks/edgemoe_decode/run.py --folder FOLDER [--llama PYTHON] [--repeats 5]
     python benchmarks/edgemoe_decode/run.py --smoke      tiny sizes, a few lines, once, nothing is kept
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files import FULL, SMALL, check_gguf, missing_disk, prepare
from lines import BUDGETS, Line, lines
from measuring import WORKERS, control_group, forget
from report import finish

INSTALL = "python -m venv DIR && DIR/bin/pip install llama-cpp-python; then --llama DIR/bin/python"
PATIENCE = 1800  # seconds for one row
KILLED = "killed: it takes more than the limit"


@dataclass(frozen=True)
class Form:
    """The full form, or the smoke form.

    Parameters
    ----------
    prompt, tokens : int
        Of the context, and fed after it one by one.
    limits : tuple of float
        Of "75 %" and "56 %", shares of the GGUF file; in the smoke form bytes: so little is too little.
        Other shares are what their name says.
    """

    sizes: dict[str, int]
    prompt: int
    tokens: int
    limits: tuple[float, float] = (0.75, 0.56)

    def ids(self) -> tuple[list[int], list[int]]:
        """Return prompt and tokens: drawn, the same for all."""
        draw = random.Random(0)
        ids = [draw.randrange(3, self.sizes["vocab"]) for _ in range(self.prompt + self.tokens)]
        return ids[: self.prompt], ids[self.prompt:]

    def limit(self, key: str, gguf: Path) -> int | None:
        """Return a limit in bytes."""
        if key in ("none", "3 GB"):
            return None if key == "none" else 3 * 10**9
        named = dict(zip(("75 %", "56 %"), self.limits, strict=True))
        share = named.get(key, float(key.removesuffix(" %")) / 100)
        return int(share * gguf.stat().st_size) if share < 1 else int(share)


FORMS = {False: Form(FULL, 512, 32), True: Form(SMALL, 32, 4, (64e6, 56e6))}


class Runner:
    """Runs workers, each in a process of its own, and keeps rows as they are measured."""

    def __init__(self, folder: Path, form: Form, files: dict[str, Path], llama: str | None) -> None:
        self.folder, self.form, self.files, self.llama = folder, form, files, llama
        self.path = folder / "rows.jsonl"
        self.rows = [json.loads(line) for line in _whole_lines(self.path)]

    def measured(self, line: Line, repeat: int) -> bool:
        """Return whether a row is there already: of this run, or of one that was killed."""
        return any(r["line"] == line.key and r["repeat"] == repeat for r in self.rows)

    def measure(self, line: Line, repeat: int) -> dict[str, Any]:
        """Measure a line once and keep its row: also of what was killed, not of what could not be run."""
        row = self._skipped(line)
        if row is None:
            forget(self.folder, everything=self.form is not FORMS[True])
            started = time.perf_counter()
            row = self._run(line) | {"seconds": round(time.perf_counter() - started, 1)}
        row = {"line": line.key, "repeat": repeat, "load": os.getloadavg()[0], **row}
        if row.get("skipped", KILLED) == KILLED:
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row

    def _skipped(self, line: Line) -> dict[str, Any] | None:
        if line.worker == "llama" and self.llama is None:
            return {"skipped": f"llama.cpp is not there: {INSTALL}"}
        if line.worker == "replayed" and not _trace():
            return {"skipped": "POISE_DATA names no folder with traces/qwen.route.csv.gz"}
        return None

    def _asked(self, line: Line, group: str | None) -> dict[str, Any]:
        prompt, tokens = self.form.ids()
        return {
            "worker": line.worker, "path": str(self.files[line.needs]), "group": group, "prompt": prompt,
            "tokens": tokens, "context": len(prompt) + len(tokens), "threads": line.threads,
            "limit": self.form.limit(line.limit, self.files["gguf"]), "trace": _trace(), **line.more}

    def _run(self, line: Line) -> dict[str, Any]:
        llama = line.worker == "llama"
        python = self.llama if llama and self.llama else sys.executable
        script = WORKERS / ("llama_worker.py" if llama else "torch_worker.py")
        with control_group() as group, tempfile.TemporaryDirectory(dir=self.folder) as offload:
            asked = self._asked(line, group) | {"offload": offload}
            if asked["limit"] and group is None:
                return {"skipped": "no control group with a limit can be made here"}
            command = [python, str(script), json.dumps(asked)]
            if group is not None:  # it enters before it begins, so that all it takes is counted
                command = ["/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False, timeout=PATIENCE,
                    env=os.environ | {"OMP_NUM_THREADS": str(line.threads)})
            except subprocess.TimeoutExpired:
                return {"skipped": f"took more than {PATIENCE} seconds"}
        if done.returncode == -9:
            return {"skipped": KILLED}
        if done.returncode:
            return {"skipped": f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}"}
        return json.loads(done.stdout.splitlines()[-1])


def _whole_lines(path: Path) -> list[str]:
    """Return a file's lines but a last one that was cut off, which is removed."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    path.write_text(whole)
    return whole.splitlines()


def _trace() -> str | None:
    path = Path(os.environ.get("POISE_DATA", ""), "traces", "qwen.route.csv.gz")
    return str(path) if path.is_file() else None


@contextmanager
def _folder(args: argparse.Namespace) -> Iterator[Path]:
    if args.smoke:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            yield Path(folder)
    else:
        folder = Path(args.folder)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", help="for 24 GB of files, and rows, so that a killed run goes on")
    parser.add_argument("--llama", default=os.environ.get("POISE_LLAMA"), metavar="PYTHON",
                        help=f"a Python that has llama.cpp (or POISE_LLAMA): {INSTALL}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", action="append", default=[],
                        help="lines whose name holds this; may be given several times")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--results", type=Path, default=WORKERS / "results")
    args = parser.parse_args()
    if args.llama and shutil.which(args.llama) is None:
        parser.error(f"--llama {args.llama} is no program: give a Python that has llama-cpp-python")
    return args


def main() -> int:
    args = _arguments()
    if not (args.smoke or args.folder):
        print("skipped: give --folder FOLDER for 24 GB of files and some hours, or --smoke")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a worker, its group and its files end too
    with _folder(args) as folder:
        if not args.smoke and (reason := missing_disk(folder)):
            print(f"skipped: {reason} (--folder names another disk)")
        else:
            print(_measure(args, folder))
    return 0


def _measure(args: argparse.Namespace, folder: Path) -> str:
    """Measure what is not there yet, in alternating order; return the tables."""
    form = FORMS[args.smoke]
    wanted = [line for line in lines() if any(o in line.key for o in args.only or [""])]
    chosen = [line for line in wanted if line.smoke or not args.smoke]
    files = prepare(folder, form.sizes)
    distance = check_gguf(args.llama, folder) if args.llama else None
    runner = Runner(folder, form, files, args.llama)
    for repeat in range(1 if args.smoke else args.repeats):
        for line in chosen if repeat % 2 == 0 else reversed(chosen):
            if not runner.measured(line, repeat):
                print(_said(runner.measure(line, repeat)), flush=True)
    more = {"gguf_distance": distance, "model_bytes": files["gguf"].stat().st_size,
            "limits": {key: form.limit(key, files["gguf"]) for key in (*BUDGETS, "3 GB") if key != "none"}}
    return finish(chosen, runner.rows, more, folder if args.smoke else args.results)


def _said(row: dict[str, Any]) -> str:
    shown = ("tokens_per_second", "cpu_ms", "read_mb", "raw_gb_per_second", "of_roofline")
    what = row.get("skipped") or ", ".join(f"{k} {row[k]:.2f}" for k in shown if k in row)
    return f"{row['repeat']} {row['line']}: {what} (load {row['load']:.1f})"


if __name__ == "__main__":
    sys.exit(main())
