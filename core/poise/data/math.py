"""Grade-school problems: generated ones, and GSM8K's files."""

from __future__ import annotations

import ast
import itertools
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from poise.data import packaged
from poise.data.splits import provenance, read_text, split_rows
from poise.errors import ConfigError, DataError
from poise.interfaces import Example, Splits

MARK = "####"
_SURROGATE = re.compile("[\ud800-\udfff]")
_PATIENCE = 2000  # problems in a row that are not new


# ------------------------------------------------------------------ generated


def load_gsm_symbolic(options, seed: int) -> Splits:
    """Generate problems; the same seed gives the same ones.

    Raises
    ------
    ConfigError
        For a template that does not exist or that upstream marks as broken.
    DataError
        When the package is absent, or the templates cannot give that many different problems.
    """
    usable = sorted(_generators())
    unknown = sorted(set(options.templates) - set(usable))
    if unknown:
        raise ConfigError(f"GsmSymbolic.templates={unknown} do not work upstream; have {usable}")
    templates = sorted(set(options.templates)) or usable
    wanted = options.test + options.validation + options.n
    problems = _different(templates, seed, wanted)
    # the test problems come first, so that asking for more training ones leaves them as they are
    b, c = options.test, options.test + options.validation
    parts = (problems[c:], problems[b:c], problems[:b])
    entry = packaged.PACKAGES["gsm_symbolic"]
    return Splits(*parts, provenance(
        entry.distribution, entry.licence, dict(entry.files), parts, seed,
        templates=len(templates), disjoint_by="prompt",
    ))


def _different(templates: list[int], seed: int, wanted: int) -> list[Example]:
    """Return the first `wanted` problems with different prompts."""
    found: dict[str, Example] = {}
    in_vain = 0
    for example in _stream(templates, seed):
        new = example is not None and example.prompt not in found
        if example is not None and new:
            found[example.prompt] = example
        in_vain = 0 if new else in_vain + 1
        if len(found) == wanted:
            break
        if in_vain == _PATIENCE:
            raise DataError(
                f"gsm_symbolic: templates {templates} gave only {len(found)} different problems, "
                f"{wanted} are asked for: use more templates or a smaller n"
            )
    return list(found.values())


def _stream(templates: list[int], seed: int) -> Iterator[Example | None]:
    """Yield problem after problem; the i-th depends on (templates, seed, i) alone.

    None stands for a problem whose worked solution ends in another number than its answer.
    """
    generators = _generators()
    for index in itertools.count():
        rng = Random(f"gsm_symbolic {seed} {index}")
        problem = generators[rng.choice(templates)](rng, 1.0)
        answer = str(problem["answer"]).strip()
        work, _, final = problem["metadata"]["answer_cot"].rpartition(MARK)
        # a few templates end their solution in "16.0" where the answer is "16"
        agree = _number(final) == _number(answer)
        question = problem["question"].strip() + "\n"
        yield Example(question, f"{work}{MARK} {answer}", answer) if agree else None


def _number(text: str) -> float | str:
    try:
        return float(text.strip().replace(",", ""))
    except ValueError:
        return text.strip()


@lru_cache(maxsize=1)
def _generators() -> dict[int, Callable[[Random, float], dict[str, Any]]]:
    """Return the generators that upstream lists as working, by template number.

    Importing `reasoning_gym` would import dozens of packages. The two files of generators need
    only its `utils`, so a bare stand-in for the package is there while they load.
    """
    first, second, index, utils = packaged.verified("gsm_symbolic")
    before = {k: sys.modules.get(k) for k in ("reasoning_gym", "reasoning_gym.utils")}
    try:
        sys.modules["reasoning_gym"] = types.ModuleType("reasoning_gym")
        sys.modules["reasoning_gym.utils"] = _execute(utils)
        modules = [_execute(path) for path in (first, second)]
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    working = _literal(index, "tasks_ok")
    names = {k: v for module in modules for k, v in vars(module).items()}
    return {k: names[f"generate_{k}"] for k in working}


def _execute(path: Path) -> types.ModuleType:
    """Run a Python file, not its cached bytecode, as a module that is not registered anywhere."""
    module = types.ModuleType(f"_poise_{path.stem}")
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module


def _literal(path: Path, name: str) -> list[int]:
    """Return the list that a Python file assigns to `name`, without running it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise DataError(f"{path} has no {name}: {packaged.HOW} --force-reinstall")


# ------------------------------------------------------------------ files


def load_gsm8k(options, seed: int) -> Splits:
    """Read a training file and a test file (or hold out part of the first).

    Raises
    ------
    DataError
        For a missing or empty file, or a line that is not a problem, with its number.
    """
    path, test_path = places(options)
    rows, digest = read_problems(path)
    sums = {str(path): digest}
    if options.limit and options.limit < len(rows):
        rows = Random(f"limit {seed}").sample(rows, options.limit)
    held = 0.0 if test_path else options.test
    train, validation, test = (
        [rows[i] for i in part]
        for part in split_rows(len(rows), held, options.validation, seed, str(path))
    )
    if test_path:
        test, sums[str(test_path)] = read_problems(test_path)
        test = test[: options.limit] if options.limit else test
    parts = (train, validation, test)
    return Splits(*parts, provenance(
        str(path), packaged.licence_of(path), sums, parts, seed, limit=options.limit,
        test="own file" if test_path else "held out",
    ))


def places(options) -> tuple[Path, Path | None]:
    """Return the training file, and the test file if there is one."""
    test_path = Path(options.test_path) if options.test_path else None
    if options.path:
        return Path(options.path), test_path
    return packaged.shared("math/gsm8k_train.jsonl"), test_path or packaged.shared("math/gsm8k_test.jsonl")


def read_problems(path: Path) -> tuple[list[Example], str]:
    """Read a JSONL file of {question, answer}; return the examples and the file's SHA-256."""
    text, digest = read_text(path)
    rows = [
        _problem(line, f"{path} line {number}")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"{path} has no problems: one JSON object per line is expected")
    return rows, digest


def _problem(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): mend or remove the line") from None
    if not isinstance(row, dict) or not all(
        isinstance(row.get(k), str) for k in ("question", "answer")
    ):
        raise DataError(f"{where} needs the keys 'question' and 'answer', both text")
    if _SURROGATE.search(row["question"] + row["answer"]):
        raise DataError(f"{where} holds half of a surrogate pair, which is no character")
    _, mark, final = row["answer"].rpartition(MARK)
    if not mark or not final.strip():
        raise DataError(f"{where}: its answer does not end in '{MARK} ANSWER'")
    return Example(row["question"].strip() + "\n", row["answer"].strip(), final.strip())
