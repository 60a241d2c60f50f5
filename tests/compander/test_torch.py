"""What torch does around a model: compile, autocast, export, DDP, FSDP2. Each an equality."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import X, network, steady, train

from poise_compander import WeightCompander

SGD = torch.optim.SGD
paths = pytest.mark.parametrize("path", ["fast", "reference"])


@paths
@pytest.mark.parametrize("learn", ["none", "layer"])
def test_a_compiled_model_is_one_graph_with_the_same_gradients(path, learn):
    torch._dynamo.reset()
    model, eager = steady(), steady()
    attached, other = (WeightCompander(path=path, learn=learn).attach(m) for m in (model, eager))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizers = [a.optimizer(SGD, lr=0.05, momentum=0.9) for a in (attached, other)]
    for _ in range(3):
        for call, optimizer in ((compiled, optimizers[0]), (eager, optimizers[1])):
            optimizer.zero_grad()
            call(X).square().mean().backward()
            optimizer.step()
    for name in attached.companded:
        assert torch.allclose(attached.w(name), other.w(name), rtol=1e-12, atol=1e-15)
    explained = torch._dynamo.explain(model)(X)
    assert explained.graph_break_count == 0 and explained.graph_count == 1


@paths
def test_under_autocast_w_stays_in_float32(path):
    model = steady(torch.float32)
    attached = WeightCompander(path=path).attach(model)
    plain = steady(torch.float32)
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        out, want = model(x), plain(x)
        assert out.dtype == torch.bfloat16
        assert attached.w("0").dtype == attached.v("0").dtype == torch.float32
        loss = out.float().square().mean()
    assert torch.equal(out, want) or float((out - want).abs().max()) < 0.02
    loss.backward()
    attached.optimizer(SGD, lr=0.1).step()
    assert all(torch.isfinite(attached.v(n)).all() for n in attached.companded)


@paths
def test_autocast_trains_both_paths_alike(path):
    def result(which):
        model = steady(torch.float32)
        attached = WeightCompander(path=which).attach(model)
        optimizer = attached.optimizer(SGD, lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = model(X.float())
            out.float().square().mean().backward()
            optimizer.step()
        return attached.w("0")

    assert torch.allclose(result(path), result("reference"), atol=2e-3)


@paths
def test_the_folded_model_is_exported_and_gives_the_same(path, tmp_path):
    model = network(dtype=torch.float32)
    attached = WeightCompander(path=path).attach(model)
    train(model, attached.optimizer(SGD, lr=0.05), 2)
    want = model(X.float()).detach()
    attached.fold()
    exported = torch.export.export(model, (X.float(),))
    assert torch.equal(exported.module()(X.float()), want)
    attached.unfold()
    train(model, attached.optimizer(SGD, lr=0.05), 1)


@paths
def test_the_folded_model_goes_to_onnx(path, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = network(dtype=torch.float32).eval()
    attached = WeightCompander(path=path).attach(model)
    train(model, attached.optimizer(SGD, lr=0.05), 2)
    want = model(X.float()).detach()
    attached.fold()
    torch.onnx.export(model, (X.float(),), tmp_path / "it.onnx", dynamo=True)
    saved = onnx.load(tmp_path / "it.onnx")
    onnx.checker.check_model(saved)
    assert not any("Atan" in node.op_type for node in saved.graph.node)
    from onnx.reference import ReferenceEvaluator

    (got,) = ReferenceEvaluator(saved).run(None, {saved.graph.input[0].name: X.float().numpy()})
    assert torch.allclose(torch.from_numpy(got), want, atol=1e-5)


# ------------------------------------------------------------------ several processes


WORKER = Path(__file__).with_name("worker.py")


LEAVES = """
import atexit, sys
import torch.distributed as dist
from worker import leave
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
atexit.register(print, "the interpreter ends")
print("work done")
leave()
"""


def python(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).parent), *sys.path])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300,
                          env=environment, check=False)


def run_worker(*cases):
    """Start two processes of worker.py, which compares with one process and raises on a difference."""
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER), *cases)
    assert done.returncode == 0, done.stderr[-3000:]
    for case in cases:
        assert done.stdout.count(f"{case} equal") == 2, done.stdout


def test_a_worker_leaves_before_the_interpreter_ends_beside_threads_of_gloo(tmp_path):
    done = python("-c", LEAVES, str(tmp_path / "store"))
    assert (done.returncode, done.stdout) == (0, "work done\n"), done.stderr[-3000:]


def test_two_processes_train_what_one_does():
    run_worker(*(f"ddp-{path}-{learn}" for path in ("fast", "reference")
                 for learn in ("none", "layer", "network")))


@pytest.mark.slow
def test_two_sharded_processes_train_what_one_does():
    run_worker(*(f"fsdp-{path}-{learn}" for path in ("fast", "reference") for learn in ("none", "layer")))
