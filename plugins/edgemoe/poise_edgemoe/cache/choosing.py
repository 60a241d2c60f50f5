"""A policy for the layers of a store, by name and options; frequencies of experts in files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.errors import ConfigError, DataError
from poise.files import read_json, write_json
from poise_edgemoe.cache.policies import DEFAULT_POLICY, POLICIES, make_policy, options_of
from poise_edgemoe.cache.policy import Key, Policy

if TYPE_CHECKING:
    from poise_edgemoe.store.index import Index


def policy_for(index: Index, policy: str | Policy, **options: Any) -> Policy:
    """Return a policy for a store, its cache empty: by name and options, or one that was made for it.

    Parameters
    ----------
    index : Index
        Of the store.
    policy : str or Policy
        A name of `POLICIES`, or a policy of one's own making.
    options
        `frequencies`, `freq_source`, as `make_policy` takes them.

    Raises
    ------
    ConfigError
        For an unknown name; an option that the policy does not have, or that changes nothing; a policy that
        was made for other layers, or has experts already.
    """
    layers, experts = len(index.layers), max(len(layer.experts) for layer in index.layers)
    if isinstance(policy, Policy):
        if (policy.layers, policy.experts) != (layers, experts):
            raise ConfigError(f"the policy is for {policy.layers} layers of {policy.experts} experts, the "
                              f"store has {layers} of {experts}: make it for those")
        if policy.served:
            raise ConfigError(f"policy {policy.name!r} is, or was, another engine's: make a new one")
        if policy.resident():
            raise ConfigError(f"policy {policy.name!r} has experts in its cache already: make a new one")
        return policy
    if options.get("freq_source") == "online" and options.get("frequencies") is not None:
        raise ConfigError("frequencies have no effect with freq_source=online, which counts from 0: leave "
                          "them out, or take mixed or offline")
    encoder = encoder_layers(index)
    if encoder and policy in POLICIES and "encoder" in options_of(POLICIES[policy]):
        options["encoder"] = encoder
    return make_policy(policy, layers=layers, experts=experts, **options)


def encoder_layers(index: Index) -> list[int]:
    """Return which layers with experts lie in an encoder."""
    return [n for n, layer in enumerate(index.layers) if layer.encoder]


def chosen_policy(
    index: Index, policy: str | None, frequencies: Path | str | None = None, freq_source: str | None = None
) -> str | Policy:
    """Return what an engine takes, of options as a person gives them: the default where nothing is given.

    Parameters
    ----------
    frequencies : path, optional
        A file that `read_frequencies` reads.

    Raises
    ------
    ConfigError, DataError
        As `policy_for` and `read_frequencies` say.
    """
    options: dict[str, Any] = {} if freq_source is None else {"freq_source": freq_source}
    if frequencies is not None:
        options["frequencies"] = read_frequencies(frequencies)
    if policy is None and not options:
        return DEFAULT_POLICY
    return policy_for(index, policy or DEFAULT_POLICY, **options)


def read_frequencies(path: Path | str) -> dict[Key, float]:
    """Read how often experts are used: JSON, "layer,expert" to uses per token.

    Layers are counted from 0, those without experts left out.

    Raises
    ------
    DataError
        For a file that holds something else, naming the first entry.
    FileError
        For one that is missing or no JSON.
    """
    said = read_json(path)
    if not isinstance(said, dict) or not said:
        raise DataError(f'{path} holds no frequencies: it is to be a mapping, {{"0,5": 0.25}}')
    found: dict[Key, float] = {}
    for key, value in said.items():
        layer, _, expert = key.partition(",")
        if not (layer.isdecimal() and expert.isdecimal() and key.isascii()):
            raise DataError(f"{path}: {key!r} names no expert: needs two whole numbers, layer,expert")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise DataError(f"{path}: {key!r} has {value!r} uses per token: needs a number from 0")
        found[int(layer), int(expert)] = float(value)
    return found


def write_frequencies(path: Path | str, frequencies: Mapping[Key, float]) -> None:
    """Write a file that `read_frequencies` reads."""
    write_json(path, {f"{layer},{expert}": f for (layer, expert), f in sorted(frequencies.items())})


def frequencies_of(uses: Iterable[Key], tokens: int) -> dict[Key, float]:
    """Return uses per token."""
    return {key: count / tokens for key, count in Counter(uses).items()}
