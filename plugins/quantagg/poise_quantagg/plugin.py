"""Entries of the quantagg plugin."""

from __future__ import annotations


def register(registry) -> None:
    """Add the plugin's entries."""
