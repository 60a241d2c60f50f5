"""The model that widths are measured on: a store of 16 or 32 bits, made where there is none."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.errors import ConfigError, FileError
from poise.files import make_folder
from poise.models.tokenizers import ByteTokenizer, load_tokenizer
from poise_edgemoe.store.index import INDEX, Index, read_index
from poise_edgemoe.store.source import open_source
from poise_edgemoe.store.writer import convert
from poise_edgemoe.widths.identity import check_raw, identity_of, identity_of_store

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Opened:
    """A model's store, and what tells it from others.

    Parameters
    ----------
    folder : Path
    index : Index
    identity : str
    tokenizer : Tokenizer or None
    """

    folder: Path
    index: Index
    identity: str
    tokenizer: Any


def is_store(model: Any) -> bool:
    """Return whether something is a store's folder."""
    return isinstance(model, (str, Path)) and (Path(model) / INDEX).is_file()


def identity_of_model(model: Any, tell: Tell) -> str:
    """Return the identity of a directory, a store or a live model."""
    progress = _stage(tell, "layers identified")
    if is_store(model):
        return identity_of_store(Path(model), read_index(model), progress)
    return identity_of(open_source(model), progress)


def store_of(model: Any, identity: str, work: Path, tell: Tell, tokenizer: Any = None) -> Opened:
    """Return a model as a store of its own numbers: itself, or one that is made in a work folder.

    A conversion that was cut short goes on; one that ended is used again.

    Raises
    ------
    ConfigError
        For a store that is quantized, and for what `convert` refuses.
    """
    if is_store(model):
        folder = Path(model)
        index = read_index(folder)
        check_raw(folder, index)
    else:
        folder = work / "store"
        if not folder.exists():
            first = next(iter(open_source(model).layers[0].experts[0].values()))
            bits = 32 if first.dtype.itemsize == 4 else 16
            convert(model, folder, bits=bits, hot="raw", progress=_stage(tell, "layers written"))
        index = read_index(folder)
    own = tokenizer if tokenizer is not None else _tokenizer(model, folder)
    return Opened(folder, index, identity, own)


def _stage(tell: Tell, label: str) -> Callable[[int, int], None]:
    return lambda done, of: tell(label, done, of)


def _tokenizer(model: Any, folder: Path) -> Any:
    """Return the model's tokenizer; a live one of 257 tokens is taken to be of bytes."""
    place = model if isinstance(model, (str, Path)) else folder
    try:
        return load_tokenizer(place)
    except ConfigError:
        size = getattr(getattr(model, "config", None), "vocab_size", None)
        return ByteTokenizer() if size == ByteTokenizer.vocab_size else None


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Hold a work folder: two that write to it would mix what they write.

    Raises
    ------
    FileError
        When another process holds it.
    """
    make_folder(work)
    handle = os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise FileError(f"{work} is in use by another process: wait for it, or name another file") from None
    try:
        yield
    finally:
        os.close(handle)
