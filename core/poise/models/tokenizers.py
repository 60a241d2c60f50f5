"""Two tokenizers: bytes, and whatever a `tokenizer.json` describes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from poise.errors import ConfigError, require
from poise.files import MOST_JSON, read_json, read_regular, write_json, write_text

# written beside a model whose tokens are bytes
MARKER = "poise_tokenizer.json"


class ByteTokenizer:
    """The 256 bytes of UTF-8, and one token that ends a text."""

    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; what is no byte is left out, broken UTF-8 becomes U+FFFD."""
        return bytes(i for i in map(int, ids) if 0 <= i < self.eos_id).decode(errors="replace")

    def save(self, directory: Path) -> None:
        """Leave a mark that `load_tokenizer` reads."""
        write_json(directory / MARKER, {"kind": "bytes"})


class FastTokenizer:
    """A `tokenizers.Tokenizer` with a token that ends a text.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
    eos_id : int
    """

    def __init__(self, backend: Any, eos_id: int) -> None:
        self.backend, self.eos_id = backend, eos_id
        self.vocab_size = backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without adding special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
        write_text(directory / "tokenizer.json", self.backend.to_str())
        write_json(directory / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.backend.id_to_token(self.eos_id),
        })


def load_tokenizer(directory: Path | str) -> ByteTokenizer | FastTokenizer:
    """Return the tokenizer of a local model directory.

    Raises
    ------
    ConfigError
        When there is none, or nothing says which token ends a text.
    FileError
        For a file that is no regular one, larger than `MOST_JSON`, or not JSON.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"model.path={directory}: there is no such directory")
    if (directory / MARKER).exists():
        return ByteTokenizer()
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{directory} has no tokenizer.json: save the tokenizer beside the model")
    backend = _backend(path)
    eos = _end_of_text(directory, backend)
    if eos is None:
        raise ConfigError(f"{directory} does not say which token ends a text: set eos_token_id in "
                          f"its config.json")
    return FastTokenizer(backend, eos)


def _backend(path: Path) -> Any:
    tokenizers, raw = require("tokenizers", "bone"), read_regular(path, MOST_JSON)
    try:
        return tokenizers.Tokenizer.from_str(raw.decode())
    except BaseException as error:  # the Rust side raises bare Exception, or its panic, which is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path} is not a tokenizer of `tokenizers`: {reason}") from None


def _end_of_text(directory: Path, backend: Any) -> int | None:
    """Look in tokenizer_config.json, then generation_config.json, then config.json."""
    token = _json(directory / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str) and backend.token_to_id(token) is not None:
        return backend.token_to_id(token)
    for name in ("generation_config.json", "config.json"):
        eos = _json(directory / name).get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if type(eos) is int and eos >= 0:
            return eos
    return None


def _json(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
