"""Serves a store: hot weights in memory, experts read when a router asks for them, never beyond a limit."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.errors import ConfigError, DataError, RunError
from poise.models.decoding import Source, Step, check_decoder, check_prompt, generate, sampling, stream
from poise.models.serving import ends_of, steps
from poise.models.tokenizers import load_tokenizer
from poise.quantizers import PackedLinear
from poise.quantizers.names import KERNELS
from poise_edgemoe.ahead import Ahead
from poise_edgemoe.beside import renew
from poise_edgemoe.body import fuse
from poise_edgemoe.budget import Budget, percent, plan_memory, resident_bytes, share_kept, status_bytes
from poise_edgemoe.cache import DEFAULT_POLICY, Policy, policy_for
from poise_edgemoe.cache.allowance import check_share
from poise_edgemoe.cache.planes import PlanedCache
from poise_edgemoe.cache.slots import ExpertCache
from poise_edgemoe.cache.traces import RoutingTrace
from poise_edgemoe.experts import put_experts
from poise_edgemoe.kernels import bound_kernels
from poise_edgemoe.loading import give_back, load_hot, prepare
from poise_edgemoe.prefetch import (
    Learned,
    Oracle,
    Predictor,
    check_prefetch,
    entrances,
    predicted_policy,
    routers_hash,
    source_of,
    trace_for,
)
from poise_edgemoe.statistics import Statistics
from poise_edgemoe.store.index import read_index
from poise_edgemoe.store.reader import Reader

SLOW = "experts are made in full before they are multiplied, which is several times slower"
UNBOUNDED = ("products in half precision were made before an engine was opened, and oneDNN keeps kernels "
             "without bounds since: prompts may take more memory than the limit (open the engine first)")


class Engine:
    """A mixture-of-experts language model on disk, behind the contract `Served`.

    Open one with `Engine.open`, and close it, or use `with`. Calls from several threads take turns. A
    process that was forked from one with an engine cannot use it. One generation runs at a time: a new one
    ends the stream before it.

    Attributes
    ----------
    progress : callable or None
        Set it to be told how far a prompt is: called with parts that are done, and all.
    cache_type : type
        What holds experts: a baseline has another.
    """

    cache_type: ClassVar[type[ExpertCache]] = ExpertCache

    def __init__(
        self, folder: Path, budget: Budget, policy: str | Policy, *, kernel: str = "auto",
        direct: bool = True, prefetch: str | Predictor = "none", trace: RoutingTrace | None = None,
        base_share: float = 0.0,
    ) -> None:
        self.index = prepare(folder)
        self.folder, self.budget = folder, budget
        self._base = resident_bytes() - status_bytes("RssFile")
        self.model: Any = load_hot(folder, self.index)
        config = self.model.config
        self.source = Source(self._start, config.vocab_size, budget.context, ends_of(self.model),
                             _tokenizer(folder))
        rule = policy_for(self.index, policy)
        self.reader = Reader(folder, direct=direct)
        try:
            share = check_share(base_share, self.index.planes)
            make = partial(PlanedCache, share=share) if self.index.planes > 1 else self.cache_type
            self.cache = make(self.index, self.reader, budget.experts, rule, kernel)
            self.experts = put_experts(self.model, self.cache)
            _choose_kernel(self.model, kernel)
            if self.cache.forms.fast:  # what is stored as it is, is computed as transformers does it
                fuse(self.model)
                renew(self.model)
            found = entrances(self.model, self.index)
            self.routers = routers_hash(self.model, self.index)
            self._check_prefetch(prefetch)
            source = source_of(prefetch, trace, found, self.index.family)
        except BaseException:
            self.reader.close()
            raise
        shown = None if isinstance(source, Oracle) else found  # which looks at nothing
        self.ahead = None if source is None else Ahead(self.cache, source, shown)
        self.statistics = Statistics(self.cache)
        # thread and file of an engine that nobody closes end with it
        self._end = weakref.finalize(self, _close, self.reader, os.getpid())
        self._kept: Any = None
        self.progress: Callable[[int, int], None] | None = None
        self._done = self._parts = 0
        self._telling = False
        for module in self.experts:
            module.done = self._layer_done
        self._lock, self._pid, self._run, self._closed = threading.RLock(), os.getpid(), 0, False

    @classmethod
    def open(
        cls, path: Path | str, memory: str | int | None = None, total: str | int | None = None,
        context: int | None = None, batch: int = 1, policy: str | Policy = DEFAULT_POLICY,
        kernel: str = "auto", direct: bool = True, prefetch: str | Predictor = "none",
        trace: RoutingTrace | Path | str | None = None, base_share: float = 0.0,
    ) -> Engine:
        """Open a store.

        Parameters
        ----------
        path : path
            As `convert` made it.
        memory : str or int, optional
            Most bytes that the engine itself holds ("900MB", MB = 10^6): hot weights, key-value cache,
            workspace and experts. None: as much as all experts take.
        total : str or int, optional
            Most bytes of the whole process, in place of `memory`.
        context : int, optional
            Most tokens of prompt and continuation; the smaller of the configuration's and 4,096.
        batch : int
            Most rows at a time.
        policy : str or Policy
            Which experts leave: a name of `poise_edgemoe.cache.POLICIES`, "predicted", which asks the
            predictor that is given as `prefetch`, or one that was made, for options
            (`policy_for(read_index(path), "static", frequencies=...)`, `predictor.policy()`).
        kernel : "auto", "reference", "c", "torch" or "ggml"
            What multiplies packed matrices: "reference" makes them in full first, and is exact; "auto"
            reads them as they are, where that can be done (`poise.quantizers.sliced`), and warns otherwise.
            Where experts are multiplied so, norms and attention of a token are ours too (`fused`).
        direct : bool
            Whether to read past the page cache where the file system allows it.
        prefetch : "none", "lookahead", "oracle" or Predictor
            Who says what the next layer will use, to be read ahead while a token is computed: nobody, that
            layer's router, recorded routing, what `poise_edgemoe.predictors` fitted, of which the engine
            takes a copy, or an object of one's own (`prefetch.Predictor`).
        trace : path or RoutingTrace, optional
            What the oracle knows, of this store's layers and experts.
        base_share : float
            Of a store with planes, the share of an answer's expert uses that may be served from bases while
            the rest is read: from 0, where answers are those of the ordinary store, to 1
            (`cache.allowance`). Only experts that are missing when a token is decoded are; the use after
            that has all of it. With `prefetch="none"` no delay changes an answer: an engine that has had
            the same calls gives the same.

        Raises
        ------
        ConfigError
            For an option that is not allowed; a limit that is too small, with the smallest that is not; a
            policy other than the default where all experts stay in memory; the oracle without a trace, a
            trace without the oracle.
        DataError
            For a trace of another model. A predictor of another one is a ConfigError.
        FileError
            For a store that is torn, altered, or of a newer version.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ConfigError(f"{path!r} is no store: give the folder that convert has made")
        if kernel not in KERNELS:
            raise ConfigError(f"kernel={kernel!r} is not allowed: it must be one of {', '.join(KERNELS)}")
        check_prefetch(prefetch, trace)
        index = read_index(path)
        known = None if trace is None else trace_for(index, trace)  # before what is held is counted
        learned = prefetch.nbytes if isinstance(prefetch, Learned) else 0
        budget = plan_memory(path, memory=memory, total=total, context=context, batch=batch,
                             learned=learned, base_share=base_share)
        rule = policy_for(index, policy if policy != "predicted" else predicted_policy(index, prefetch))
        if policy != DEFAULT_POLICY and share_kept(index, budget) == 1:
            raise ConfigError(f"policy={rule.name} has no effect, as all experts stay in memory: leave it "
                              "out, or give a lower limit")
        engine = cls(Path(path), budget, rule, kernel=kernel, direct=direct, prefetch=prefetch, trace=known,
                     base_share=base_share)
        if engine.cache.forms.slow:
            warnings.warn(f"{SLOW}: {engine.cache.forms.slow}", stacklevel=2)
        if not (memory is total is None or bound_kernels(getattr(torch, index.dtype))):
            warnings.warn(UNBOUNDED, stacklevel=2)
        return engine

    @property
    def base(self) -> int:
        """What the process holds besides, in bytes: what it held at the start, and the code of libraries.

        Code is read in when it first runs; nothing of an engine is mapped from files.
        """
        return self._base + status_bytes("RssFile")

    # ------------------------------------------------------------ the contract

    @torch.no_grad()
    def logits(self, input_ids: Tensor, decoder_input_ids: Tensor | None = None) -> Tensor:
        """Return logits (batch, time, vocab), which are the caller's."""
        with self._turn():
            ids = self._checked(input_ids)
            more = check_decoder(self.source, decoder_input_ids, self.model.config.is_encoder_decoder)
            whole = more or ids.shape[1] <= self.budget.chunk
            self._begin(ids.shape[1], ids.shape[1] if whole else self.budget.piece(len(ids)))
            if whole:
                return self._forward(self.model, input_ids=ids, use_cache=False, **more).logits
            return self._logits_in_chunks(ids)

    def generate(self, prompt: Tensor | str, max_new_tokens: int, **options: Any) -> Tensor | str:
        """Return the prompt and its continuation: ids (batch, time + new) for ids, text for text."""
        with self._turn():
            return generate(self.source, prompt, sampling(max_new_tokens, options))

    def stream(self, prompt: Tensor | str, max_new_tokens: int, **options: Any) -> Iterator[Any]:
        """Yield the continuation as it is made: tokens (batch,) for ids, pieces of text for text."""
        with self._turn():
            return stream(self.source, prompt, sampling(max_new_tokens, options))

    def stats(self) -> dict[str, Any]:
        """Return what was measured since the engine was opened, as plain JSON values."""
        with self._turn():
            off, idle = self.ahead.restraint.left() if self.ahead else ([], [])
            return {**self.statistics.summary(off, idle), "memory": self.budget.terms()}

    def opening(self) -> str:
        """Return in one line what the limit is spent on."""
        b, kept = self.budget, share_kept(self.index, self.budget)
        which = "all" if kept == 1 else percent(kept)
        return (f"poise: {b.total / 1e6:.1f} MB: hot weights {b.hot / 1e6:.1f}, keys and values "
                f"{b.kv / 1e6:.1f}, workspace {b.workspace / 1e6:.1f}, index {b.index / 1e6:.1f}, experts "
                f"{b.experts / 1e6:.1f} ({which} kept); the process holds {self.base / 1e6:.0f} MB besides")

    def summary(self) -> str:
        """Return in one line what was measured."""
        s = self.stats()
        base = f"; {self.cache.allowance.words()}" if isinstance(self.cache, PlanedCache) else ""
        return (f"poise: {s['tokens']} tokens in {s['seconds']:.1f} s, {100 * s['hit_rate']:.1f} % of "
                f"experts were in memory, {s['bytes_read'] / 1e6:.1f} MB read, {s['stall_seconds']:.1f} s "
                f"waited for{base}")

    def close(self) -> None:
        """Give back memory, thread and file. A second time: nothing."""
        if self._pid != os.getpid():
            return  # of a fork: thread and file are the parent's
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._end()
            self.cache.close()
            self._forget()
            self.model = self._kept = self.ahead = None
            give_back()

    def __enter__(self) -> Engine:
        with self._turn():
            return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------ within

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the engine during a call, if it may be used then: it may be closed while one waits."""
        if self._pid != os.getpid():
            raise RunError("the engine belongs to the process that opened it: open another after a fork")
        with self._lock:
            if self._closed:
                raise RunError("the engine is closed: open it again")
            if self._telling:
                raise RunError("progress is told within a call of the engine: it cannot make another one")
            yield

    def _check_prefetch(self, prefetch: str | Predictor) -> None:
        """Refuse a predictor of another model."""
        if isinstance(prefetch, Learned):
            layers = self.index.layers
            prefetch.check(len(layers), max(len(layer.experts) for layer in layers), self.routers)

    def _checked(self, ids: Tensor) -> Tensor:
        ids = check_prompt(self.source, ids)
        if len(ids) > self.budget.batch:
            raise DataError(f"{len(ids)} rows at a time, and the engine was opened for "
                            f"batch={self.budget.batch}")
        return ids

    def _begin(self, length: int, chunk: int) -> int:
        """Begin a prompt of that many tokens; what ran before has ended. Return its number."""
        self._run += 1
        if isinstance(self.cache, PlanedCache):
            self.cache.allowance.begin()
        renew(self.model)
        self._done, self._parts = 0, len(self.index.layers) * -(-length // chunk)
        self._tell()
        return self._run

    def _keys(self) -> Any:
        """Return an empty cache of keys and values; None: the model makes its own.

        There is room for one: a stream that has ended may still be held by somebody, with its own.
        """
        from poise_edgemoe.kv import kept_cache

        self._forget()
        config = self.model.config
        self._kept = None if config.is_encoder_decoder else kept_cache(config, self.budget.context)
        return self._kept

    def _forget(self) -> None:
        if self._kept is not None:
            self._kept.reset()

    def _layer_done(self) -> None:
        if self._done < self._parts:
            self._done += 1
            self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            self._telling = True
            try:
                self.progress(self._done, self._parts)
            finally:
                self._telling = False

    def _forward(self, module: Any, more: int = 0, /, **inputs: Any) -> Any:
        """Call a module; experts lend room to its tokens, and some bytes more."""
        ids = next(iter(inputs.values()))
        self.cache.length = ids.shape[1]
        try:
            with self.cache.lent(self.budget.lent(ids.numel()) + more), self.statistics.step(ids.numel()):
                return module(**inputs)
        finally:
            self.cache.next_token()
            if self.ahead is not None:
                self.ahead.token_done(self.statistics.steps[-1])
            if ids.shape[1] > 1:  # a token leaves nothing behind that the next one does not use
                give_back()

    def _logits_in_chunks(self, ids: Tensor) -> Tensor:
        """Return logits of a prompt that is longer than what is computed at a time; equal to rounding."""
        kept, found, at = self._keys(), None, 0
        for part in ids.split(self.budget.piece(len(ids)), 1):
            room = part.numel() * self.budget.logits_bytes
            inputs = {"input_ids": part, "use_cache": True, "past_key_values": kept}
            out = self._forward(self.model, room, **inputs).logits
            if found is None:
                found = out.new_empty(*ids.shape, out.shape[-1])
            found[:, at: at + part.shape[1]] = out
            at += part.shape[1]
        assert found is not None
        return found

    def _start(self, prompt: Tensor) -> tuple[Tensor, Step]:
        """Return the tokens that a generation begins with, and its step."""
        self._checked(prompt)
        run = self._begin(prompt.shape[1], self.budget.chunk)
        first, step = steps(self.model, prompt, self._forward, self.budget.chunk, self._keys())

        def mine(ids: Tensor) -> Tensor:
            with self._turn():
                if run != self._run:
                    raise RunError("another call has begun since: the stream before it has ended")
                return step(ids)

        return first, mine


def _close(reader: Reader, pid: int) -> None:
    if pid == os.getpid():
        reader.close()


def _choose_kernel(model: Any, kernel: str) -> None:
    """Let packed hot weights be multiplied as they are, unless all is to be exact."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.packed.kernel = "reference" if kernel == "reference" else "auto"


def _tokenizer(folder: Path) -> Any:
    try:
        return load_tokenizer(folder)
    except ConfigError:
        return None
