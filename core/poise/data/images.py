"""Labelled images: packaged digits, IDX files, and folders of PNG files."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.data import packaged
from poise.data.pixels import channels_of, decode
from poise.data.splits import provenance, read_bytes, split_rows
from poise.errors import DataError, require
from poise.interfaces import Arrays, Splits

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Loaded:
    """Images (n, c, h, w) float32 in [0, 1], labels (n,), perhaps their own test set."""

    x: np.ndarray
    y: np.ndarray
    source: str
    licence: str
    sums: dict[str, str]
    test: tuple[np.ndarray, np.ndarray] | None = None
    classes: list[str] | None = None


DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
# what is read of a folder
FILES = ("*/*.png", "train/*/*.png", "test/*/*.png", "*-ubyte", "*-ubyte.gz")
# third byte of an IDX magic number: 8 is unsigned byte, the only type used for images
_UNSIGNED_BYTE = 0x08


# ------------------------------------------------------------------ packaged


def load_digits(options, seed: int) -> Splits:
    """Return scikit-learn's digits, scaled from 0..16 to [0, 1]."""
    import numpy as np

    datasets = require("sklearn.datasets", "images")
    sums = packaged.of_sklearn(("digits.csv.gz",))
    bunch = datasets.load_digits()
    x = (bunch.images[:, None] / 16).astype(np.float32)
    y = bunch.target.astype(np.int64)
    loaded = Loaded(x, y, "scikit-learn load_digits", "CC BY 4.0 (UCI)", sums)
    return split(loaded, options, seed)


def load_mnist5k(options, seed: int) -> Splits:
    """Return the packaged 5,000 MNIST digits, scaled from 0..255 to [0, 1]."""
    import numpy as np

    path, = packaged.verified("mnist5k")
    raw, digest = read_bytes(path)
    table = np.loadtxt(raw.decode().splitlines(), delimiter=",", dtype=np.float32)
    x, y = table[:, :-1].reshape(-1, 1, 28, 28) / 255, table[:, -1].astype(np.int64)
    entry = packaged.PACKAGES["mnist5k"]
    loaded = Loaded(x, y, entry.distribution, entry.licence, {path.name: digest})
    return split(loaded, options, seed)


# ------------------------------------------------------------------ files


def load_images(options, seed: int) -> Splits:
    """Return the splits of a `poise.data.components.Images`.

    Raises
    ------
    DataError
        For what is missing, torn, of mixed sizes, or not images.
    """
    path = place(options)
    if not path.exists():
        raise DataError(f"{path} does not exist: check `path`")
    sums: dict[str, str] = {}
    pairs = _idx_pairs(path, options)
    if pairs:
        (x, y), *rest = [_idx_pair(*pair, sums) for pair in pairs]
        test, classes = (rest[0] if rest else None), None
    else:
        x, y, test, classes = _folders(path, options, sums)
    x = _shaped(x, options)
    test = (_shaped(test[0], options), test[1]) if test else None
    if test and test[0].shape[1:] != x.shape[1:]:
        raise DataError(f"{path}: test images are {test[0].shape[1:]}, training ones "
                        f"{x.shape[1:]}: give `size`")
    loaded = Loaded(x, y, str(path), packaged.licence_of(path), sums, test, classes)
    return split(loaded, options, seed)


def place(options) -> Path:
    """Return the file or folder that is read."""
    return Path(options.path) if options.path else _fashion_mnist()


def _fashion_mnist() -> Path:
    """Return the folder of Fashion-MNIST: below POISE_DATA, or where Debian's package puts it."""
    try:
        return packaged.shared("images/fashion-mnist")
    except DataError as error:
        if DEBIAN.is_dir():
            return DEBIAN
        raise DataError(f"{error}, or install Debian's dataset-fashion-mnist ({DEBIAN})") from None


def split(loaded: Loaded, options, seed: int) -> Splits:
    """Split by seed; a test set of its own is used as it is."""
    import numpy as np

    x, y, test, limit = loaded.x, loaded.y, loaded.test, options.limit
    highest = max(int(y.max()), int(test[1].max()) if test else 0)
    if limit and limit < len(y):
        kept = np.sort(np.random.default_rng([seed, 1]).choice(len(y), limit, replace=False))
        x, y = x[kept], y[kept]
    held = 0.0 if test else options.test
    rows = split_rows(len(y), held, options.validation, seed, loaded.source)
    train, validation, rest = (Arrays(x[i], y[i]) for i in rows)
    if test:
        rest = Arrays(*(part[: limit or None] for part in test))
    spec: dict[str, Any] = {
        "input_shape": tuple(x.shape[1:]),
        "n_classes": len(loaded.classes) if loaded.classes else highest + 1,
    }
    if loaded.classes:
        spec["classes"] = loaded.classes
    record = provenance(
        loaded.source, loaded.licence, loaded.sums, (train, validation, rest), seed,
        limit=limit, test="own files" if test else "held out",
    )
    return Splits(train, validation, rest, record, spec)


def _shaped(x: np.ndarray, options) -> np.ndarray:
    """Turn (n, h, w, c) bytes or uint16 into (n, c, h, w) float32 in [0, 1], resized when asked."""
    import numpy as np

    if options.size and x.shape[1:3] != (options.size, options.size):
        x = np.stack([_resized(image, options.size) for image in x])
    if options.channels == 3 and x.shape[3] == 1:
        x = np.repeat(x, 3, axis=3)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2), dtype=np.float32) / np.iinfo(x.dtype).max


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    """Return (side, side, c) of (h, w, c), of the same type, channel by channel."""
    import numpy as np

    pillow = require("PIL.Image", "images")
    wide = image if image.dtype == np.uint8 else image.astype(np.float32)  # exact up to 24 bits
    planes = [pillow.fromarray(np.ascontiguousarray(wide[..., c])) for c in range(image.shape[2])]
    scaled = [np.asarray(plane.resize((side, side), pillow.Resampling.BILINEAR)) for plane in planes]
    return np.rint(np.stack(scaled, axis=2)).astype(image.dtype)


# ------------------------------------------------------------------ IDX


def _idx_pairs(path: Path, options) -> list[tuple[Path, Path]]:
    """Return (images, labels) for training and perhaps for test; empty for a PNG folder."""
    if path.is_dir():
        pairs = [(_idx_file(path, f"{p}-images-idx3-ubyte"), _idx_file(path,
                 f"{p}-labels-idx1-ubyte")) for p in ("train", "t10k")]
        return [(a, b) for a, b in pairs if a and b]
    if options.labels is None:
        raise DataError(f"{path} is a file: give the IDX file of its labels as `labels`")
    pairs = [(path, Path(options.labels))]
    if options.test_path:
        pairs.append((Path(options.test_path), Path(options.test_labels)))
    return pairs


def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)


def _idx_pair(images: Path, labels: Path, sums: dict[str, str]) -> tuple[Any, Any]:
    """Read images (n, h, w, 1) bytes and labels (n,) int64."""
    import numpy as np

    x, y = read_idx(images, 3, sums), read_idx(labels, 1, sums)
    if len(x) != len(y):
        raise DataError(f"{images} has {len(x)} images and {labels} {len(y)} labels: they must "
                        f"be a pair")
    return x[..., None], y.astype(np.int64)


def read_idx(path: Path, dimensions: int, sums: dict[str, str]) -> np.ndarray:
    """Read an IDX file (or .gz) of unsigned bytes with so many dimensions; note its checksum.

    Raises
    ------
    DataError
        For another magic number, a size of 0, or a length that does not fit the header.
    """
    import numpy as np

    raw, sums[str(path)] = read_bytes(path)
    header = 4 + 4 * dimensions
    if len(raw) < header:
        raise DataError(f"{path} is truncated: {len(raw)} bytes, its header alone takes {header}")
    if raw[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
        raise DataError(
            f"{path} is not an IDX file of {dimensions}-dimensional bytes: it begins with "
            f"0x{raw[:4].hex()} instead of 0x{bytes((0, 0, _UNSIGNED_BYTE, dimensions)).hex()}"
        )
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    if 0 in shape:
        raise DataError(f"{path} holds nothing: its header gives the sizes {' x '.join(map(str, shape))}")
    expected = header + math.prod(shape)  # of Python's numbers, which do not overflow
    if len(raw) != expected:
        fault = "truncated" if len(raw) < expected else "too long"
        raise DataError(f"{path} is {fault}: {len(raw)} bytes, its header says {expected}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


# ------------------------------------------------------------------ PNG folders


def _folders(path: Path, options, sums: dict[str, str]):
    """Read CLASS/*.png below `path`, or below its train/ and test/."""
    has_train = (path / "train").is_dir()
    root = path / "train" if has_train else path
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and any(p.glob("*.png")))
    if not classes:
        raise DataError(
            f"{root} has neither folders CLASS/*.png nor IDX files (train-images-idx3-ubyte)"
        )
    x, y = _pngs(root, classes, options, sums)
    test = None
    if has_train and (path / "test").is_dir():
        unknown = {p.name for p in (path / "test").iterdir() if p.is_dir()} - set(classes)
        if unknown:
            raise DataError(f"{path / 'test'} has classes that train/ lacks: {sorted(unknown)}")
        test = _pngs(path / "test", classes, options, sums)
    return x, y, test, classes


def _pngs(root: Path, classes: list[str], options, sums: dict[str, str]) -> tuple[Any, Any]:
    """Return (n, h, w, c) bytes, or uint16 if an image has 16 bits, and class indices (n,)."""
    import numpy as np

    files = [(f, i) for i, name in enumerate(classes) for f in sorted((root / name).glob("*.png"))]
    if not files:
        raise DataError(f"{root} has no PNG files")
    images: list[np.ndarray] = []
    channels = options.channels
    for file, _ in files:
        raw, sums[str(file)] = read_bytes(file)
        channels = channels or channels_of(raw, str(file))
        if channels == 1 != options.channels and channels_of(raw, str(file)) == 3:
            raise DataError(f"{file} has colours, {files[0][0]} is grey: give `channels`")
        image = decode(raw, str(file), channels)
        image = _resized(image, options.size) if options.size else image
        if images and image.shape != images[0].shape:
            raise DataError(f"{file} is {image.shape[1]}x{image.shape[0]}, {files[0][0]} is "
                            f"{images[0].shape[1]}x{images[0].shape[0]}: give `size`")
        images.append(image)
    if any(image.dtype == np.uint16 for image in images):
        images = [i if i.dtype == np.uint16 else i.astype(np.uint16) * 257 for i in images]  # 255 is 65535
    return np.stack(images), np.array([i for _, i in files], dtype=np.int64)
