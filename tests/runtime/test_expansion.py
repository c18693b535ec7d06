import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from engine.backends.settings import BackendSettings
from engine.checkpoints.gpt2 import LanguageModel
from engine.errors import GraphError, ModelError, RequestError
from runtime.conditioning.syntax import parse
from runtime.expansion import PromptExpander, Sampling
from tests.support.language_models import (
    END_OF_TEXT,
    SMALL,
    TEXTS,
    change_config,
    small_gpt2,
    small_tokenizer,
    write_folder,
    write_graph,
)
from tests.support.tolerances import TOKEN_PROBABILITY

ROOT = Path(__file__).parents[2]
PROMPT = "a red apple"
SETTINGS = BackendSettings(threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("gpt2"), small_gpt2())


@pytest.fixture(scope="module")
def graphs(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("graphs")
    write_graph(LanguageModel.open(folder).config, out)
    return out


@pytest.fixture(scope="module")
def expander(folder, graphs):
    return PromptExpander.load(folder, graphs=graphs, settings=SETTINGS)


@pytest.fixture(scope="module")
def reference(folder):
    return GPT2LMHeadModel.from_pretrained(folder).eval()


class Scripted:
    """An engine whose logits spell one text, token by token, whatever it is given."""

    def __init__(self, tokenizer, text, then=()):
        self.ids = [*tokenizer.encode(text).ids, *then]
        self.given = []

    def run(self, inputs):
        past, ids = inputs["past"], inputs["input_ids"]
        self.given.append(ids[0].tolist())
        logits = np.zeros((1, SMALL["vocab_size"]), np.float32)
        logits[0, self.ids[len(self.given) - 1]] = 50
        present = np.zeros((*past.shape[:4], past.shape[4] + ids.shape[1], 8), np.float32)
        return {"logits": logits, "present": present}


def scripted(expander, text, then=()):
    engine = Scripted(expander.tokenizer, text, then)
    return PromptExpander(model=expander.model, tokenizer=expander.tokenizer, engine=engine)


def greedy(expander, ids, count, **options):
    sampling = Sampling(temperature=0, **options)
    tokens = expander.tokens(ids, lambda *now: sampling.token(*now, 0.5))
    return [token for _, token in zip(range(count), tokens, strict=False)]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("text", TEXTS)
def test_greedy_output_is_that_of_transformers_token_for_token(expander, reference, text, penalty):
    ids = expander.tokenizer.encode(text).ids[:20]
    expected = reference.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        repetition_penalty=penalty,
    )[0, len(ids) :]
    given = greedy(expander, ids, 40, repetition_penalty=penalty)
    assert given == expected.tolist()
    assert len(set(given)) > 10, "it does not stammer"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("penalty", [1.0, 1.4, 0.7])
def test_one_step_has_the_distribution_of_transformers(reference, temperature, top_k, penalty):
    ids = torch.randint(SMALL["vocab_size"], (1, 12))
    with torch.no_grad():
        logits = reference(ids).logits[:, -1]
    scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    scores = TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    expected = scores.softmax(-1)[0].numpy()
    sampling = Sampling(temperature=temperature, top_k=top_k, repetition_penalty=penalty)
    given = sampling.probabilities(logits[0].numpy(), ids[0].tolist())
    assert np.array_equal(given > 0, expected > 0)
    assert np.count_nonzero(given) == (top_k if 0 < top_k < 300 else 300)
    assert np.abs(given - expected).max() < TOKEN_PROBABILITY


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = np.random.default_rng(0).standard_normal(20).astype(np.float32)
    sampling = Sampling(top_k=6, temperature=0.7)
    likely = sampling.probabilities(logits, [1])
    count = 2000
    drawn = [sampling.token(logits, [1], (i + 0.5) / count) for i in range(count)]
    assert np.abs(np.bincount(drawn, minlength=20) / count - likely).max() < 1 / count
    assert sampling.token(logits, [1], 0.0) == np.flatnonzero(likely)[0]
    assert sampling.token(logits, [1], 1 - 2**-53) == np.flatnonzero(likely)[-1]


def test_a_temperature_of_nearly_nothing_is_greedy():
    logits = np.array([1, 3, 2], np.float32)
    assert Sampling(temperature=1e-310).probabilities(logits, [0]).tolist() == [0, 1, 0]


def test_the_same_seed_gives_the_same_text(expander):
    first = expander(PROMPT, seed=3, max_new_tokens=20)
    assert first == expander(PROMPT, seed=3, max_new_tokens=20)
    assert len({expander(PROMPT, seed=seed, max_new_tokens=20) for seed in range(5)}) > 1
    assert first.startswith(PROMPT)
    assert len({expander(PROMPT, max_new_tokens=20) for _ in range(5)}) > 1, "drawn seeds"


def test_a_top_k_of_one_is_greedy(expander):
    assert expander(PROMPT, top_k=1, seed=1) == expander(PROMPT, temperature=0)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (" on a table\nnext line", " on a table"),
        (" on a table" + END_OF_TEXT + " more", " on a table"),
        ("\nmore", ""),
        (" café, naïve 🍎" + END_OF_TEXT, " café, naïve 🍎"),
    ],
)
def test_where_it_ends(expander, written, expected):
    short = scripted(expander, written)
    assert short(PROMPT) == PROMPT + expected
    assert len(short.engine.given) < len(short.engine.ids) or written.endswith(END_OF_TEXT)


def test_max_new_tokens(expander):
    short = scripted(expander, "x" * 50)
    assert short(PROMPT, max_new_tokens=7) == PROMPT + "x" * 7
    assert [len(ids) for ids in short.engine.given[1:]] == [1] * 6


def test_half_a_character_is_left_out(expander):
    first = expander.tokenizer.token_to_id("ð")  # the first of four bytes
    assert scripted(expander, " red", [first, 0])(PROMPT) == PROMPT + " red"


def test_brackets_that_the_model_wrote_mean_themselves(expander):
    prompt = "(a cat:1.2) [x|y]"
    written = " (oil:1.3) [b] BREAK \\ c"
    text = scripted(expander, written, [0])(prompt)
    assert text.startswith(prompt)
    assert text != prompt + written
    ((heavy, *_, last),) = parse(text)
    assert heavy == ("a cat", 1.2)
    assert last == (written, 1.0)
    plain = scripted(expander, written, [0])(prompt, prompt_syntax=False)
    assert plain == prompt + written


def test_a_blank_at_the_end_is_kept_and_not_doubled(expander):
    spaced = scripted(expander, " on a table", [0])
    assert spaced(PROMPT + " ") == PROMPT + " on a table"
    assert spaced.engine.given[0] == expander.tokenizer.encode(PROMPT).ids


def test_a_prompt_longer_than_the_context_keeps_its_end(expander):
    prompt = "x" * 500 + ", a red apple"
    text = expander(prompt, temperature=0, max_new_tokens=20)
    assert text.startswith(prompt)
    long = scripted(expander, "y" * 20, [0])
    assert long(prompt, max_new_tokens=20) == prompt + "y" * 20
    assert long.engine.given[0] == expander.tokenizer.encode(prompt).ids[-44:]


def test_it_ends_where_the_context_does(expander):
    endless = scripted(expander, "y" * 100)
    context, half = SMALL["n_positions"], SMALL["n_positions"] // 2
    assert endless("x" * 100, max_new_tokens=1000) == "x" * 100 + "y" * (half + 1)
    assert sum(map(len, endless.engine.given)) == context
    ids = [1] * context
    assert len(greedy(expander, ids, 9)) == 1


def test_an_empty_prompt_begins_a_text(expander, folder, graphs, tmp_path):
    empty = scripted(expander, "red", [0])
    assert empty("") == "red"
    assert empty.engine.given[0] == [0]
    other = write_folder(tmp_path, GPT2LMHeadModel.from_pretrained(folder))
    change_config(other, bos_token_id=None)
    with pytest.raises(RequestError, match="the prompt is empty; this language model needs"):
        PromptExpander.load(other, graphs=graphs, settings=SETTINGS)("  ")


@pytest.mark.parametrize("whole", [True, False], ids=["tokenizer.json", "vocab.json"])
def test_ids_are_those_of_transformers(tmp_path, graphs, whole):
    folder = write_folder(tmp_path, small_gpt2(), whole_tokenizer=whole)
    given = PromptExpander.load(folder, graphs=graphs, settings=SETTINGS).tokenizer
    if whole:
        expected = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    else:
        expected = GPT2Tokenizer.from_pretrained(folder)
    for text in (*TEXTS, "", "  two  blanks ", "x<|endoftext|>y", "1234 don't", "日本\r\n\t"):
        ids = given.encode(text, add_special_tokens=False).ids
        assert ids == expected(text)["input_ids"]
        assert given.decode(ids, skip_special_tokens=False) == text


def test_what_a_folder_lacks_gets_one_sentence(folder, graphs, tmp_path):
    other = write_folder(tmp_path / "model", GPT2LMHeadModel.from_pretrained(folder))

    def said(message, kind=ModelError, where=graphs):
        with pytest.raises(kind, match=message) as caught:
            PromptExpander.load(other, graphs=where, settings=SETTINGS)
        assert "\n" not in str(caught.value)

    said(rf"python -m export language-model {re.escape(str(other))} --p", GraphError, tmp_path)
    (other / "tokenizer.json").write_text("{}")
    said("cannot be used .*fetch the folder")
    (other / "tokenizer.json").unlink()
    said("holds no tokenizer; put tokenizer.json there, or vocab.json and merges.txt")
    (other / "merges.txt").write_text("#version: 0.2\na b\n")
    (other / "vocab.json").write_text(json.dumps({"a": 0}))
    said("cannot be used")
    (other / "vocab.json").write_text("[")
    said("is not valid JSON")
    (other / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 300}))
    said("ids up to 300 and its model up to 299")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1; give a number from 0 to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 2.5}, "top_k is 2.5; give a whole number from 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give a whole number from 1"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "one"}, "seed is 'one'"),
    ],
)
def test_bad_numbers(expander, options, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        expander(PROMPT, **options)


def test_a_prompt_that_is_no_text(expander):
    with pytest.raises(RequestError, match="A prompt came as int"):
        expander(3)
    with pytest.raises(RequestError, match="surrogate"):
        expander("\ud800")


def test_small_tokenizer_has_the_end_of_text_where_the_model_does():
    assert small_tokenizer().token_to_id(END_OF_TEXT) == 0


def test_expanding_loads_no_torch(folder, graphs):
    code = (
        "import json, sys\n"
        "from engine.backends.base import BackendSettings\n"
        "from runtime.expansion import PromptExpander\n"
        "late = {'onnxruntime', 'tokenizers'} & set(sys.modules)\n"
        "settings = BackendSettings(threads=1)\n"
        "expand = PromptExpander.load(sys.argv[1], graphs=__import__('pathlib').Path(sys.argv[2]),"
        " settings=settings)\n"
        "text = expand('a red apple', temperature=0, max_new_tokens=4)\n"
        "print(json.dumps([text, sorted(late), [n.split('.')[0] for n in sys.modules]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(graphs)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    text, late, modules = json.loads(done.stdout)
    assert text.startswith(PROMPT)
    assert late == [], "nothing is imported before it is needed"
    assert {"onnxruntime", "tokenizers"} <= set(modules)
    assert not {"torch", "transformers", "onnx", "safetensors", "export"} & set(modules)
