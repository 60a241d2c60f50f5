"""What all tests share: property tests are the same every time and are never failed by the clock."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("poise", deadline=None, derandomize=True, database=None)
settings.load_profile("poise")
