"""zlib's CRC-32: a blob is looked at when it is first read, while somebody waits for it."""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32  # the same numbers, ten times as fast
except ImportError:  # no wheel for every system
    from zlib import crc32

__all__ = ["crc32"]
