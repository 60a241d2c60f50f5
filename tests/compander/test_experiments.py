"""The named experiments, run for a few steps on small files."""

from __future__ import annotations

import os

import numpy as np
import pytest
from cases import some

from poise.cli.main import main
from poise.data.cifar import TEST, TRAIN
from poise.runs.records import load_run


def run(tmp_path, *overrides):
    folder = tmp_path / "run"
    assert main(["run", *overrides, "hydra.mode=RUN", f"hydra.run.dir={folder}", "threads=1"]) == 0
    return load_run(folder)


def lines(found, name):
    return dict(zip(*found.series(name)))


@pytest.fixture
def cifar(tmp_path):
    """Return a folder in the form of CIFAR-10's binary version: 100 training images and 20 test images."""
    rng = np.random.default_rng(0)
    for name in TRAIN + TEST:
        labels = np.arange(20, dtype=np.uint8) % 10
        images = rng.integers(0, 256, (20, 3 * 32 * 32), dtype=np.uint8) // 2 + 12 * labels[:, None]
        (tmp_path / name).write_bytes(np.c_[labels, images].astype(np.uint8).tobytes())
    return tmp_path


@pytest.mark.parametrize("adapter", some(
    ["none", "compander_resnet18", "lr_matched_resnet18"], keep=["compander_resnet18"]))
def test_the_papers_protocol_on_cifar10_in_twenty_steps(tmp_path, cifar, adapter):
    found = run(tmp_path, "experiment=compander_paper_cifar10", f"data.path={cifar}", "model.width=4",
                f"adapter={adapter}", "train.steps=20", "train.batch_size=16", "train.eval_every=5",
                "train.checkpoint_every=5", "train.log_every=1")
    rates = lines(found, "lr")
    first = 0.1 * (2.7777777 if adapter == "lr_matched_resnet18" else 1.0)
    # 90 and 136 of 200 epochs: 45 and 68 %
    assert [rates[1], rates[9], rates[10], rates[14], rates[15], rates[20]] == pytest.approx(
        [first, first, 0.1 * first, 0.1 * first, 0.01 * first, 0.01 * first])
    errors = lines(found, "validation_error")
    assert set(errors) == {5, 10, 15, 20}
    best = int(found.metrics["best_step"])
    assert errors[best] == min(errors.values())
    assert 0 <= found.metrics["best_test_accuracy"] <= 1
    assert found.notes["data"]["sizes"] == {"train": 90, "validation": 10, "test": 20}
    figures = tmp_path / "run" / "figures"
    assert figures.is_dir() == (adapter != "none")
    if adapter == "compander_resnet18":
        report = found.notes["adapter"]
        assert (report["a"], report["b"], report["decay_on"]) == (1.0, 0.6, "w")
        bound = np.pi / 2
        assert all(abs(v) < bound for n in ("0", "100") for v in lines(found, f"bands/stem/{n}").values())


def test_it_is_the_protocol_of_the_paper():
    from poise.compose import compose

    config = compose(["experiment=compander_paper_cifar10", "hydra.mode=RUN"]).config
    train = config.train
    assert (train.optimizer, train.lr, train.momentum, train.weight_decay) == ("sgd", 0.1, 0.9, 1e-4)
    assert train.batch_size == 128 and train.factor == 0.1
    epochs = train.steps * train.batch_size / 45_000
    assert epochs == pytest.approx(200, abs=0.01)
    assert [share * epochs for share in train.milestones] == pytest.approx([90, 136], abs=0.01)
    assert train.eval_every * train.batch_size == pytest.approx(45_000, rel=0.005)  # once an epoch
    assert config.recipe["augment"] == "crop_flip" and config.data["validation"] == 0.1


@pytest.mark.parametrize("adapter", some(
    ["none", "compander_resnet18", "compander_learned", "lr_matched_resnet18", "lr_matched_learned",
     "weight_norm", "powerprop"], keep=["compander_learned", "lr_matched_resnet18"]))
def test_fashion_in_a_few_steps_on_packaged_digits(tmp_path, adapter):
    found = run(tmp_path, "experiment=compander_fashion", "data=mnist5k", "data.limit=400",
                "data.validation=0.1", f"adapter={adapter}", "train.steps=100", "train.eval_every=25",
                "train.checkpoint_every=25")
    assert found.metrics["train_accuracy"] > 0.5
    assert found.metrics["best_step"] in (25, 50, 75, 100)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not os.environ.get("POISE_DATA"), reason="POISE_DATA is not set")
def test_the_papers_resnet18_learns_from_jpeg_images(tmp_path):
    found = run(tmp_path, "experiment=compander_paper_cifar10", "data.limit=120", "recipe.augment=none",
                "adapter=compander_resnet18", "train.steps=40", "train.batch_size=32", "train.lr=0.005",
                "train.log_every=1", "train.eval_every=0", "train.checkpoint_every=0")
    losses = list(lines(found, "loss").values())
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    assert found.notes["adapter"]["layers"] == 21  # 17 of 3 x 3, 3 beside, the head
