"""Tokens are chosen as transformers chooses them; text comes in whole letters and ends at a stop text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poise.errors import ConfigError, DataError
from poise.models.decoding import (
    Sampling,
    Source,
    _pieces,
    _until,
    generate,
    narrowed,
    next_tokens,
    stream,
    tokens,
)
from poise.models.serving import InMemory, context_of, ends_of
from poise.models.tokenizers import ByteTokenizer
from poise.testing.families import tiny

transformers = pytest.importorskip("transformers")


def small(name="LlamaForCausalLM", **more):
    from poise.models.components import CausalLM

    torch.manual_seed(0)
    return CausalLM(architecture=name, hidden_size=32, layers=1, **more).build().eval()


def says(*rows):
    """A source whose next tokens are given, whatever it is fed."""
    script = torch.tensor(rows)

    def start(prompt):
        made = iter(range(script.shape[1]))

        def step(ids):
            logits = torch.zeros(len(script), 257)
            logits[torch.arange(len(script)), script[:, next(made)]] = 9.0
            return logits

        return prompt, step

    return Source(start, 257, 4096, (256,), ByteTokenizer())


# ------------------------------------------------------------------ the choice of a token


@given(st.integers(0, 999), st.one_of(st.none(), st.integers(1, 20)),
       st.one_of(st.none(), st.floats(0.01, 1.0)))
def test_the_tokens_left_are_those_that_transformers_leaves(seed, top_k, top_p):
    logits = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)).mul(3).round(decimals=1)
    want, rules = logits, transformers.generation.logits_process
    if top_k is not None:
        want = rules.TopKLogitsWarper(top_k)(None, want)
    if top_p is not None and top_p < 1:
        want = rules.TopPLogitsWarper(top_p)(None, want)
    assert torch.equal(narrowed(logits, top_k, top_p), want)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "olmoe", "switch_transformers"])
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_generation_is_that_of_transformers(name, rows):
    model = small(name) if name.endswith("LM") else tiny(name)
    ids = torch.randint(3, 200, (rows, 9), generator=torch.Generator().manual_seed(1))
    got = InMemory(model).generate(ids, 20)
    want = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=ends_of(model)[0])
    assert torch.equal(got, want)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0]])
    sampling = Sampling(4000, do_sample=True, temperature=0.7, top_k=3, seed=0)
    drawn = torch.cat(list(tokens(torch.zeros(1, 1, dtype=torch.long), lambda _: logits, sampling)))
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    want = torch.tensor([[1.0, 0.0, 2.0, -torch.inf]]).div(0.7).softmax(-1)[0]
    assert torch.allclose(share, want, atol=0.03) and share[3] == 0


def test_logits_of_the_steps_are_those_of_the_whole():
    model = small()
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    with InMemory(model) as served:
        made = served.generate(ids, 6)
        assert torch.equal(served.logits(made)[:, 8:-1].argmax(-1), made[:, 9:])
        assert served.stats() == {"tokens": 2 * (9 + 5)}


# ------------------------------------------------------------------ the end


def test_rows_end_with_their_end_token_and_all_of_them_end_the_text():
    source = says([65, 256, 66, 67], [68, 69, 256, 70])
    ids = torch.ones(2, 3, dtype=torch.long)
    assert generate(source, ids, Sampling(4)).tolist() == [[1, 1, 1, 65, 256, 256],
                                                           [1, 1, 1, 68, 69, 256]]
    assert generate(says([65, 256, 66]), "x", Sampling(3)) == "xA"
    assert generate(says([65, 66, 67]), "x", Sampling(2)) == "xAB"


def test_a_stop_text_ends_rows_of_ids_and_is_left_out_of_text():
    ids = torch.ones(2, 1, dtype=torch.long)
    made = generate(says(list(b"abcdef"), list(b"xyabcd")), ids, Sampling(6, stop=["bc"]))
    assert made[0, 1:].tolist() == [*b"abc", 256, 256] and made[1, 1:].tolist() == list(b"xyabc")
    assert generate(says(list(b"abcdef")), "> ", Sampling(6, stop=["zz", "cd"])) == "> ab"
    assert list(stream(says(list(b"abcdef")), "> ", Sampling(6, stop=["cz", "ef"]))) == ["a", "b", "cd"]


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3), st.data())
def test_text_ends_before_the_first_stop_text_however_it_is_cut(text, stop, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    first = min((text.find(s) for s in stop if s in text), default=len(text))
    given_out = list(_until(iter(pieces), stop))
    assert "".join(given_out) == text[:first] and all(given_out)


@given(st.binary(max_size=40), st.text(max_size=5))
def test_pieces_are_the_decoded_tokens_in_whole_letters(raw, before):
    tokenizer, known = ByteTokenizer(), ByteTokenizer().encode(before)
    pieces = list(_pieces(iter(raw), known, tokenizer))
    assert "".join(pieces) == raw.decode(errors="replace")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return
    assert len(pieces) == len(text)  # a letter each, of however many bytes


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("options", "words"), [
    ({"top_k": 5}, "top_k=5 has no effect without do_sample=True"),
    ({"seed": 0}, "seed=0 has no effect without do_sample=True"),
    ({"temperature": 0.5}, "temperature=0.5 has no effect"),
    ({"stop": [""]}, "stop='' ends everything"),
    ({"do_sample": True, "temperature": 0.0}, "must be > 0"),
    ({"do_sample": True, "top_p": 0.0}, "must be > 0 and <= 1"),
    ({"stop": "x"}, "wrong type: allowed is list"),
])
def test_sampling_that_means_nothing_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(3, **options)


def test_what_is_longer_than_the_context_or_has_no_tokenizer_is_refused():
    served = InMemory(small(context=32))
    ids = torch.ones(1, 30, dtype=torch.long)
    with pytest.raises(DataError, match="30 tokens and 3 new ones exceed the context of 32"):
        served.generate(ids, 3)
    assert served.generate(ids, 2).shape == (1, 32)
    with pytest.raises(ConfigError, match="no tokenizer: give token ids"):
        served.generate("text", 1)
    with pytest.raises(ConfigError, match="stop needs a tokenizer"):
        served.generate(ids, 1, stop=["x"])
    with pytest.raises(ConfigError, match="generate has no option 'topk'; did you mean 'top_k'"):
        served.generate(ids, 1, topk=3)


def test_a_decoder_is_fed_where_there_is_one():
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(DataError, match="the model has no decoder of its own"):
        InMemory(small()).logits(ids, ids)
    with pytest.raises(DataError, match="needs decoder_input_ids too"):
        InMemory(tiny("switch_transformers")).logits(ids)


def test_the_context_is_the_configurations_up_to_4096():
    assert context_of(transformers.LlamaConfig(max_position_embeddings=100)) == 100
    assert context_of(transformers.LlamaConfig(max_position_embeddings=10**6)) == 4096
    assert context_of(transformers.T5Config()) == 4096


@pytest.mark.parametrize("temperature", [1e-320, 1e-38, 1e-3])
@pytest.mark.parametrize("shift", [-50.0, 0.0, 50.0])
def test_a_temperature_near_zero_draws_the_likeliest(temperature, shift):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) + shift
    how = Sampling(1, do_sample=True, temperature=temperature, seed=1)
    assert torch.equal(next_tokens(logits, how, torch.Generator().manual_seed(1)), logits.argmax(-1))
