"""What tests put in the place of libraries that are loaded once: `poise.native.Loaded`."""

from __future__ import annotations

from poise.native import Loaded


def absent(why: str) -> Loaded:
    """Return one that cannot be had."""

    def make() -> None:
        raise RuntimeError(why)

    return Loaded(make)


def asked_again(loaded: Loaded) -> Loaded:
    """Return one that nobody has asked for yet."""
    return Loaded(loaded._make)
