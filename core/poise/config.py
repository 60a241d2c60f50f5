"""What a run is, as plain data. No Hydra here; `poise.compose` fills these in.

The components of a run stay plain mappings (`{"entry": "bone", "r": 64}`) until the registry
builds them, so a saved configuration is data and nothing else.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from poise.errors import ConfigError, nearest
from poise.options import check_options, fits, make, option, type_name
from poise.registry import KINDS

CONFIG_VERSION = 2
MOST_THREADS = 1024
LONGEST_TAG = 200


@dataclass(frozen=True)
class Train:
    """How the one training loop runs. A recipe that does not train ignores it."""

    steps: int = option(300, "optimizer steps", low=0, unit="steps")
    batch_size: int = option(64, "rows or sequences per optimizer step and accumulation part", low=1)
    accumulate: int = option(1, "gradient accumulation: parts per optimizer step", low=1)
    optimizer: str = option("adamw", "optimizer", choices=("sgd", "adam", "adamw"))
    lr: float = option(1e-3, "peak learning rate", low=0, high=1e30)
    momentum: float = option(0.9, "momentum of sgd", low=0, below=1)
    weight_decay: float = option(0.0, "L2 (sgd, adam) or decoupled (adamw) decay", low=0)
    schedule: str = option(
        "constant", "learning rate after warm-up", choices=("constant", "linear", "cosine", "steps")
    )
    milestones: list[float] = option([0.5, 0.75], "steps: shares of the run after which the rate drops",
                                     above=0, below=1)
    factor: float = option(0.1, "steps: what the rate is multiplied by at each milestone", above=0, below=1)
    warmup: int = option(0, "steps of linear warm-up", low=0, unit="steps")
    clip: float | None = option(None, "largest norm of the gradient", above=0)
    precision: str = option("fp32", "arithmetic of forward passes", choices=("fp32", "bf16"))
    eval_every: int = option(100, "steps between evaluations; 0: only at the end", low=0)
    log_every: int = option(10, "steps between recorded training losses", low=1)
    checkpoint_every: int = option(100, "steps between checkpoints; 0: only at the end", low=0)
    keep: int = option(2, "newest checkpoints kept (the best one is kept too)", low=1)

    def __post_init__(self) -> None:
        check_options(self)
        if any(b <= a for a, b in pairwise(self.milestones)):
            raise ConfigError(f"milestones={self.milestones}: allowed are shares that increase")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    recipe: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    quantizer: dict[str, Any]
    adapter: dict[str, Any]
    aggregator: dict[str, Any]
    tracker: dict[str, Any]
    train: Train = field(default_factory=Train)
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    tag: str = "run"
    version: int = CONFIG_VERSION

    def component(self, kind: str) -> dict[str, Any] | None:
        """Return the plain mapping of a part, or None for `none`."""
        part = getattr(self, kind)
        return None if part["entry"] == "none" else part

    def plain(self) -> dict[str, Any]:
        """Return the whole configuration as nested plain values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> RunConfig:
        """Check a plain mapping strictly and build the configuration.

        Raises
        ------
        ConfigError
            For another version, an unknown or missing key, a wrong type.
        """
        values = dict(values)
        _check_version(values.get("version", CONFIG_VERSION))
        _check_keys(values)
        for kind in PARTS:
            values[kind] = _part(kind, values.get(kind))
        values["train"] = _train(values.get("train", {}))
        config = RunConfig(**values)
        _check_values(config)
        return config


# the kinds of which a run has one each, in the order of its configuration
PARTS = tuple(f.name for f in dataclasses.fields(RunConfig) if f.name in KINDS)


def _check_version(version: Any) -> None:
    if version == CONFIG_VERSION:
        return
    if version == 1:
        raise ConfigError(
            f"version=1: this configuration was written by an earlier Poise (version 1); this one reads "
            f"version {CONFIG_VERSION}, where the options include and exclude of adapters are called "
            f"target_modules and exclude_modules (null instead of an empty list): run it again from its "
            f"overrides"
        )
    raise ConfigError(
        f"version={version}: this configuration was written by another version of Poise; "
        f"this one reads version {CONFIG_VERSION}"
    )


def _check_keys(values: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(RunConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(
                f"{key}={values[key]!r}: no key {key!r}{nearest(key, known)} (keys: {', '.join(known)})"
            )


def _part(kind: str, part: Any) -> dict[str, Any]:
    if not isinstance(part, Mapping) or not isinstance(part.get("entry"), str):
        raise ConfigError(f"{kind}={part!r} is not a component: write {kind}=NAME")
    if part["entry"] == "none" and len(part) > 1:
        named = next(key for key in part if key != "entry")
        raise ConfigError(f"{kind}.{named}={part[named]!r}: {kind}=none has no options; choose one with "
                          f"{kind}=NAME (poise list {kind})")
    return dict(part)


def _check_values(config: RunConfig) -> None:
    for key, hint in (("seed", int), ("threads", int), ("device", str), ("tag", str)):
        value = getattr(config, key)
        if not fits(value, hint):
            raise ConfigError(f"{key}={value!r}: allowed is {type_name(hint)}")
    if not 1 <= config.threads <= MOST_THREADS:
        raise ConfigError(f"threads={config.threads}: allowed is 1 to {MOST_THREADS}")
    if not config.tag or set("/\\\0") & set(config.tag) or config.tag in (".", ".."):
        raise ConfigError(f"tag={config.tag!r}: a tag names one folder; use a word without / or \\")
    if len(os.fsencode(config.tag)) > LONGEST_TAG:
        raise ConfigError(f"tag={config.tag[:40]}...: a tag names a folder; at most {LONGEST_TAG} bytes")
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed={config.seed}: allowed is 0 <= seed < 2**63")


def _train(values: Mapping[str, Any]) -> Train:
    if not isinstance(values, Mapping):
        raise ConfigError(f"train={values!r} is not a set of options: write train.steps=100 and so on")
    return make(Train, values, "train")
