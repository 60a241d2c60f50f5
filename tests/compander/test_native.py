"""Building the C kernel, and doing without it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from networks import randn, steady, train

from poise.errors import ConfigError, RunError
from poise.native import compiler_at_hand, is_whole
from poise_compander import WeightCompander, native, update
from poise_compander.functions import FUNCTIONS
from poise_compander.names import FUNCTION_NAMES
from poise_compander.update import Step, Work

LIMITS = {torch.float32: 2e-6, torch.float64: 1e-13}


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Forget the kernel; build into a folder of this test."""
    monkeypatch.setattr(native, "_found", {})
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compander"


def needs_compiler():
    if native.kernel() is None:
        pytest.skip(f"no C kernel here: {native.why_not()}")


def enum_of(first):
    """Return an enum of kernel.c by its first name: names and numbers, in order."""
    (body,) = re.findall(rf"enum {{ ({first}\b[^}}]*) }}", native.SOURCE.read_text())
    names = [entry.strip().partition(" = ") for entry in body.split(",")]
    return {name: int(value) if value else i for i, (name, _, value) in enumerate(names)}


def test_what_python_says_of_the_kernel_is_what_the_kernel_says():
    """Functions and flags are passed by number, and a step's numbers by their place."""
    functions = enum_of("ARCTAN")
    assert tuple(name.lower() for name in functions) == FUNCTION_NAMES
    assert list(functions.values()) == list(range(len(FUNCTION_NAMES)))
    assert enum_of("ADAPTIVE") == {name.lstrip("_"): value for name, value in vars(native).items()
                                   if name.isupper() and name.startswith("_") and isinstance(value, int)}
    (fields,) = re.findall(r"double (a, b, [^;]*);\n} numbers;", native.SOURCE.read_text())
    assert ["weight_decay" if f == "decay" else f for f in fields.split(", ")] == list(native._NUMBERS)
    assert set(FUNCTION_NAMES) <= set(FUNCTIONS)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize(("adaptive", "decoupled"), [(False, False), (True, False), (True, True)])
def test_every_case_of_the_kernel_is_the_rule_in_torch(function, dtype, adaptive, decoupled):
    needs_compiler()
    for on_v, decay, more, extra in product((False, True), (0.0, 0.02), (False, True), (False, True)):
        options = {"amsgrad": more} if adaptive else {"momentum": 0.9 * more, "nesterov": more and extra}
        g = torch.Generator().manual_seed(0)
        v = torch.randn(1003, generator=g, dtype=torch.float64).clamp(-2, 2).to(dtype)
        count = (3 if more else 2) if adaptive else int(more)
        mine = [function.forward(v, 0.8, 0.6), v, *(torch.zeros_like(v) for _ in range(count))]
        theirs = [t.clone() for t in mine]
        for step in range(1, 6):
            gradient = torch.randn(1003, generator=g, dtype=torch.float64).to(dtype)
            numbers = Step(0.8, 0.6, 0.81, 0.59, lr=0.01, weight_decay=decay, scale=0.7,
                           keep=0.5 if step > 1 else 1.0, correct1=1 - 0.9**step,
                           correct2=(1 - 0.999**step) ** 0.5,
                           adaptive=adaptive, decoupled=decoupled, decay_on_v=on_v, **options)
            native.kernel().update(function, [Work(numbers, *mine[:2], gradient, mine[2:])])
            update.update(function, numbers, *theirs[:2], gradient, theirs[2:])
        for a, b in zip(mine, theirs):
            size = max(1.0, float(b.abs().max()))
            assert float((a - b).abs().max()) <= LIMITS[dtype] * size, (on_v, decay, options)


@pytest.mark.parametrize("function", ["arctan", "erf", "arsinh", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [{}, {"decay_on_v": True}, {"adaptive": True, "decoupled": True}])
def test_sums_for_learned_pairs_are_those_in_torch(function, dtype, decay):
    needs_compiler()
    f, work = FUNCTIONS[function], []
    for i, n in enumerate((1, 63, 70_001)):
        w, v, g = (randn(n, seed=3 * i + j, dtype=dtype) for j in range(3))
        step = Step(0.9, 0.6, 0.9, 0.6, lr=0.1, weight_decay=0.3, scale=0.7, **decay)
        work.append(Work(step, w, v, g, []))
    found = native.kernel().sums(f, work)
    for one, pair in zip(work, found):
        want = update.sums(f, one.step, *(t.double() for t in (one.w, one.v, one.g)))
        size = float((one.g.abs().double() * one.v.abs().clamp_min(1)).sum())
        assert float((pair - want).abs().max()) <= {torch.float32: 1e-6, torch.float64: 1e-14}[dtype] * size
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(found, native.kernel().sums(f, work))
    finally:
        torch.set_num_threads(threads)


def test_a_gradient_that_is_not_a_number_comes_through():
    needs_compiler()
    for value in (float("nan"), float("inf")):
        tensors = [torch.zeros(64), torch.zeros(64), torch.full((64,), value), torch.zeros(64)]
        step = Step(0.7, 0.7, 0.7, 0.7, lr=0.1, weight_decay=0.0, momentum=0.9)
        native.kernel().update(FUNCTIONS["arctan"], [Work(step, *tensors[:3], tensors[3:])])
        assert not torch.isfinite(tensors[1]).any()


def test_the_kernel_changes_nothing_about_rounding_in_the_process():
    """A library that is linked with -ffast-math would make denormal numbers vanish everywhere."""
    needs_compiler()
    assert float(torch.tensor(1e-40) * 1.0) == pytest.approx(1e-40, rel=1e-4)
    assert 5e-324 * 1.0 > 0


def test_it_is_built_once_under_a_name_that_holds_its_digest(fresh):
    needs_compiler()
    native._found.clear()
    first = native.kernel()
    assert first.path.parent == fresh and first.path.name.startswith("kernel-")
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    built = first.path.stat().st_mtime_ns
    native._found.clear()
    assert native.kernel().path.stat().st_mtime_ns == built
    assert [p.name for p in fresh.iterdir()] == [first.path.name]


@pytest.mark.slow
def test_many_threads_build_it_at_once(fresh):
    needs_compiler()
    native._found.clear()
    with ThreadPoolExecutor(4) as pool:
        kernels = list(pool.map(lambda _: native.kernel(), range(4)))
    assert len({id(k) for k in kernels}) == 1
    assert len(list(fresh.iterdir())) == 1


@pytest.mark.slow
def test_many_processes_build_it_at_once(fresh):
    needs_compiler()
    code = "from poise_compander import native; assert native.kernel() is not None"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [p.wait(timeout=120) for p in started] == [0, 0, 0]
    assert len(list(fresh.iterdir())) == 1


def still_trains():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model = steady()
            attached = WeightCompander().attach(model)
            train(model, attached.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9), 3)
    return attached.w("0"), [str(w.message) for w in said if "compander" in str(w.message)]


def test_without_a_compiler_steps_are_taken_in_torch_and_it_is_said_once(fresh, monkeypatch):
    with_kernel = still_trains()[0]
    for compiler, words in (("no-such-compiler", "no-such-compiler is not there"), ("false", "false"),
                            ("gcc 'x", "No closing quotation")):
        native._found.clear()
        monkeypatch.setenv("CC", compiler)
        w, said = still_trains()
        assert torch.allclose(w, with_kernel, rtol=1e-12)
        assert len(said) == 1 and words in said[0] and "steps are taken in torch" in said[0]
        assert "no C kernel" in native.status()


@pytest.mark.slow
def test_a_compiler_may_come_with_arguments(fresh, monkeypatch):
    plain = still_trains()[0]
    native._found.clear()
    compiler = compiler_at_hand()[0]
    monkeypatch.setenv("CC", f"env {compiler} -DNOTHING='a b'")
    w, said = still_trains()
    assert torch.equal(w, plain) and not said
    assert len(list(fresh.glob("*.so"))) == 2  # other arguments, another library


def test_a_broken_compiler_is_named_with_its_last_words(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "internal error 7" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    _, said = still_trains()
    assert len(said) == 1 and "failed: internal error 7" in said[0]
    assert list(fresh.iterdir()) == []


def loaded_afresh(code="pass"):
    """Load the kernel in a process of its own: what it must not load would end the process."""
    code = f"from poise_compander import native; assert native.kernel() is not None; {code}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=False)


def slow(change, name):
    return pytest.param(change, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize("change", [
    slow(lambda d: d[:-1], "a byte short"),
    slow(lambda d: d[:9000] + bytes([d[9000] ^ 1]) + d[9001:], "a bit of code"),
    slow(lambda d: d[:-40], "no checksum"), slow(lambda d: d[:5000], "torn"),
    slow(lambda d: d[:64], "a header"), slow(lambda d: b"", "empty"),
    slow(lambda d: d[:-1] + bytes([d[-1] ^ 128]), "a bit at the end"),
])
def test_a_torn_or_altered_library_is_found_and_built_again(fresh, change):
    needs_compiler()
    native._found.clear()
    path = native.kernel().path
    whole = path.read_bytes()
    path.unlink()  # not written in place: this process has it loaded
    path.write_bytes(change(whole))
    assert loaded_afresh().returncode == 0
    assert is_whole(path.read_bytes())


def owned_by_another(path, foreign):
    if os.geteuid():
        pytest.skip("only root can give a file away")
    path.write_bytes(foreign.read_bytes())
    os.chown(path, 12345, 12345)


def writable_by_others(path, foreign):
    path.write_bytes(foreign.read_bytes())
    path.chmod(0o666)


@pytest.mark.parametrize("plant", [
    slow(lambda path, foreign: path.symlink_to(foreign), "link"),
    slow(owned_by_another, "owned by another"), slow(writable_by_others, "writable by others"),
    slow(lambda path, foreign: os.mkfifo(path), "fifo"),
])
def test_a_library_that_is_not_ones_own_is_built_again(fresh, tmp_path, plant):
    needs_compiler()
    native._found.clear()
    path = native.kernel().path
    foreign = tmp_path / "foreign.so"
    foreign.write_bytes(path.read_bytes())
    path.unlink()
    plant(path, foreign)
    assert loaded_afresh().returncode == 0
    found = os.lstat(path)
    assert stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o002


def test_a_folder_that_is_not_ones_own_is_not_loaded_from(fresh, monkeypatch, tmp_path):
    """Another user's folder, one that all may write to, and a link into either."""
    cases = {"all": lambda p: p.chmod(0o777)}
    if not os.geteuid():
        cases["another"] = lambda p: os.chown(p, 12345, 12345)
    for name, spoil in cases.items():
        parent = tmp_path / name
        (parent / "compander").mkdir(parents=True)
        spoil(parent)
        for cache in (parent, tmp_path / f"link-{name}"):
            if cache is not parent:
                cache.symlink_to(parent)
            native._found.clear()
            monkeypatch.setenv("POISE_CACHE", str(cache))
            _, said = still_trains()
            assert len(said) == 1 and "code is loaded only from folders of one's own" in said[0]
            assert not list((parent / "compander").iterdir())


def test_a_folder_that_cannot_be_written(fresh, monkeypatch, tmp_path):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("poise.native.cache_folder", refuse)
    _, said = still_trains()
    assert len(said) == 1 and "read-only" in said[0]


def test_the_doctor_says_which_kernel_takes_the_steps(tmp_path):
    from poise.cli.doctor import findings

    assert dict(findings(tmp_path))["compander steps"] == native.status()


def test_functions_of_ones_own_go_without_the_kernel():
    from poise_compander.functions import Function

    own = Function("own", torch.atan, torch.tan, lambda u: 1 / (1 + u * u), 1.57)
    needs_compiler()
    assert not native.kernel().takes(own, torch.zeros(3))
    assert native.kernel().takes(FUNCTIONS["tanh"], torch.zeros(3))


def test_threads_share_layers_and_change_no_bit():
    needs_compiler()
    sizes = [3, 40_000, 1, 200_003, 65_536]
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(0)
            work = []
            for i, size in enumerate(sizes):
                dtype = (torch.float32, torch.float64)[i % 2]
                w, v, g, m = (torch.randn(size, generator=generator, dtype=dtype) for _ in range(4))
                step = Step(0.7, 0.7, 0.7, 0.7, lr=0.1 * i, weight_decay=0.01, momentum=0.9)
                work.append(Work(step, w, v, g, [m]))
            expected = [[t.clone() for t in (one.w, one.v, *one.moments)] for one in work]
            for one, (w, v, m) in zip(work, expected):
                update.update(FUNCTIONS["arctan"], one.step, w, v, one.g, [m])
            native.kernel().update(FUNCTIONS["arctan"], work)
            found.append([t for one in work for t in (one.w, one.v, *one.moments)])
            for one, tensors in zip(work, expected):
                for a, b in zip((one.w, one.v, *one.moments), tensors):
                    assert float((a - b).abs().max()) <= 10 * LIMITS[a.dtype]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("change", [
    lambda m: m.double(), lambda m: m.to(memory_format=torch.channels_last), lambda m: m.bfloat16()])
def test_a_model_that_was_converted_after_attach_is_refused(change):
    """v would have another size or order than w: the kernel would write past its end, or mix elements."""
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3))
    optimizer = WeightCompander().attach(model).optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    change(model)
    dtype = model[0].weight.dtype
    with pytest.raises(RunError, match=r"convert the model before attach|written to"):
        model(torch.randn(1, 2, 5, 5, dtype=dtype)).square().mean().backward()
        optimizer.step()


def test_a_part_of_a_larger_tensor_is_refused():
    layer = torch.nn.Linear(8, 4)
    layer.weight = torch.nn.Parameter((0.1 * torch.randn(4, 32))[:, :8])
    with pytest.raises(ConfigError, match="part of a larger tensor"):
        WeightCompander().attach(torch.nn.Sequential(layer))


@pytest.mark.slow
def test_the_form_for_other_devices_is_the_rule_too():
    """torch.compile makes it; here for the processor, since no other device is at hand."""
    for function in FUNCTIONS.values():
        a = [torch.randn(64, dtype=torch.float64) for _ in range(4)]
        b = [t.clone() for t in a]
        for count in range(1, 13):  # more than torch compiles anew before it gives up
            step = Step(0.7, 0.7, 0.7, 0.7, lr=0.1 / count, weight_decay=0.01, scale=1 / count,
                        momentum=0.9)
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            update.compiled(function, step, *a[:3], a[3:])
            assert count == 1 or torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
            update.update(function, step, *b[:3], b[3:])
        assert all(torch.allclose(x, y, rtol=1e-12) for x, y in zip(a, b))
