"""The C kernel: built once with the system's compiler, kept under a name that holds a digest of its source.

Where it cannot be had (no compiler, one that fails, no folder to write to), `kernel()` is None, `why_not()`
says so, and the torch form in `update.py` takes the steps.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.caches import cache_folder
from poise.errors import FileError
from poise.files import write_bytes
from poise.trust import read_own, refuse_foreign_folder
from poise_compander.functions import Function
from poise_compander.names import FUNCTION_NAMES
from poise_compander.update import Step, Work

SOURCE = Path(__file__).with_name("kernel.c")
COMPILE = ("-c", "-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fPIC", "-std=gnu11")
LINK = ("-shared",)
LIBRARIES = ("-lmvec", "-lm", "-lpthread")
TIMEOUT = 120  # seconds
DTYPES = (torch.float32, torch.float64)
GRAIN = 1 << 16  # weights for each thread below which another one does not pay
_ADAPTIVE, _DECOUPLED, _ON_V, _NESTEROV, _AMSGRAD, _MOMENTUM, _DECAY = (1 << i for i in range(7))
_lock = threading.Lock()


_NUMBERS = ("a", "b", "a_next", "b_next", "lr", "weight_decay", "scale", "momentum", "keep", "beta1",
            "beta2", "eps", "correct1", "correct2")  # in the order of the struct in kernel.c


class _Numbers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in _NUMBERS]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("n", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in ("w", "v", "g", "m", "s", "l")),
        ("k", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("function", "flags", "wide")),
    ]


class Kernel:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        self._steps, self._sums = library.poise_steps, library.poise_sums
        self._steps.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        self._sums.argtypes = [*self._steps.argtypes, ctypes.c_void_p]
        self._block = int(library.poise_block())
        self._team = _team()

    def takes(self, function: Function, w: Tensor) -> bool:
        """Whether it knows the function, and the weight's place and type."""
        return w.device.type == "cpu" and w.dtype in DTYPES and function.name in FUNCTION_NAMES

    def update(self, function: Function, work: Sequence[Work]) -> None:
        """Take the steps of all weights in place, on as many threads as torch uses."""
        layers, threads, _numbers_alive = self._layers(function, work)
        failed = self._steps(layers, len(work), threads, self._team)
        assert not failed, "kernel.c has no case for these flags"

    def sums(self, function: Function, work: Sequence[Work]) -> Tensor:
        """Return `update.sums` of every weight, float64, shape (weights, 2)."""
        layers, threads, _numbers_alive = self._layers(function, work)
        blocks = [-(-one.w.numel() // self._block) for one in work]
        by_block = torch.zeros(sum(blocks), 2, dtype=torch.float64)
        failed = self._sums(layers, len(work), threads, self._team, by_block.data_ptr())
        assert not failed, "kernel.c does not know this function"
        return torch.stack([part.sum(0) for part in by_block.split(blocks)])

    def _layers(self, function: Function, work: Sequence[Work]) -> tuple[Any, int, Any]:
        """Return what the library is given: layers, threads; and what must live as long as the call."""
        layers = (_Layer * len(work))()
        numbers: dict[int, _Numbers] = {}  # most layers share a step
        number, total = FUNCTION_NAMES.index(function.name), 0
        for layer, one in zip(layers, work):
            if id(one.step) not in numbers:
                numbers[id(one.step)] = _numbers(one.step)
            total += one.w.numel()
            pointers = [t.data_ptr() for t in (one.w, one.v, one.g, *one.moments)]
            pointers += [None] * (6 - len(pointers))
            layer.__init__(one.w.numel(), *pointers, ctypes.addressof(numbers[id(one.step)]), number,
                           _flags(one.step, one.moments), one.w.dtype == torch.float64)
        return layers, max(1, min(torch.get_num_threads(), total // GRAIN)), numbers


def _team() -> ctypes.c_void_p | None:
    """Return the call that runs a function on torch's own OpenMP threads, or None where there is none.

    Those threads wait for work by spinning: other threads would have to share their cores with them.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def _numbers(step: Step) -> _Numbers:
    return _Numbers(*(float(getattr(step, name)) for name in _NUMBERS))


def _flags(step: Step, moments: Sequence[Tensor]) -> int:
    decay = bool(step.weight_decay)
    flags = _DECAY * decay + _ON_V * (decay and step.decay_on_v)
    if step.adaptive:
        return flags + _ADAPTIVE + _AMSGRAD * step.amsgrad + _DECOUPLED * (decay and step.decoupled)
    return flags + (_MOMENTUM + _NESTEROV * step.nesterov if moments else 0)


# ------------------------------------------------------------------ building


_found: dict[str, Kernel | str] = {}


def kernel() -> Kernel | None:
    """Return the kernel, built at the first call; None where it cannot be had, with one warning."""
    if isinstance(it := _found.get("it"), Kernel):
        return it
    with _lock:
        if "it" not in _found:
            try:
                _found["it"] = _loaded()
            except (OSError, AttributeError, subprocess.SubprocessError, RuntimeError, ValueError,
                    FileError) as error:
                _found["it"] = str(error)
                warnings.warn(f"compander: no C kernel, steps are taken in torch ({error})",
                              RuntimeWarning, stacklevel=3)
        it = _found["it"]
    return it if isinstance(it, Kernel) else None


def why_not() -> str:
    """Return why there is no kernel, or an empty string."""
    return "" if kernel() is not None else str(_found["it"])


def status() -> str:
    """Return one line for people: where the kernel is, or why there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        it = kernel()
    return f"C kernel, {it.path}" if it is not None else f"torch, no C kernel: {why_not()}"


def _loaded() -> Kernel:
    """Return the kernel; a file that is torn, altered or somebody else's is not loaded, but built again.

    A torn library ends the process when it is loaded, and an altered one computes something else: the file
    ends with the checksum of what is before.
    """
    path = _built()
    try:
        whole = _is_whole(read_own(path))
    except FileError:
        whole = False
    if not whole:
        path.unlink()
        path = _built()
    return Kernel(path)


def _is_whole(data: bytes) -> bool:
    body, checksum = data[:-hashlib.sha256().digest_size], data[-hashlib.sha256().digest_size:]
    return hashlib.sha256(body).digest() == checksum


def _built() -> Path:
    """Return the library's path; compile where it is not there yet.

    Raises
    ------
    OSError, RuntimeError, ValueError, subprocess.SubprocessError
        When there is no compiler, CC cannot be read, it fails, or the folder cannot be used.
    FileError
        When somebody else could write to the folder.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or _compiler_at_hand()
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"compiler {compiler[0]} is not there")
    target = _folder() / f"kernel-{_digest(compiler)}.so"
    if not os.path.lexists(target):
        _compile(compiler, target)
    return target


def _compiler_at_hand() -> list[str]:
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("no compiler: install gcc or clang, or set CC")


def _folder() -> Path:
    """Return the folder of built kernels; code is loaded from it, so nobody else may write there."""
    folder = cache_folder("compander")
    if not folder.is_symlink():
        folder.chmod(0o700)  # raises unless it is this user's
    return refuse_foreign_folder(folder)


def _digest(compiler: list[str]) -> str:
    asked = subprocess.run([*compiler, "--version"], capture_output=True, timeout=TIMEOUT, check=True)
    digest = hashlib.sha256(SOURCE.read_bytes() + asked.stdout)
    digest.update(repr((compiler[1:], COMPILE, LINK, LIBRARIES, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """Return what -march=native looks at: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: list[str], target: Path) -> None:
    """Compile into a folder of its own, then move the library into place in one go."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        object_file, library = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        for command in ([*compiler, *COMPILE, "-o", str(object_file), str(SOURCE)],
                        [*compiler, *LINK, "-o", str(library), str(object_file), *LIBRARIES]):
            done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                                  timeout=TIMEOUT, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise RuntimeError(f"{' '.join(compiler)} failed: {last}")
        data = library.read_bytes()
        write_bytes(target, data + hashlib.sha256(data).digest())  # what follows a library is not looked at
