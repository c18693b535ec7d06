"""CLIP's own vocabulary, which ships, and words of textual inversion."""

import hashlib
import json

import numpy as np
import pytest
from transformers import CLIPTokenizer

from engine.errors import RequestError
from runtime.conditioning.tokenizer import Tokenizer
from runtime.conditioning.vocabulary import CLIP_MERGES, Vocabulary, read_merges
from tests.runtime.conditioning.test_tokenizer import PROMPTS, TEXT, random_prompts

END_PAD, OPEN_PAD = "<|endoftext|>", "!"
START, END = 49406, 49407
SINGLE, FIRST = range(49408, 49409), 49408


@pytest.fixture(scope="module")
def clip():
    return Tokenizer.clip(END_PAD)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """transformers' tokenizer of the files that CLIP's own vocabulary would be."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(dict(Vocabulary.clip(END_PAD).ids)))
    (folder / "merges.txt").write_bytes(CLIP_MERGES.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    return CLIPTokenizer.from_pretrained(folder)


def words(row):
    """Return the ids between start and end."""
    ids = row.tolist()
    return ids[1 : ids.index(END)]


MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"


def test_the_merges_are_those_that_openclip_ships():
    """The digest is that of lines 2 to 48,895 of open_clip 3.3.0's bpe_simple_vocab_16e6.txt.gz."""
    merges = read_merges(CLIP_MERGES)
    assert len(merges) == 48894
    text = "\n".join(" ".join(merge) for merge in merges)
    assert hashlib.sha256(text.encode()).hexdigest() == MERGES_SHA256


def test_there_are_49408_tokens(clip):
    vocabulary = Vocabulary.clip(END_PAD)
    assert clip.vocab_size == len(vocabulary.ids) == 49408
    assert sorted(vocabulary.ids.values()) == list(range(49408))
    assert (clip.bos_token_id, clip.eos_token_id, clip.max_length) == (START, END, 77)


def test_known_ids(clip):
    row = clip(["a photo of a cat"]).input_ids[0].tolist()
    assert row == [START, 320, 1125, 539, 320, 2368, END, *[END] * 70]


@pytest.mark.parametrize(("pad", "index"), [(END_PAD, END), (OPEN_PAD, 0)])
def test_padding(pad, index):
    tokenizer = Tokenizer.clip(pad)
    assert tokenizer.pad_token_id == index
    assert tokenizer([""]).input_ids[0].tolist() == [START, END, *[index] * 75]


def test_prompts_equal_transformers(clip, reference):
    prompts = [*PROMPTS, *TEXT, *random_prompts(5, 300)]
    expected = reference(prompts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    given = clip(prompts).input_ids.tolist()
    for prompt, row, other in zip(prompts, given, expected, strict=True):
        assert row == other, ascii(prompt[:200])


def test_a_word_becomes_its_ids(clip):
    taught = clip.with_words({"<cat-toy>": SINGLE})
    assert words(taught(["a <cat-toy> here"]).input_ids[0]) == [320, FIRST, 763]
    assert words(clip(["a <cat-toy> here"]).input_ids[0]) != [320, FIRST, 763], "only the new one"


def test_a_word_of_several_vectors(clip):
    taught = clip.with_words({"moody": range(49408, 49412), "<b>": range(49412, 49414)})
    row = words(taught(["moody cat <b>"]).input_ids[0])
    assert row == [49408, 49409, 49410, 49411, 2368, 49412, 49413]


@pytest.mark.parametrize(
    "prompt", ["BadHands cat", "badhands cat", "BADHANDS  CAT", "badHANDS\tcat"]
)
@pytest.mark.parametrize("word", ["BadHands", "badhands"])
def test_case_does_not_matter(clip, word, prompt):
    assert words(clip.with_words({word: SINGLE})([prompt]).input_ids[0]) == [FIRST, 2368]


@pytest.mark.parametrize(
    ("prompt", "counted"),
    [
        ("sks", 1),
        ("(sks:1.2), sks. sks! -sks-", 4),
        ("a sks", 1),
        ("asks", 0),
        ("sksy", 0),
        ("sks1", 0),
        ("", 0),
    ],
)
def test_a_word_is_found_by_itself_and_not_inside_others(clip, prompt, counted):
    taught = clip.with_words({"sks": SINGLE})
    row = words(taught([prompt]).input_ids[0])
    assert row.count(FIRST) == counted
    if not counted:
        np.testing.assert_array_equal(taught([prompt]).input_ids, clip([prompt]).input_ids)


def test_a_word_in_brackets_is_found_anywhere(clip):
    taught = clip.with_words({"<s1>": SINGLE})
    assert words(taught(["cat<s1>cat"]).input_ids[0]) == [2368, FIRST, 2368]


def test_the_text_around_a_word_is_what_it_was(clip):
    taught = clip.with_words({"<s1>": SINGLE})
    before, after = "A Photo, of; 2 cats", "don't 東京 é"
    row = words(taught([f"{before} <s1> {after}"]).input_ids[0])
    parts = [words(row) for row in clip([before, after]).input_ids]
    assert row == [*parts[0], FIRST, *parts[1]]


def test_other_prompts_stay_the_same(clip):
    taught = clip.with_words({"zzq": SINGLE, "<s1>": range(49409, 49411)})
    prompts = [*PROMPTS, *TEXT, *random_prompts(6, 200)]
    np.testing.assert_array_equal(taught(prompts).input_ids, clip(prompts).input_ids)


def test_words_are_added_to_those_that_are_known(clip):
    twice = clip.with_words({"<s1>": SINGLE}).with_words({"<s2>": range(49409, 49411)})
    assert words(twice(["<s1> <s2>"]).input_ids[0]) == [49408, 49409, 49410]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("<|endoftext|>", "means no text"),
        ("<|EndOfText|>", "means no text"),
        (" ", "means no text"),
        ("<s1>", "Two textual inversions mean the word"),
        ("<S1>", "Two textual inversions mean the word"),
    ],
)
def test_a_word_that_cannot_be_taught(clip, word, said):
    known = clip.with_words({"<s1>": SINGLE})
    with pytest.raises(RequestError, match=said):
        known.with_words({word: SINGLE})


@pytest.mark.parametrize("word", ["cat", "!", "photo"])
def test_a_word_counts_before_a_token(clip, word):
    taught = clip.with_words({word: SINGLE})
    assert clip.is_token(word)
    plain = words(clip(["a category; photography"]).input_ids[0])
    assert words(taught(["a category; photography"]).input_ids[0]) == plain
    assert words(taught([f"a {word} of"]).input_ids[0]) == [320, FIRST, 539]


def test_the_longest_word_counts(clip):
    taught = clip.with_words({"nice": SINGLE, "nice-style": range(49409, 49410)})
    row = words(taught(["Nice-Style, nice"]).input_ids[0])
    assert row == [49409, 267, FIRST]
    assert taught.words_in("a NICE-style") == {"nice-style"}
    assert clip.words_in("nice") == set()


def test_two_words_that_differ_in_case_are_one(clip):
    with pytest.raises(RequestError, match="'<S1>'"):
        clip.with_words({"<s1>": SINGLE, "<S1>": SINGLE})
