import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from engine.errors import RequestError
from engine.shipped import MODELS
from runtime.conditioning.tokenizer import Tokenizer
from training.vocabulary import caption_words, cut_vocabulary, write_tokenizer

TEXT = [
    "a photograph of an astronaut riding a horse, highly detailed, 4k",
    "red apple, noto style; it's they're we've I'm you'll he'd don't",
    "café naïve Ünïcode 東京タワー 北京 привет мир שלום مرحبا हिन्दी ไทย 한국어 😀 👩‍👩‍👧",
]
TOY = "<Cat-Toy>"
PICTOGRAM = MODELS / "pictogram" / "tokenizer"

PROMPTS = [
    *("", " ", "!", "\x00", "a\x00b"),
    "\t\n\r\x0b\x0c a \u00a0\u1680\u2003\u2028\u2029\u202f\u205f\u3000 b \x85\x1c\x1f",
    "a photo of a cat",
    "A PHOTO of a CAT!!! :-) ... --- \"quoted\" 'single' `back` \\ / {curly} [square] (round:1.2)",
    "it's IT'S they'RE we've I'm you'll he'd don't 'tis rock'n'roll ''s",
    "numbers 0 1 12 123 1234567 3.14 1e-5 ½ ² Ⅷ ٣ ७ 四",
    "ﬁ ﬂ Å \u212b ｆｕｌｌ ｗｉｄｔｈ ẞ ß İ ı Σ σ ς ΌΣΟΣ Ǆ ǅ ǆ",
    "e\u0301 é o\u0302\u0323 \u0301alone a" + "\u0300" * 40 + " \u1100\u1161\u11a8 각",
    "東京タワー、北京。サクラ 한국어 조선글 漢字 𠀀𠮷",
    "привет мир Ёлка український ქართული Հայերեն Ελληνικά",
    "שלום עולם مرحبا بالعالم فارسی اردو \u202eright\u202c \u200fmark",
    "हिन्दी বাংলা தமிழ் తెలుగు ไทย ພາສາລາວ မြန်မာ ខ្មែរ བོད་ አማርኛ ᏣᎳᎩ ᚠᚢᚦ 𐌰𐌱 𝓼𝓬𝓻𝓲𝓹𝓽",
    "😀 😃🍎🍏 👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🇩🇪🇫🇷 👍🏽 ❤\ufe0f 1\ufe0f\u20e3 ☺ ⌚ 🫠",
    "\x00\x01\x02\x07\x08\x1b\x7f\x80\x9f",
    "soft\u00adhyphen zero\u200bwidth \ufeff",
    "\ufffd \uffff \U0010ffff \ue000 \ufdd0 \u0378",
    "a <|endoftext|> b",
    "<|startoftext|><|endoftext|><|startoftext|>",
    "x<|EndOfText|>y <|endoftext",
    "<|STARTOFTEXT|> |endoftext|> <| startoftext |>",
    f"a {TOY} b {TOY.lower()} {TOY.upper()}",
    "hello! ! !! world!",
    "</w> a</w> #version: 0.2",
    "word" * 19 + " " + "w " * 80,
    *(piece * 10_000 for piece in ("a", "ab ", "東", "\u0301", "\x00", " ", "!", "👩\u200d👩")),
    "<|endoftext|>" * 1_000,
]


def made_merges(words):
    """Merges that join each word from the left, letter by letter."""
    made = {}
    for word in words:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        left = symbols[0]
        for right in symbols[1:]:
            made.setdefault(left + right, (left, right))
            left += right
    return list(made.values())


def write_model(folder):
    """The files of Stable Diffusion 1.5's tokenizer, with a made vocabulary."""
    merges = made_merges(sorted(caption_words(TEXT)))
    vocab, kept = cut_vocabulary(TEXT, 514 + len(merges), merges)
    write_tokenizer(folder, vocab, kept, 77)
    return vocab


def change(path, **fields):
    """Set fields of a JSON file; a value of None removes the field."""
    content = json.loads(path.read_text("utf-8")) | fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), "utf-8")


def padded_with_exclamation_marks(folder):
    write_model(folder)
    change(folder / "tokenizer_config.json", pad_token="!", model_max_length=50)
    change(folder / "special_tokens_map.json", pad_token="!")


def with_added_tokens_decoder(folder):
    vocab = write_model(folder)
    bos, eos = list(vocab)[-2:]
    found = [("!", False), (bos, True), (eos, True)]
    added = {vocab[c]: {"content": c, "normalized": n, "special": True} for c, n in found}
    added[len(vocab)] = {"content": TOY, "lstrip": True}
    named = {"bos_token": bos, "eos_token": eos, "unk_token": eos, "pad_token": "!"}
    change(folder / "tokenizer_config.json", added_tokens_decoder=added, **named)


def with_added_tokens_file(folder):
    vocab = write_model(folder)
    change(folder / "special_tokens_map.json", pad_token="!")
    (folder / "added_tokens.json").write_text(json.dumps({TOY: len(vocab), "!": 0}))


def in_one_file(folder):
    padded_with_exclamation_marks(folder / "parts")
    CLIPTokenizer.from_pretrained(folder / "parts").save_pretrained(folder)
    assert not (folder / "vocab.json").exists()


def in_one_file_with_merges_as_strings(folder):
    in_one_file(folder)
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    model["merges"] = [" ".join(merge) for merge in model["merges"]]
    change(folder / "tokenizer.json", model=model)


def without_stated_tokens_and_length(folder):
    write_model(folder)
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")


MODELS = [write_model, padded_with_exclamation_marks, with_added_tokens_decoder]
MODELS += [with_added_tokens_file, in_one_file, in_one_file_with_merges_as_strings]
MODELS += [without_stated_tokens_and_length, PICTOGRAM]


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: getattr(p, "__name__", "pictogram"))
def pair(request, tmp_path_factory):
    """The tokenizer and transformers' own, of the same folder."""
    folder = request.param
    if callable(folder):
        folder = tmp_path_factory.mktemp("models") / "tokenizer"
        request.param(folder)
    return Tokenizer.load(folder), CLIPTokenizer.from_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path)
    return tmp_path


def assert_equal(pair, prompts):
    tokenizer, reference = pair
    rows = reference(
        prompts, padding="max_length", truncation=True, max_length=tokenizer.max_length
    )["input_ids"]
    tokens = tokenizer(prompts)
    for prompt, row, expected in zip(prompts, tokens.input_ids.tolist(), rows, strict=True):
        assert row == expected, ascii(prompt[:200])
    return tokens


def random_prompts(seed, count):
    """Prompts of any characters, with the troublesome ones often."""
    generator = random.Random(seed)
    common = [*"abcdefghijklmnop ABC'!?<|>.,019éß\t\n", *"".join(PROMPTS[5:16]), *TEXT[0].split()]
    common += ["<|endoftext|>", "<|startoftext|>", TOY, TOY.lower(), "'s", "'LL", "</w>", "  "]

    def piece():
        point = generator.randrange(0x110000)
        common_one = generator.random() < 0.7 or 0xD800 <= point < 0xE000
        return generator.choice(common) if common_one else chr(point)

    lengths = generator.choices([1, 2, 5, 20, 80, 200], k=count)
    return ["".join(piece() for _ in range(length)) for length in lengths]


def test_the_fixed_prompts_equal_transformers(pair):
    tokens = assert_equal(pair, PROMPTS + TEXT)
    assert tokens.input_ids.dtype == np.int64
    assert tokens.input_ids.shape == (len(PROMPTS + TEXT), pair[0].max_length)


def test_random_prompts_equal_transformers(pair):
    assert_equal(pair, random_prompts(0, 1500))


@settings(deadline=None)  # counts are asserted, times are not
@given(prompts=st.lists(st.text(), min_size=1, max_size=20))
def test_any_prompts_equal_transformers(pair, prompts):
    assert_equal(pair, prompts)


def test_special_ids_and_padding(folder):
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    end = len(vocab) - 1
    tokenizer = Tokenizer.load(folder)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (*ids, tokenizer.max_length) == (end - 1, end, end, 77)
    row = tokenizer(["A horse"]).input_ids[0].tolist()
    assert row == [end - 1, vocab["a</w>"], vocab["horse</w>"], end] + [end] * 73
    change(folder / "special_tokens_map.json", pad_token="!")
    assert Tokenizer.load(folder)(("A horse",)).input_ids[0].tolist() == row[:4] + [0] * 73


def test_no_prompts_give_no_rows(folder):
    tokens = Tokenizer.load(folder)([])
    assert tokens.input_ids.shape == (0, 77)


@pytest.mark.parametrize("prompt", [None, 3, b"bytes", ["a"], 1.5])
def test_a_prompt_that_is_no_string_is_refused(folder, prompt):
    with pytest.raises(RequestError, match=f"came as {type(prompt).__name__}; give a string"):
        Tokenizer.load(folder)(["a", prompt])


@pytest.mark.parametrize("prompts", ["a horse", None, 3, {"a"}, iter(["a"])])
def test_prompts_that_are_no_list_are_refused(folder, prompts):
    with pytest.raises(RequestError, match="give a list of strings"):
        Tokenizer.load(folder)(prompts)


@pytest.mark.parametrize("prompt", ["ab\ud800c", "ab\udfff", "ab\udc00\ud800"])
def test_half_a_surrogate_pair_is_refused(folder, prompt):
    with pytest.raises(RequestError, match=r"half a surrogate pair \('\\ud.*at character 2"):
        Tokenizer.load(folder)([prompt])
