"""What the fuzzers share: how many cases, mutations of bytes, and the verdict on each case."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from poise.errors import PoiseError

WORDS = (b" ", b"\t", b"-", b":", b",", b"&a ", b"*a", b"[", b"{", b"null", b"1e999", b"\n")
SECONDS = 60  # of one case, after which it hangs


FULL = os.environ.get("POISE_FUZZ") == "full"
# of each campaign the default suite has a few cases, the long one more, and `make fuzz` all
sizes = pytest.mark.parametrize("size", [2] if FULL else [0, pytest.param(1, marks=pytest.mark.slow)],
                                ids=["full"] if FULL else ["few", "more"])


def cases(size: int, *counts: int) -> Iterator[random.Random]:
    """Yield a generator for each case of a campaign that has so many in each size."""
    for number in range(counts[size]):
        yield random.Random(number)


class HangError(BaseException):
    """A case did not end; no Exception, which a reader might catch on the way."""


class Verdicts:
    """Counts of how the cases of one class ended; only right values and one-line errors are allowed."""

    def __init__(self, kind: str) -> None:
        self.kind, self.counts, self.examples = kind, Counter(), {}

    def judge(self, case: Any, act: Callable[[], bool]) -> None:
        """Carry out a case; `act` says whether its result is right."""
        try:
            with _limited():
                verdict = "right" if act() else "wrong"
        except PoiseError as error:
            verdict, case = ("refused" if len(str(error).splitlines()) == 1 else "raw"), (case, str(error))
        except HangError:
            verdict = "hang"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            verdict, case = "raw", (case, repr(error))
        self.counts[verdict] += 1
        self.examples.setdefault(verdict, case)

    def check(self) -> None:
        """Print the counts of this class, and fail for any wrong, raw or hanging case."""
        faults = {v: self.counts[v] for v in ("wrong", "raw", "hang")}
        told = ", ".join(f"{n:,} {v}" for v, n in {**self.counts, **faults}.items())
        print(f"\n{self.kind}: {sum(self.counts.values()):,} cases: {told}")
        first = {v: self.examples[v] for v, n in faults.items() if n}
        assert not first, first


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to three mutations: a flip, a cut, an insertion, a repeat, a run of zeros."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(found) + 1), rng.choice([1, 1, 2, 8, 64])
        match rng.randrange(5):
            case 0 if at < len(found):
                found[at] ^= 1 << rng.randrange(8)
            case 1:
                del found[at : at + length]
            case 2:
                found[at:at] = rng.choice([rng.randbytes(length), *WORDS])
            case 3:
                found[at:at] = found[at : at + length]
            case _:
                found[at : at + length] = bytes(len(found[at : at + length]))
    return bytes(found)
