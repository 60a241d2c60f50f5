"""What every served language model keeps, beside the same model in memory."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from poise.interfaces import Served
from poise.testing.faults import expect, expect_json, expect_refusal

TEXT = "Weights on a balance: 3 + 4 = 7, déjà vu."


def check_served(
    make: Callable[[], Served], reference: Served, *, exact: bool = True, new: int = 12
) -> list[str]:
    """Hold a served model against the same one in memory (`poise.models.serving.InMemory`).

    Parameters
    ----------
    make : callable
        Opens it; called a few times.
    reference : Served
        The same weights, in memory.
    exact : bool
        Whether logits are those of the reference bit for bit; otherwise to 1e-3 of the largest.
    new : int
        Tokens that are generated.

    Returns
    -------
    list of str
        The checks that were made, in order.

    Raises
    ------
    ContractError
        Naming the first fault.
    """
    checks = [_logits, _greedy, _sampled, _streams, _text, _refuses, _stats]
    with make() as served:
        expect(isinstance(served, Served), "it lacks a method of Served")
        for check in checks:
            check(served, reference, exact, new)
    _closes(make)
    return [c.__name__.strip("_") for c in checks] + ["closes"]


def _ids(served: Any, rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(0))


def _decoder(served: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the decoder's ids where the model has one."""
    try:
        served.logits(ids)
    except Exception:
        return (ids[:, :5].clone(),)
    return ()


def _logits(served: Any, reference: Any, exact: bool, new: int) -> None:
    ids = _ids(served)
    more = _decoder(reference, ids)
    got, want = served.logits(ids, *more), reference.logits(ids, *more)
    expect(got.shape == want.shape, f"logits have the shape {tuple(got.shape)}, not {tuple(want.shape)}")
    _same(got, want, exact, "logits are not those of the model in memory")
    kept = got.clone()
    served.logits(ids.flip(1), *more)
    expect(torch.equal(got, kept), "a later call writes into logits that were given out")
    _same(served.logits(ids, *more), got, True, "the same call gives other logits the second time")
    for n in range(len(ids)):
        alone = served.logits(ids[n: n + 1], *(m[n: n + 1] for m in more))
        _same(alone, reference.logits(ids[n: n + 1], *(m[n: n + 1] for m in more)), exact,
              "a row alone is not what the model in memory says")


def _same(got: torch.Tensor, want: torch.Tensor, exact: bool, fault: str) -> None:
    if exact:
        expect(torch.equal(got, want), f"{fault}, bit for bit")
    else:
        worst = float((got.float() - want.float()).abs().max())
        expect(worst <= 1e-3 * float(want.float().abs().max()), f"{fault}: off by {worst:.2g}")


def _greedy(served: Any, reference: Any, exact: bool, new: int) -> None:
    ids = _ids(served)
    got, want = served.generate(ids, new), reference.generate(ids, new)
    expect(got.dtype == torch.int64 and got.ndim == 2 and len(got) == 2, "ids (batch, time + new) are due")
    if exact:
        expect(torch.equal(got, want), "greedy tokens are not those of the model in memory")
    expect(torch.equal(served.generate(ids, new), got), "generating again gives other tokens")
    one = served.generate(ids, 1)
    expect(torch.equal(one, got[:, : one.shape[1]]), "fewer tokens are not the beginning of more")


def _sampled(served: Any, reference: Any, exact: bool, new: int) -> None:
    ids = _ids(served)
    how = {"do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.95}
    got = served.generate(ids, new, seed=1, **how)
    expect(torch.equal(served.generate(ids, new, seed=1, **how), got), "the same seed draws other tokens")
    expect(any(not torch.equal(served.generate(ids, new, seed=s, **how), got) for s in (2, 3, 4)),
           "every seed draws the same tokens")
    state = torch.get_rng_state()
    served.generate(ids, 2, seed=1, **how)
    expect(torch.equal(torch.get_rng_state(), state), "a seeded draw moves torch's own generator")
    if exact:
        expect(torch.equal(got, reference.generate(ids, new, seed=1, **how)),
               "drawn tokens are not those of the model in memory")


def _streams(served: Any, reference: Any, exact: bool, new: int) -> None:
    ids = _ids(served)
    whole = served.generate(ids, new)
    made = torch.stack(list(served.stream(ids, new)), 1)
    expect(torch.equal(made, whole[:, -made.shape[1]:]), "streamed tokens are not the generated ones")
    some = served.stream(ids, new)
    next(some)
    some.close()
    expect(torch.equal(served.generate(ids, new), whole), "a stream left half way changes what follows")


def _text(served: Any, reference: Any, exact: bool, new: int) -> None:
    whole = served.generate(TEXT, new)
    expect(isinstance(whole, str) and whole.startswith(TEXT), "text does not give the text, continued")
    pieces = list(served.stream(TEXT, new))
    expect(TEXT + "".join(pieces) == whole, "streamed text is not the generated one")
    if exact:
        expect(whole == reference.generate(TEXT, new), "text is not that of the model in memory")
    rest = whole[len(TEXT):]
    if len(rest) > 2:
        stop = rest[1:3]
        short = served.generate(TEXT, new, stop=[stop])
        expect(short == TEXT + rest[: rest.index(stop)], "generation does not end before a stop text")


def _refuses(served: Any, reference: Any, exact: bool, new: int) -> None:
    ids = _ids(served)
    bad: dict[str, Callable[[], Any]] = {
        "an empty prompt": lambda: served.generate(ids[:, :0], 2),
        "an empty text": lambda: served.generate("", 2),
        "a negative id": lambda: served.logits(-ids),
        "an id beyond the vocabulary": lambda: served.logits(ids + 10**9),
        "ids of one dimension": lambda: served.logits(ids[0]),
        "ids that are no whole numbers": lambda: served.logits(ids.float()),
        "max_new_tokens=0": lambda: served.generate(ids, 0),
        "temperature=0": lambda: served.generate(ids, 2, do_sample=True, temperature=0.0),
        "top_p=1.5": lambda: served.generate(ids, 2, do_sample=True, top_p=1.5),
        "top_k=0": lambda: served.generate(ids, 2, do_sample=True, top_k=0),
        "an option that there is not": lambda: served.generate(ids, 2, num_beams=3),
        "a seed that nothing draws by": lambda: served.generate(ids, 2, seed=1),
        "more tokens than the context": lambda: served.generate(ids, 10**9),
    }
    for what, call in bad.items():
        expect_refusal(call, f"{what} is accepted")
    served.generate(ids, 2)


def _stats(served: Any, reference: Any, exact: bool, new: int) -> None:
    expect_json(served.stats(), "stats()")


def _closes(make: Callable[[], Any]) -> None:
    make().close()  # what is opened once stays open: libraries, their threads
    gc.collect()
    before = _held()
    _use_and_close(make())
    gc.collect()
    expect(_held() == before, f"threads or files are left after close(): {before} before, {_held()} after")
    try:
        with make() as one:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        expect_refusal(lambda: one.generate(_ids(one), 1), "an exception within `with` leaves it open")


def _use_and_close(served: Any) -> None:
    ids = _ids(served)
    served.generate(ids, 2)
    running = served.stream(ids, 4)
    next(running)
    served.close()
    served.close()
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: served.generate(ids, 1), "logits": lambda: served.logits(ids),
        "stream": lambda: list(served.stream(ids, 1)), "a running stream": lambda: next(running),
        "stats": served.stats, "with": served.__enter__}
    for what, call in calls.items():
        expect_refusal(call, f"{what} is accepted after close()")


def _held() -> tuple[int, int]:
    """Return the numbers of threads and of open files."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))
