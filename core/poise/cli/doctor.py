"""`poise doctor`: what this machine and this environment offer."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from poise.errors import ConfigError

_EXTRAS = {
    "edgemoe, bone": ("transformers", "gguf", "tokenizers"),
    "ggml": ("libggml-python",),
    "quantagg": ("scikit-learn", "scipy", "lightgbm", "quantile-forest", "joblib"),
    "tabular": ("pandas", "pyarrow"),
    "images": ("pillow",),
    "plots": ("matplotlib",),
    "sweep": ("hydra-joblib-launcher",),
    "tensorboard": ("tensorboardX",),
    "mlflow": ("mlflow-skinny", "sqlalchemy", "alembic"),
    "wandb": ("wandb",),
}


def main(argv: list[str]) -> int:
    """Print the findings: `poise doctor [DIRECTORY]` also tests O_DIRECT in that directory."""
    from rich.table import Table

    from poise.cli.console import console

    if len(argv) > 1 or any(a.startswith("-") for a in argv):
        raise ConfigError("usage: poise doctor [DIRECTORY]")
    directory = Path(argv[0] if argv else ".")
    if not directory.is_dir():
        raise ConfigError(f"doctor: no directory {directory}")
    table = Table("what", "finding", show_header=False)
    for what, finding in findings(directory):
        table.add_row(what, finding)
    console().print(table)
    return 0


def findings(directory: Path) -> list[tuple[str, str]]:
    """Return (what, finding) pairs."""
    from poise.runs.records import environment

    facts = environment(0, "cpu")
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    return [
        ("python", f"{facts['python']} at {sys.executable}"),
        ("versions", versions),
        ("machine", facts["platform"]),
        ("cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"),
        ("vector units", vector_units()),
        ("torch", _torch()),
        ("memory", memory()),
        ("disk", f"{shutil.disk_usage(directory).free / 2**30:.1f} GiB free at {directory.resolve()}"),
        ("O_DIRECT", o_direct(directory)),
        ("packed weights", _packed()),
        *_of_plugins(),
        *_extras(),
        *_data(),
    ]


def _packed() -> str:
    """Return what makes rows of large packed matrices."""
    from poise.quantizers.kernel import status

    return status()


def vector_units() -> str:
    """Return the AVX and related flags of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown (no /proc/cpuinfo)"
    flags = next((x.split(":", 1)[1].split() for x in text.splitlines() if x.startswith("flags")), [])
    return ", ".join(f for f in flags if f.startswith(("avx", "fma", "f16c", "amx"))) or "none"


def memory() -> str:
    """Return available and total memory."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, value = line.split(":")
        values[key] = int(value.split()[0]) / 2**20
    return f"{values['MemAvailable']:.1f} GiB available of {values['MemTotal']:.1f} GiB"


def o_direct(directory: Path) -> str:
    """Try an aligned O_DIRECT write and read in a directory."""
    import mmap

    if not hasattr(os, "O_DIRECT"):
        return "not on this system"
    block = mmap.mmap(-1, 4096)
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as f:
            handle = os.open(f.name, os.O_RDWR | os.O_DIRECT)
            try:
                os.write(handle, block)
                os.lseek(handle, 0, os.SEEK_SET)
                os.readv(handle, [block])
            finally:
                os.close(handle)
    except OSError as error:
        return f"not supported at {directory.resolve()}: {error.strerror}"
    return f"supported at {directory.resolve()}"


def _torch() -> str:
    import torch

    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    blas = found[1] if found else "unknown"
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no CUDA device"
    return (
        f"{torch.__version__}, {torch.get_num_threads()} threads by default, "
        f"{torch.backends.cpu.get_cpu_capability()}, BLAS {blas}, {cuda}"
    )


def _of_plugins() -> list[tuple[str, str]]:
    from importlib import import_module

    from poise.registry import installed

    rows = []
    for what, function in installed().findings.items():
        module, _, name = function.partition(":")
        rows.append((what, getattr(import_module(module), name)()))
    return rows


def _extras() -> list[tuple[str, str]]:
    from importlib.metadata import PackageNotFoundError, version

    rows = []
    for extra, packages in _EXTRAS.items():
        missing = []
        for package in packages:
            try:
                version(package)
            except PackageNotFoundError:
                missing.append(package)
        state = "present" if not missing else f"absent: {', '.join(missing)}"
        first = extra.split(",")[0]
        rows.append((f"extra {extra}", state if not missing else f"{state} (pip install 'poise[{first}]')"))
    return rows


def _data() -> list[tuple[str, str]]:
    from poise.data.packaged import inventory

    words: dict[Any, str] = {True: "here, checksum matches", False: "ALTERED", None: "here"}
    return [
        (f"data {i['name']}", words[i.get("checksum_ok")] if i["present"] else f"absent: {i['how']}")
        for i in inventory(check=True)
    ]
