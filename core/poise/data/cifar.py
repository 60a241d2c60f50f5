"""CIFAR-10: the binary files of its authors, or an archive of JPEG files by class."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.data import packaged
from poise.data.images import Loaded, split
from poise.data.pixels import decode
from poise.data.splits import read_bytes
from poise.errors import DataError
from poise.interfaces import Splits

if TYPE_CHECKING:
    import numpy as np

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN, TEST = [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]
SHARED = "images/cifar10-jpeg/cifar10_jpeg_q75.tar.xz"
_SIDE, _MOST_BYTES = 32, 1 << 20  # no image of 32 x 32 pixels needs more
_MOST_TOTAL = 1 << 29  # nor do 60,000 of them
_RECORD = 1 + 3 * _SIDE * _SIDE  # a class, then red, green and blue planes


def load_cifar10(options, seed: int) -> Splits:
    """Return the splits of a `poise.data.components.Cifar10`.

    Raises
    ------
    DataError
        For what is missing, torn, pickled, or no image of 32 x 32 pixels.
    """
    path = place(options)
    if not path.exists():
        raise DataError(f"{path} does not exist: check `path`")
    sums: dict[str, str] = {}
    train, test = _binary(path, sums) if path.is_dir() else _archive(path, sums)
    (x, y), own = (_floats(*train), _floats(*test))
    loaded = Loaded(x, y, str(path), packaged.licence_of(path), sums, own, list(CLASSES))
    return split(loaded, options, seed)


def place(options) -> Path:
    """Return the folder or archive that is read."""
    return Path(options.path) if options.path else packaged.shared(SHARED)


def _floats(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    return images.astype(np.float32) / 255, labels.astype(np.int64)


def _binary(folder: Path, sums: dict[str, str]):
    """Read the five training files and the test file: records of a class and 3 planes of 32 x 32 bytes."""
    import numpy as np

    missing = [name for name in TRAIN + TEST if not (folder / name).is_file()]
    if missing:
        pickled = (folder / "data_batch_1").is_file()
        why = "those without .bin are pickles, which can run code: " if pickled else ""
        raise DataError(f"{folder} has no {missing[0]}: {why}give the folder of CIFAR-10's binary version "
                        f"({TRAIN[0]} and so on), or an archive of JPEG files")
    parts = []
    for names in (TRAIN, TEST):
        rows = []
        for name in names:
            raw, sums[name] = read_bytes(folder / name)
            if len(raw) % _RECORD:
                raise DataError(f"{folder / name} is torn: {len(raw)} bytes are no multiple of {_RECORD}")
            rows.append(np.frombuffer(raw, np.uint8).reshape(-1, _RECORD))
        table = np.concatenate(rows)
        if table[:, 0].max() >= len(CLASSES):
            raise DataError(f"{folder}: a record has the class {table[:, 0].max()}; CIFAR-10 has 0 to 9")
        parts.append((table[:, 1:].reshape(-1, 3, _SIDE, _SIDE), table[:, 0]))
    return parts


def _archive(path: Path, sums: dict[str, str]):
    """Read train/CLASS/*.jpg and test/CLASS/*.jpg out of a tar archive, in the order of their names."""
    import numpy as np

    found: dict[str, dict[str, bytes]] = {"train": {}, "test": {}}
    raw, sums[path.name] = read_bytes(path)
    try:
        unpacked = _Counted(_unpacked(raw), str(path))
        with tarfile.open(fileobj=unpacked, mode="r|") as archive:  # type: ignore[call-overload]
            for member in archive:
                parts = Path(member.name).parts
                if not member.isfile() or len(parts) < 3 or parts[-3] not in found:
                    continue
                if parts[-2] not in CLASSES or member.size > _MOST_BYTES:
                    raise DataError(f"{path}: {member.name} is no image of one of {', '.join(CLASSES)}")
                if (file := archive.extractfile(member)) is not None:  # never, for a regular file
                    found[parts[-3]]["/".join(parts[-2:])] = file.read()
    except DataError:
        raise
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ArithmeticError,
            ValueError) as error:
        raise DataError(f"{path} is no whole tar archive: {error}") from None
    parts = []
    for name, files in found.items():
        if not files:
            raise DataError(f"{path} has no {name}/CLASS/*.jpg")
        order = sorted(files)
        images = np.stack([_jpeg(f"{path}: {name}/{file}", files[file]) for file in order])
        labels = np.array([CLASSES.index(file.partition("/")[0]) for file in order])
        parts.append((images, labels))
    return parts


def _unpacked(raw: bytes) -> Any:
    """Return a file of what an archive holds, unpacked as it is read."""
    stored = io.BytesIO(raw)
    if raw.startswith(b"\xfd7zXZ"):
        return lzma.LZMAFile(stored)
    return gzip.GzipFile(fileobj=stored) if raw.startswith(b"\x1f\x8b") else stored


class _Counted:
    """A file that ends with an error where it turns out larger than images can be, headers included."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name, self._left = file, name, _MOST_TOTAL

    def read(self, size: int) -> bytes:
        found = self._file.read(size)
        self._left -= len(found)
        if self._left < 0:
            raise DataError(f"{self._name} holds more than {_MOST_TOTAL >> 20} MiB: it is no CIFAR-10")
        return found


def _jpeg(name: str, raw: bytes) -> np.ndarray:
    """Return one image as (3, 32, 32) bytes."""
    image = decode(raw, name, 3, ("JPEG", "PNG"), _SIDE)
    if image.dtype != "uint8":
        raise DataError(f"{name} has 16 bits a pixel: CIFAR-10 has 8")
    return image.transpose(2, 0, 1)
