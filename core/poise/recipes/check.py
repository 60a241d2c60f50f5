"""What a recipe refuses before anything is loaded; imports nothing heavy."""

from __future__ import annotations

from poise.errors import ConfigError
from poise.interfaces import Parts


def check_parts(parts: Parts, needed: tuple[str, ...]) -> None:
    """Refuse, before anything is loaded, a run that lacks a part or adapts an untrained model.

    Raises
    ------
    ConfigError
    """
    for kind in needed:
        if getattr(parts, kind) is None:
            raise ConfigError(f"{kind}=none: this recipe needs a {kind} (see: poise list {kind})")
    adapter, model = parts.adapter, parts.model
    freezes = adapter is not None and adapter.freezes_base
    trained = getattr(model, "trained", False)
    if freezes and not trained:
        raise ConfigError(
            f"adapter={parts.names.get('adapter')} freezes its base, and "
            f"model={parts.names.get('model')} is untrained: choose trained weights "
            f"(model=smollm2, model.path=DIR) or an adapter that trains the base"
        )
    if parts.quantizer is not None and not freezes and getattr(parts.train, "steps", 0):
        raise ConfigError(
            f"quantizer={parts.names.get('quantizer')} freezes the weights it packs: add an "
            f"adapter that trains beside them (adapter=bone), or only evaluate (train.steps=0)"
        )
