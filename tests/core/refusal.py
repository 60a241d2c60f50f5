"""What a refusal of data looks like, and a layer that is refused."""

from __future__ import annotations

import pytest
from torch import nn

from poise.errors import DataError
from poise.walk import held


def refuses(component, *words):
    """Load; the refusal is one line that holds every word."""
    with pytest.raises(DataError) as caught:
        component.load()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


class Around(nn.Module):
    """A layer of somebody's own around a linear or an expert; the walk sees what it wraps."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)

    def held_weights(self, path):
        yield from held(self.base, path)
