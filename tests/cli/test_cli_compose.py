"""The tree of choices: everything in it composes, nothing in it hides something else."""

from __future__ import annotations

import itertools
from importlib.resources import files
from pathlib import Path

import hydra
import pytest
from cases import some
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from poise import compose as composing
from poise.compose import compose, conf_root, experiments
from poise.config import PARTS
from poise.registry import installed
from poise.runs.building import build_parts


def choices() -> list[tuple[str, str]]:
    """Return every (group, name) that can be written on the command line."""
    composing.install()
    with composing.initialized():
        loader = GlobalHydra.instance().config_loader()
        return [
            (group, name)
            for group in (*PARTS, "train", "launcher", "experiment", "paths")
            for name in loader.get_group_options(group)
        ]


def jobs(experiment: str) -> list[list[str]]:
    """Return the overrides of each job of an experiment; one empty list for a single run."""
    composing.install()
    with composing.initialized():
        whole = hydra.compose("config", [f"experiment={experiment}"], return_hydra_config=True)
    swept = whole.hydra.sweeper.params or {}
    values = [[f"{key}={v}" for v in str(text).split(",")] for key, text in swept.items()]
    return [list(job) for job in itertools.product(*values)]


@pytest.mark.parametrize("most", some([2, 10**6], keep=[2]))
@pytest.mark.parametrize("name", experiments())
def test_every_experiment_composes_and_fits_together(name, most):
    """Of a large sweep, jobs at even distances."""
    sweeps, every = compose([f"experiment={name}"]).config is None, jobs(name)
    assert sweeps == (len(every) > 1)
    for job in every[:: -(-len(every) // most)]:
        config = compose([f"experiment={name}", *job, "hydra.mode=RUN"]).config
        build_parts(config)
        assert config.tag == (name if name != "none" else "run")


@pytest.mark.parametrize("name", [n for n in experiments() if n.endswith("_demo")])
def test_a_demo_is_the_short_form_of_an_experiment(name):
    assert name.removesuffix("_demo") in experiments()


# experiments compose by default in the test of each
@pytest.mark.parametrize("group, name", some(
    choices(), keep=[choice for choice in choices() if choice[0] != "experiment"]))
def test_every_choice_composes_alone(group, name):
    compose([f"{group}={name}", "hydra.mode=RUN"])


@pytest.mark.parametrize("kind", PARTS)
def test_every_registered_entry_can_be_chosen_and_nothing_else_is_registered_twice(kind):
    offered = {n for g, n in choices() if g == kind}
    assert {e.name for e in installed().entries(kind)} <= offered
    assert "none" in offered


def test_a_command_line_value_beats_an_experiment_and_an_experiment_beats_a_default():
    def lr(*words: str) -> float:
        return compose([*words, "hydra.mode=RUN"]).config.train.lr

    usual, chosen = lr(), lr("experiment=compander_digits")
    assert chosen != usual
    assert lr("experiment=compander_digits", "train.lr=0.125") == 0.125


def trees() -> dict[str, Path]:
    roots = {"poise": conf_root()} | {p: p for p in installed().conf_packages}
    return {
        name: Path(str(files(root[6:]))) if root.startswith("pkg://") else Path(root)
        for name, root in roots.items()
    }


def test_no_two_trees_hold_the_same_path():
    seen: dict[str, str] = {}
    for name, root in trees().items():
        for path in root.rglob("*.yaml"):
            inside = str(path.relative_to(root))
            assert inside not in seen, f"{inside} of {name} hides the one of {seen[inside]}"
            seen[inside] = name


def test_no_yaml_file_hides_a_registered_entry():
    composing.install()
    for kind in PARTS:
        nodes = {n.removesuffix(".yaml") for n in ConfigStore.instance().repo.get(kind, {})}
        for root in trees().values():
            assert not nodes & {p.stem for p in (root / kind).glob("*.yaml")}
