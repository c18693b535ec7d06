"""Chunks of prompts, and their states against a plain computation with transformers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextModel, CLIPTokenizer

from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from runtime import Pipeline
from runtime.conditioning.encoder import Texts
from runtime.conditioning.guidance import Guidance
from runtime.conditioning.tokenizer import Tokenizer, emphasize, make_chunks
from tests.support.tolerances import PARITY_RTOL

TOKENIZER = Tokenizer.clip("!")
TAUGHT = TOKENIZER.with_words({"<many>": range(49408, 49418), "<all>": range(49500, 49600)})
START, END, PAD, COMMA = 49406, 49407, 0, 267
A, CAT = (TOKENIZER.words_of(word)[0][0] for word in ("a", "cat"))


def rows(text, tokenizer=TOKENIZER):
    """Return the ids of each chunk without start, end and padding."""
    found = []
    for chunk in make_chunks(text, tokenizer):
        ids = chunk.input_ids.tolist()
        end = ids.index(END)
        assert ids[0] == START
        assert ids[end + 1 :] == [PAD] * (76 - end)
        assert len(ids) == len(chunk.weights) == 77
        assert chunk.input_ids.dtype == np.int64
        assert chunk.weights.dtype == np.float32
        assert chunk.weights[0] == 1
        assert (chunk.weights[end:] == 1).all()
        found.append(ids[1:end])
    return found


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("", [0]),
        ("a " * 75, [75]),
        ("a " * 76, [75, 1]),
        ("a " * 200, [75, 75, 50]),
        ("a BREAK cat", [1, 1]),
        ("a BREAK", [1]),
        ("BREAK", [0]),
        ("BREAK a", [0, 1]),
        ("a BREAK BREAK a", [1, 0, 1]),
        ("a " * 75 + "BREAK a", [75, 1]),
        # A full chunk ends after a comma that is one of its last 20 tokens, and not after another.
        ("a " * 55 + ", " + "a " * 20, [56, 20]),
        ("a " * 54 + ", " + "a " * 21, [75, 1]),
        ("a " * 55 + ", " + "a " * 19, [75]),
        ("a " * 55 + ", " + "a " * 19 + ",", [75, 1]),
        ("a " * 74 + ", a", [75, 1]),
        ("a " * 55 + ", " + "a " * 10 + ", " + "a " * 10, [67, 10]),
        ("a " * 60 + ", " + "a " * 90, [61, 75, 15]),
    ],
)
def test_where_chunks_end(text, lengths):
    found = rows(text)
    assert [len(row) for row in found] == lengths
    flat = [index for ids in TOKENIZER.words_of(text.replace("BREAK", " ")) for index in ids]
    assert [index for row in found for index in row] == flat


def test_a_prompt_beyond_reason():
    assert len(rows("a " * 75 * 64)) == 64
    with pytest.raises(RequestError, match="has 65 chunks of 75 tokens; up to 64 fit"):
        make_chunks("BREAK " * 64 + "a", TOKENIZER)


def test_weights_stand_beside_their_tokens():
    (chunk,) = make_chunks("a (cat:1.5) [a]", TOKENIZER)
    assert chunk.input_ids[:5].tolist() == [START, A, CAT, A, END]
    expected = np.ones(77)
    expected[2:4] = 1.5, 1 / 1.1
    np.testing.assert_allclose(chunk.weights, expected, rtol=1e-6)
    first, second = make_chunks("(" + "a " * 76 + ":0.5)", TOKENIZER)
    assert first.weights.tolist() == [1, *[0.5] * 75, 1]
    assert second.weights.tolist() == [1, 0.5, *[1] * 75]


def test_words_of_textual_inversion_stay_whole():
    many, every = list(range(49408, 49418)), list(range(49500, 49600))
    assert rows("a " * 65 + "<many>", TAUGHT) == [[A] * 65 + many]
    assert rows("a " * 66 + "<many> cat", TAUGHT) == [[A] * 66, [*many, CAT]]
    assert rows("a " * 60 + ", " + "a " * 14 + "<many>", TAUGHT)[1] == [A] * 14 + many
    assert rows("a <all> cat", TAUGHT) == [[A], every[:75], [*every[75:], CAT]], "longer than a row"
    moved = "a " * 58 + ", " + "a " * 16
    wide = TOKENIZER.with_words({"<wide>": range(49408, 49468)})
    assert [len(row) for row in rows(moved + "<wide>", wide)] == [59, 16, 60]


@settings(deadline=None)
@given(st.text(), st.integers(1, 100))
def test_any_text_has_chunks(text, times):
    if any(0xD800 <= ord(c) < 0xE000 for c in text):
        with pytest.raises(RequestError):
            make_chunks(text, TOKENIZER)
    else:
        assert all(len(row) <= 75 for row in rows((text.replace("<|", "") * times)[:900]))


def test_weights_of_one_change_no_bit():
    states = np.random.default_rng(0).standard_normal((77, 8), np.float32)
    assert emphasize(states, np.ones(77, np.float32)) is states


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1e4, -1e4], [-1.0, 1.0], [2.0, 2.0]])
def test_extreme_weights_give_numbers(weights):
    states = np.array([[1.0, 2.0], [1.0, 2.0]], np.float32)
    given = emphasize(states, np.array(weights, np.float32))
    assert np.isfinite(given).all()
    assert given.dtype == np.float32
    if weights == [2.0, 2.0]:
        np.testing.assert_allclose(given, states)


# Against transformers

CASES = {
    "plain": "a red apple, fluent style",
    "weights": "a (red:1.4) apple, ((fluent)) [style]",
    "negative weight": "a red (apple:-0.5)",
    "long": "red apple " * 20,
    "long with weights": "(red apple:1.2) " * 20 + "[[blue]]",
}


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load("pictogram", settings=BackendSettings(threads=1))


@pytest.fixture(scope="module")
def reference(pipeline):
    model = CLIPTextModel.from_pretrained(pipeline.model_path / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(pipeline.model_path / "tokenizer")
    return model.to(torch.float32).eval(), tokenizer


# What the cases say, written by hand: words and their weights.
WORDS = {
    "plain": [("a red apple, fluent style", 1.0)],
    "weights": [
        ("a", 1.0),
        ("red", 1.4),
        ("apple,", 1.0),
        ("fluent", 1.21),
        ("style", 1 / 1.1),
    ],
    "negative weight": [("a red", 1.0), ("apple", -0.5)],
    "long": [("red apple", 1.0)] * 20,
    "long with weights": [*[("red apple", 1.2)] * 20, ("blue", 1 / 1.21)],
}


def encode(reference, words, chunks, clip_skip=1):
    """Encode rows one by one, multiply, restore the mean, and put them after each other."""
    model, tokenizer = reference
    tokens = [
        (index, weight)
        for text, weight in words
        for index in tokenizer(text, add_special_tokens=False).input_ids
    ]
    size, states = tokenizer.model_max_length, []
    for i in range(chunks):
        part = tokens[i * (size - 2) : (i + 1) * (size - 2)]
        padding = size - 1 - len(part)
        ids = [tokenizer.bos_token_id, *[index for index, _ in part]]
        ids += [tokenizer.eos_token_id] * padding
        weights = torch.tensor([1.0, *[weight for _, weight in part], *[1.0] * padding])
        with torch.no_grad():
            given = model(torch.tensor([ids]), output_hidden_states=True)
            hidden = given.last_hidden_state
            if clip_skip > 1:
                inner = getattr(model, "text_model", model)
                hidden = inner.final_layer_norm(given.hidden_states[-clip_skip])
        weighted = hidden * weights[None, :, None]
        # in float64: the means are near zero, where float32's sums of thousands are rough
        states.append(weighted * (hidden.double().mean() / weighted.double().mean()).float())
    return torch.cat(states, dim=1)[0].numpy()


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= PARITY_RTOL * np.linalg.norm(expected)


@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_states_are_those_of_transformers(pipeline, reference, case, clip_skip):
    texts = Texts(negatives=[["blurry"]], prompts=[[CASES[case]]])
    guidance = Guidance.over(2.0, 1)
    (given,) = pipeline.encoder.condition(texts, guidance, 128, 128, clip_skip=clip_skip)
    told = given["context"]
    chunks = 2 if "long" in case else 1
    for group, words in ((0, [("blurry", 1.0)]), (1, WORDS[case])):
        assert_close(told[group, 0], encode(reference, words, chunks, clip_skip))


def test_text_without_syntax_is_what_the_encoder_gives(pipeline):
    encoder = pipeline.encoder
    texts = Texts(negatives=[[""]], prompts=[[CASES["plain"]]])
    (told,) = encoder.condition(texts, Guidance.over(2.0, 1), 128, 128)
    input_ids = encoder.tokenizers["text_encoder"](["", CASES["plain"]]).input_ids
    none = np.zeros((1, pipeline.model.text_encoders["text_encoder"].hidden_size), np.float32)
    plain = pipeline.engine("text_encoder").run({"input_ids": input_ids, "extra_embeddings": none})
    np.testing.assert_array_equal(told["context"][:, 0], plain["last_hidden_state"])
