"""Regression tables: read, checked, split by seed, and made numeric from the training rows."""

from __future__ import annotations

import csv
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.data import packaged
from poise.data.splits import provenance, read_bytes, split_rows
from poise.errors import DataError, nearest, require
from poise.interfaces import Arrays, Splits

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

# separated by blanks, without a header
_BARE = ("istanbul", "resid_build_sale_price")
# what pandas calls an index without a name
_INDEX = re.compile(r"__index_level_\d+__")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|infinity)", re.IGNORECASE | re.ASCII)
# of the cells of a column of text, and of its values: from here on it is one of numbers with slips in it
_MOSTLY, _HANDFUL = 0.9, 5
# a date, and two columns whose sum is the target
_LEAKS = {"bike_sharing_day": ["dteday", "casual", "registered"]}


@dataclass(frozen=True)
class Table:
    """A frame as it was read, and where it came from."""

    frame: pd.DataFrame
    source: str
    licence: str
    sha256: dict[str, str]
    note: str = ""


def load(options, seed: int) -> Splits:
    """Return the splits of a `poise.data.components.Tabular`.

    Raises
    ------
    DataError
        For a source that is missing, empty, torn, without a usable target or features.
    """
    import numpy as np

    table = read(Path(options.path)) if options.path else named(options.name)
    frame: Any = table.frame
    what = table.source
    target = _column(frame, options.target, what) if options.target else frame.columns[-1]
    dropped = [_column(frame, name, what) for name in options.drop]
    y = _target(frame[target], what)
    frame = frame.drop(columns=[*dropped, target])
    if options.limit and options.limit < len(y):
        kept = np.random.default_rng([seed, 1]).choice(len(y), options.limit, replace=False)
        kept.sort()
        frame, y = frame.iloc[kept], y[kept]  # with their index: messages name rows of the file
    rows = split_rows(len(y), options.test, options.validation, seed, what)
    encoder = Encoder(options.categories, options.missing_indicator).fit(frame, rows[0], what)
    x = encoder.transform(frame)
    parts = [Arrays(x[i], y[i]) for i in rows]
    spec = {"input_shape": (x.shape[1],), "columns": encoder.columns, "target": str(target)}
    record = provenance(
        what, table.licence, table.sha256, parts, seed, rows=len(y), note=table.note,
        dropped=[str(d) for d in dropped], **encoder.handled,
    )
    return Splits(parts[0], parts[1], parts[2], record, spec)


# ------------------------------------------------------------------ sources


def names() -> list[str]:
    """Return every table name there is here: packaged, of scikit-learn, below POISE_DATA."""
    own = [n.split("/")[1] for n in packaged.PACKAGES if n.startswith("tabular/")]
    root = packaged.folder()
    extra = sorted(p.name[: -len(".csv.gz")] for p in root.glob("tabular/*.csv.gz")) if root else []
    return list(dict.fromkeys([*own, *packaged.SKLEARN, *extra]))


def named(name: str) -> Table:
    """Read a table by name; a packaged one goes before one below POISE_DATA."""
    if f"tabular/{name}" in packaged.PACKAGES:
        return _packaged(name)
    if name in packaged.SKLEARN:
        return _sklearn(name)
    path = packaged.shared_table(name)
    if path is None:
        more = "" if packaged.folder() else f"; more with {packaged.VARIABLE} set"
        raise DataError(
            f"no table {name!r}{nearest(name, names())} (have: {', '.join(names())}{more})"
        )
    return read(path)


def _packaged(name: str) -> Table:
    path, = packaged.verified(f"tabular/{name}")
    entry = packaged.PACKAGES[f"tabular/{name}"]
    raw, digest = read_bytes(path)
    if name in _BARE:
        lines = [line.split() for line in raw.decode().splitlines()]
        header = [f"x{i}" for i in range(len(lines[0]) - 1)] + ["y"]
        raw = "\n".join(map(",".join, [header, *lines])).encode()
    leaks = _LEAKS.get(name, [])
    frame = _csv(raw, path).drop(columns=leaks)
    note = f"left out: {', '.join(leaks)} (date, and parts of the target)" if leaks else ""
    return Table(frame, f"{entry.distribution} {path.name}", entry.licence, {path.name: digest},
                 note)


def _sklearn(name: str) -> Table:
    datasets = require("sklearn.datasets", "tabular")
    require("pandas", "tabular")
    loader, files = packaged.SKLEARN[name]
    digest = packaged.of_sklearn(files)
    frame = getattr(datasets, loader)(as_frame=True).frame
    return Table(frame, f"scikit-learn {loader}", "BSD-3-Clause (scikit-learn)", digest)


def read(path: Path) -> Table:
    """Read a .csv, .tsv (also .gz) or .parquet file.

    Raises
    ------
    DataError
        For a missing, empty, torn or header-only file, or a column name that occurs twice.
    """
    raw, digest = read_bytes(path)
    suffix = [s for s in path.suffixes if s != ".gz"][-1:]
    if suffix in ([".parquet"], [".pq"]):
        frame = _parquet(raw, path)
    else:
        frame = _csv(raw, path, "\t" if suffix == [".tsv"] else ",")
    if len(frame) == 0:
        raise DataError(f"{path} has a header and no rows")
    return Table(frame, str(path), packaged.licence_of(path), {str(path): digest})


def _csv(raw: bytes, path: Path, separator: str = ",") -> pd.DataFrame:
    pandas = require("pandas", "tabular")
    try:
        text = raw.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds the character NUL")
        header = next(csv.reader(io.StringIO(text), delimiter=separator), [])
        header = [name.strip() for name in header]
        _unique(header, path)
        with warnings.catch_warnings():
            # pandas cuts longer rows with this warning only
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            return pandas.read_csv(
                io.StringIO(text), sep=separator, header=0, names=header, index_col=False,
                na_values=["?"], skipinitialspace=True, float_precision="round_trip",
                low_memory=False,
            )
    except (UnicodeDecodeError, csv.Error, ValueError, pandas.errors.ParserWarning) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no columns"
        raise DataError(f"{path} is not a readable table: {reason}") from None


def _parquet(raw: bytes, path: Path) -> pd.DataFrame:
    """Read the pages, whose checksums are compared where the file has them (it need not have any)."""
    parquet = require("pyarrow.parquet", "tabular")
    arrow = require("pyarrow", "tabular")
    require("pandas", "tabular")
    try:
        table = parquet.read_table(arrow.BufferReader(raw), page_checksum_verification=True)
        table.validate(full=True)
        names = [name for name in table.column_names if not _INDEX.fullmatch(name)]
        _unique(names, path)
        table = table.select(names)
        plain = [(name, _plain(arrow.types, table.schema.field(name).type)) for name in names]
        # what pandas left in the file is not followed: it may name other columns and types
        return table.cast(arrow.schema(plain)).to_pandas(ignore_metadata=True)
    except DataError:
        raise
    except Exception as error:  # a damaged file fails in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is not a whole Parquet file: {reason}") from None


def _plain(types: Any, kind: Any) -> Any:
    """Return the type to read a column as: of dictionaries their values', of decimals float64."""
    import pyarrow

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return pyarrow.float64() if types.is_decimal(kind) else kind


def _unique(header: list[str], path: Path) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path} has columns that occur twice: {', '.join(map(repr, twice))}; "
                        f"rename them")
    if len(header) < 2:
        raise DataError(f"{path} has {len(header)} column(s): at least one feature and a target "
                        f"are needed")


# ------------------------------------------------------------------ columns


def _column(frame: pd.DataFrame, name: str, what: str) -> str:
    """Return the name when the column exists."""
    columns = [str(c) for c in frame.columns]
    if name not in columns:
        raise DataError(
            f"{what} has no column {name!r}{nearest(name, columns)} (columns: {', '.join(columns)})"
        )
    return name


def _target(column: pd.Series, what: str) -> np.ndarray:
    """Return the target as float64, refusing text, NaN and Inf."""
    import numpy as np

    _refuse_odd(column, what)
    if not _numeric(column):
        row, shown = _first_word(column)
        raise DataError(
            f"{what}: target {str(column.name)!r} is no number (data row {row + 1} holds {shown!r}): mend "
            f"that, or choose another `target`"
        )
    y = column.to_numpy(dtype=np.float64, na_value=np.nan)
    bad = np.flatnonzero(~np.isfinite(y))
    if len(bad):
        raise DataError(
            f"{what}: target {str(column.name)!r} is missing, NaN or Inf in {len(bad)} of {len(y)} "
            f"rows, first in data row {bad[0] + 1}: remove those rows"
        )
    return y


def _numeric(column: pd.Series) -> bool:
    from pandas.api import types

    return types.is_numeric_dtype(column) and not types.is_complex_dtype(column)


def _refuse_odd(column: pd.Series, what: str) -> None:
    """Raise `DataError` for a column of neither numbers nor text: dates, lists, mappings, bytes."""
    from pandas.api import types

    if _numeric(column):
        return
    kind = types.infer_dtype(column, skipna=True)
    if kind not in ("string", "boolean", "empty"):
        raise DataError(f"{what}: column {str(column.name)!r} holds neither numbers nor text ({kind}): "
                        f"convert it, or leave it out")


def _first_word(column: pd.Series) -> tuple[int, Any]:
    """Return the row and the value of the first cell that is no number; of the first one if all are."""
    words = column[[isinstance(v, str) and not _NUMBER.fullmatch(v.strip()) for v in column]]
    first = words if len(words) else column
    return int(first.index[0]), first.iloc[0]


def _refuse_slips(column: pd.Series, what: str) -> None:
    """Raise `DataError` for numbers that a few cells made text: each of them would be a category."""
    cells = [v.strip() for v in column if isinstance(v, str)]
    numbers = sum(_NUMBER.fullmatch(cell) is not None for cell in cells)
    if not _MOSTLY * len(cells) <= numbers < len(cells) or len(set(cells)) <= _HANDFUL:
        return
    row, cell = _first_word(column)
    raise DataError(
        f"{what}: column {str(column.name)!r} holds {cell!r} in data row {row + 1}, and {numbers} of its "
        f"{len(cells)} cells are numbers: write a number there, leave it empty (missing), or `drop` the "
        f"column"
    )


class Encoder:
    """Makes a frame numeric, with medians and categories learned from training rows.

    Parameters
    ----------
    categories : int
        Most frequent values of a text column that get an indicator; others get zeros.
    indicator : bool
        Add a 0/1 column beside each numeric column that has missing values.

    Attributes
    ----------
    columns : list of str
        Names of the columns of `transform`'s result.
    handled : dict
        Counts of what was done, as plain JSON values.
    """

    def __init__(self, categories: int, indicator: bool) -> None:
        self.categories, self.indicator = categories, indicator
        self.columns: list[str] = []
        self.handled: dict[str, Any] = {}
        self._plan: list[tuple[str, str, Any]] = []

    def fit(self, frame: Any, train: np.ndarray, what: str) -> Encoder:
        """Learn from the rows `train` (indices) of a pandas frame.

        Raises
        ------
        DataError
            For an infinite value, a column of neither numbers nor text, one of numbers but for a few
            cells, or when no column is left.
        """
        done: dict[str, Any] = {"imputed": {}, "one_hot": {}, "constant": []}
        for name in frame.columns:
            column = frame[name]
            _refuse_odd(column, what)
            steps = (self._number if _numeric(column) else self._category)(column, train, what)
            missing = int(column.isna().sum())
            if not steps:
                done["constant"].append(str(name))
                continue
            if missing:
                done["imputed"][str(name)] = missing
            if not _numeric(column):
                done["one_hot"][str(name)] = len(steps)
            self._plan += [(name, kind, value) for kind, value in steps]
        if not self._plan:
            raise DataError(f"{what} has no feature that varies over its training rows")
        self.columns = [_label(*step) for step in self._plan]
        self.handled = done
        return self

    def transform(self, frame: Any) -> np.ndarray:
        """Return the rows as (n, d) float64."""
        import numpy as np

        return np.column_stack([_apply(frame[name], kind, v) for name, kind, v in self._plan])

    def _number(self, column: pd.Series, train: np.ndarray, what: str) -> list[tuple[str, Any]]:
        import numpy as np

        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        infinite = np.flatnonzero(np.isinf(values))
        if len(infinite):
            raise DataError(
                f"{what}: column {str(column.name)!r} is infinite in {len(infinite)} rows, first "
                f"in data row {column.index[infinite[0]] + 1}: remove those rows or `drop` the column"
            )
        seen = values[train][~np.isnan(values[train])]
        steps: list[tuple[str, Any]] = []
        if len(seen) and (seen != seen[0]).any():
            steps.append(("number", float(np.median(seen))))
        holes = np.isnan(values[train])
        if self.indicator and holes.any() and not holes.all():
            steps.append(("missing", None))
        return steps

    def _category(self, column: pd.Series, train: np.ndarray, what: str) -> list[tuple[str, Any]]:
        _refuse_slips(column, what)
        seen = column.iloc[train].dropna().astype(str)
        counts = seen.value_counts()
        if len(counts) < 2 and len(seen) == len(train):
            return []
        # ties go by name, so that the columns do not depend on the order of the rows
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return [("is", str(value)) for value, _ in ranked[: self.categories]]


def _label(name: Any, kind: str, value: Any) -> str:
    return {"number": f"{name}", "missing": f"{name}=?", "is": f"{name}={value}"}[kind]


def _apply(column: pd.Series, kind: str, value: Any) -> np.ndarray:
    import numpy as np

    if kind == "missing":
        return column.isna().to_numpy(dtype=np.float64)
    if kind == "is":
        return (column.notna() & (column.astype(str) == value)).to_numpy(dtype=np.float64)
    x = column.to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isnan(x), value, x)
