"""What an engine is opened with, of options as a person gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from poise_edgemoe.cache.choosing import chosen_policy, encoder_layers
from poise_edgemoe.cache.policies import check_policy
from poise_edgemoe.flags import check_predictor
from poise_edgemoe.store.index import read_index


def chosen(
    store: Path | str, *, policy: str | None, frequencies: str | None, freq_source: str | None,
    prefetch: str | None, predictor: str | None,
) -> dict[str, Any]:
    """Return `policy` and `prefetch` of `Engine.open`.

    Raises
    ------
    ConfigError
        For an option without effect, or one that needs another.
    FileError
        For a predictor that cannot be read.
    """
    check_predictor(prefetch, predictor, policy)
    index, learned = read_index(store), None
    if predictor is not None:
        from poise_edgemoe.predictors import load

        learned = load(predictor)
        learned.check(len(index.layers), max(len(layer.experts) for layer in index.layers), None)
    if policy == "predicted" and learned is not None:
        given = {"frequencies": frequencies, "freq_source": freq_source}
        if names := [name for name, value in given.items() if value is not None]:
            check_policy(policy, names)  # has none of them
        rule: Any = learned.policy(encoder_layers(index))
    else:
        rule = chosen_policy(index, policy, frequencies, freq_source)
    speaks = prefetch == "predictor" or (prefetch is None and learned is not None)
    return {"policy": rule, "prefetch": learned if speaks else prefetch or "none"}
