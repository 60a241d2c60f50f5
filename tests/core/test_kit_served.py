"""The kit of served models: what is right passes, and each planted fault is named."""

from __future__ import annotations

import threading

import pytest
import torch

from poise.models.serving import InMemory
from poise.models.tokenizers import ByteTokenizer
from poise.testing import ContractError, check_served
from poise.testing.families import tiny

pytest.importorskip("transformers")


def served(cls=InMemory, name="mixtral"):
    return cls(tiny(name), ByteTokenizer())


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_a_model_in_memory_keeps_the_contract(name):
    made = check_served(lambda: served(name=name), served(name=name))
    assert made == ["logits", "greedy", "sampled", "streams", "text", "refuses", "stats", "closes"]


class Off(InMemory):
    def logits(self, input_ids, decoder_input_ids=None):
        return super().logits(input_ids, decoder_input_ids) + 1e-6


class Wrong(InMemory):
    def logits(self, input_ids, decoder_input_ids=None):
        return 1.01 * super().logits(input_ids, decoder_input_ids)


class Reused(InMemory):
    """Gives out its own buffer."""

    def logits(self, input_ids, decoder_input_ids=None):
        new = super().logits(input_ids, decoder_input_ids)
        kept = self.__dict__.setdefault("kept", new)
        return kept.copy_(new) if kept.shape == new.shape else new


class Drifts(InMemory):
    def generate(self, prompt, max_new_tokens, **sampling):
        made = super().generate(prompt, max_new_tokens, **sampling)
        if isinstance(made, torch.Tensor) and made.shape[1] > 9:
            made[:, 9] = (made[:, 9] + 1) % 200
        return made


class Forgets(InMemory):
    """Leaves the seed out."""

    def generate(self, prompt, max_new_tokens, **sampling):
        return super().generate(prompt, max_new_tokens, **{**sampling, "seed": None} if "seed" in sampling
                                else sampling)


class Hoards(InMemory):
    """Draws with the global generator."""

    def generate(self, prompt, max_new_tokens, seed=None, **sampling):
        if seed is not None:
            torch.manual_seed(seed)
        return super().generate(prompt, max_new_tokens, **sampling)


class Skips(InMemory):
    def stream(self, prompt, max_new_tokens, **sampling):
        for n, one in enumerate(super().stream(prompt, max_new_tokens, **sampling)):
            if n != 2:
                yield one


class Stays(InMemory):
    def close(self):
        pass


class Leaks(InMemory):
    def __init__(self, *given):
        super().__init__(*given)
        self.file = open("/dev/null")  # noqa: SIM115 - left open on purpose
        LEFT.append(self.file)


class Threads(InMemory):
    def __init__(self, *given):
        super().__init__(*given)
        LEFT.append(done := threading.Event())
        threading.Thread(target=done.wait, daemon=True).start()


class Takes(InMemory):
    """Takes any prompt."""

    def generate(self, prompt, max_new_tokens, **sampling):
        if isinstance(prompt, torch.Tensor) and not prompt.numel():
            return prompt
        return super().generate(prompt, max_new_tokens, **sampling)


class Keeps(InMemory):
    """An exception within `with` does not close it."""

    def __exit__(self, *error):
        if error[0] is None:
            self.close()


class Tells(InMemory):
    def stats(self):
        return {"tokens": torch.ones(1)}


LEFT: list = []
FAULTS = [
    (Off, "logits are not those of the model in memory, bit for bit"),
    (Reused, "a later call writes into logits that were given out"),
    (Drifts, "greedy tokens are not those of the model in memory"),
    (Forgets, "the same seed draws other tokens"),
    (Hoards, "a seeded draw moves torch's own generator"),
    (Skips, "streamed tokens are not the generated ones"),
    (Takes, "an empty prompt is accepted"),
    (Tells, "holds what JSON cannot"),
    (Stays, r"is accepted after close\(\)"),
    (Leaks, r"threads or files are left after close\(\)"),
    (Threads, r"threads or files are left after close\(\)"),
    (Keeps, "an exception within `with` leaves it open"),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS, ids=[f.__name__ for f, _ in FAULTS])
def test_a_planted_fault_is_named(fault, words):
    try:
        with pytest.raises(ContractError, match=words):
            check_served(lambda: served(fault), served())
    finally:
        for one in LEFT:
            (one.close if hasattr(one, "close") else one.set)()
        LEFT.clear()


def test_what_need_not_be_exact_may_be_near_and_no_more():
    check_served(lambda: served(Off), served(), exact=False)
    with pytest.raises(ContractError, match="are not those of the model in memory: off by"):
        check_served(lambda: served(Wrong), served(), exact=False)
