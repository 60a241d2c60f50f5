"""Files that are whole or not there: atomic writes, checksums, safetensors + JSON, nothing else.

A bundle is a pair of files, `NAME.safetensors` and `NAME.json`; the JSON is written last, holds the
checksum of the tensors and of itself, and so decides whether the bundle exists.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from poise.errors import FileError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

BUNDLE_VERSION = 1
SHARD_BYTES = 2_000_000_000
MOST_JSON = 1 << 26  # bytes
_CHUNK = 1 << 20


def _file_mode() -> int:
    """Return the mode of an ordinary new file; mkstemp's own is private to the user."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


_MODE = _file_mode()


def checksum(path: Path | str) -> str:
    """Return the SHA-256 of a file as hex.

    Raises
    ------
    FileError
        When it is no regular file.
    OSError
        When it is missing or cannot be read.
    """
    digest = hashlib.sha256()
    with _open_regular(path) as f:
        while block := f.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _open_regular(path: Path | str) -> BinaryIO:
    """Open a file for reading, but neither a pipe or device, which may never end, nor a folder."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would wait for one
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FileError(f"cannot read {path}: it is no regular file")
    return os.fdopen(handle, "rb")


def write_bytes(path: Path | str, data: bytes) -> None:
    """Replace a file atomically: temporary file in the same folder, fsync, rename.

    Raises
    ------
    FileError
        When the folder cannot be written or the disk is full; the old file is untouched.
    """
    path = Path(path)
    temporary = None
    try:
        make_folder(path.parent)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fchmod(f.fileno(), _MODE)
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary and os.path.exists(temporary):  # an error, or an interrupt
            os.unlink(temporary)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def still_there(folder: Path) -> None:
    """Raise `FileError` where a folder was removed in the meantime: nobody wants half of it made again."""
    if not folder.is_dir():
        raise FileError(f"{folder} was removed while a run was writing to it: leave a run's directory "
                        f"alone until it ends")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path | str, text: str) -> None:
    """Replace a text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Replace a JSON file atomically; NaN and infinities become strings."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def read_regular(path: Path | str, most: int) -> bytes:
    """Read a file whole, but neither a pipe or device, which may never end, nor more than `most` bytes.

    Raises
    ------
    FileError
        When it is missing, no regular file, or larger.
    """
    try:
        with _open_regular(path) as f:
            size = os.fstat(f.fileno()).st_size
            if size > most:
                raise FileError(f"cannot read {path}: it has {size} bytes, {most} are allowed")
            return f.read(size)  # not `most`, for which memory would be set aside at once
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises
    ------
    FileError
        When it is missing, no regular file, larger than `MOST_JSON`, or not JSON.
    """
    try:
        return json.loads(read_regular(path, MOST_JSON).decode())
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not valid JSON (torn or altered): {error}") from None


def plain(value: Any) -> Any:
    """Turn numpy scalars, paths, tuples and non-finite floats into what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def save_bundle(stem: Path | str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and plain metadata as `stem.safetensors` and `stem.json`.

    Parameters
    ----------
    stem : path without suffix
    tensors : mapping of name to tensor
        Saved contiguous; views of one storage are saved as separate tensors.
    meta : mapping of plain JSON values
    """
    from safetensors.torch import save

    _write_bundle(Path(stem), save({k: v.detach().contiguous().clone() for k, v in tensors.items()}), meta)


def save_arrays(stem: Path | str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Write NumPy arrays as `save_bundle` writes tensors; torch is not needed."""
    import numpy as np
    from safetensors.numpy import save

    _write_bundle(Path(stem), save({k: np.asarray(v, order="C") for k, v in arrays.items()}), meta)


def _write_bundle(stem: Path, data: bytes, meta: Mapping[str, Any]) -> None:
    body = {
        "version": BUNDLE_VERSION,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "meta": plain(meta),
    }
    write_bytes(_tensors(stem), data)
    write_json(_index(stem), {**body, "checksum": _own_checksum(body)})


def load_bundle(stem: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_bundle` wrote, after checking every byte of it.

    Raises
    ------
    FileError
        Naming the file that is missing, torn, altered or of another version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    meta = load_meta(stem)
    try:
        return load(_tensors(Path(stem)).read_bytes()), meta
    except SafetensorError as error:
        raise FileError(f"{_tensors(Path(stem))} holds no tensors: {error}") from None


def load_arrays(stem: Path | str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a bundle as NumPy arrays, checked as `load_bundle` does; torch is not needed."""
    from safetensors.numpy import load

    meta = load_meta(stem)
    try:
        return load(_tensors(Path(stem)).read_bytes()), meta
    except Exception as error:  # no tensors, or of a kind that NumPy does not have (bfloat16: a KeyError)
        raise FileError(f"{_tensors(Path(stem))} holds no arrays of NumPy: {type(error).__name__}: "
                        f"{error}") from None


def load_meta(stem: Path | str) -> dict[str, Any]:
    """Check a bundle without loading its tensors and return its metadata."""
    stem = Path(stem)
    index, data = read_json(_index(stem)), _tensors(stem)
    if not isinstance(index, dict) or "checksum" not in index:
        raise FileError(f"{_index(stem)} is not a bundle of Poise (torn or altered)")
    body = {k: v for k, v in index.items() if k != "checksum"}
    if index["checksum"] != _own_checksum(body):
        raise FileError(f"{_index(stem)} is altered: its checksum does not match")
    if not {"version", "bytes", "sha256", "meta"} <= index.keys() or not isinstance(index["meta"], dict):
        raise FileError(f"{_index(stem)} is not a bundle of Poise: it lacks its version, size or metadata")
    if index["version"] != BUNDLE_VERSION:
        raise FileError(
            f"{_index(stem)} has version {index['version']}; this Poise reads {BUNDLE_VERSION}"
        )
    if not data.exists():
        raise FileError(f"{data} is missing")
    if not data.is_file():
        raise FileError(f"cannot read {data}: it is no regular file")
    if data.stat().st_size != index["bytes"]:
        raise FileError(
            f"{data} is torn: {data.stat().st_size} bytes instead of {index['bytes']}"
        )
    if checksum(data) != index["sha256"]:
        raise FileError(f"{data} is altered: its checksum does not match")
    return index["meta"]


def write_shards(
    pairs: Iterable[tuple[str, Tensor]], folder: Path | str, *, stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write a stream of tensors as safetensors, in files of about `shard_bytes`, one of them in memory.

    One file is `model.safetensors`; several have an index, `model.safetensors.index.json`, as transformers
    reads it. Files are moved into place when all are written, the index last; those of an earlier save go.

    Parameters
    ----------
    pairs : iterable of (name, tensor)
        Names are distinct.
    shard_bytes : int
        A file is closed when the next tensor would make it larger; a larger tensor has a file of its own.

    Raises
    ------
    FileError
        For a name that comes twice, or when the folder cannot be written; an earlier save stays.
    """
    folder = Path(folder)
    try:
        make_folder(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{stem}.") as fresh:
            homes, total = _write_each(pairs, Path(fresh), shard_bytes)
            return _move_shards(Path(fresh), folder, stem, homes, total)
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror or error}") from error


def _write_each(
    pairs: Iterable[tuple[str, Tensor]], fresh: Path, shard_bytes: int
) -> tuple[list[list[str]], int]:
    """Write numbered files and return the names of the tensors in each, and all their bytes."""
    homes: list[list[str]] = []
    seen: set[str] = set()
    shard: dict[str, Tensor] = {}
    held = total = 0

    def close() -> None:
        _save_shard(shard, fresh / str(len(homes)))
        homes.append(list(shard))
        shard.clear()

    for name, tensor in pairs:
        if not isinstance(name, str) or name in seen or name == "__metadata__":
            raise FileError(f"{name!r} comes twice, or is no name for a tensor")
        if not hasattr(tensor, "element_size") or str(tensor.layout) != "torch.strided":
            raise FileError(f"{name} is no dense tensor but a {type(tensor).__name__}")
        seen.add(name)
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > shard_bytes:
            close()
            held = 0
        shard[name], held, total = tensor, held + size, total + size
    if not seen:
        raise FileError("there is nothing to write: the stream has no tensors (was it used before?)")
    close()
    return homes, total


def _save_shard(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    alone: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses two names of one memory
        whole = tensor.detach().contiguous()
        where = whole.untyped_storage().data_ptr()
        alone[name] = whole.clone() if where in storages else whole
        storages.add(where)
    save_file(alone, path, metadata={"format": "pt"})
    with open(path, "rb+") as f:
        os.fchmod(f.fileno(), _MODE)
        os.fsync(f.fileno())


def _move_shards(fresh: Path, folder: Path, stem: str, homes: list[list[str]], total: int) -> list[Path]:
    index, n = folder / f"{stem}.safetensors.index.json", len(homes)
    names = [f"{stem}.safetensors"] if n == 1 else [
        f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    aside = _put_aside(folder, stem, fresh)  # nothing is half new: neither an index nor a file is there
    try:
        for number, name in enumerate(names):
            os.replace(fresh / str(number), folder / name)
        sync_folder(folder)
        if n > 1:
            mapped = {key: name for name, keys in zip(names, homes, strict=True) for key in keys}
            write_json(index, {"metadata": {"total_size": total}, "weight_map": mapped})
    except BaseException:
        for name in [*names, index.name]:
            if (folder / name).is_file():
                (folder / name).unlink()
        for old in aside:
            os.replace(old, folder / old.name)
        raise
    return [folder / name for name in names]


def _put_aside(folder: Path, stem: str, fresh: Path) -> list[Path]:
    """Move the files of an earlier save out of the way, the index first, and return where they are."""
    ours = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    found = [p for p in folder.iterdir() if ours.fullmatch(p.name)]
    found.sort(key=lambda p: p.suffix != ".json")
    if blocked := [p for p in found if not p.is_file()]:
        raise FileError(f"{blocked[0]} is in the way: it is no file")
    (fresh / "before").mkdir()
    for path in found:
        os.replace(path, fresh / "before" / path.name)
    return [fresh / "before" / path.name for path in found]


def copy_checked(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy saved tensors into a method's own ones, in place, once names and shapes agree.

    Raises
    ------
    FileError
        Naming the first tensor that is missing, not of this model, or of another shape.
    """
    if odd := sorted(own.keys() ^ saved.keys()):
        raise FileError(f"{what}: {odd[0]} is {'missing' if odd[0] in own else 'not of this model'}")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise FileError(
                f"{what}: {name} has shape {tuple(saved[name].shape)}, here {tuple(tensor.shape)}"
            )
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def remove_bundle(stem: Path | str) -> None:
    """Delete a bundle, index first, so that it never looks whole when it is not."""
    _index(Path(stem)).unlink(missing_ok=True)
    _tensors(Path(stem)).unlink(missing_ok=True)


def _index(stem: Path) -> Path:
    return stem.with_name(stem.name + ".json")


def _tensors(stem: Path) -> Path:
    return stem.with_name(stem.name + ".safetensors")


def _own_checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
