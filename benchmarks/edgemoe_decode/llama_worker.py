"""llama.cpp on a GGUF file, in a Python of its own that has llama-cpp-python: one JSON line.

Asked for `logits`, it returns those of the last token and measures nothing.
"""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
from measuring import decode, given, held, limit, say


class Llama:
    """A model and a context of llama.cpp, through its C interface."""

    def __init__(self, path: str, context: int, threads: int, repack: bool) -> None:
        llama_cpp.llama_log_set(QUIET, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_mmap, params.use_extra_bufts = True, repack
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot read {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, 512, 512
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context of {context} tokens")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def feed(self, *tokens: int) -> None:
        """Compute logits after some tokens, and wait for them."""
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        code = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(ids, len(tokens)))
        if code:
            raise SystemExit(f"llama.cpp: code {code} for {len(tokens)} tokens")
        self.logits()

    def logits(self) -> np.ndarray:
        """Return those of the last token, (vocab,)."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), shape=(self.vocab,))


@llama_cpp.llama_log_callback
def QUIET(*_: Any) -> None:  # noqa: N802
    """Say nothing: standard output is for the row."""


def main(asked: dict[str, Any]) -> None:
    base = held(asked["group"]) if asked["group"] else 0
    if asked["limit"]:
        limit(asked["group"], base + asked["limit"])
    prompt, tokens = asked["prompt"], asked["tokens"]
    context = -(-(len(prompt) + len(tokens)) // 256) * 256  # what llama.cpp rounds to
    model = Llama(asked["path"], context, asked["threads"], asked["repack"])
    if asked.get("logits"):
        model.feed(*prompt)
        say({"logits": model.logits().tolist()})
        return
    row = decode(lambda: model.feed(*prompt), model.feed, tokens)
    system = llama_cpp.llama_print_system_info()
    say({**row, "base_mb": base / 1e6, "version": llama_cpp.__version__, "system": system.decode()})


if __name__ == "__main__":
    main(given())
