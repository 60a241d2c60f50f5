"""The loop: parts add up, schedules and orders are functions, stopping and going on changes nothing."""

from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.config import Train
from poise.errors import ConfigError, FileError, RunError
from poise.interfaces import Arrays, Splits
from poise.recipes.classify import ClassifyTask, crop_flip, loaded, tensors
from poise.recipes.loop import Order, build_optimizer, fit, rate
from poise.runs.checkpoint import Checkpoints
from poise.runs.context import Interrupted, RunContext, seed_for
from poise.runs.records import read_rows
from poise_bone import Bone
from poise_compander import WeightCompander

few = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6))
    return Arrays(x, (x[:, 0] + x[:, 1] > 0).astype(np.int64) + (x[:, 2] > 1))


def network(dropout=0.0, norm=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def settings_of(**options):
    return Train(**{"steps": 12, "batch_size": 8, "optimizer": "sgd", "lr": 0.1, "eval_every": 4,
                    "log_every": 1, "checkpoint_every": 4, **options})


def task_of(model, train, n=40, cls=ClassifyTask):
    order = Order(n, train.batch_size, 5)
    return cls(model, tensors(rows(n), "cpu"), tensors(rows(16, 1), "cpu"), order, train.accumulate)


def context_of(folder, keep=9, keep_rows=None):
    context = RunContext(folder, seed=3, keep=keep, quiet=True)
    context.records.open(keep_rows)
    return context


def run(folder, train, model=None, adapter=None, task_class=ClassifyTask, context=None):
    """Train and return the model's tensors."""
    model = (model or network()).train()
    attached = adapter.attach(model) if adapter else None
    context = context or context_of(folder)
    task = task_of(model, train, cls=task_class)
    task.context = context
    try:
        fit(task, build_optimizer(train, model, attached), train, context)
    finally:
        context.records.close()
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], v) for k, v in second.items())


def recorded(folder):
    return [(r["step"], r["name"], r["value"]) for r in read_rows(folder / "metrics.jsonl")]


# ------------------------------------------------------------------ accumulation


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_two_parts_of_eight_are_one_batch_of_sixteen(optimizer, tmp_path):
    one = settings_of(batch_size=16, optimizer=optimizer, lr=0.01)
    two = settings_of(batch_size=8, accumulate=2, optimizer=optimizer, lr=0.01)
    first, second = run(tmp_path / "a", one), run(tmp_path / "b", two)
    for key, value in first.items():
        assert torch.allclose(second[key], value, rtol=0, atol=1e-6)
    assert not same(first, network().state_dict())
    losses = [[v for _, name, v in recorded(tmp_path / d) if name == "loss"] for d in "ab"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_parts_count_by_their_targets(tmp_path):
    """A part of two targets and one of six weigh 1/4 and 3/4: the mean over all eight."""

    class Uneven(ClassifyTask):
        def batch(self, step, part):
            rows = self.order.rows(step)
            chosen = rows[:2] if part == 0 else rows[2:]
            return self.x[chosen], self.y[chosen]

    first = run(tmp_path / "a", settings_of())
    second = run(tmp_path / "b", settings_of(accumulate=2), task_class=Uneven)
    for key, value in first.items():
        assert torch.allclose(second[key], value, rtol=0, atol=1e-6)


# ------------------------------------------------------------------ rates


@pytest.mark.parametrize(("schedule", "step", "factor"), [
    ("constant", 0, 0.1), ("constant", 4, 0.5), ("constant", 9, 1.0), ("constant", 99, 1.0),
    ("linear", 0, 0.1), ("linear", 9, 1.0), ("linear", 10, 1.0), ("linear", 55, 0.5),
    ("linear", 99, 1 / 90),
    ("cosine", 9, 1.0), ("cosine", 10, 1.0), ("cosine", 55, 0.5), ("cosine", 40, 0.75),
    ("cosine", 99, 0.5 * (1 + math.cos(math.pi * 89 / 90))),
])
def test_the_rate_at_a_step(schedule, step, factor):
    assert rate(Train(steps=100, warmup=10, schedule=schedule), step) == pytest.approx(factor)


@few
@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(1, 200), st.integers(0, 50))
def test_the_rate_rises_through_the_warm_up_and_never_again(schedule, steps, warmup):
    factors = [rate(Train(steps=steps, warmup=warmup, schedule=schedule), s) for s in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    up, down = factors[:warmup], factors[warmup:]
    assert up == sorted(up) and down == sorted(down, reverse=True)


def test_the_recorded_rate_is_the_one_that_was_used(tmp_path):
    run(tmp_path, settings_of(lr=0.4, schedule="linear", warmup=2))
    found = {s: v for s, name, v in recorded(tmp_path) if name == "lr"}
    assert found[1] == pytest.approx(0.2) and found[2] == pytest.approx(0.4)
    assert found[3] == pytest.approx(0.4) and found[8] == pytest.approx(0.2)


def test_clipping_bounds_the_norm_of_a_step(tmp_path):
    train = settings_of(steps=1, lr=1.0, momentum=0.0, clip=1e-3)
    before, after = network().state_dict(), run(tmp_path, train)
    moved = math.sqrt(sum(float((after[k] - v).square().sum()) for k, v in before.items()))
    assert moved == pytest.approx(1e-3, rel=1e-3)
    free = run(tmp_path / "free", settings_of(steps=1, lr=1.0, momentum=0.0, clip=1e3))
    assert same(free, run(tmp_path / "none", settings_of(steps=1, lr=1.0, momentum=0.0)))


def test_only_what_is_trainable_is_given_to_the_optimizer():
    model = network()
    model[0].requires_grad_(False)
    optimizer = build_optimizer(settings_of(momentum=0.5, weight_decay=0.1), model)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model[3].parameters()}
    assert optimizer.defaults["momentum"] == 0.5 and optimizer.defaults["weight_decay"] == 0.1


@pytest.mark.parametrize("options", [
    {"steps": -1}, {"lr": -1.0}, {"schedule": "step"}, {"optimizer": "lion"}, {"momentum": 1.0},
    {"clip": 0.0}, {"batch_size": 0}, {"keep": 0}, {"lr": float("nan")},
])
def test_training_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"Train.{next(iter(options))}="):
        Train(**options)


# ------------------------------------------------------------------ the order of rows


@few
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**63 - 1))
def test_every_row_comes_exactly_once_an_epoch(n, batch, seed):
    order = Order(n, batch, seed)
    size = min(n, batch)
    stream = torch.cat([order.rows(i) for i in range(math.ceil(3 * n / size))])
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@few
@given(st.integers(1, 40), st.integers(1, 50), st.lists(st.integers(0, 30), max_size=8))
def test_a_batch_is_a_function_of_its_index(n, batch, visits):
    order = Order(n, batch, 7)
    for index in visits:
        assert torch.equal(order.rows(index), Order(n, batch, 7).rows(index))
        assert len(order.rows(index)) == min(n, batch)


def test_epochs_and_seeds_differ():
    order = Order(50, 50, 0)
    assert not torch.equal(order.rows(0), order.rows(1))
    assert not torch.equal(order.rows(0), Order(50, 50, 1).rows(0))


# ------------------------------------------------------------------ going on where it stopped


class StopsAt(ClassifyTask):
    """Asks to stop while step 7 is under way, as Ctrl-C would."""

    step = 7

    def batch(self, step, part):
        self.context.stopping |= step + 1 == self.step
        return super().batch(step, part)


def resumed(folder, train, **options):
    newest = Checkpoints(folder / "checkpoints").newest()
    context = context_of(folder, keep_rows=newest.meta["rows"])
    context.resume_from = newest
    return run(folder, train, context=context, **options)


CASES = {
    "sgd": {"train": {"optimizer": "sgd"}},
    "adam": {"train": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1}},
    "adamw cosine": {"train": {"optimizer": "adamw", "lr": 0.01, "schedule": "cosine", "warmup": 3}},
    "dropout": {"train": {"optimizer": "adamw", "lr": 0.01}, "dropout": 0.5},
    "batch norm": {"train": {"optimizer": "sgd"}, "norm": True},
    "accumulate, clip": {"train": {"accumulate": 2, "clip": 0.1}, "dropout": 0.3},
    "bone": {"train": {"optimizer": "adamw", "lr": 0.01}, "adapter": Bone(r=2)},
    "compander sgd": {"train": {"optimizer": "sgd"}, "adapter": WeightCompander()},
    "compander adamw": {"train": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
                        "adapter": WeightCompander(), "dropout": 0.5},
    "learned pairs, sgd": {"train": {"optimizer": "sgd"}, "adapter": WeightCompander(learn="layer")},
    "learned pair, adamw": {"train": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
                            "adapter": WeightCompander(learn="network")},
    "learned pairs, reference": {"train": {"optimizer": "sgd"},
                                 "adapter": WeightCompander(learn="layer", path="reference")},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_resumed_run_is_the_straight_one_bit_for_bit(case, tmp_path):
    train, adapter = settings_of(**case["train"]), case.get("adapter")

    def model():
        return network(case.get("dropout", 0.0), case.get("norm", False))

    straight = run(tmp_path / "straight", train, model(), adapter)
    with pytest.raises(Interrupted, match="interrupted at step 7 of 12"):
        run(tmp_path / "cut", train, model(), adapter, StopsAt)
    torch.manual_seed(999)  # whatever happened to the generator in between
    assert same(resumed(tmp_path / "cut", train, model=model(), adapter=adapter), straight)
    assert recorded(tmp_path / "cut") == recorded(tmp_path / "straight")


def test_rows_past_the_checkpoint_are_cut_before_going_on(tmp_path):
    """Killed between two checkpoints: steps 9 and 10 are recorded, then done again."""
    train = settings_of()
    straight = run(tmp_path / "straight", train)

    class Killed(ClassifyTask):
        def batch(self, step, part):
            if step == 10:
                raise MemoryError
            return super().batch(step, part)

    with pytest.raises(MemoryError):
        run(tmp_path / "cut", train, task_class=Killed)
    assert max(s for s, _, _ in recorded(tmp_path / "cut")) == 10
    assert same(resumed(tmp_path / "cut", train), straight)
    assert recorded(tmp_path / "cut") == recorded(tmp_path / "straight")


def test_evaluating_does_not_disturb_training(tmp_path):
    class Noisy(ClassifyTask):
        def evaluate(self):
            torch.rand(3)
            return super().evaluate()

    found = [run(tmp_path / str(e), settings_of(eval_every=e), network(0.5), None, Noisy)
             for e in (0, 1, 5)]
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run(tmp_path, settings_of())
    with pytest.raises(RunError, match=r"of another model: 9 tensors differ, first 1.bias"):
        resumed(tmp_path, settings_of(steps=20), model=network(norm=True))
    wider = network()
    wider[0], wider[3] = nn.Linear(6, 9), nn.Linear(9, 3)  # the same names, other shapes
    with pytest.raises(RunError, match="of another model"):
        resumed(tmp_path, settings_of(steps=20), model=wider)


def test_a_loss_that_is_not_finite_names_the_step_and_spares_the_checkpoints(tmp_path):
    class Diverges(ClassifyTask):
        def loss(self, batch):
            self.seen = getattr(self, "seen", 0) + 1
            return super().loss(batch) * (float("nan") if self.seen == 6 else 1.0)

    seen = ", ".join(str(int(n)) for n in Order(40, 8, 5).rows(5))
    with pytest.raises(RunError, match=rf"the loss is nan at step 6 \(training rows {seen}; the "
                                       r"last good checkpoint is of step 4\): lower train.lr"):
        run(tmp_path, settings_of(checkpoint_every=2), task_class=Diverges)
    assert Checkpoints(tmp_path / "checkpoints").newest().step == 4
    half = run(tmp_path / "half", settings_of(steps=4, checkpoint_every=2))
    saved = Checkpoints(tmp_path / "checkpoints").newest().tensors
    assert all(torch.equal(saved[f"model.{k}"], v) for k, v in half.items())


def test_the_last_step_is_always_evaluated_and_saved(tmp_path):
    run(tmp_path, settings_of(steps=5, eval_every=0, checkpoint_every=0))
    assert [s for s, name, _ in recorded(tmp_path) if name == "validation_loss"] == [5]
    assert Checkpoints(tmp_path / "checkpoints").steps() == [5]


# ------------------------------------------------------------------ checkpoints


def saved(folder, scores, keep=2):
    points = Checkpoints(folder, keep)
    for step, score in enumerate(scores, start=1):
        points.save(step, {"x": torch.tensor([float(step)])}, {"score": score})
    return points


@pytest.mark.parametrize(("scores", "keep", "kept"), [
    ([5, 1, 3, 4, 2], 2, [2, 4, 5]), ([1, 2, 3, 4], 1, [1, 4]), ([4, 3, 2, 1], 1, [4]),
    ([None] * 4, 2, [3, 4]), ([2, None, None, None], 1, [1, 4]), ([1, 1, 1], 1, [1, 3]),
    ([float("nan"), 3, float("inf"), 4], 1, [2, 4]), ([1, 2], 5, [1, 2]),
])
def test_the_newest_and_the_best_are_kept(scores, keep, kept, tmp_path):
    points = saved(tmp_path, scores, keep)
    assert points.steps() == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"step-{s:08d}.{end}" for s in kept for end in ("json", "safetensors"))
    assert points.newest().tensors["x"].item() == len(scores)


@pytest.mark.parametrize("damage", [
    lambda p: p.write_bytes(p.read_bytes()[:-3]), lambda p: p.write_bytes(b""), os.unlink,
    lambda p: p.write_bytes(bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:]),
], ids=["torn", "empty", "gone", "flipped"])
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(damage, tmp_path, capsys):
    points = saved(tmp_path, [None] * 3)
    damage(tmp_path / "step-00000003.safetensors")
    assert points.newest().step == 2
    err = capsys.readouterr().err
    assert "skipping a checkpoint" in err and "step-00000003.safetensors" in err
    damage(tmp_path / "step-00000002.safetensors")
    with pytest.raises(FileError, match=r"no usable checkpoint.*step-00000003\.safetensors"):
        points.newest()


def points_of(folder, run: str, *steps: int) -> Checkpoints:
    """Return the checkpoints of a run at some steps; each holds its step as a tensor."""
    points = Checkpoints(folder, keep=9, run=run)
    for step in steps:
        points.save(step, {"step": torch.tensor(float(step))}, {"score": 1 / step, "rows": 0})
    return points


def moved(source, target) -> None:
    for suffix in ("safetensors", "json"):
        source.with_suffix(f".{suffix}").rename(target.with_suffix(f".{suffix}"))


def test_a_checkpoint_of_another_run_is_named_and_never_loaded(tmp_path, capsys):
    points = points_of(tmp_path / "own", "run 1", 2)
    points_of(tmp_path / "other", "run 2", 5)
    moved(tmp_path / "other/step-00000005", tmp_path / "own/step-00000005")
    assert points.newest().step == points.best().step == 2
    assert "step-00000005.json is of another run (run 2, this one is run 1)" in capsys.readouterr().err
    points.keep = 1
    points.save(4, {}, {"score": None, "rows": 0})
    points.save(6, {}, {"score": None, "rows": 0})
    assert points.steps() == [2, 5, 6]  # its own best and newest; the other is none of its business


def test_with_a_checkpoint_of_another_run_alone_there_is_none_to_use(tmp_path):
    points_of(tmp_path, "run 2", 5)
    with pytest.raises(FileError, match=r"no usable checkpoint .*step-00000005\.json is of another run"):
        Checkpoints(tmp_path, run="run 1").newest()


def test_a_renamed_checkpoint_is_named_and_never_loaded(tmp_path, capsys):
    points = points_of(tmp_path, "run", 2, 3)
    moved(tmp_path / "step-00000003", tmp_path / "step-00000007")
    assert points.newest().step == points.best().step == 2
    assert "step-00000007.json is of step 3" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["step-abc.json", "step-.json", "step-7.json", "step-00000009 (copy).json",
                                  "step--0000001.json", "step-٠٠٠٠٠٠٠٩.json", "step-1e9.json"])
def test_a_stray_file_is_no_checkpoint_and_blocks_none(tmp_path, name):
    tmp_path.joinpath(name).write_text("{}")
    points = points_of(tmp_path, "run", 2, 3)
    assert points.steps() == [2, 3] and points.newest().step == 3
    assert tmp_path.joinpath(name).read_text() == "{}"


def test_steps_of_nine_digits_have_checkpoints_too(tmp_path):
    assert points_of(tmp_path, "run", 99_999_999, 100_000_000).newest().step == 100_000_000


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "nothing").newest() is None


# ------------------------------------------------------------------ seeds and signals


def test_each_purpose_has_a_seed_of_its_own(tmp_path):
    seeds = {seed_for(s, p) for s in range(20) for p in ("init", "order", "dropout", "fold 3")}
    assert len(seeds) == 80 and all(0 <= s < 2**63 for s in seeds)
    assert seed_for(0, "init") == 3330654677893223573  # a changed derivation changes every recorded run
    assert RunContext(tmp_path, seed=4).seed_for("order") == seed_for(4, "order")



def test_a_seeded_block_is_a_function_of_its_purpose_and_leaves_the_rest_alone(tmp_path):
    context = RunContext(tmp_path, seed=4)
    torch.manual_seed(1)
    with context.seeded("init"):
        inside = torch.rand(2)
    after = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(2))
    with context.seeded("init"):
        assert torch.equal(inside, torch.rand(2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_and_the_second_one_raises(number, tmp_path):
    context = RunContext(tmp_path)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), context.graceful():
        os.kill(os.getpid(), number)
        assert context.stopping
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


# ------------------------------------------------------------------ schedules, images, best checkpoints


def test_the_rate_drops_at_each_milestone():
    train = settings_of(steps=20, schedule="steps", milestones=[0.45, 0.68], factor=0.2)
    found = [round(rate(train, step), 6) for step in range(20)]
    assert found == [1.0] * 9 + [0.2] * 5 + [0.04] * 6


@pytest.mark.parametrize("bad", [{"milestones": [0.0]}, {"milestones": [1.0]}, {"factor": 1.0}])
def test_milestones_are_shares_of_the_run(bad):
    with pytest.raises(ConfigError):
        settings_of(schedule="steps", **bad)


def test_augmented_images_are_moved_and_mirrored_ones():
    x = torch.rand(200, 2, 6, 5) + 0.5
    moved = crop_flip(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    kinds = set()
    for image, wide in zip(moved, padded):
        found = [(i, j, flip) for i in range(9) for j in range(9) for flip in (False, True)
                 if torch.equal(wide[:, i:i + 6, j:j + 5].flip([-1] * flip), image)]
        assert found
        kinds.add(found[0])
    assert len(kinds) > 80
    assert torch.equal(moved, crop_flip(x, torch.Generator().manual_seed(0)))


def test_an_augmented_batch_depends_on_its_step_alone():
    images = Arrays(np.random.default_rng(0).random((12, 1, 6, 6), dtype=np.float32), np.arange(12) % 3)
    both = tensors(images, "cpu")
    task = ClassifyTask(network(), both, both, Order(12, 4, 5), 1, augment=True)
    first, again, other = task.batch(3, 0)[0], task.batch(3, 0)[0], task.batch(6, 0)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_normalised_training_rows_have_mean_zero_and_deviation_one():
    rng = np.random.default_rng(0)
    splits = Splits(*(Arrays(rng.normal(3, 2, (50, 2, 4, 4)), np.zeros(50, int)) for _ in range(3)), {})
    found = loaded(splits, True, "cpu")
    x = found["train"][0]
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(2), atol=1e-5)
    mean = torch.as_tensor(splits.train.x).float().mean((0, 2, 3), keepdim=True)
    std = torch.as_tensor(splits.train.x).float().std((0, 2, 3), keepdim=True)
    test = torch.as_tensor(splits.test.x).float()
    assert torch.allclose(found["test"][0], (test - mean) / std, atol=1e-5)
    constant = Splits(*(Arrays(np.ones((4, 3)), np.zeros(4, int)) for _ in range(3)), {})
    assert torch.equal(loaded(constant, True, "cpu")["test"][0], torch.zeros(4, 3))


@pytest.mark.parametrize(("adapter", "lr"), [(None, 0.2), ("compander", 1.0)])
def test_the_best_checkpoint_is_scored_on_a_copy(tmp_path, adapter, lr):
    """With a rate that ruins the network at the end, the best step is not the last."""
    from poise.interfaces import Parts
    from poise.registry import build

    parts = Parts(
        data=build("data", "digits", limit=200), model=build("model", "mlp", hidden=[16]),
        train=settings_of(steps=40, optimizer="sgd", lr=lr, eval_every=10, checkpoint_every=10),
        adapter=build("adapter", adapter, path="fast") if adapter else None,
        names={"model": "mlp", "data": "digits"})
    context = context_of(tmp_path)
    try:
        metrics = build("recipe", "classify", normalise=True).run(parts, context)
    finally:
        context.records.close()
    errors = {s: v for s, n, v in recorded(tmp_path) if n == "validation_error"}
    assert errors[int(metrics["best_step"])] == min(errors.values())
    assert metrics["best_step"] < 40
    splits = parts.data.load(context.seed)
    model = parts.model.build(splits.spec).eval()  # the fast path trains plain weights
    best = context.checkpoints.best()
    assert best.step == metrics["best_step"]
    with torch.no_grad():  # by hand: what the checkpoint of that step holds, on the test rows
        for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            tensor.copy_(best.tensors.get(f"model.{name}", tensor))
        x, y = loaded(splits, True, "cpu")["test"]
        outputs = model(x)
    assert metrics["best_test_accuracy"] == float((outputs.argmax(-1) == y).double().mean())
    loss = float(nn.functional.cross_entropy(outputs, y))
    assert metrics["best_test_loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["best_test_loss"] != pytest.approx(metrics["test_loss"], rel=1e-3)


def test_no_record_before_the_end_depends_on_test_rows(tmp_path):
    """Other test rows, same records, weights and choice of the best; only the test's figures differ."""
    from types import SimpleNamespace

    from poise.interfaces import Parts
    from poise.registry import build

    found = []
    for name in ("a", "b"):
        test = rows(20, seed=7 if name == "a" else 8)
        splits = Splits(rows(60), rows(20, 1), test, {}, {"input_shape": [6], "n_classes": 3})
        parts = Parts(data=SimpleNamespace(load=lambda seed, splits=splits: splits),
                      model=build("model", "mlp", hidden=[8]), train=settings_of(), names={"data": "mine"})
        context = context_of(tmp_path / name)
        metrics = build("recipe", "classify", normalise=True).run(parts, context)
        context.records.close()
        found.append({k: v for k, v in metrics.items() if k != "step_seconds"})
    assert recorded(tmp_path / "a") == recorded(tmp_path / "b")
    differ = {k for k in found[0] if found[0][k] != found[1][k]}
    assert {"test_loss", "best_test_loss"} <= differ
    assert differ <= {"test_loss", "test_accuracy", "best_test_loss", "best_test_accuracy"}


def test_an_evaluation_computes_companded_weights_once(monkeypatch):
    """On the reference path every use computes w; an evaluation of many batches needs it once."""
    from types import SimpleNamespace

    from poise_compander.reference import Psi

    model = network().eval()
    attached = WeightCompander(path="reference").attach(model)
    many = tensors(rows(1500), "cpu")  # three batches of evaluation
    calls, forward = [], Psi.forward
    monkeypatch.setattr(Psi, "forward", lambda self, v: calls.append(1) or forward(self, v))
    found = []
    for watched, uses in ((SimpleNamespace(cached=attached.cached), 2), (None, 6)):
        task = ClassifyTask(model, many, many, Order(1500, 8, 5), 1, attached=watched)
        calls.clear()
        found.append(task.evaluate())
        assert len(calls) == uses
    assert found[0] == found[1]
