"""The pixels of one image file, whose sizes, checksums and kind are looked at before they are believed."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from poise.errors import DataError, require

if TYPE_CHECKING:
    import numpy as np

_GREY = ("1", "L", "LA", "I;16")
_KNOWN = (*_GREY, "P", "RGB", "RGBA", "CMYK", "YCbCr")


def channels_of(raw: bytes, name: str, formats: tuple[str, ...] = ("PNG",)) -> int:
    """Return 1 for a grey image and 3 for another."""
    with _opened(raw, name, formats) as image:
        return 1 if image.mode in _GREY else 3


def decode(
    raw: bytes, name: str, channels: int, formats: tuple[str, ...] = ("PNG",), side: int | None = None
) -> np.ndarray:
    """Return an image as (h, w, channels) bytes, or as uint16 if it is grey of 16 bits.

    Parameters
    ----------
    raw : bytes
        Content of a file of one of Pillow's `formats`.
    name : str
        For messages.
    channels : int
        1 grey, 3 colour.
    side : int, optional
        The only height and width that is allowed.

    Raises
    ------
    DataError
        For a torn or altered image, one of more pixels than Pillow takes for safe, one that is partly
        transparent, or colour of 16 bits a channel (which Pillow cuts to 8).
    """
    import numpy as np

    with _opened(raw, name, formats) as image:
        image.verify()  # checksums, which decoding passes over
    with _opened(raw, name, formats) as image:
        if side and image.size != (side, side):
            raise DataError(f"{name} is {image.width}x{image.height}: {side}x{side} is expected")
        _refuse_odd(image, raw, name)
        if image.mode == "I;16":
            return np.repeat(np.asarray(image)[..., None], channels, axis=2)
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        return pixels.reshape(image.height, image.width, channels)


@contextmanager
def _opened(raw: bytes, name: str, formats: tuple[str, ...]) -> Iterator[Any]:
    """Open an image; whatever goes wrong inside the block is a `DataError`."""
    pillow = require("PIL.Image", "images")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(io.BytesIO(raw), formats=formats) as image:
                yield image
    except DataError:
        raise
    except (pillow.DecompressionBombWarning, pillow.DecompressionBombError):
        raise DataError(f"{name} has more than {pillow.MAX_IMAGE_PIXELS} pixels: make it smaller") from None
    except Exception as error:  # decoders raise whatever the damage leads to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].replace(repr(error), "")
        raise DataError(f"{name} is not a whole {' or '.join(formats)} image: {reason}") from None


def _refuse_odd(image: Any, raw: bytes, name: str) -> None:
    """Raise `DataError` for what cannot be had as grey or red, green and blue without loss."""
    if image.mode not in _KNOWN:
        raise DataError(f"{name} is of Pillow's mode {image.mode}: save it as grey or RGB")
    if image.format == "PNG" and raw[24] == 16 and image.mode != "I;16":  # IHDR's bit depth
        raise DataError(f"{name} has 16 bits a channel, which are read of grey images only: save it with 8")
    clear = image.has_transparency_data
    if clear and (image.mode == "I;16" or image.convert("RGBA").getchannel("A").getextrema()[0] < 255):
        raise DataError(f"{name} is partly transparent: put it on a background and save it without alpha")
