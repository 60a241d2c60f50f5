"""Places of experts that are read ahead: held, dropped, promoted, given back, at every moment of a read."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from moe_models import ids, reference
from test_engine import opened, store_of

from poise.errors import FileError, RunError
from poise.testing.families import tiny
from poise_edgemoe.cache import make_policy
from poise_edgemoe.cache.residents import STAGES
from poise_edgemoe.cache.slots import ExpertCache, size_of
from poise_edgemoe.store.index import read_index
from poise_edgemoe.store.reader import HUGE, Reader, mapped
from poise_edgemoe.store.writer import convert


class Gate:
    """Lets one read after the other begin, and knows their order."""

    def __init__(self, monkeypatch):
        self.begun, self.may, self.order = threading.Semaphore(0), threading.Semaphore(0), []
        real, gate = Reader._read, self

        def read(self, request):
            gate.order.append(request.what)
            gate.begun.release()
            assert gate.may.acquire(timeout=20)
            real(self, request)

        monkeypatch.setattr(Reader, "_read", read)

    def open(self, reads=999):
        self.may.release(reads)


@pytest.fixture
def gate(monkeypatch):
    made = Gate(monkeypatch)
    yield made
    made.open()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("slots"), "olmoe", num_experts=12)[0]


@pytest.fixture
def make(store):
    """Return a function that makes a cache with places for some experts."""
    made = []

    def cache(places, policy="expected", frequencies=None, **options):
        index = read_index(store)
        largest = max(size_of(m) for _, _, m in index.blobs())
        known = {} if frequencies is None else {"frequencies": frequencies}
        rule = make_policy(policy, layers=2, experts=12, **known)
        made.append(ExpertCache(index, Reader(store), (places + STAGES) * largest, rule, **options))
        return made[-1]

    yield cache
    for cache in made:
        cache.reader.close()
        cache.close()


def use(cache, n, experts):
    """Use a layer's experts; return their matrices as they were."""
    with cache.layer(n, experts) as get:
        return {(e, part): get(e, part)[0].dequantize().clone()
                for e in experts for part in ("gate_up", "down")}


def whole(cache):
    """Every place is free or an expert's, and the budget holds."""
    held = sum(len(r.place) for r in cache.resident.values())
    free = sum(size * len(places) for size, places in cache._free.items())
    assert held == sum(cache._taken.values()) and held + free == cache.mapped <= cache.budget
    assert set(cache.policy.resident()) == set(cache.resident)


def name(n, e):
    return f"expert {e} in layer {n}"


@pytest.mark.parametrize("each", [True, False])
def test_a_guess_has_its_place_at_once_and_is_what_is_read_on_demand(each, make):
    plain, cache = make(12, whole=each), make(12, whole=each)
    want = use(plain, 1, [3, 7])
    use(cache, 0, [0, 1])
    assert cache.prefetch((1, 3), 0.9) and cache.prefetch((1, 7), 0.9) and not cache.prefetch((1, 3), 0.9)
    whole(cache)
    got, before = use(cache, 1, [3, 7]), plain.reader.bytes_read
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert cache.reader.bytes_read == 2 * before  # none is read twice
    assert cache.counts.used.tolist() == [0, 2] and cache.counts.misses.tolist() == [2, 0]


@pytest.mark.parametrize("moment", ["waiting", "being read", "read"])
def test_a_wrong_guess_leaks_nothing_whenever_the_truth_comes(moment, make, gate):
    cache = make(4)
    cache.prefetch((1, 0), 1.0)
    gate.begun.acquire()
    if moment == "waiting":
        cache.prefetch((1, 5), 1.0)  # behind the one that is being read
        wrong = (1, 5)
    else:
        wrong = (1, 0)
    if moment == "read":
        gate.open()
        cache.resident[wrong].settle()
    threading.Timer(0.1, gate.open).start()
    use(cache, 1, [8])
    whole(cache)
    assert set(cache.resident) == {(1, 0), (1, 8)} and cache._guesses == cache._pinned == set()
    counts = cache.counts
    assert counts.cancelled[1] == (moment == "waiting") and counts.used[1] == counts.wasted[1] == 0
    for e in (1, 2, 3, 4):  # it leaves like any other
        use(cache, 0, [e])
    assert counts.wasted[1] == 1 and counts.wasted_bytes[1] == cache._size((1, 0))
    whole(cache)


def test_a_demand_waits_for_one_read_at_most_and_lets_its_guess_go_first(make, gate):
    cache = make(12)
    for e in (0, 1, 2, 3):
        cache.prefetch((1, e), 1.0)
    gate.begun.acquire()
    threading.Timer(0.1, gate.open).start()
    use(cache, 1, [3, 9])
    cache.reader.close()
    assert gate.order == [name(1, 0), name(1, 3), name(1, 9)]  # 1 and 2 were dropped
    assert cache.counts.late[1] == cache.counts.used[1] == 1 and cache.counts.cancelled[1] == 2
    assert cache.counts.blocked[1] == cache.counts.demands[1] == 1


def test_a_guess_that_is_being_read_is_waited_for_and_not_read_again(make, gate):
    cache = make(12)
    cache.prefetch((1, 4), 1.0)
    gate.begun.acquire()
    threading.Timer(0.1, gate.open).start()
    use(cache, 1, [4])
    assert gate.order == [name(1, 4)] and cache.counts.late[1] == 1 and cache.counts.stall[1] > 0


def test_experts_of_this_layer_and_guesses_for_the_next_stay(make):
    cache = make(4, "lru")
    use(cache, 0, [0, 1])
    use(cache, 1, [2])  # the least recent are of layer 0
    with cache.layer(0, [0, 1]) as get:
        assert cache.prefetch((1, 2), 1.0) is False  # there already: held all the same
        assert cache.prefetch((1, 5), 1.0)
        assert not cache.prefetch((1, 6), 1.0)  # nobody may leave
        assert set(cache.resident) == {(0, 0), (0, 1), (1, 2), (1, 5)}
        get(0, "down")
    use(cache, 1, [5])
    whole(cache)
    assert cache.counts.used[1] == 1 and cache._pinned == set()


def test_a_guess_takes_no_place_of_an_expert_that_is_as_likely(make):
    cache = make(3)
    for _ in range(30):
        use(cache, 0, [0, 1, 2])
        cache.next_token()
    rate = cache.policy._rate[0, 0]
    assert 0.65 < rate < 0.75
    assert not cache.prefetch((1, 0), 0.5 * rate) and set(cache.resident) == {(0, 0), (0, 1), (0, 2)}
    assert cache.prefetch((1, 0), 1.0)  # sure to be used, and sooner
    whole(cache)
    for name in ("static", "paper_intent"):
        told = make(3, name, frequencies={(0, 0): 0.6, (0, 1): 0.7, (0, 2): 0.8})
        use(told, 0, [0, 1, 2])
        assert not told.prefetch((1, 0), 0.6) and told.prefetch((1, 0), 0.65)
    lru = make(3, "lru")
    use(lru, 0, [0, 1, 2])
    assert lru.prefetch((1, 0), 0.01)  # a policy without chances gives whom it would give


def test_demand_rather_takes_another_place_than_one_that_is_being_read(make, gate):
    cache = make(2, "lru")
    gate.open(1)
    use(cache, 0, [0])
    gate.begun.acquire()
    cache.prefetch((1, 0), 1.0)
    gate.begun.acquire()
    use(cache, 0, [0])
    with cache.layer(1, [3]):  # (0, 0) leaves, though it was used after (1, 0); nothing waits
        assert set(cache.resident) == {(1, 0), (1, 3)} and not cache.resident[1, 0].ready()
    threading.Timer(0.1, gate.open).start()
    use(cache, 0, [0, 1])  # both places are needed: it is waited for
    assert set(cache.resident) == {(0, 0), (0, 1)}
    whole(cache)


# ------------------------------------------------------------------ failures


def failing(monkeypatch, times):
    """Let that many reads fail; 4 tries are one read."""
    real, left = os.preadv, [4 * times]

    def preadv(handle, buffers, offset):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return left


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("each", [True, False])
def test_a_guess_that_cannot_be_read_is_nobodys_error(each, late, make, gate, monkeypatch):
    plain, cache = make(12), make(12, whole=each)
    gate.open(2)
    want = use(plain, 1, [4, 5])
    left = failing(monkeypatch, 1)
    cache.prefetch((1, 4), 1.0)
    if not late:
        gate.open()
        cache.resident[1, 4].settle()
    else:
        threading.Timer(0.1, gate.open).start()
    got = use(cache, 1, [4, 5])
    assert left == [0] and all(torch.equal(got[k], want[k]) for k in want)
    whole(cache)


def test_a_guess_that_cannot_be_read_on_demand_either_is_an_error_then(make, monkeypatch):
    cache = make(12)
    left = failing(monkeypatch, 2)
    cache.prefetch((1, 4), 1.0)
    cache.resident[1, 4].settle()
    use(cache, 0, [])  # not needed: nothing is said
    with pytest.raises(FileError, match=r"of expert 4 in layer 1 at .*Input/output error"):
        use(cache, 1, [4])
    assert left == [0] and (1, 4) not in cache.resident
    use(cache, 1, [4])
    whole(cache)


def test_it_closes_while_guesses_are_read(store, gate):
    with opened(store, 6, prefetch="none") as engine:
        cache = engine.cache
        for e in range(4):
            cache.prefetch((1, e), 1.0)
        gate.begun.acquire()
        held = list(cache.resident.values())
        threading.Timer(0.1, gate.open).start()
    engine.close()
    assert all(r.ready() for r in held) and not engine.reader._thread.is_alive()
    with pytest.raises(RunError, match="closed before it came to this"):
        held[-1].requests[0].wait()
    with pytest.raises(RunError, match="the reader is closed"):
        engine.reader.prefetch([])


def test_an_exception_within_a_layer_holds_nobody(store, make, monkeypatch):
    from poise_edgemoe.experts import StoredExperts

    class Next:
        def candidates(self, layer, seen):
            return [(e, 1.0) for e in range(12)]

    monkeypatch.setattr("poise_edgemoe.ahead.Restraint.chance", lambda *_: 1.0)
    want = reference(store.parent / "model").generate(ids(), 8)
    real, calls = StoredExperts._experts, [0]

    def interrupted(self, *given):
        calls[0] += 1
        if calls[0] == 40:
            raise KeyboardInterrupt
        return real(self, *given)

    with opened(store, 6, prefetch=Next()) as engine:
        monkeypatch.setattr(StoredExperts, "_experts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(ids(), 8)
        assert engine.cache._pinned == set()
        whole(engine.cache)
        assert torch.equal(engine.generate(ids(), 8), want)
        whole(engine.cache)


@pytest.mark.parametrize("lend", [1, 4, 6])
def test_room_that_is_lent_is_taken_from_guesses_too(lend, make, gate):
    cache = make(6)
    for e in range(6):
        cache.prefetch((1, e), 1.0)
    gate.begun.acquire()
    threading.Timer(0.1, gate.open).start()
    with cache.lent(lend * cache._size((1, 0))):
        whole(cache)
        assert len(cache.resident) == 6 - lend
    whole(cache)
    use(cache, 1, [0, 5])
    whole(cache)
    counts, left = cache.counts, sum(r.guessed for r in cache.resident.values())
    assert counts.guesses[1] - counts.cancelled[1] == counts.used[1] + counts.wasted[1] + left


def test_places_are_mapped_together_and_lie_in_huge_pages(tmp_path):
    """All places of a size are mapped with the first: neighbours share huge pages."""
    model = tiny("olmoe", hidden_size=256, intermediate_size=1152, num_experts=8, num_hidden_layers=2)
    cache = opened(convert(model, tmp_path / "large", bits=32), 12, context=16, batch=1).cache
    size = cache._size((0, 0))
    before, control = huge_bytes(), [mapped(size) for _ in range(12)]
    for place in control:
        place[::4096] = bytes(-(-size // 4096))
    together = huge_bytes() - before
    del control, place
    before = huge_bytes()
    use(cache, 0, [0])
    assert size % HUGE and cache.mapped == 12 * size
    for e in range(1, 12):  # each is there before the next is asked for
        use(cache, e % 2, [e // 2])
    assert len(cache.resident) == 12
    assert huge_bytes() - before >= 0.8 * together
    cache.reader.close()


def huge_bytes():
    """Return how much of the process lies in huge pages."""
    path = Path("/proc/self/smaps_rollup")
    lines = path.read_text().splitlines() if path.is_file() else []
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))
