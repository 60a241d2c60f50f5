"""What a refusal of data looks like."""

from __future__ import annotations

import pytest

from poise.errors import DataError


def refuses(component, *words):
    """Load; the refusal is one line that holds every word."""
    with pytest.raises(DataError) as caught:
        component.load()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
