"""Sources of data and their options. Importing this loads nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from poise.data import packaged
from poise.data.splits import check_fractions
from poise.errors import ConfigError
from poise.hooks import Input
from poise.options import check_options, option

if TYPE_CHECKING:
    from poise.interfaces import Splits


def _test(default: float = 0.1):
    return option(default, "fraction of all rows held out for the final test", low=0, below=1)


def _validation(default: float = 0.1):
    return option(default, "fraction of all rows held out for choices", low=0, below=1)


def _limit():
    return option(0, "keep this many, drawn by seed; 0 keeps all", low=0)


@dataclass(frozen=True)
class Tabular:
    """A regression table: packaged, of scikit-learn, below POISE_DATA, or a CSV or Parquet file.

    Missing values become medians, text columns become indicators, both learned from the training
    rows alone; columns that are constant there are dropped. Nothing is standardised. A text column nine
    tenths of whose cells are numbers is refused, naming the first that is none (`1,000`, `0x10`).
    A changed byte is noticed in .gz files, and in Parquet files that were written with checksums of
    their pages (pyarrow: write_page_checksum=True; by default there are none).
    """

    name: str = option("airfoil", "a packaged table (see `poise data`); ignored when path is given")
    path: str | None = option(None, "a .csv, .csv.gz, .tsv or .parquet file with named columns")
    target: str | None = option(None, "column to predict; null: the last one")
    drop: list[str] = option([], "columns to leave out")
    test: float = _test()
    validation: float = _validation(0.18)
    limit: int = _limit()
    categories: int = option(50, "most frequent values of a text column that get an indicator",
                             low=1)
    missing_indicator: bool = option(False, "add a 0/1 column beside each one with missing values")

    def __post_init__(self) -> None:
        check_options(self)
        check_fractions(self)

    def load(self, seed: int = 0) -> Splits:
        """Return splits of `Arrays` with x (n, d) and y (n,), both float64."""
        from poise.data import tabular

        return tabular.load(self, seed)

    def inputs(self) -> dict[str, Input]:
        """Return the table, unless an installed package holds it."""
        if self.path:
            return {"path": Input(Path(self.path))}
        found = packaged.shared_table(self.name)
        return {"path": Input(found)} if found else {}


@dataclass(frozen=True)
class Digits:
    """1,797 grey digits of scikit-learn, 8x8, in [0, 1]."""

    test: float = _test(0.2)
    validation: float = _validation()
    limit: int = _limit()

    def __post_init__(self) -> None:
        check_options(self)
        check_fractions(self)

    def load(self, seed: int = 0) -> Splits:
        """Return splits of `Arrays` with x (n, 1, 8, 8) float32 and y (n,) int64."""
        from poise.data import images

        return images.load_digits(self, seed)


@dataclass(frozen=True)
class Mnist5k:
    """5,000 grey MNIST digits (500 per class), 28x28, in [0, 1]."""

    test: float = _test(0.2)
    validation: float = _validation()
    limit: int = _limit()

    def __post_init__(self) -> None:
        check_options(self)
        check_fractions(self)

    def load(self, seed: int = 0) -> Splits:
        """Return splits of `Arrays` with x (n, 1, 28, 28) float32 and y (n,) int64."""
        from poise.data import images

        return images.load_mnist5k(self, seed)


@dataclass(frozen=True)
class Images:
    """Images from IDX files (MNIST's format) or from PNG files in a folder per class.

    `path` is an IDX image file (with `labels`), a folder with MNIST-style names
    (train-images-idx3-ubyte[.gz] and so on), or a folder CLASS/*.png, optionally below train/
    and test/. A given test set is used as it is; otherwise `test` is held out.
    """

    path: str | None = option(None, "IDX file or folder; null: Fashion-MNIST of POISE_DATA or Debian")
    labels: str | None = option(None, "IDX file of the labels")
    test_path: str | None = option(None, "IDX file of the test images")
    test_labels: str | None = option(None, "IDX file of the test labels")
    size: int | None = option(None, "resize to this height and width", low=1, unit="pixels")
    channels: int | None = option(None, "1 grey, 3 colour; null: as the first image",
                                  choices=(None, 1, 3))
    test: float = _test()
    validation: float = _validation()
    limit: int = _limit()

    def __post_init__(self) -> None:
        check_options(self)
        check_fractions(self)
        if (self.test_path is None) != (self.test_labels is None):
            raise ConfigError("Images: give both test_path and test_labels, or neither")

    def load(self, seed: int = 0) -> Splits:
        """Return splits of `Arrays` with x (n, c, h, w) float32 in [0, 1] and y (n,) int64."""
        from poise.data import images

        return images.load_images(self, seed)

    def inputs(self) -> dict[str, Input]:
        """Return the folder or files that are read."""
        from poise.data import images

        given = {name: getattr(self, name) for name in ("labels", "test_path", "test_labels")}
        return {"path": Input(images.place(self), images.FILES),
                **{name: Input(Path(path)) for name, path in given.items() if path}}


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32, in ten classes.

    `path` is the folder of its binary version (data_batch_1.bin and so on), or a tar archive of
    train/CLASS/*.jpg and test/CLASS/*.jpg. JPEG loses detail: results on it compare with one another, not
    with published ones.
    """

    path: str | None = option(None, "folder or archive; null: the JPEG archive below POISE_DATA/images")
    validation: float = _validation()
    limit: int = _limit()

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, seed: int = 0) -> Splits:
        """Return splits of `Arrays` with x (n, 3, 32, 32) float32 in [0, 1] and y (n,) int64."""
        from poise.data import cifar

        return cifar.load_cifar10(self, seed)

    def inputs(self) -> dict[str, Input]:
        """Return the folder or archive that is read."""
        from poise.data import cifar

        return {"path": Input(cifar.place(self), ("*.bin",))}


@dataclass(frozen=True)
class Sotu:
    """State of the Union speeches; a speech is in one split only."""

    chunk: int = option(2000, "cut speeches into pieces of this length; 0 keeps them whole",
                        low=0, unit="characters")
    related: bool = option(False, "also the package's related documents (special messages)")
    test: float = _test()
    validation: float = _validation()
    limit: int = option(0, "keep this many speeches, drawn by seed; 0 keeps all", low=0)

    def __post_init__(self) -> None:
        check_options(self)
        check_fractions(self)

    def load(self, seed: int = 0) -> Splits:
        """Return splits of `Example` lists with empty prompts."""
        from poise.data import text

        return text.load_sotu(self, seed)


@dataclass(frozen=True)
class Text:
    """Any UTF-8 text file: its beginning trains, its end tests; the seed changes nothing."""

    path: str | None = option(None, "text file (or .gz); null: POISE_DATA/text/tinyshakespeare.txt")
    chunk: int = option(2000, "cut into pieces of this length", low=1, unit="characters")
    test: float = _test(0.05)
    validation: float = _validation(0.05)
    limit: int = option(0, "use only the first so many characters; 0 uses all", low=0)

    def __post_init__(self) -> None:
        check_options(self)
        check_fractions(self)

    def load(self, seed: int = 0) -> Splits:
        """Return splits of `Example` lists with empty prompts."""
        from poise.data import text

        return text.load_text(self, seed)

    def inputs(self) -> dict[str, Input]:
        """Return the text file."""
        from poise.data import text

        return {"path": Input(text.place(self))}


@dataclass(frozen=True)
class GsmSymbolic:
    """Generated grade-school problems with worked solutions that end in `#### ANSWER`.

    No prompt is in two splits; the test and validation problems of a seed do not depend on `n`.
    """

    n: int = option(1000, "training problems", low=1)
    validation: int = option(100, "validation problems", low=0)
    test: int = option(100, "test problems", low=0)
    templates: list[int] = option([], "use only these templates (0 to 99); empty: all that work",
                                  low=0, high=99)

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, seed: int = 0) -> Splits:
        """Return splits of `Example` lists."""
        from poise.data import math

        return math.load_gsm_symbolic(self, seed)


@dataclass(frozen=True)
class Gsm8k:
    """Grade-school problems from JSONL files with keys `question` and `answer`."""

    path: str | None = option(None, "training file; null: POISE_DATA/math/gsm8k_train.jsonl")
    test_path: str | None = option(
        None, "test file; null: gsm8k_test.jsonl below POISE_DATA, or `test` of a given path")
    test: float = _test()
    validation: float = _validation(0.05)
    limit: int = _limit()

    def __post_init__(self) -> None:
        check_options(self)
        check_fractions(self)

    def load(self, seed: int = 0) -> Splits:
        """Return splits of `Example` lists."""
        from poise.data import math

        return math.load_gsm8k(self, seed)

    def inputs(self) -> dict[str, Input]:
        """Return the training file, and the test file if there is one."""
        from poise.data import math

        path, test_path = math.places(self)
        return {"path": Input(path), **({"test_path": Input(test_path)} if test_path else {})}


@dataclass(frozen=True)
class MetaMath:
    """MetaMathQA (arXiv 2309.12284), from its JSON file of `query` and `response`."""

    path: str | None = option(None, "training file; null: POISE_DATA/math/MetaMathQA-395K.json")
    test_path: str | None = option(None, "GSM8K's test file (JSONL); null: `test` of the training file")
    test: float = _test()
    validation: float = _validation(0.01)
    limit: int = _limit()

    def __post_init__(self) -> None:
        check_options(self)
        check_fractions(self)

    def load(self, seed: int = 0) -> Splits:
        """Return splits of `Example` lists."""
        from poise.data import metamath

        return metamath.load(self, seed)

    def inputs(self) -> dict[str, Input]:
        """Return the training file, and the test file if there is one."""
        from poise.data import metamath

        found = {"path": Input(metamath.place(self))}
        return {**found, **({"test_path": Input(Path(self.test_path))} if self.test_path else {})}


__all__ = [
    "Cifar10", "Digits", "Gsm8k", "GsmSymbolic", "Images", "MetaMath", "Mnist5k", "Sotu", "Tabular", "Text",
]
