"""The C kernel: built once with the system's compiler, kept under a name that holds a digest of its source.

Where it cannot be had (no compiler, one that fails, no folder to write to), `kernel()` is None, `why_not()`
says so, and the torch form in `update.py` takes the steps.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.native import FAILURES, built, team
from poise_compander.functions import Function
from poise_compander.names import FUNCTION_NAMES
from poise_compander.update import Step, Work

SOURCE = Path(__file__).with_name("kernel.c")
LIBRARIES = ("-lmvec", "-lm", "-lpthread")
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
        self._team = team()

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
                _found["it"] = Kernel(built(SOURCE, "compander", LIBRARIES))
            except FAILURES as error:
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
